"""Attention of packed and paged sequences, key-value caches: kernels under the interpreter against float64 torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import errors
from gemskit._interpret import interpret


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Run the kernels on CPU tensors."""
    with interpret():
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def reference(
    q: Tensor, k: Tensor, v: Tensor, left: int = -1, right: int = -1, cap: float = 0.0, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens, heads, D) in float64: the definition, row by row, written apart from the meaning of the operator."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64)
    for h in range(q.shape[1]):
        own = h // (q.shape[1] // k.shape[1])
        for i in range(q.shape[0]):
            at = i + k.shape[0] - q.shape[0]
            seen = [
                j for j in range(k.shape[0]) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
            ]  # fmt: skip
            s = k[seen, own] @ q[i, h] / math.sqrt(q.shape[2])
            if cap:
                s = cap * torch.tanh(s / cap)
            if slopes is not None:
                s = s - slopes[h].double() * (torch.tensor(seen) - at).abs()
            if sinks is not None:
                s = torch.cat((s, sinks[h].double().view(1)))
            if s.numel():
                weights = torch.softmax(s, 0)[: len(seen)]
                out[i, h], lse[h, i] = weights @ v[seen, own], torch.logsumexp(s, 0)
    return out, lse


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1, b[b.isfinite()].abs().max().item()))


OPTIONS: list[dict[str, Any]] = [
    dict(causal=True),
    dict(window_size=(7, 3)),
    dict(causal=True, window_size=(40, -1), softcap=2.0),
    dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.3]), s_aux=torch.tensor([0.3, -1.0, -math.inf, 2.0])),
]


