"""Samples of the operators with index tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemskit.testing import Make, Sample, samples

INDICES = (torch.int64, torch.int32)


def below(make: Make, n: int, *shape: int, dtype: torch.dtype = torch.int64, wraps: bool = False) -> Tensor:
    """Indices into a dimension of ``n``; negative ones too if it ``wraps``."""
    return make(*shape, dtype=dtype, low=-n if wraps else 0, high=n)


@samples("gather")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        yield Sample((make(5, 33), 1, below(make, 33, 5, 40, dtype=dtype)))
    yield Sample((make(7, 5, 9), 0, below(make, 7, 3, 4, 9)), note="smaller index")
    yield Sample((make(4, 6, 17), -2, below(make, 6, 4, 2, 17)))
    yield Sample((make(), 0, below(make, 1)), note="0-dim")
    yield Sample((make(9), 0, below(make, 9)), note="0-dim index")
    yield Sample((make(3, 4), 1, below(make, 4, 3, 0)), note="no index")
    yield Sample((make(300), 0, below(make, 300, 1500)), note="1-dim")
    yield Sample((make(16384, 4096), 1, below(make, 4096, 16384, 2048)), note="big")


@samples("_gather_grad")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 40), make(5, 33), 1, below(make, 33, 5, 40)))
    yield Sample((make(3, 4, 9), make(7, 5, 9), 0, below(make, 7, 3, 4, 9)))
    yield Sample((make(), make(), 0, below(make, 1)), note="0-dim")


@samples("index_select")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        yield Sample((make(11, 33), 0, below(make, 11, 20, dtype=dtype)))
    yield Sample((make(4, 9, 7), 1, below(make, 9, 5)))
    yield Sample((make(4, 9, 7), -1, below(make, 7, 30)))
    yield Sample((make(3, 4), 0, below(make, 3, 0)), note="no index")
    yield Sample((make(0, 4), 1, below(make, 4, 2)), note="nothing")
    yield Sample((make(6), 0, below(make, 6)), note="one index")
    yield Sample((make(32000, 4096), 0, below(make, 32000, 65536)), note="big")


@samples("take")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 7), below(make, 35, 3, 20, wraps=True)))
    yield Sample((make(3, 4, 5), below(make, 60)))
    yield Sample((make(9), below(make, 9, 0)), note="no index")
    yield Sample((make(), below(make, 1, 4)), note="0-dim")


@samples("_index")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        yield Sample((make(11, 33), below(make, 11, 20, dtype=dtype, wraps=True)), note="rows")
    yield Sample((make(5, 6, 7), None, below(make, 6, 2, 3, wraps=True)), note="in the middle")
    yield Sample((make(5, 6, 7), below(make, 5, 4, 1), below(make, 6, 3)), note="two, broadcast")
    yield Sample((make(5, 6, 7), below(make, 5, 4), None, below(make, 7, 4, dtype=torch.int32)), note="not neighbours")
    yield Sample((make(5, 6, 7, 3), None, below(make, 6, 4), below(make, 7, 1)), note="neighbours")
    yield Sample((make(5, 6), below(make, 5), below(make, 6, 3)), note="0-dim index")
    yield Sample((make(5, 6), below(make, 5, 0)), note="no index")
    yield Sample((make(7, 40), below(make, 7, 60), below(make, 40, 60)), note="elements")
    yield Sample((make(2, 3, 2, 3, 2), None, below(make, 3, 2), None, below(make, 3, 2)), note="five dimensions")
    yield Sample((make(32000, 4096), below(make, 32000, 65536)), note="big")


@samples("_masked_index")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 6), make(4, 3, dtype=torch.bool), 0, below(make, 5, 4, 1), below(make, 6, 3)))
    yield Sample((make(5, 6), make(4, 1, 6, dtype=torch.bool), 2, below(make, 5, 4, 1)))


def permuted(make: Make, n: int, count: int) -> Tensor:
    """Different indices below ``n``."""
    if make.empty:
        return torch.empty(count, dtype=torch.int64, device=make.device)
    return torch.randperm(n, generator=make.generator, device=make.generator.device)[:count].to(make.device)


@samples("_scatter_src")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        yield Sample((make(5, 33), 1, below(make, 33, 5, 20, dtype=dtype), make(5, 20)))
    yield Sample((make(7, 5, 9), 0, below(make, 7, 3, 4, 9), make(4, 5, 9)), note="larger src")
    yield Sample((make(4, 6), -1, below(make, 6, 4, 3), 2))
    yield Sample((make(4, 6), 0, below(make, 4, 3, 6), 1.5 if make.dtype.is_floating_point else 3))
    yield Sample((make(3, 4), 1, below(make, 4, 3, 0), make(3, 0)), note="no index")
    yield Sample((make(5, 33), 1, below(make, 33, 5, 40), make(5, 40)), {"reduce": "add"})
    yield Sample((make(5, 6), 0, below(make, 5, 9, 6), make(9, 6)), {"reduce": "multiply"})
    yield Sample((make(5, 6), 1, below(make, 6, 4, 9), 2), {"reduce": "multiply"})
    yield Sample((make(5, 6), 1, below(make, 6, 4, 9), 2), {"reduce": "add"})
    yield Sample((make(16384, 4096), 1, below(make, 4096, 16384, 2048), make(16384, 2048)), note="big")


@samples("scatter_add")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        yield Sample((make(5, 33), 1, below(make, 33, 5, 40, dtype=dtype), make(5, 40)))
    yield Sample((make(7, 5, 9), 0, below(make, 7, 3, 4, 9), make(4, 5, 9)), note="larger src")
    yield Sample((make(2), 0, below(make, 2, 700), make(700)), note="many to one")
    yield Sample((make(3, 4), 1, below(make, 4, 3, 0), make(3, 0)), note="no index")
    yield Sample((make(8192, 8192), 1, below(make, 8192, 8192, 8192), make(8192, 8192)), note="big")


@samples("index_add")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        yield Sample((make(11, 33), 0, below(make, 11, 20, dtype=dtype), make(20, 33)))
    yield Sample((make(4, 9, 7), 1, below(make, 9, 5), make(4, 5, 7)), {"alpha": 3})
    yield Sample((make(4, 9, 7), -1, below(make, 7, 30), make(4, 9, 30)))
    yield Sample((make(3, 4), 0, below(make, 3, 0), make(0, 4)), note="no index")
    if make.dtype.is_floating_point:
        yield Sample((make(6), 0, below(make, 6, 9), make(9)), {"alpha": 0.3})
    yield Sample((make(8192, 4096), 0, below(make, 8192, 16384), make(16384, 4096)), note="big")


@samples("index_copy")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(11, 33), 0, permuted(make, 11, 7), make(7, 33)))
    yield Sample((make(4, 9, 7), 1, permuted(make, 9, 5), make(4, 5, 7)))
    yield Sample((make(3, 4), 0, below(make, 3, 0), make(0, 4)), note="no index")


@samples("index_fill")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(11, 33), 0, below(make, 11, 7, wraps=True), 2))
    yield Sample((make(4, 9, 7), 1, below(make, 9, 5), make()))
    yield Sample((make(4, 9), -1, below(make, 9), 1))
    yield Sample((make(3, 4), 0, below(make, 3, 0), 1), note="no index")


@samples("_index_put")
def _(make: Make) -> Iterator[Sample]:
    for dtype in INDICES:
        at = permuted(make, 11, 8).to(dtype)
        yield Sample((make(11, 33), make(8, 33), False, at), note="rows")
    for accumulate in (False, True):
        yield Sample((make(5, 6, 7), make(7), accumulate, below(make, 5, 4, 1, wraps=True), below(make, 6, 3)))
        yield Sample((make(5, 6, 7), make(4, 6), accumulate, below(make, 5, 4), None, below(make, 7, 4)))
        yield Sample((make(5, 6), make(), accumulate, None, below(make, 6, 9)), note="one value")
        yield Sample((make(7, 4), make(30), accumulate, below(make, 7, 30), below(make, 4, 30)), note="elements")
        yield Sample((make(5, 6), make(0, 6), accumulate, below(make, 5, 0)), note="no index")
    slots = below(make, 65536, 8192)
    yield Sample((make(65536, 8, 128), make(8192, 8, 128), False, slots), note="big")
    yield Sample((make(32000, 1024), make(16384, 1024), True, below(make, 32000, 16384)), note="big")


@samples("masked_scatter")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33, dtype=torch.bool), make(5, 40)))
    yield Sample((make(4, 6), make(4, 1, dtype=torch.bool), make(24)))
    yield Sample((make(6), make(4, 6, dtype=torch.bool), make(24)), note="broadcast input")
    yield Sample((make(3, 0), make(3, 0, dtype=torch.bool), make(2)), note="nothing")
    yield Sample((make(4096, 4096), make(4096, 4096, dtype=torch.bool), make(4096, 4096)), note="big")


@samples("_masked_scatter_grad")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33, dtype=torch.bool), (5, 33)))
    yield Sample((make(4, 6), make(4, 1, dtype=torch.bool), 24))


@samples("scatter_reduce")
def _(make: Make) -> Iterator[Sample]:
    for reduce in ("sum", "prod", "mean", "amax", "amin"):
        for include_self in (True, False):
            args = make(5, 9), 1, below(make, 9, 5, 14), make(5, 14), reduce
            yield Sample(args, {"include_self": include_self})
    ties = torch.ones_like(make(6))
    yield Sample((ties, 0, below(make, 6, 8), make(8, low=1, high=2), "prod"), note="factors of 1")
    tied = make(6, low=0, high=2)
    yield Sample((tied, 0, below(make, 6, 20), make(20, low=0, high=2), "amax"), note="ties")
    yield Sample((make(7, 5, 9), 0, below(make, 7, 3, 4, 9), make(4, 5, 9), "amin"), note="larger src")
    yield Sample((make(4096, 4096), 1, below(make, 4096, 4096, 4096), make(4096, 4096), "amax"), note="big")
