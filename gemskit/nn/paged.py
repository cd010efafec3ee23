"""Decoding with key-value caches: the interfaces of flash-attn, vLLM and FlashMLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit import backends
from gemskit._op import operator
from gemskit.errors import ArgumentError, NoKernel, ShapeError
from gemskit.nn import _attention_host as host
from gemskit.nn import _flash_meaning as meaning
from gemskit.nn._attention_host import Problem
from gemskit.nn.attention import launch_numbers
from gemskit.nn.flash import _window, flash_attention
from gemskit.nn.kv_cache import FLOAT8, write
from gemskit.nn.rotary import apply_rotary_pos_emb
from gemskit.pointwise import add, arange, copy_
from gemskit.pointwise.copying import copy_


@operator(writes=("k_cache", "v_cache"))
def _cache_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """Caches (pages, P, H, D) with k and v (B, S, H, D) behind the ``cache_seqlens`` (B,) rows of each sequence."""
    if (
        k.dim() != 4
        or k.shape[:3] != v.shape[:3]
        or k.shape[2:] != k_cache.shape[2:]
        or v.shape[2:] != v_cache.shape[2:]
    ):
        raise ShapeError(
            f"flash_attn_with_kvcache: k and v (B, S, H, D) given {list(k.shape)} and {list(v.shape)}, caches "
            f"{list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if k_cache.is_meta:
        return torch.empty_like(k_cache), torch.empty_like(v_cache)
    found, page = (k_cache.clone(), v_cache.clone()), k_cache.shape[1]
    for b, first in enumerate(cache_seqlens.tolist()):
        for i in range(k.shape[1]):
            row = first + i
            if 0 <= row < block_table.shape[1] * page:
                for cache, new in zip(found, (k, v)):
                    cache[int(block_table[b, row // page]), row % page] = new[b, i].to(cache.dtype)
    return found


_cache_append.elementwise = True


@_cache_append.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
    cache_seqlens: Tensor, block_table: Tensor,
) -> None:  # fmt: skip
    for out, cache in zip(outs, (k_cache, v_cache)):
        if out is not cache:
            copy_(out, cache)
    write((k, v), outs, None, table=block_table, lengths=cache_seqlens)


_cache_append_ = _cache_append.inplace


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None, block_table: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: Sequence[int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention of q (B, Sq, Hq, D) over caches (B, S, Hkv, D), or (pages, P, Hkv, D) with ``block_table`` (B, n) int32.

    ``cache_seqlens`` (B,) int32 counts the keys of each sequence. k and v (B, Snew, Hkv, D) are first written behind them, which
    changes ``k_cache`` and ``v_cache``; with ``rotary_cos`` and ``rotary_sin`` (rows, n) k and q are rotated before. Causal masks
    and windows are aligned at the bottom right. ``cache_batch_idx`` (B,) says which batch of the cache a sequence has. Returns
    (B, Sq, Hq, D), and with ``return_softmax_lse`` the log-sum-exp (B, Hq, Sq). Source: ``flash_attn.flash_attn_with_kvcache``.
    """
    batch, size = q.shape[0], k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if (k is None) != (v is None) or (k is not None and cache_seqlens is None):
        raise ArgumentError("flash_attn_with_kvcache: k, v and cache_seqlens are given together")
    if block_table is None and (k is not None or cache_batch_idx is not None):
        # A cache by batch is one of pages, each a whole sequence.
        rows = cache_batch_idx if cache_batch_idx is not None else arange(batch, dtype=torch.int32, device=q.device)
        block_table = rows.unsqueeze(1)
    if k is not None and v is not None:
        assert isinstance(cache_seqlens, Tensor) and block_table is not None
        if rotary_cos is not None and rotary_sin is not None:
            tables = rotary_cos, rotary_sin
            first = cache_seqlens.unsqueeze(1)
            new = add(first, arange(k.shape[1], dtype=cache_seqlens.dtype, device=q.device))
            # Without an order of the queries all stand at the first new place.
            own = causal or tuple(window_size) != (-1, -1)
            places = add(first, arange(q.shape[1], dtype=cache_seqlens.dtype, device=q.device)) if own else first
            _, k = apply_rotary_pos_emb(k, k, *tables, new, rotary_interleaved)
            q, _ = apply_rotary_pos_emb(q, q, *tables, places.expand(batch, q.shape[1]), rotary_interleaved)
        _cache_append_(k, v, k_cache, v_cache, cache_seqlens, block_table)
        cache_seqlens = add(cache_seqlens, k.shape[1])
    left, right = _window(causal, window_size)
    with torch.no_grad():
        out, lse = flash_attention(
            q, k_cache, v_cache, seqused_k=cache_seqlens, block_table=block_table, alibi_slopes=alibi_slopes,
            max_seqlen_k=size if block_table is None else block_table.shape[1] * size, softmax_scale=softmax_scale,
            left=left, right=right, softcap=softcap, num_splits=num_splits,
        )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    cache_seqlens: Tensor, qkv_dtype: torch.dtype = torch.bfloat16, headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, cache_leftpad: Tensor | None = None,
    page_size: int | None = None, max_seqlen_k_new: int = 0, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), has_softcap: bool = False, num_splits: int = 0,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """How many parts the keys of each sequence are read in: (B,) int32 on the device of ``cache_seqlens``.

    The number follows from the sizes alone, so that a captured graph serves any lengths; ``flash_attn_varlen_func`` takes what
    is returned and finds the same number itself. Source: ``vllm_flash_attn.get_scheduler_metadata``.
    """
    if num_heads_kv < 1 or num_heads_q % num_heads_kv:
        raise ArgumentError(f"get_scheduler_metadata: {num_heads_q} query heads for {num_heads_kv} key heads")
    device = cache_seqlens.device
    config = backends.arch(None if device.type in ("cpu", "meta") else device).config("attention")
    group = num_heads_q // num_heads_kv
    block = host.blocks(max(headdim, headdim_v or 0), config, itemsize=qkv_dtype.itemsize)
    rows = max_seqlen_q * group
    parts = num_splits or (
        host.parts_of(rows, max_seqlen_k, batch_size * num_heads_kv, host.few_rows(block, rows), config)
        if max_seqlen_q <= host.FEW
        else 1
    )
    return torch.full((batch_size,), parts, dtype=torch.int32, device=device)


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float, block_tables: Tensor, seq_lens: Tensor,
    max_seq_len: int = 0, alibi_slopes: Tensor | None = None, kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *, cache_layout: str = "NHD",
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one query token (S, Hq, D) for each sequence over caches (pages, P, Hkv, D).

    ``cache_layout`` "NHD" is that, "HND" (pages, Hkv, P, D), "vllm" keys (pages, Hkv, D / x, P, x) and values
    (pages, Hkv, D, P). Caches of float8 are uint8 with ``kv_cache_dtype``; ``k_scale`` and ``v_scale`` hold one number.
    ``alibi_slopes`` (Hq,). Source: vLLM's paged_attention_v1 and v2.
    """
    if cache_layout not in ("NHD", "HND", "vllm"):
        raise ArgumentError(f"paged_attention: cache_layout is {cache_layout!r}; accepted: 'NHD', 'HND', 'vllm'")
    if kv_cache_dtype != "auto":
        if kv_cache_dtype not in FLOAT8:
            raise ArgumentError(
                f"paged_attention: kv_cache_dtype is {kv_cache_dtype!r}; accepted: 'auto', {list(FLOAT8)}"
            )
        key_cache, value_cache = (t.view(FLOAT8[kv_cache_dtype]) for t in (key_cache, value_cache))
    if cache_layout == "HND":
        key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    elif cache_layout == "vllm":
        # (pages, P, Hkv, D / x, x)
        key_cache, value_cache = key_cache.permute(0, 3, 1, 2, 4), value_cache.permute(0, 3, 1, 2)
    found = _paged_attention(
        query, key_cache, value_cache, block_tables, seq_lens, alibi_slopes, k_scale, v_scale, scale
    )
    return found if out is None else copy_(out, found)


@operator(floats=("query",))
def _paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, seq_lens: Tensor,
    alibi_slopes: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """:func:`paged_attention` of caches (pages, P, H, D), or keys (pages, P, H, D / x, x)."""
    if query.dim() != 3 or not query.is_floating_point() or key_cache.shape[:3] != value_cache.shape[:3]:
        raise ShapeError(
            f"paged_attention: query is (sequences, heads, D), floating-point, caches have the same pages; given "
            f"{list(query.shape)} {query.dtype}, {list(key_cache.shape)}, {list(value_cache.shape)}"
        )
    if query.shape[1] % key_cache.shape[2] or key_cache.shape[3:].numel() != query.shape[2]:
        raise ShapeError(f"paged_attention: query {list(query.shape)} for a key cache {list(key_cache.shape)}")
    out = torch.empty_like(query[..., :1]).expand(*query.shape[:2], value_cache.shape[-1]).contiguous()
    if query.is_meta:
        return out
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key_cache.flatten(3) if key_cache.dim() == 5 else key_cache
    scales = [1.0 if t is None else t.to(wide) for t in (k_scale, v_scale)]
    results = [
        meaning.one(
            mine.to(wide), k.to(wide) * scales[0], v.to(wide) * scales[1], scale, -1, -1, 0.0, alibi_slopes, None, 0.0
        )[0]
        for _, _, mine, k, v in meaning.sequences(
            query.unsqueeze(1), keys, value_cache, None, None, seq_lens, block_tables
        )
    ]
    return torch.cat(results).to(query.dtype) if results else out


_paged_attention.float8 = True


@_paged_attention.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, query: Tensor, key_cache: Tensor, value_cache: Tensor,
    block_tables: Tensor, seq_lens: Tensor, alibi_slopes: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, scale: float,
) -> None:  # fmt: skip
    (out,) = outs
    split = (0, 0)
    keys = key_cache
    if key_cache.dim() == 5:
        # The axis of groups goes: kernels find it by its stride.
        split = (key_cache.shape[4], key_cache.stride(3))
        keys = key_cache[:, :, :, 0]
    if 0 in out.shape:
        return
    q = query.unsqueeze(2)
    scales = [None if t is None else t.reshape(1, 1).expand(q.shape[0], keys.shape[2]) for t in (k_scale, v_scale)]
    p = Problem(
        q, keys.transpose(1, 2), value_cache.transpose(1, 2), q.shape[0], 1, block_tables.shape[1] * keys.shape[1], scale,
        bottom=True, slopes=alibi_slopes, used=seq_lens, table=block_tables, descale=(None, scales[0], scales[1]),
        split=split, name="paged_attention",
    )  # fmt: skip
    lse = torch.empty(q.shape[:3], dtype=p.type, device=out.device)
    host.run(p, out.unsqueeze(2), lse, launch_numbers(query))


@operator(floats=("q",))
def mla_decode(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
    softmax_scale: float | None = None, causal: bool = False, num_splits: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention whose values are the first ``head_dim_v`` columns of the keys: q (B, Sq, Hq, d), cache (pages, P, Hkv, d).

    Causal masks are aligned at the bottom right; ``softmax_scale`` defaults to 1 / sqrt(d). Returns (B, Sq, Hq, head_dim_v) and
    the log-sum-exp (B, Hq, Sq). Source: FlashMLA.
    """
    right = 0 if causal else -1
    return flash_attention.meaning(
        q, k_cache, k_cache[..., :head_dim_v], seqused_k=cache_seqlens, block_table=block_table,
        softmax_scale=softmax_scale, right=right,
    )  # fmt: skip


