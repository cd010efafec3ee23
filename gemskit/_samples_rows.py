"""Samples of the row-wise operators: softmax, normalisations, cross entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemskit.testing import Make, Sample, samples

#: Around the tile sizes: one element, odd, a whole tile, just more than one, several tiles of a looped row.
_LENGTHS = (1, 3, 17, 4097, 20001)


def _long(n: int) -> str:
    """Rows over several tiles are run in few dtypes and layouts."""
    return "long" if n > 1000 else ""


def _vector(make: Make, n: int) -> Tensor:
    """A vector that keeps its values in every layout: with equal weights a gradient can be 0, and its error unbounded."""
    return make(1, n)[0]


@samples("softmax", "log_softmax")
def _(make: Make) -> Iterator[Sample]:
    for n in _LENGTHS:
        yield Sample((make(3, n), 1), note=_long(n))
    for n in (1, 33, 20001):
        yield Sample((make(n, 3), 0), note=_long(n))
    for dim in (0, 1, 2, -2):
        yield Sample((make(3, 33, 5), dim))
    yield Sample((make(), 0), note="0-dim")
    yield Sample((make(), -1), note="0-dim")
    for shape in ((0, 3), (3, 0), (2, 0, 3)):
        yield Sample((make(*shape), 1), note="nothing")
    yield Sample((make(3, 33), 1, torch.float32))
    yield Sample((make(3, 33), 1), {"dtype": torch.float64})


@samples("layer_norm")
def _(make: Make) -> Iterator[Sample]:
    for n in _LENGTHS[1:]:
        yield Sample((make(3, n), (n,), _vector(make, n), _vector(make, n)), note=_long(n))
    yield Sample((make(4, 33), [33]))
    yield Sample((make(4, 33), (33,), _vector(make, 33)))
    yield Sample((make(4, 33), (33,), None, _vector(make, 33)), {"eps": 0.1})
    yield Sample((make(3, 2, 5, 26), (5, 26), make(5, 26), make(5, 26)), note="two dimensions")
    yield Sample((make(5, 26), (5, 26), make(5, 26), make(5, 26)), note="one row")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 5), (5,), make(5), make(5)), note="no rows")
    if make.dtype.is_floating_point:
        yield Sample((make(5, 0), (0,), make(0), make(0)), note="no columns")


@samples("rms_norm")
def _(make: Make) -> Iterator[Sample]:
    for n in _LENGTHS[1:]:  # the gradient of one element is all cancellation
        yield Sample((make(3, n), (n,), make(n)), note=_long(n))
    yield Sample((make(4, 33), [33]))
    yield Sample((make(4, 33), (33,), make(33), 1e-6))
    yield Sample((make(4, 33), (33,)), {"eps": 0.1})
    yield Sample((make(3, 2, 5, 26), (5, 26), make(5, 26)), note="two dimensions")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 5), (5,), make(5)), note="no rows")
    if make.dtype.is_floating_point:
        yield Sample((make(5, 0), (0,), make(0)), note="no columns")


@samples("add_rms_norm", "fused_add_rms_norm")
def _(make: Make) -> Iterator[Sample]:
    for n in (3, 33, 4097, 20001):
        yield Sample((make(3, n), make(3, n), (n,), make(n)), note=_long(n))
    yield Sample((make(4, 33), make(4, 33), [33]))
    yield Sample((make(4, 33), make(4, 33), (33,), make(33)), {"eps": 0.1})
    yield Sample((make(3, 2, 5, 26), make(3, 2, 5, 26), (5, 26), make(5, 26)), note="two dimensions")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 5), make(0, 5), (5,), make(5)), note="no rows")


@samples("skip_layer_norm")
def _(make: Make) -> Iterator[Sample]:
    for n in (3, 33, 4097, 20001):
        yield Sample((make(3, n), make(3, n), (n,), _vector(make, n), _vector(make, n)), note=_long(n))
    yield Sample((make(4, 33), make(4, 33), [33]))
    yield Sample((make(4, 33), make(4, 33), (33,), None, _vector(make, 33)), {"eps": 0.1})
    yield Sample((make(3, 2, 5, 26), make(3, 2, 5, 26), (5, 26), make(5, 26), make(5, 26)), note="two dimensions")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 5), make(0, 5), (5,), make(5), make(5)), note="no rows")


@samples("cross_entropy")
def _(make: Make) -> Iterator[Sample]:
    def classes(*shape: int, n: int) -> Tensor:
        return make(*shape, dtype=torch.int64, low=0, high=n)

    yield Sample((make(5, 33), classes(5, n=33)))
    if not make.dtype.is_floating_point:
        return
    for reduction in ("none", "sum", "mean"):
        more = {"reduction": reduction}
        yield Sample((make(4, 20001), classes(4, n=20001)), more, "long")
        yield Sample((make(3, 6, 4, 5), classes(3, 4, 5, n=6)), {**more, "ignore_index": 2})
        yield Sample((make(7), classes(n=7)), more)
        yield Sample((make(5, 33), classes(5, n=33), make(33, low=0.1, high=2)), {**more, "label_smoothing": 0.1})
        yield Sample((make(5, 33), make(5, 33, low=0, high=0.1)), more)
        yield Sample(
            (make(3, 6, 4), make(3, 6, 4, low=0, high=0.5), make(6, low=0.1, high=2)), {**more, "label_smoothing": 0.2}
        )
        z = {**more, "z_loss": 0.1}
        yield Sample((make(5, 33), classes(5, n=33), make(33, low=0.1, high=2)), {**z, "ignore_index": 2})
        yield Sample((make(3, 6, 4), make(3, 6, 4, low=0, high=0.5)), z)
        yield Sample((make(5, 33), classes(5, n=33)), {**z, "label_smoothing": 0.1})
    # torch's own sum over the classes overflows in float16 and loses 100 units of float64, so it is no reference there.
    if make.dtype in (torch.float32, torch.bfloat16):
        yield Sample((make(4, 20001), classes(4, n=20001)), {"label_smoothing": 0.1}, "long")
    yield Sample((make(7), make(7, low=0, high=0.2)))
    yield Sample((make(5, 33), make(5, dtype=torch.uint8, low=0, high=33)))
    yield Sample((make(4, 3), torch.full((4,), -100, device=make.device)), note="all ignored")
    yield Sample((make(0, 3), classes(0, n=3)), note="no rows")
    yield Sample((make(0, 3), classes(0, n=3)), {"reduction": "none"}, "no rows")


@samples("fused_linear_cross_entropy")
def _(make: Make) -> Iterator[Sample]:
    def classes(*shape: int, n: int) -> Tensor:
        return make(*shape, dtype=torch.int64, low=0, high=n)

    whole = {"prepare": "input linear_weight linear_bias"}
    yield Sample((make(5, 16), make(33, 16), classes(5, n=33), make(33)), whole)
    if not make.dtype.is_floating_point:
        return
    for reduction in ("none", "sum", "mean"):
        for more in ({}, whole)[: 2 if reduction == "mean" else 1]:
            how = {**more, "reduction": reduction}
            yield Sample((make(21, 16), make(70, 16), classes(21, n=70), make(70)), {**how, "ignore_index": 3})
            yield Sample((make(9, 16), make(33, 16), classes(9, n=33)), {**how, "z_loss": 0.1, "softcap": 2.0})
        more = {**whole, "reduction": reduction}
        yield Sample((make(700, 16), make(33, 16), classes(700, n=33), make(33)), more, "long")
    yield Sample(
        (make(5, 16), make(33, 16), classes(5, n=33), None, make(33, low=0.1, high=2)),
        {"label_smoothing": 0.1, "prepare": "linear_weight"},
    )
    yield Sample((make(5, 16), make(33, 16), make(5, 33, low=0, high=0.1), make(33)), whole)
    yield Sample((make(16), make(33, 16), classes(n=33)), {"prepare": "input"}, "one row")
    yield Sample(
        (make(4, 16), make(33, 16), torch.full((4,), -100, device=make.device), make(33)), whole, "all ignored"
    )
    yield Sample((make(0, 16), make(33, 16), classes(0, n=33), make(33)), {**whole, "reduction": "sum"}, "no rows")
    if make.dtype in (torch.float16, torch.bfloat16):
        wide = {**whole, "out_dtype": torch.float32}
        yield Sample((make(5, 16), make(33, 16), classes(5, n=33)), wide)
        yield Sample((make(5, 16), make(33, 16), classes(5, n=33)), {**wide, "acc_dtype": make.dtype})


@samples("cross_entropy_backward")
def _(make: Make) -> Iterator[Sample]:
    def classes(*shape: int, n: int) -> Tensor:
        return make(*shape, dtype=torch.int64, low=0, high=n)

    yield Sample((make(), make(5, 33), classes(5, n=33)), {"ignore_index": 2})
    if not make.dtype.is_floating_point:
        return
    yield Sample((make(3), make(3, 6), classes(3, n=6), make(6, low=0.1, high=2), -100, "none"))
    yield Sample((make(3, 4), make(3, 6, 4), classes(3, 4, n=6)), {"reduction": "none", "label_smoothing": 0.1})
    yield Sample((make(), make(5, 33), make(5, 33, low=0, high=0.1)), {"reduction": "sum", "z_loss": 0.1})
    yield Sample((make(), make(7), classes(n=7)), {"z_loss": 0.1})
    yield Sample((make(), make(4, 20001), classes(4, n=20001)), {}, "long")


@samples("squared_error", "absolute_error")
def _(make: Make) -> Iterator[Sample]:
    for reduction in ("none", "mean", "sum"):
        yield Sample((make(5, 33), make(5, 33), reduction))
        yield Sample((make(3, 4, 5), make(5), reduction), note="broadcast")
        yield Sample((make(), make(), reduction), note="0-dim")
    yield Sample((make(3, 20001), make(3, 20001), "mean"), note="long")
    yield Sample((make(0, 3), make(0, 3), "sum"), note="nothing")


@samples("smooth_error", "huber_error")
def _(make: Make) -> Iterator[Sample]:
    for reduction in ("none", "mean", "sum"):
        yield Sample((make(5, 33), make(5, 33), 1.0, reduction))
        yield Sample((make(4, 1, 5), make(3, 5), 0.3, reduction), note="broadcast")


@samples("binary_logits_error")
def _(make: Make) -> Iterator[Sample]:
    for reduction in ("none", "mean", "sum"):
        yield Sample((make(5, 33), make(5, 33, low=0, high=1), None, None, reduction))
        weights = make(5, 1, low=0.5, high=2), make(33, low=0.5, high=2)
        yield Sample((make(5, 33), make(5, 33, low=0, high=1), *weights, reduction))


@samples("divergence")
def _(make: Make) -> Iterator[Sample]:
    for reduction in ("none", "mean", "sum", "batchmean"):
        yield Sample((make(5, 33), make(5, 33, low=0.01, high=1), False, reduction))
        yield Sample((make(3, 4, 5), make(3, 4, 5), True, reduction))
    yield Sample((make(3, 5), make(5, low=0.01, high=1), False, "batchmean"), note="broadcast")
