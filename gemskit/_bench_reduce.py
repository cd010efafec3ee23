"""Rows of the benchmark: reductions, scans, sorting, selection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._bench_cases import BIG, ELEMENTS, BenchCase, Build, call
from gemskit.testing import Sample

#: Label, shape, arguments.
FOLDED: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("8192² dim=1", (BIG, BIG), {"dim": 1}),
    ("8192² dim=0", (BIG, BIG), {"dim": 0}),
    ("65536x1024 dim=1", (65536, 1024), {"dim": 1}),
    ("65536x1024 dim=0", (65536, 1024), {"dim": 0}),
    ("1024x65536 dim=1", (1024, 65536), {"dim": 1}),
    ("1024x65536 dim=0", (1024, 65536), {"dim": 0}),
    ("64x256x4096 dim=1", (64, 256, 4096), {"dim": 1}),
    ("64M all", (ELEMENTS,), {}),
)


def _found(sample: Sample, outs: Sequence[Tensor]) -> list[Tensor]:
    """Values, and the elements at the positions: which of several equal ones is found is left open."""
    (x, *given), more = sample.args, sample.kwargs
    dim = more.get("dim", given[0] if given else None)
    at = outs[-1]
    if dim is None:
        return [x.flatten()[at]]
    return [*outs[:-1], x.gather(dim, at if at.ndim == x.ndim else at.unsqueeze(dim))]


def _bools(*shape: int, **more: Any) -> Build:
    return lambda make: Sample((make(*shape, dtype=torch.bool),), more)


def _norm(*shape: int, **more: Any) -> Build:
    return lambda make: Sample((make(*shape), "2", 2.0), more)


def cases() -> Iterator[BenchCase]:
    """The rows, operator by operator."""
    f32, bf16 = torch.float32, torch.bfloat16
    for op in ("sum", "mean", "_var", "amax", "argmax", "_vector_norm", "any", "all"):
        for label, shape, more in FOLDED:
            build = {"any": _bools, "all": _bools, "_vector_norm": _norm}.get(op)
            yield BenchCase(
                op, label, build(*shape, **more) if build else call(shape, **more),
                compare=_found if op == "argmax" else None,
            )  # fmt: skip
    yield BenchCase("mean", "65536x1024 dim=0 f32", call((65536, 1024), dim=0), f32)
    yield BenchCase("max_dim", "8192² dim=1", call((BIG, BIG), dim=1), compare=_found)
    for op in ("_std_mean", "logsumexp", "count_nonzero"):
        yield BenchCase(op, "8192² dim=1", call((BIG, BIG), dim=1))
    # Around 1, so that products of 8192 stay in range.
    yield BenchCase(
        "prod", "8192² dim=1 f32", lambda make: Sample((make(BIG, BIG, low=0.99, high=1.01),), {"dim": 1}), f32
    )
    yield BenchCase("cumsum", "4096x16384 dim=1 f32", call((4096, 16384), dim=1), f32)
    yield BenchCase("cumsum", "64M f32", call((ELEMENTS,), dim=0), f32)
    yield BenchCase("cumsum", "8192² dim=0 f32", call((BIG, BIG), dim=0), f32)
    yield BenchCase("cummax", "4096x16384 dim=1 f32", call((4096, 16384), dim=1), f32, compare=_found)
    for dtype, suffix in ((f32, " f32"), (bf16, "")):
        for rows, cols in ((64, 128256), (8192, 4096), (1, 1 << 24)):
            label = f"{rows}x{cols}" if rows > 1 else "1x16M"
            yield BenchCase("sort", label + suffix, call((rows, cols), dim=1), dtype, compare=_found)
    for rows, cols in ((64, 128256), (8192, 4096)):
        for k in (1, 8, 50, 1024):
            for dtype, suffix in ((f32, " f32"), (bf16, "")):
                yield BenchCase(
                    "topk", f"{k} of {rows}x{cols}{suffix}", call((rows, cols), k=k, dim=1), dtype, peer=torch.topk,
                    compare=_found,
                )  # fmt: skip
    yield from _sized()


def _sized() -> Iterator[BenchCase]:
    many = 1 << 24
    yield BenchCase("nonzero", "64M", _bools(ELEMENTS))
    yield BenchCase("masked_select", "64M", lambda make: Sample((make(ELEMENTS), make(ELEMENTS, dtype=torch.bool))))
    yield BenchCase(
        "unique", "16M of 1M ints", lambda make: Sample((make(many, dtype=torch.int64, low=0, high=1 << 20),))
    )
    yield BenchCase("histc", "64M f32", call((ELEMENTS,), bins=256, min=-4, max=4), torch.float32)
    yield BenchCase(
        "searchsorted", "16M in 1M f32",
        lambda make: Sample((torch.linspace(-4, 4, 1 << 20, dtype=make.dtype, device=make.device), make(many))),
        torch.float32,
    )  # fmt: skip
    yield BenchCase(
        "isin", "16M in 4096 ints",
        lambda make: Sample((
            make(many, dtype=torch.int64, low=0, high=1 << 20), make(4096, dtype=torch.int64, low=0, high=1 << 20),
        )),
    )  # fmt: skip
