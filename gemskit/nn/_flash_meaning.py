"""What :func:`gemskit.flash_attention` means, in plain torch, sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gemskit._dtypes import compute_type
from gemskit.errors import DtypeError, NoKernel, ShapeError


def check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, block_table: Tensor | None,
    alibi_slopes: Tensor | None, s_aux: Tensor | None,
) -> None:  # fmt: skip
    """Refuse what does not fit together."""
    if len({q.dtype, k.dtype, v.dtype} - {torch.float8_e4m3fn, torch.float8_e5m2}) != 1 or not q.is_floating_point():
        raise DtypeError(
            f"flash_attention: q, k and v are of one floating-point dtype (k and v may be float8), "
            f"given {q.dtype}, {k.dtype}, {v.dtype}"
        )
    packed, paged = cu_seqlens_q is not None, block_table is not None
    if paged and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise NoKernel("flash_attention: no gradient with block_table; call it under torch.no_grad()")
    if q.dim() != (3 if packed else 4) or k.dim() != (3 if packed and not paged else 4) or v.dim() != k.dim():
        raise ShapeError(
            f"flash_attention: q is (tokens, heads, D) with cu_seqlens_q, else (batch, tokens, heads, D); k and v likewise, "
            f"or (pages, P, heads, D) with block_table; given {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ShapeError(
            f"flash_attention: q and k need the same D, k and v the same heads, which divide those of q; given "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not paged and packed != (cu_seqlens_k is not None):
        raise ShapeError(
            "flash_attention: cu_seqlens_q and cu_seqlens_k are given both or neither (but with block_table)"
        )
    if not packed and not paged and q.shape[0] != k.shape[0]:
        raise ShapeError(f"flash_attention: q has a batch of {q.shape[0]}, k of {k.shape[0]}")
    heads = q.shape[-2]
    if alibi_slopes is not None and (alibi_slopes.dim() not in (1, 2) or alibi_slopes.shape[-1] != heads):
        raise ShapeError(
            f"flash_attention: alibi_slopes is ({heads},) or (batch, {heads}), given {list(alibi_slopes.shape)}"
        )
    if s_aux is not None and s_aux.shape != (heads,):
        raise ShapeError(f"flash_attention: s_aux is ({heads},), given {list(s_aux.shape)}")


def one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, cap: float, slopes: Tensor | None,
    sinks: Tensor | None, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens, heads, D) of one sequence: its result, and the log-sum-exp (heads, tokens)."""
    wide = compute_type(q.dtype)
    group = q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
    scores = q.to(wide).transpose(0, 1) @ k.mT * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    rows = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[1] - q.shape[0]
    cols = torch.arange(k.shape[1], device=q.device)[None, :]
    if slopes is not None:
        scores = scores - slopes.to(wide)[:, None, None] * (rows - cols).abs()
    hidden = torch.zeros_like(rows - cols, dtype=torch.bool)
    if right >= 0:
        hidden = hidden | (cols > rows + right)
    if left >= 0:
        hidden = hidden | (cols < rows - left)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(-1, q.shape[0], 1)), 2)
    weights = torch._safe_softmax(scores, -1)[:, :, : k.shape[1]]
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ v).transpose(0, 1).to(q.dtype), torch.logsumexp(scores, -1)


def sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None, block_table: Tensor | None,
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of each sequence: its number, where it is in q, and its tokens of q, k and v."""
    bounds = cu_seqlens_q.tolist() if cu_seqlens_q is not None else None
    bounds_k = cu_seqlens_k.tolist() if cu_seqlens_k is not None else None
    used = seqused_k.tolist() if seqused_k is not None else None
    for b in range(q.shape[0] if bounds is None else len(bounds) - 1):
        here = slice(0, q.shape[1]) if bounds is None else slice(bounds[b], bounds[b + 1])
        mine = q[b] if bounds is None else q[here]
        if block_table is not None:
            pages = block_table[b].long()
            count = pages.numel() * k.shape[1]
            if used is not None:
                count = min(count, used[b])
            elif bounds_k is not None:
                count = min(count, bounds_k[b + 1] - bounds_k[b])
            pages = pages[: -(-count // k.shape[1])]
            keys, values = (t[pages].flatten(0, 1)[:count] for t in (k, v))
        else:
            first, last = (0, k.shape[1]) if bounds_k is None else (bounds_k[b], bounds_k[b + 1])
            if used is not None:
                last = min(last, first + used[b])
            whole = (k[b], v[b]) if bounds_k is None else (k, v)
            keys, values = (t[first:last] for t in whole)
        yield b, here, mine, keys, values
