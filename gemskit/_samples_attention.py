"""Samples of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples


@samples("scaled_dot_product_attention")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 17, 16), make(2, 3, 33, 16), make(2, 3, 33, 16)))
    yield Sample(
        (make(1, 2, 70, 33), make(1, 2, 70, 33), make(1, 2, 70, 20)), dict(is_causal=True), "causal, value head size"
    )
    yield Sample(
        (make(2, 4, 20, 64), make(2, 2, 20, 64), make(2, 2, 20, 64)), dict(is_causal=True, enable_gqa=True), "GQA"
    )
    yield Sample((make(2, 4, 5, 8), make(2, 1, 9, 8), make(2, 1, 9, 8)), dict(enable_gqa=True, scale=0.5), "MQA")
    mask = make(2, 1, 1, 33, dtype=torch.bool) | (torch.arange(33, device=make.device) == 0)
    yield Sample((make(2, 3, 17, 16), make(2, 3, 33, 16), make(2, 3, 33, 16), mask), {}, "padding mask")
    yield Sample((make(2, 3, 9, 16), make(2, 3, 11, 16), make(2, 3, 11, 16), make(9, 11)), {}, "added mask")
    yield Sample((make(4, 9, 16), make(4, 11, 16), make(4, 11, 16)), {}, "3-D")
    yield Sample((make(2, 2, 1, 16), make(2, 2, 1, 16), make(2, 2, 1, 16)), {}, "one")
    big = [make(1, h, 4096, 128) for h in (8, 2, 2)] if make.empty else []
    if big:
        yield Sample(tuple(big), dict(is_causal=True, enable_gqa=True), "big")
        yield Sample(tuple(make(1, 8, 4096, 64) for _ in range(3)), {}, "big")
