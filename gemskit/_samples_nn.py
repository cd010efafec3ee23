"""Samples of gates, rotary position embedding and table look-up."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples


@samples("silu_and_mul", "relu_and_mul")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((4, 6), (3, 5, 34), (2,), (0, 8), (3, 0)):
        yield Sample((make(*shape),), note="packed")
    yield Sample((make(3, 70), make(3, 70)), note="two operands")
    yield Sample((make(3, 1, 9), make(5, 9)), note="broadcast")
    yield Sample((make(), make()), note="0-dim")


@samples("gelu_and_mul")
def _gelu(make: Make) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        yield Sample((make(3, 34),), {"approximate": approximate}, note=f"packed {approximate}")
        yield Sample((make(3, 1, 9), make(5, 9)), {"approximate": approximate}, note=f"broadcast {approximate}")


@samples("silu_and_mul_with_clamp", "swigluoai_and_mul")
def _(make: Make) -> Iterator[Sample]:
    for shape in ((4, 6), (3, 5, 34), (2,), (0, 8), (3, 0)):
        yield Sample((make(*shape),), {"limit": 0.75}, note="packed")
    yield Sample((make(3, 70), make(3, 70)), note="two operands")
    yield Sample((make(3, 1, 9), make(5, 9)), {"limit": 0.5}, note="broadcast")
    yield Sample((make(), make()), note="0-dim")


@samples("apply_rotary_pos_emb")
def _(make: Make) -> Iterator[Sample]:
    def table(*shape: int) -> torch.Tensor:
        return make(*shape, dtype=torch.float32 if make.dtype != torch.float64 else torch.float64, low=-1, high=1)

    for interleaved in (False, True):
        yield Sample(
            (make(2, 5, 4, 8), make(2, 5, 2, 8), table(9, 4), table(9, 4), None, interleaved), note="default rows"
        )
        ids = make(2, 5, dtype=torch.int64, low=0, high=9)
        yield Sample((make(2, 5, 3, 8), make(2, 5, 3, 8), table(9, 2), table(9, 2), ids, interleaved), note="partial")
    full = table(2, 5, 4)
    full = torch.cat((full, full), -1)
    yield Sample(
        (make(2, 4, 5, 8), make(2, 1, 5, 8), full, full.flip(-1)), {"layout": "bhsd"}, note="rows of the tokens"
    )
    yield Sample(
        (make(7, 2, 6), make(7, 1, 6), table(7, 3), table(7, 3), make(7, dtype=torch.int32, low=0, high=7)),
        note="no batch",
    )
    yield Sample((make(0, 2, 6), make(0, 1, 6), table(7, 3), table(7, 3)), note="no tokens")


@samples("embedding")
def _(make: Make) -> Iterator[Sample]:
    for dtype in (torch.int32, torch.int64):
        yield Sample((make(3, 5, dtype=dtype, low=0, high=11), make(11, 33)), note=str(dtype))
    index = make(40, dtype=torch.int64, low=0, high=6)
    yield Sample((index, make(6, 20)), {"padding_idx": -2, "scale_grad_by_freq": True}, note="padding and frequency")
    yield Sample((make(dtype=torch.int64, low=0, high=4), make(4, 3)), note="one index")
    yield Sample((make(0, dtype=torch.int64, low=0, high=4), make(4, 3)), note="no index")


@samples("embedding_dense_backward")
def _(make: Make) -> Iterator[Sample]:
    def index(*shape: int) -> torch.Tensor:
        return make(*shape, dtype=torch.int64, low=0, high=11)

    yield Sample((make(3, 5, 33), index(3, 5), 11))
    yield Sample((make(40, 20), index(40), 11, 4, True), note="padding and frequency")
    yield Sample((make(3), index(), 11), note="one index")
    if make.dtype.is_floating_point:
        yield Sample((make(0, 3), index(0), 11), note="no index")
