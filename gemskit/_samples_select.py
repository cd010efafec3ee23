"""Samples of selection, search and counting."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from gemskit.testing import Make, Sample, samples


def _few(make: Make, *shape: int, high: int = 3) -> Tensor:
    """Many equal elements, zeros among them."""
    t = make(*shape, low=0, high=high)
    return t.round() if make.dtype.is_floating_point and not make.empty else t


def _sorted(make: Make, *shape: int) -> Tensor:
    """Rows in order, some elements equal."""
    t = _few(make, *shape, high=9)
    return t.sort(-1).values if not make.empty and make.dtype != torch.bool else t


def _mask(make: Make, *shape: int) -> Tensor:
    return make(*shape, dtype=torch.bool)


@samples("nonzero")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((), (1,), (70,), (3, 33, 5), (0, 3), (2, 3, 0)):
        yield Sample((make(*shape),))
    yield Sample((make(5, 70, low=-1, high=1).trunc() if make.dtype.is_floating_point else make(5, 70, low=0, high=2),))
    yield Sample((make(5, 7),), {"as_tuple": True})
    yield Sample((make(4097 * 5).ge(0.5),), note="long")
    yield Sample((_mask(make, 1 << 26),), note="big")


@samples("masked_select")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((1,), (70,), (3, 33, 5), (0, 3)):
        yield Sample((make(*shape), _mask(make, *shape)))
    yield Sample((make(), _mask(make)), note="0-dim")
    yield Sample((make(3, 1, 5), _mask(make, 4, 1)), note="broadcast")
    yield Sample((make(3, 5), _mask(make, 4, 3, 5)), note="broadcast")
    yield Sample((make(4097 * 5), _mask(make, 4097 * 5)), note="long")
    yield Sample((make(1 << 26), _mask(make, 1 << 26)), note="big")


@samples("searchsorted")
def _(make: Make) -> Iterator[Sample]:
    for n in (1, 2, 17, 70):
        for right in (False, True):
            yield Sample((_sorted(make, n), _few(make, 5, 7, high=9)), {"right": right})
    yield Sample((_sorted(make, 3, 17), _few(make, 3, 5)), {"side": "right", "out_int32": True})
    yield Sample((_sorted(make, 2, 3, 17), _few(make, 2, 3, 1)), {"side": "left"})
    yield Sample((_sorted(make, 17), 2))
    if make.dtype.is_floating_point:
        yield Sample((_sorted(make, 17), 0.5), {"right": True})
        values = make(3, 17)
        yield Sample((values, make(3, 5)), {"sorter": values.argsort(-1)})
        yield Sample((_sorted(make, 17), make(5, dtype=torch.int64)), note="promoted")
    for shape in ((0, 3), (3, 0)):
        yield Sample((_sorted(make, 17), make(*shape)), note="nothing")
    yield Sample((make(0), make(5)), note="no boundaries")
    yield Sample((_sorted(make, 1 << 12), make(1 << 24)), note="big")


@samples("bucketize")
def _(make: Make) -> Iterator[Sample]:
    for n in (0, 1, 17, 70):
        yield Sample((_few(make, 5, 7, high=9), _sorted(make, n)))
    yield Sample((_few(make, 3, 7, 2), _sorted(make, 17)), {"right": True, "out_int32": True})
    yield Sample((2, _sorted(make, 17)))
    yield Sample((make(), _sorted(make, 17)), note="0-dim")
    yield Sample((make(1 << 24), _sorted(make, 1 << 12)), note="big")


@samples("isin")
def _(make: Make) -> Iterator[Sample]:
    for n in (0, 1, 3, 70, 300):
        for invert in (False, True):
            yield Sample((_few(make, 5, 33, high=9), _few(make, n, high=9)), {"invert": invert})
    yield Sample((_few(make, 3, 7, 2), _few(make, 2, 3)), {"assume_unique": True})
    yield Sample((_few(make, 5, 33), 1))
    yield Sample((_few(make, 5, 33), 1.5), {"invert": True})
    yield Sample((2, _few(make, 33)))
    yield Sample((_few(make, 5, 33), make(5, dtype=torch.int64)), note="promoted")
    yield Sample((make(0, 3), make(5)), note="nothing")
    yield Sample((make(), make()), note="0-dim")
    yield Sample((make(1 << 24), make(8)), note="big")
    yield Sample((make(1 << 24), make(1 << 12)), note="big")


@samples("histc")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((70,), (3, 33, 5), (0,), ()):
        yield Sample((make(*shape), 10, -3, 3))
    yield Sample((make(5, 70, low=0, high=9), 7, 0, 9))
    yield Sample((make(5, 70), 1500, -2.5, 3), note="many bins")
    yield Sample((make(0), 4), note="no elements")
    if not make.special:
        # Of a range that is not finite torch's kernels differ: tests/test_selection.py.
        yield Sample((make(5, 70),))
        yield Sample((torch.full((5,), 3, dtype=make.dtype, device=make.device), 4), note="all equal")
    yield Sample((make(30_000), 64, -3, 3), note="long")
    yield Sample((make(1 << 26), 256, 0, 1), note="big")
    yield Sample((make(1 << 26), 1 << 14, 0, 1), note="big")


@samples("bincount")
def _(make: Make) -> Iterator[Sample]:
    dtype = torch.int64 if make.dtype.is_floating_point else make.dtype
    weights = make.dtype if make.dtype.is_floating_point else torch.float32

    def ints(*shape: int) -> Tensor:
        return make(*shape, dtype=dtype, low=0, high=9)

    yield Sample((ints(70),))
    yield Sample((ints(70),), {"minlength": 33})
    yield Sample((ints(70),), {"minlength": 1500}, "many bins")
    yield Sample((ints(0),), {"minlength": 3}, "no elements")
    yield Sample((ints(0),), note="nothing")
    yield Sample((ints(70), make(70, dtype=weights, low=0, high=2)))
    yield Sample((ints(70), make(70, dtype=torch.int32)), {"minlength": 12})
    yield Sample((ints(1 << 26),), note="big")


@samples("unique")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((1,), (70,), (3, 33, 5), (0, 3)):
        for inverse, counts in product((False, True), repeat=2):
            yield Sample((_few(make, *shape, high=9),), {"return_inverse": inverse, "return_counts": counts})
    yield Sample((make(),), {"return_inverse": True, "return_counts": True}, "0-dim")
    yield Sample((make(33), False, True, False, 0))
    yield Sample((_few(make, 20_001, high=9), True, True, True), note="long")
    yield Sample((make(1 << 24),), note="big")


@samples("unique_consecutive")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((1,), (70,), (3, 33, 5), (0, 3)):
        for more in ({}, {"return_inverse": True, "return_counts": True}):
            yield Sample((_few(make, *shape),), more)
    yield Sample((make(),), {"return_inverse": True, "return_counts": True}, "0-dim")
    yield Sample((_few(make, 33), False, True, -1))
    yield Sample((_few(make, 20_001), True, True), note="long")
    yield Sample((make(1 << 24),), note="big")


@samples("quantile", "nanquantile")
def _(make: Make) -> Iterator[Sample]:
    for number in (0, 0.3, 1.0):
        yield Sample((make(3, 17, 5), number, 1))
    q = make(4, low=0, high=1) if make.dtype.is_floating_point else make(4, dtype=torch.float32, low=0, high=1)
    for dim in (0, -1, None):
        # Not expanded along what is reduced: of equal elements torch gives the gradient to any.
        yield Sample((make(1 if dim is None else 3, 17, 5), q, dim))
        yield Sample((make(1 if dim is None else 3, 17), q, dim, True))
    for interpolation in ("lower", "higher", "nearest", "midpoint"):
        yield Sample((make(5, 18), q, 1), {"interpolation": interpolation})
    yield Sample((make(), 0.5), note="0-dim")
    yield Sample((make(1 << 22), 0.5), note="big")


@samples("kthvalue")
def _(make: Make) -> Iterator[Sample]:
    for k, dim in ((1, 0), (2, 0), (17, 1), (9, -2)):
        yield Sample((make(3, 33, 5), k, dim))
    yield Sample((make(3, 17), 4, 1, True))
    yield Sample((make(), 1, 0), note="0-dim")
    yield Sample((make(4096, 4096), 100, -1), note="big")


@samples("median_dim", "nanmedian_dim")
def _(make: Make) -> Iterator[Sample]:
    for dim in (0, 1, -1):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(3, 18), 1, True))
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(4096, 4096), -1), note="big")


@samples("median_all", "nanmedian_all")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((), (1,), (18,), (3, 33, 5)):
        yield Sample((make(*shape),))
    if make.dtype.is_floating_point:  # of no ints torch's median is a NaN turned into an int
        yield Sample((make(0),), note="no elements")
    yield Sample((make(1 << 24),), note="big")


@samples("_multinomial")
def _(make: Make) -> Iterator[Sample]:
    seed = torch.full((), 7, dtype=torch.int64, device=make.device)
    for replacement in (False, True):
        yield Sample((make(17, low=0, high=1), 3, replacement, seed))
        yield Sample((make(5, 70, low=0, high=1), 1, replacement, seed))
    yield Sample((make(64, 1 << 17, low=0, high=1), 1, True, seed), note="big")


@samples("_randperm")
def _(make: Make) -> Iterator[Sample]:
    seed = torch.full((), 7, dtype=torch.int64, device=make.device)
    for n, dtype in ((0, torch.int64), (17, torch.int64), (70, torch.int32)):
        yield Sample((seed, n, dtype))
    yield Sample((seed, 1 << 20, torch.int64), note="big")