@mla_decode.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, q: Tensor, k_cache: Tensor, block_table: Tensor,
    cache_seqlens: Tensor, head_dim_v: int, softmax_scale: float | None, causal: bool, num_splits: int,
) -> None:  # fmt: skip
    out, lse = outs
    if 0 in out.shape:
        return
    keys = k_cache.transpose(1, 2)
    p = Problem(
        q.transpose(1, 2), keys, keys[..., :head_dim_v], q.shape[0], q.shape[1], block_table.shape[1] * k_cache.shape[1],
        softmax_scale, right=0 if causal else None, bottom=True, used=cache_seqlens, table=block_table,
        name="mla_decode",
    )  # fmt: skip
    host.run(p, out.transpose(1, 2), lse, launch_numbers(q), parts=num_splits)


def flash_mla(
    q: Tensor, block_table: Tensor, blocked_k: Tensor, max_seqlen_pad: int, block_size: int, b: int, s_q: int,
    cache_seqlens: Tensor, h_q: int, h_kv: int = 1, d: int = 576, dv: int = 512, causal: bool = True,
) -> Tensor:  # fmt: skip
    """:func:`mla_decode` of q (b, s_q, h_q, d) over ``blocked_k`` (pages, block_size, h_kv, d): (b, s_q, h_q, dv).

    Source: FlagGems.
    """
    if q.shape != (b, s_q, h_q, d) or blocked_k.shape[1:] != (block_size, h_kv, d):
        raise ShapeError(
            f"flash_mla: q {list(q.shape)} is not {[b, s_q, h_q, d]} or blocked_k {list(blocked_k.shape)} not "
            f"{['pages', block_size, h_kv, d]}"
        )
    return mla_decode(q, blocked_k, block_table, cache_seqlens, dv, None, causal)[0]


def flash_mla_with_kvcache(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
    tile_scheduler_metadata: Tensor | None = None, num_splits: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`mla_decode`; the scheduler's tensors are not needed. Sparse indices and float8 rows have no kernel.

    Source: ``flash_mla.flash_mla_with_kvcache``.
    """
    if indices is not None or is_fp8_kvcache:
        raise NoKernel("flash_mla_with_kvcache: indices and is_fp8_kvcache have no kernel; accepted: None, False")
    return mla_decode(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)
