"""The loops of a fold: tiles read ahead, split rows, words of bytes, groups, with launch numbers small enough to reach them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gemskit import _launch, backends, reduce
from gemskit._interpret import interpret

SMALL = {
    "one_tile": 64, "short_tile": 64, "thread": 32, "most": 2, "tile": 64, "warps": 1, "unroll": 2, "rows": 16,
    "narrow": 2, "fill": 2, "split_into": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    torch.manual_seed(0)
    kinds = ("along", "along_states", "across", "across_states")
    row = dataclasses.replace(
        backends.find_arch("sm_90"), name="small", launch={f"reduction_{k}": SMALL for k in kinds}
    )
    with interpret(), backends.use_arch(row):
        yield


def layouts(x: Tensor) -> Iterator[Tensor]:
    """``x`` along rows and across columns, aligned and not, with and without gaps."""
    yield x
    yield x.t().contiguous().t()
    wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
    wide[:, 1:-2] = x
    yield wide[:, 1:-2]
    yield x.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("n", [17, 64, 150])
def test_lengths_and_layouts(n: int) -> None:
    x = torch.randint(-9, 10, (8, n)).float()
    for y in layouts(x):
        assert torch.equal(reduce.sum(y, 1), x.sum(1))
    for y in (x, x.t().contiguous().t()):
        assert torch.equal(reduce.argmax(y, 1), x.argmax(1))
        torch.testing.assert_close(reduce.logsumexp(y, 1), x.logsumexp(1))
        torch.testing.assert_close(reduce.var(y, 1), x.var(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("n", [65, 256])
def test_bytes_are_read_as_words(n: int, dtype: torch.dtype) -> None:
    cases = torch.zeros(8, n, dtype=torch.int16)
    cases[1, n // 2], cases[2, -1], cases[3, 0] = 1, 2, 128
    cases[4:] = torch.tensor([1, 2, 255, 128])[:, None]
    cases[5, n // 2], cases[6, -1], cases[7, 0] = 0, 0, 0
    for x in layouts(cases.to(dtype)):
        for mine, exact in ((reduce.any, torch.any), (reduce.all, torch.all)):
            got: Tensor = mine(x, 1)
            assert torch.equal(got, exact(x, 1)) and got.dtype == exact(x, 1).dtype
            assert torch.equal(mine(x.t(), 0), got)


@pytest.mark.parametrize("name", ["sum", "argmax", "var"])
def test_a_middle_dimension(name: str) -> None:
    for sizes in ((2, 40, 32), (3, 7, 5)):
        x = torch.randn(sizes)
        torch.testing.assert_close(getattr(reduce, name)(x, 1), getattr(torch, name)(x, 1))


def test_a_row_of_infinities() -> None:
    inf = float("inf")
    x = torch.randn(6, 150)
    x[0], x[1, 7], x[2, 149], x[3] = -inf, inf, float("nan"), inf
    x[4, :75] = -inf
    torch.testing.assert_close(reduce.logsumexp(x, 1), x.logsumexp(1), equal_nan=True)
    torch.testing.assert_close(reduce.logsumexp(x.t().contiguous(), 0), x.logsumexp(1), equal_nan=True)


def test_few_rows_are_split_and_many_are_not() -> None:
    before = _launch.launches()
    reduce.sum(torch.randn(1, 512), 1)
    reduce.sum(torch.randn(4, 512), 1)
    after = _launch.launches()
    assert (after - before) == {"sum_part": 1, "sum_join": 1, "sum": 1}
