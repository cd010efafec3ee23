"""Samples of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples


@samples("scaled_dot_product_attention", "scaled_dot_product_attention_lse")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 17, 16), make(2, 3, 33, 16), make(2, 3, 33, 16)))
    yield Sample(
        (make(1, 2, 70, 33), make(1, 2, 70, 33), make(1, 2, 70, 20)), dict(is_causal=True), "causal, value head size"
    )
    yield Sample(
        (make(2, 4, 20, 64), make(2, 2, 20, 64), make(2, 2, 20, 64)), dict(is_causal=True, enable_gqa=True), "GQA"
    )
    yield Sample(
        (make(1, 2, 9, 8), make(1, 2, 21, 8), make(1, 2, 21, 8)),
        dict(is_causal=True, bottom_right=True),
        "bottom-right",
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


def _ints(make: Make, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=make.device)


@samples("flash_attention")
def _flash(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 17, 4, 16), make(2, 33, 2, 16), make(2, 33, 2, 20)), dict(right=0), "causal, GQA")
    slopes, sinks = make(4, dtype=torch.float32, low=0.0, high=1.0), make(4)
    yield Sample(
        (make(2, 40, 4, 16), make(2, 40, 2, 16), make(2, 40, 2, 16)),
        dict(left=9, right=2, softcap=3.0, alibi_slopes=slopes, s_aux=sinks, softmax_scale=0.5),
        "window, soft-cap, ALiBi, sinks",
    )
    q_bounds, k_bounds = _ints(make, 0, 5, 5, 45, 57), _ints(make, 0, 20, 30, 60, 71)
    packed = (make(57, 4, 16), make(71, 2, 16), make(71, 2, 16), q_bounds, k_bounds)
    yield Sample(packed, dict(max_seqlen_q=40, max_seqlen_k=30, right=0), "packed")
    yield Sample(packed, dict(max_seqlen_q=40, max_seqlen_k=30, left=5, s_aux=sinks), "packed, sinks")
    used = _ints(make, 15, 0, 30, 8)
    yield Sample((*packed, used), dict(max_seqlen_q=40, max_seqlen_k=30), "packed, fewer keys")
    cache = make(9, 8, 2, 16), make(9, 8, 2, 16)
    table = _ints(make, 1, 4, 8, 0, 2, 3, 5, 7, 6).reshape(3, 3)
    yield Sample(
        (make(3, 1, 4, 16), *cache, None, None, _ints(make, 24, 3, 13), table),
        dict(right=0, num_splits=2),
        "paged decode",
    )
    yield Sample(
        (make(21, 4, 16), *cache, _ints(make, 0, 2, 3, 21), None, _ints(make, 24, 3, 19), table),
        dict(right=0, max_seqlen_q=18, max_seqlen_k=24),
        "paged prefill",
    )
    if make.empty:
        big = make(4096, 8, 128), make(4096, 2, 128), make(4096, 2, 128)
        bounds = _ints(make, 0, 1024, 4096)
        yield Sample((*big, bounds, bounds), dict(max_seqlen_q=3072, max_seqlen_k=3072, right=0), "big")
        cache = make(4096, 16, 2, 128), make(4096, 16, 2, 128)
        table = torch.zeros(16, 256, dtype=torch.int32, device=make.device)
        used = torch.full((16,), 4000, dtype=torch.int32, device=make.device)
        yield Sample((make(16, 1, 16, 128), *cache, None, None, used, table), dict(right=0), "big")


@samples("_cache_write")
def _cache(make: Make) -> Iterator[Sample]:
    slots = torch.tensor([3, 17, -1, 0, 8], dtype=torch.int64, device=make.device)
    # The caches are overwritten in place: first in order, as no argument of theirs may be expanded.
    sources = make(5, 2, 16), make(5, 2, 20)
    yield Sample((*sources, make(3, 8, 2, 16), make(3, 8, 2, 20), slots, None, None))
    yield Sample((*sources, make(3, 8, 2, 4, 4), make(3, 8, 2, 20), slots[:3], None, None), {}, "groups of columns")
    sources = make(4, 3, 8), make(4, 3, 8)
    caches = [torch.zeros(2, 4, 3, 8, dtype=torch.uint8, device=make.device) for _ in range(2)]
    scales = [torch.tensor([s], dtype=torch.float32, device=make.device) for s in (0.5, 0.003)]
    yield Sample((*sources, *caches, slots[1:], *scales), dict(kv_cache_dtype="fp8"), "float8")
    if make.empty:
        big = make(4096, 8, 128), make(4096, 8, 128), make(1024, 16, 8, 128), make(1024, 16, 8, 128)
        slots = torch.zeros(4096, dtype=torch.int64, device=make.device)
        yield Sample((*big, slots, None, None), {}, "big")


@samples("_mla_write")
def _mla_cache(make: Make) -> Iterator[Sample]:
    slots = torch.tensor([3, 17, -1, 0, 8], dtype=torch.int64, device=make.device)
    yield Sample((make(5, 32), make(5, 8), make(3, 8, 40), slots, None))
    cache = torch.zeros(3, 8, 40, dtype=torch.uint8, device=make.device)
    scale = torch.tensor([0.5], dtype=torch.float32, device=make.device)
    yield Sample((make(5, 32), make(5, 8), cache, slots, scale), dict(kv_cache_dtype="fp8"), "float8")


@samples("_merge_attn_states")
def _merged(make: Make) -> Iterator[Sample]:
    lses = [make(3, 7, dtype=torch.float32) for _ in range(2)]
    yield Sample((make(7, 3, 20), lses[0], make(7, 3, 20), lses[1]))
    none = torch.full((3, 7), -torch.inf, device=make.device)
    yield Sample((make(7, 3, 20), none, make(7, 3, 20), lses[1]), {}, "no key in the prefix")
    if make.empty:
        yield Sample((make(4096, 32, 128), make(32, 4096, dtype=torch.float32)) * 2, {}, "big")


@samples("_cache_append")
def _append(make: Make) -> Iterator[Sample]:
    table = _ints(make, 1, 4, 0, 2).reshape(2, 2)
    yield Sample((make(2, 3, 2, 16), make(2, 3, 2, 20), make(5, 4, 2, 16), make(5, 4, 2, 20), _ints(make, 2, 6), table))


@samples("_paged_attention")
def _paged(make: Make) -> Iterator[Sample]:
    table, used = _ints(make, 1, 4, 8, 0, 2, 3).reshape(2, 3), _ints(make, 20, 7)
    caches = make(9, 8, 2, 16), make(9, 8, 2, 20)
    yield Sample((make(2, 4, 16), *caches, table, used, None, None, None, 0.25))
    slopes = make(4, dtype=torch.float32, low=0.0, high=1.0)
    groups = make(9, 8, 2, 4, 4), make(9, 8, 2, 20)
    yield Sample((make(2, 4, 16), *groups, table, used, slopes, None, None, 0.25), {}, "groups of columns, ALiBi")
    bytes_ = [make(9, 8, 2, 16, dtype=torch.float32).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = [torch.tensor([s], dtype=torch.float32, device=make.device) for s in (0.5, 0.25)]
    yield Sample((make(2, 4, 16), *bytes_, table, used, None, *scales, 0.25), {}, "float8")


@samples("mla_decode")
def _mla(make: Make) -> Iterator[Sample]:
    table, used = _ints(make, 1, 4, 8, 0, 2, 3).reshape(2, 3), _ints(make, 24, 7)
    yield Sample((make(2, 2, 4, 40), make(9, 8, 1, 40), table, used, 32), dict(causal=True))
    yield Sample((make(2, 1, 4, 40), make(9, 8, 1, 40), table, used, 32), dict(softmax_scale=0.3, num_splits=2))
    if make.empty:
        table = torch.zeros(4, 64, dtype=torch.int32, device=make.device)
        used = torch.full((4,), 4000, dtype=torch.int32, device=make.device)
        yield Sample((make(4, 1, 16, 576), make(256, 64, 1, 576), table, used, 512), dict(causal=True), "big")