def plain(options: dict[str, Any]) -> dict[str, Any]:
    left, right = options.get("window_size", (-1, -1))
    return dict(
        left=left, right=0 if options.get("causal") else right, cap=options.get("softcap", 0.0),
        slopes=options.get("alibi_slopes"), sinks=options.get("s_aux"),
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_packed(options: dict[str, Any]) -> None:
    """Lengths 0 and 1, more rows than keys, more keys than rows."""
    bounds_q, bounds_k = [0, 33, 33, 34, 74], [0, 20, 25, 90, 130]
    q, k, v = random(74, 4, 16), random(130, 2, 16), random(130, 2, 24, seed=1)
    got, lse = gemskit.flash_attn_varlen_func(
        q, k, v, 40, ints(*bounds_q), 65, ints(*bounds_k), return_softmax_lse=True, **options
    )
    for b in range(4):
        here, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        want, total = reference(q[here], k[keys], v[keys], **plain(options))
        if want.numel():
            close(got[here], want)
            torch.testing.assert_close(lse[:, here].double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("page", [4, 8, 24, 32, 128])
@pytest.mark.parametrize("options", OPTIONS)
def test_pages(options: dict[str, Any], page: int, split: int) -> None:
    """Pages of fewer and of as many keys as a tile, with strides of their own."""
    lengths = [100, 0, 37]
    pages = [-(-n // page) for n in lengths]
    table = torch.zeros(3, max(pages), dtype=torch.int32)
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).tolist()
    for b in range(3):
        table[b, : pages[b]] = ints(*[order.pop() for _ in range(pages[b])])
    both = random(sum(pages), 2, 2, page, 16)  # pages, key or value, heads, rows
    keys, values = both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    q = random(5, 4, 16)
    got = gemskit.flash_attn_varlen_func(
        q, keys, values, 2, ints(0, 2, 3, 5), max(lengths), seqused_k=ints(*lengths), block_table=table,
        num_splits=split, **options,
    )  # fmt: skip
    for b, here in enumerate((slice(0, 2), slice(2, 3), slice(3, 5))):
        k, v = (t[table[b].long()].flatten(0, 1)[: lengths[b]] for t in (keys, values))
        close(got[here], reference(q[here], k, v, **plain(options))[0])


def test_dense_gradients_with_dropout() -> None:
    """The mask of dropout is one for forward and backward: the result is linear in v, and its gradient the same map."""
    q, k, v = random(1, 40, 2, 16), random(1, 50, 2, 16), random(1, 50, 2, 50).requires_grad_()
    torch.manual_seed(0)
    out = gemskit.flash_attn_func(q, k, v, dropout_p=0.4)
    (grad,) = torch.autograd.grad(out, v, g := random(*out.shape, seed=1))
    torch.manual_seed(0)
    weights = gemskit.flash_attn_func(q, k, torch.eye(50).expand(2, 50, 50).transpose(0, 1)[None], dropout_p=0.4)
    torch.testing.assert_close(grad, torch.einsum("bihj,bihd->bjhd", weights, g), rtol=0, atol=1e-5)
    assert abs((weights == 0).float().mean().item() - 0.4) < 0.04


def test_kvcache_appends_and_rotates() -> None:
    lengths, new = [9, 2], 3
    caches = random(3, 16, 2, 16), random(3, 16, 2, 16, seed=1)
    before = [t.clone() for t in caches]
    q, k, v = random(2, new, 4, 16), random(2, new, 2, 16, seed=2), random(2, new, 2, 16, seed=3)
    angles = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    out = gemskit.flash_attn_with_kvcache(
        q, *caches, k, v, angles.cos(), angles.sin(), ints(*lengths), ints(2, 0), causal=True, rotary_interleaved=False
    )

    def turned(t: Tensor, first: int) -> Tensor:
        at = slice(first, first + t.shape[0])
        cos, sin = angles[at].cos()[:, None], angles[at].sin()[:, None]
        a, b, rest = t[..., :4], t[..., 4:8], t[..., 8:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    for b, row in enumerate((2, 0)):
        n = lengths[b]
        keys = torch.cat((before[0][row, :n], turned(k[b], n)))
        values = torch.cat((before[1][row, :n], v[b]))
        torch.testing.assert_close(caches[0][row, : n + new], keys)
        assert torch.equal(caches[0][row, n + new :], before[0][row, n + new :])
        close(out[b], reference(turned(q[b], n), keys, values, right=0)[0])
    assert torch.equal(caches[0][1], before[0][1])


@pytest.mark.parametrize("kind", ["auto", "fp8"])
@pytest.mark.parametrize("layout", ["NHD", "vllm"])
def test_caches_round(layout: str, kind: str) -> None:
    """What is written by reshape_and_cache is what paged_attention reads."""
    tokens, page = 21, 8
    key, value = random(tokens, 2, 32), random(tokens, 2, 32, seed=1)
    slots = torch.randperm(5 * page, generator=torch.Generator().manual_seed(1))[:tokens]
    table = ints(3, 1, 4).view(1, 3)
    slots = torch.tensor([int(table[0, i // page]) * page + i % page for i in range(tokens)])
    dtype = torch.uint8 if kind == "fp8" else torch.float32
    scales = dict(k_scale=torch.tensor([0.02]), v_scale=torch.tensor([0.01])) if kind == "fp8" else {}
    if layout == "NHD":
        caches = [torch.zeros(5, page, 2, 32, dtype=dtype) for _ in range(2)]
        gemskit.reshape_and_cache_flash(key, value, *caches, slots, kind, **scales)
    else:
        caches = [torch.zeros(5, 2, 4, page, 8, dtype=dtype), torch.zeros(5, 2, 32, page, dtype=dtype)]
        gemskit.reshape_and_cache(key, value, *caches, slots, kind, **scales)
    query = random(1, 4, 32, seed=2)
    got = gemskit.paged_attention(
        query, *caches, 0.2, table, ints(tokens), kv_cache_dtype=kind, cache_layout=layout, **scales
    )
    want, _ = reference(query * 0.2 * math.sqrt(32), key, value)
    close(got, want, 0.05 if kind == "fp8" else 2e-5)


def test_mla() -> None:
    cache, table = random(6, 16, 1, 40), ints(4, 2, 1, 0).view(2, 2)
    q = random(2, 2, 8, 40)
    got = gemskit.flash_mla(q, table, cache, 32, 16, 2, 2, ints(30, 9), 8, 1, 40, 32)
    for b, n in enumerate((30, 9)):
        keys = cache[table[b].long()].flatten(0, 1)[:n]
        close(got[b], reference(q[b], keys, keys[..., :32], right=0)[0])
    rows, latent, rope = torch.tensor([5, -1, 95]), random(3, 32), random(3, 8)
    whole = cache[:, :, 0].clone()
    gemskit.concat_and_cache_mla(latent, rope, whole, rows)
    assert torch.equal(whole.view(96, 40)[[5, 95]], torch.cat((latent, rope), 1)[[0, 2]])
    assert torch.equal(whole.view(96, 40)[6:95], cache.view(96, 40)[6:95])


def test_merging_parts_is_the_whole() -> None:
    q, k, v = random(7, 2, 16), random(50, 2, 16), random(50, 2, 16, seed=1)
    parts = []
    for part in (slice(0, 20), slice(20, 50)):
        n = part.stop - part.start
        parts += gemskit.flash_attn_varlen_func(
            q, k[part], v[part], 7, ints(0, 7), n, ints(0, n), return_softmax_lse=True
        )
    out, lse = gemskit.merge_attn_states(*parts)
    want, total = reference(q, k, v)
    close(out, want)
    close(lse, total)


def test_metadata_says_the_splits() -> None:
    parts = gemskit.get_scheduler_metadata(2, 1, 32768, 8, 2, 128, ints(32768, 5))
    assert parts.shape == (2,) and parts.dtype == torch.int32 and (parts > 8).all()
    assert (gemskit.get_scheduler_metadata(2, 4096, 4096, 8, 2, 128, ints(5, 5)) == 1).all()


def test_errors() -> None:
    q, k = random(6, 4, 16), random(6, 2, 16)
    with pytest.raises(errors.ShapeError, match="cu_seqlens_q and cu_seqlens_k"):
        gemskit.flash_attention(q, k, k, ints(0, 6))
    with pytest.raises(errors.ShapeError, match="heads"):
        gemskit.flash_attn_func(random(1, 6, 3, 16), random(1, 6, 2, 16), random(1, 6, 2, 16))
    with pytest.raises(errors.NoKernel, match="up to 256"):
        gemskit.flash_attn_func(*[random(1, 6, 2, 300)] * 3)
    with pytest.raises(errors.ArgumentError, match="'auto'"):
        gemskit.reshape_and_cache_flash(
            q, q, torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, 4, 16), torch.arange(6), "int4"
        )
