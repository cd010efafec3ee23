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
    yield Sample((make(3, 18, 20), make(20, 37), ends(make, 5, 30, 37)), note="columns")
    yield Sample((make(18, 37), make(37, 20), ends(make, 5, 5, 37)), note="steps, one group empty")
    yield Sample((make(3, 7, 20), make(3, 20, 18)), note="batches")
    yield Sample((make(0, 20), make(2, 20, 18), ends(make, 0, 0)), note="no rows")
    yield Sample((make(512, 256), make(8, 256, 512), ends(make, *range(64, 513, 64))), note="big")


F8 = torch.float8_e4m3fn


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
        (make(3, 7, 32, dtype=F8), make(3, 32, 18, dtype=F8), scales(make, 3, 7), scales(make, 3, 18)),
        to, note="batches",
    )  # fmt: skip
