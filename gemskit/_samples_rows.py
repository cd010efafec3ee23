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


def _finite(make: Make, n: int) -> Tensor:
    """A weight or a bias of channels: for an infinite one torch's ``x * (rstd * weight) - mean * (rstd * weight)`` is NaN."""
    return make(1, n, low=-2, high=2)[0]


@samples("group_norm")
def _(make: Make) -> Iterator[Sample]:
    def vectors(n: int) -> tuple[Tensor, Tensor]:
        return _finite(make, n), _finite(make, n)

    for shape, groups in (((2, 6, 4, 5), 3), ((3, 8, 33), 4), ((2, 6, 7, 3), 6), ((2, 5, 3, 4), 1), ((5, 12), 4)):
        yield Sample((make(*shape), groups, *vectors(shape[1])))
    yield Sample((make(2, 6, 4, 5).to(memory_format=torch.channels_last), 2, *vectors(6)), note="channels last")
    yield Sample((make(2, 4, 5, 6), 2), {"eps": 0.1})
    yield Sample((make(2, 4, 5, 6), 2, _finite(make, 4)))
    yield Sample((make(2, 4, 5, 6), 2, None, _finite(make, 4)))
    yield Sample((make(2, 4, 17001), 2, *vectors(4)), note="long")
    yield Sample((make(2, 3, 183, 184), 3, *vectors(3)), note="long")
    yield Sample((make(1, 2, 40000), 2), note="long without weights")
    yield Sample((make(2, 6, 60, 301).mT, 2, None, _finite(make, 6)), note="long transposed")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 6, 4), 3, *vectors(6)), note="no samples")
        yield Sample((make(2, 6, 0), 3), note="no positions")
        yield Sample((make(64, 256, 56, 56), 32, *vectors(256)), note="big")
        yield Sample((make(64, 256, 64, 32), 32, *vectors(256)), note="big")


@samples("_batch_norm")
def _batch(make: Make) -> Iterator[Sample]:
    for shape in ((4, 6, 4, 5), (33, 7), (3, 5, 41), (5, 1, 3, 4)):
        yield Sample((make(*shape), _finite(make, shape[1]), _finite(make, shape[1])))
    yield Sample((make(3, 6, 4, 5).to(memory_format=torch.channels_last), _finite(make, 6), _finite(make, 6)))
    yield Sample((make(4, 4, 5, 6),), {"eps": 0.1})
    yield Sample((make(4, 4, 5, 6), _finite(make, 4)))
    yield Sample((make(4, 4, 5, 6), None, _finite(make, 4)))
    yield Sample((make(3, 2, 20001), _finite(make, 2), _finite(make, 2)), note="long")
    yield Sample((make(20001, 3), _finite(make, 3), _finite(make, 3)), note="long")
    if make.dtype.is_floating_point:
        yield Sample((make(64, 256, 56, 56), _finite(make, 256), _finite(make, 256)), note="big")


@samples("_batch_norm_fixed")
def _(make: Make) -> Iterator[Sample]:
    for sample in _batch(make):
        n = sample.args[0].shape[1]
        given = _finite(make, n), make(1, n, low=0.5, high=2)[0]
        yield Sample((sample.args[0], *given, *sample.args[1:]), sample.kwargs, sample.note)
    if make.dtype.is_floating_point:
        yield Sample((make(0, 3, 4), make(3), make(3, low=0.5, high=2), make(3), make(3)), note="no samples")


@samples("_track")
def _(make: Make) -> Iterator[Sample]:
    for n in (1, 33):
        yield Sample((make(n), make(n), make(n), make(n), 0.1))


@samples("weight_norm")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(6, 33), make(6, 1)))
    for dim, shape in ((0, (3, 1, 1)), (1, (1, 4, 1)), (2, (1, 1, 5)), (-3, (3, 1, 1)), (-1, ()), (-1, (1, 1, 1))):
        yield Sample((make(3, 4, 5), make(*shape), dim))
    yield Sample((make(7), make(7), 0), note="one dimension")
    yield Sample((make(2, 40001), make(2, 1)), note="long")
    yield Sample((make(3, 20001), make(), -1), note="long, all")
    yield Sample((make(20001, 3), make(1, 3), 1), note="long columns")
    if make.dtype.is_floating_point:
        yield Sample((make(3, 0), make(3, 1)), note="no columns")


@samples("_normalize")
def _(make: Make) -> Iterator[Sample]:
    for n in (3, 33, 20001):
        yield Sample((make(3, n), -1, 1e-12), note=_long(n))
    yield Sample((make(3, 33, 5), 1, 0.1))
    yield Sample((make(2, 9), 1, 100.0), note="short vectors")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 5), 1, 1e-12), note="no rows")


