"""Samples of grouped and quantised products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemskit.testing import Make, Sample, samples


def ends(make: Make, *values: int) -> Tensor:
    """The ends of groups, on the device under test."""
    return torch.tensor(values, dtype=torch.int32, device=make.device)


@samples("grouped_mm")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(37, 20), make(3, 20, 18), ends(make, 5, 5, 37)), note="rows, one group empty")
    yield Sample((make(37, 20), make(3, 20, 18), ends(make, 0, 17, 30)), note="rows, some of no group")
    yield Sample((make(144, 40), make(2, 40, 24), ends(make, 65, 141)), note="rows, 64 of a group and more")
    yield Sample((make(3, 18, 20), make(20, 37), ends(make, 5, 30, 37)), note="columns")
    yield Sample((make(2, 24, 40), make(40, 144), ends(make, 65, 141)), note="columns, 64 of a group and more")
    yield Sample((make(18, 37), make(37, 20), ends(make, 5, 5, 37)), note="steps, one group empty")
    yield Sample((make(3, 7, 20), make(3, 20, 18)), note="batches")
    yield Sample((make(0, 20), make(2, 20, 18), ends(make, 0, 0)), note="no rows")
    yield Sample((make(512, 256), make(8, 256, 512), ends(make, *range(64, 513, 64))), note="big")


F8, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def scales(make: Make, *shape: int) -> Tensor:
    return make(*shape, dtype=torch.float32, low=0.5, high=2.0)


def result(make: Make) -> torch.dtype:
    """The dtype under test where it is one of results."""
    return make.dtype if make.dtype in (torch.float32, torch.float16) else torch.bfloat16


@samples("scaled_grouped_mm")
def _(make: Make) -> Iterator[Sample]:
    to = {"out_dtype": result(make)}
    yield Sample(
        (make(37, 32, dtype=F8), make(3, 32, 18, dtype=F8), scales(make, 37), scales(make, 3, 18), ends(make, 5, 5, 37)),
        to, note="rows",
    )  # fmt: skip
    yield Sample(
        (make(3, 18, 32, dtype=F8), make(32, 37, dtype=F8), scales(make, 3, 18), scales(make, 37), ends(make, 5, 9, 30)),
        to, note="columns, some of no group",
    )  # fmt: skip
    yield Sample(
        (make(18, 37, dtype=F8), make(37, 20, dtype=F8), scales(make, 54), scales(make, 60), ends(make, 5, 5, 37)),
        to, note="steps",
    )  # fmt: skip
    yield Sample(
        (float8(make, 3, 7, 32, dtype=E5), float8(make, 3, 32, 18, dtype=E5), scales(make, 3, 7), scales(make, 3, 18)),
        to, note="batches",
    )  # fmt: skip


@samples("int_mm")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in ((32, 64, 32), (17, 33, 70), (1, 40, 5), (0, 3, 4), (3, 0, 4)):
        yield Sample((make(m, k, dtype=torch.int8), make(k, n, dtype=torch.int8)), note=f"{m}x{k}x{n}")


def float8(make: Make, *shape: int, dtype: torch.dtype = F8) -> Tensor:
    return make(*shape, dtype=dtype)


@samples("scaled_mm")
def _(make: Make) -> Iterator[Sample]:
    to = {"out_dtype": result(make)}
    for m, k, n in ((32, 64, 32), (17, 48, 70), (1, 40, 5), (0, 3, 4), (3, 0, 4)):
        yield Sample((float8(make, m, k), float8(make, n, k).mT, scales(make), scales(make)), to, note=f"{m}x{k}x{n}")
    a, b = float8(make, 17, 256), float8(make, 130, 256, dtype=E5).mT
    bias = make(130, dtype=torch.float32)
    yield Sample((a, b, scales(make, 17, 1), scales(make, 1, 130), bias), to, note="rows, columns and a bias")
    yield Sample((a, b, scales(make), scales(make, 1, 130)), to, note="a tensor and columns")
    yield Sample((a, b, scales(make, 17, 2), scales(make, 2, 2), bias), to, note="slices of rows and blocks")
    yield Sample((a, b, scales(make, 1, 2), scales(make, 2, 130)), to, note="blocks and slices of columns")
    yield Sample((a, b, scales(make), scales(make), None, scales(make)), note="float8")
    c, d = make(17, 40, dtype=torch.int8), make(40, 20, dtype=torch.int8)
    yield Sample((c, d, scales(make, 17, 1), scales(make, 1, 20)), to, note="int8")


@samples("bmm_fp8")
def _(make: Make) -> Iterator[Sample]:
    to = result(make)
    yield Sample(
        (float8(make, 3, 17, 40), float8(make, 3, 20, 40).mT, scales(make), scales(make, 1), to), note="column-major"
    )
    yield Sample((float8(make, 3, 17, 40), float8(make, 3, 40, 20), scales(make), scales(make), to), note="row-major")
    yield Sample((float8(make, 0, 17, 40), float8(make, 0, 40, 20), scales(make), scales(make), to), note="no batch")


@samples("w8a8_block_fp8_matmul")
def _(make: Make) -> Iterator[Sample]:
    to = result(make)
    for n, k in ((128, 128), (64, 32), (48, 96)):
        a, b = float8(make, 17, 200), float8(make, 130, 200)
        sizes = -(-200 // k), -(-130 // n)
        yield Sample(
            (a, b, scales(make, 17, sizes[0]), scales(make, *sizes[::-1]), [n, k], to), note=f"blocks of {n}x{k}"
        )
    three = float8(make, 2, 3, 128), float8(make, 20, 128), scales(make, 2, 3, 1), scales(make, 1, 1)
    yield Sample((*three, [128, 128], to), note="3-d")
    none = float8(make, 0, 128), float8(make, 20, 128), scales(make, 0, 1), scales(make, 1, 1)
    yield Sample((*none, [128, 128], to), note="no rows")


@samples("weight_int8pack_mm")
def _(make: Make) -> Iterator[Sample]:
    for m, k, n in ((17, 70, 40), (1, 33, 5), (0, 16, 8)):
        yield Sample((make(m, k), make(n, k, dtype=torch.int8), make(n)), note=f"{m}x{k}x{n}")
