"""Decoding for Hopper, cross-compiled."""

from __future__ import annotations

import pytest
import torch
from test_compile_targets import BF16, ROWS, Launches, Unfilled, _cross_compiling, _forget_plans  # noqa: F401

import gemskit
from gemskit import _launch, backends


@pytest.mark.parametrize(
    ("batch", "heads", "owners", "keys", "columns", "page"),
    [(32, 32, 4, 1024, 128, 0), (32, 32, 4, 1024, 128, 16), (1, 32, 2, 65536, 128, 16), (1, 8, 8, 9000, 64, 256)],
)
def test_decoding_for_hopper_compiles(batch: int, heads: int, owners: int, keys: int, columns: int, page: int) -> None:
    """Nothing spills, also with half of the registers, where two programs share a processor."""
    row = next(row for row in ROWS if row.name == "sm_90")
    launches, make = Launches(), Unfilled(BF16)
    with _launch.capturing(launches), backends.use_arch(row):
        _forget_plans()
        if page:
            caches = [make(batch * keys // page, page, owners, columns) for _ in range(2)]
            table, used = torch.empty((batch, keys // page), dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
            gemskit.flash_attention(make(batch, 1, heads, columns), *caches, seqused_k=used, block_table=table)
        else:
            k, v = (make(batch, owners, keys, columns) for _ in range(2))
            gemskit.scaled_dot_product_attention(make(batch, heads, 1, columns), k, v, enable_gqa=True)
    _forget_plans()
    names = [launch.name.rpartition(".")[2] for launch in launches.values()]
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert names == ["attention_hopper_few", "attention_merge"][: 2 if batch == 1 else 1] and not problems, problems