@samples("_gemma_rms_norm")
def _(make: Make) -> Iterator[Sample]:
    for n in (3, 33, 20001):
        yield Sample((make(3, n), (n,), make(n), 1e-6), note=_long(n))
    yield Sample((make(3, 2, 5, 26), (5, 26), make(5, 26), 0.1), note="two dimensions")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 5), (5,), make(5), 1e-6), note="no rows")


def _positive(make: Make, *shape: int) -> Tensor:
    return make(*shape, low=0.5, high=2)


@samples("_layer_norm_backward")
def _(make: Make) -> Iterator[Sample]:
    for n in (3, 33, 4097):
        rows = make(3, 1), _positive(make, 3, 1)
        yield Sample((make(3, n), make(3, n), (n,), *rows, _vector(make, n)), note=_long(n))
    yield Sample((make(4, 5, 26), make(4, 5, 26), (5, 26), make(4, 1, 1), _positive(make, 4, 1, 1), None))


@samples("_rms_norm_backward")
def _(make: Make) -> Iterator[Sample]:
    for n in (3, 33, 4097):
        yield Sample((make(3, n), make(3, n), (n,), _positive(make, 3, 1), make(n)), note=_long(n))
    yield Sample((make(4, 5, 26), make(4, 5, 26), (5, 26), _positive(make, 4, 1, 1), None))


@samples("_group_norm_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape, groups in (((2, 6, 4, 5), 3), ((5, 12), 4), ((2, 4, 17001), 2)):
        rows = make(shape[0], groups), _positive(make, shape[0], groups)
        note = _long(shape[-1])
        yield Sample((make(*shape), make(*shape), *rows, _finite(make, shape[1]), groups), note=note)
    yield Sample((make(2, 4, 5, 6), make(2, 4, 5, 6), make(2, 2), _positive(make, 2, 2), None, 2))


@samples("_batch_norm_backward")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((4, 6, 4, 5), (33, 7)):
        for train in (True, False):
            rows = make(shape[1]), _positive(make, shape[1])
            yield Sample((make(*shape), make(*shape), _finite(make, shape[1]), *rows, train))
    yield Sample((make(4, 6, 5), make(4, 6, 5), None, make(6), _positive(make, 6), True))


@samples("weight_norm_backward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(6, 33), make(6, 33), make(6, 1), _positive(make, 6, 1), 0))
    yield Sample((make(3, 4, 5), make(3, 4, 5), make(1, 1, 5), _positive(make, 1, 1, 5), 2))
    yield Sample((make(2, 40001), make(2, 40001), make(2, 1), _positive(make, 2, 1), 0), note="long")


@samples("cross_entropy")
def _(make: Make) -> Iterator[Sample]:
    def classes(*shape: int, n: int) -> Tensor:
        return make(*shape, dtype=torch.int64, low=0, high=n)

    yield Sample((make(5, 33), classes(5, n=33)))
    if not make.dtype.is_floating_point:
        return
    none, total = {"reduction": "none"}, {"reduction": "sum"}
    for more in (none, total, {}):
        yield Sample((make(4, 20001), classes(4, n=20001)), more, "long")
        yield Sample((make(3, 6, 4, 5), classes(3, 4, 5, n=6)), {**more, "ignore_index": 2})
        yield Sample((make(5, 33), classes(5, n=33), make(33, low=0.1, high=2)), {**more, "label_smoothing": 0.1})
    yield Sample((make(7), classes(n=7)), none)
    yield Sample((make(5, 33), make(5, 33, low=0, high=0.1)), total)
    weighed = (make(3, 6, 4), make(3, 6, 4, low=0, high=0.5), make(6, low=0.1, high=2))
    yield Sample(weighed, {"label_smoothing": 0.2})
    yield Sample(weighed, {**none, "z_loss": 0.1})
    z = {"z_loss": 0.1}
    yield Sample((make(5, 33), classes(5, n=33), make(33, low=0.1, high=2)), {**z, "ignore_index": 2})
    yield Sample((make(3, 6, 4), make(3, 6, 4, low=0, high=0.5)), {**total, **z})
    yield Sample((make(5, 33), classes(5, n=33)), {**none, **z, "label_smoothing": 0.1})
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
    # Two parts, of the classes and of the rows.
    yield Sample((make(9, 16), make(8200, 16), classes(9, n=8200), make(8200)), whole, "long")
    yield Sample((make(2049, 16), make(33, 16), classes(2049, n=33), make(33)), whole, "long")
    yield Sample(
        (make(4, 16), make(33, 16), torch.full((4,), -100, device=make.device), make(33)), whole, "all ignored"
    )
    yield Sample((make(0, 16), make(33, 16), classes(0, n=33), make(33)), {**whole, "reduction": "sum"}, "no rows")
    if make.dtype in (torch.float16, torch.bfloat16):
        yield Sample((make(5, 16), make(33, 16), classes(5, n=33)), {**whole, "out_dtype": torch.float32})


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
