"""Rotary position embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._dtypes import TRITON, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named, Op, P, R
from gemskit.errors import ArgumentError, DtypeError, ShapeError


@jit(repr=lambda _: "apply_rotary_pos_emb")
def rotary(
    outs, ins, cos, sin, position, sizes, out_tokens, in_tokens, cos_tokens, sin_tokens, position_tokens,
    out_heads, in_heads, out_channels, in_channels, cos_channel, sin_channel, cos_row, sin_row, heads, rows,
    COMPUTE: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr,
    BACK: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program rotates all heads of a token, of q and of k: pairs are channels (STEP * p, STEP * p + SECOND)."""
    token = tl.program_id(0)
    p = tl.arange(0, BP)
    live = p < PAIRS
    if WIDE:
        token = token.to(tl.int64)
        p = p.to(tl.int64)
    cos += offset(token, sizes, cos_tokens)
    sin += offset(token, sizes, sin_tokens)
    seen = live
    if position is not None:
        row = tl.load(position + offset(token, sizes, position_tokens)).to(tl.int64)
        # A position outside the table reads nothing and gives NaN.
        seen = live & (row >= 0) & (row < rows)
        cos += row * cos_row
        sin += row * sin_row
    c = tl.load(cos + p * cos_channel, seen, other=float("nan")).to(COMPUTE)[None, :]
    s = tl.load(sin + p * sin_channel, seen, other=float("nan")).to(COMPUTE)[None, :]
    if BACK:
        s = -s
    p = p[None, :]
    for j in tl.static_range(len(ins)):
        source = ins[j] + offset(token, sizes, in_tokens[j])
        target = outs[j] + offset(token, sizes, out_tokens[j])
        for first in range(0, heads[j], BH):
            h = first + tl.arange(0, BH)[:, None]
            if WIDE:
                h = h.to(tl.int64)
            mask = (h < heads[j]) & live[None, :]
            at = h * in_heads[j] + p * STEP * in_channels[j]
            a = tl.load(source + at, mask).to(COMPUTE)
            b = tl.load(source + at + SECOND * in_channels[j], mask).to(COMPUTE)
            to = h * out_heads[j] + p * STEP * out_channels[j]
            tl.store(target + to, (a * c - b * s).to(outs[j].dtype.element_ty), mask)
            tl.store(target + to + SECOND * out_channels[j], (b * c + a * s).to(outs[j].dtype.element_ty), mask)
            if REST > 0:
                r = tl.arange(0, BR)[None, :]
                if WIDE:
                    r = r.to(tl.int64)
                mask = (h < heads[j]) & (r < REST)
                r += 2 * PAIRS
                rest = tl.load(source + h * in_heads[j] + r * in_channels[j], mask)
                tl.store(target + h * out_heads[j] + r * out_channels[j], rest, mask)


def _tokens_first(t: Tensor, layout: str) -> Tensor:
    """``t`` as (..., seq, heads, channels)."""
    return t if layout == "bshd" else t.transpose(-3, -2)


def _table(t: Tensor, channels: int, interleaved: bool) -> Tensor:
    """cos or sin with one entry for each pair of channels."""
    if t.shape[-1] != channels:
        return t
    return t[..., ::2] if interleaved else t[..., : channels // 2]


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, layout: str) -> None:
    name = "apply_rotary_pos_emb"
    if layout not in ("bshd", "bhsd"):
        raise ArgumentError(f"{name}: layout is {layout!r}; accepted: 'bshd' (heads second to last), 'bhsd'")
    for n, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not t.is_floating_point():
            raise DtypeError(f"{name}: {n} must be floating point, given {t.dtype}")
    if (
        q.ndim < 3
        or k.ndim != q.ndim
        or _token_shape(q, layout) != _token_shape(k, layout)
        or q.shape[-1] != k.shape[-1]
    ):
        form = "(..., seq, heads, D)" if layout == "bshd" else "(..., heads, seq, D)"
        raise ShapeError(
            f"{name}: q and k must have the same tokens and channels, {form}, given {list(q.shape)} and {list(k.shape)}"
        )
    tokens, channels = _token_shape(q, layout), q.shape[-1]
    width = cos.shape[-1] if cos.ndim else 0
    if cos.shape != sin.shape or cos.ndim < 2 or not (width == channels or 0 < width <= channels // 2) or channels % 2:
        raise ShapeError(
            f"{name}: cos and sin must have the same shape (..., width) with width {channels} or at most {channels // 2} "
            f"for an even number of channels, given {list(cos.shape)} and {list(sin.shape)} for {channels} channels"
        )
    if position_ids is not None:
        if position_ids.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name}: position_ids must be int32 or int64, given {position_ids.dtype}")
        if cos.ndim != 2 or not _fits(position_ids.shape, tokens):
            raise ShapeError(
                f"{name}: position_ids {list(position_ids.shape)} must broadcast to the tokens {list(tokens)} and select "
                f"rows of two-dimensional cos and sin, given {list(cos.shape)}"
            )
    elif cos.ndim == 2 and cos.shape[0] < tokens[-1]:
        raise ShapeError(f"{name}: cos and sin have {cos.shape[0]} rows, fewer than the {tokens[-1]} tokens of seq")
    elif cos.ndim > 2 and not _fits(cos.shape[:-1], tokens):
        raise ShapeError(f"{name}: cos and sin {list(cos.shape)} must broadcast to the tokens {list(tokens)}")


def _fits(shape: Sequence[int], into: Sequence[int]) -> bool:
    lead = len(into) - len(shape)
    return lead >= 0 and all(n in (1, m) for n, m in zip(shape, into[lead:]))


def _token_shape(t: Tensor, layout: str) -> tuple[int, ...]:
    return tuple(_tokens_first(t, layout).shape[:-2])


def _plan(named: Named, ins: Sequence[Tensor], outs: Sequence[Tensor], back: bool) -> Callable[..., None]:
    """The launch that rotates ``ins`` into ``outs``, backwards for the gradient: ``run(outs, ins, arguments)``."""
    cos, sin, position, interleaved = (named[n] for n in ("cos", "sin", "position_ids", "rotary_interleaved"))
    ins, outs = ([_tokens_first(t, named["layout"]) for t in ts] for ts in (ins, outs))
    tokens, channels = tuple(ins[0].shape[:-2]), ins[0].shape[-1]
    cos, sin = (_table(t, channels, interleaved) for t in (cos, sin))
    pairs = cos.shape[-1]
    if position is None:
        tables = [
            _layout.broadcast_strides(t[..., 0] if t.ndim > 2 else t[: tokens[-1], 0], tokens) for t in (cos, sin)
        ]
        selected = (0,) * len(tokens)
    else:
        tables = [(0,) * len(tokens)] * 2
        selected = _layout.broadcast_strides(position, tokens)
    strides = [*(t.stride()[:-2] for t in (*outs, *ins)), *tables, selected]
    sizes, flat = _layout.collapse(tokens, strides)
    rest, bp = channels - 2 * pairs, _layout.next_power_of_2(pairs)
    n, heads = len(ins), tuple(t.shape[-2] for t in ins)
    grid = math.prod(tokens) if any(heads) else 0
    meta = dict(
        COMPUTE=TRITON[compute_type(functools.reduce(torch.promote_types, [t.dtype for t in ins]))],
        PAIRS=pairs,
        REST=rest,
        STEP=2 if interleaved else 1,
        SECOND=1 if interleaved else pairs,
        BACK=back,
        # 2048 pairs a step are 16 values of each factor in a thread.
        BH=min(_layout.next_power_of_2(max(heads)), max(1, 2048 // bp)),
        BP=bp,
        BR=_layout.next_power_of_2(max(rest, 1)),
        WIDE=_layout.is_wide(sizes, flat) or _layout.any_wide(*outs, *ins, cos, sin),
        num_warps=4,
    )
    by_head = (tuple(t.stride(-2) for t in outs), tuple(t.stride(-2) for t in ins))
    by_channel = (tuple(t.stride(-1) for t in outs), tuple(t.stride(-1) for t in ins), cos.stride(-1), sin.stride(-1))
    rows = (cos.stride(0), sin.stride(0), heads, cos.shape[0])
    strided = (
        sizes,
        tuple(flat[:n]),
        tuple(flat[n : 2 * n]),
        flat[-3],
        flat[-2],
        flat[-1],
        *by_head,
        *by_channel,
        *rows,
    )

    def run(outs: Sequence[Tensor], ins: Sequence[Tensor], arguments: Named) -> None:
        if grid:
            tables = arguments["cos"], arguments["sin"], arguments["position_ids"]
            # In place, the channels that stay are there already.
            how = dict(meta, REST=0) if outs[0] is ins[0] else meta
            launch(rotary, (grid,), (tuple(outs), tuple(ins), *tables, *strided), how)

    return run


class _Rotary(Op[P, R]):
    """The operator with its one kernel for q and k."""

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        run = _plan(named, [named["q"], named["k"]], outs, back=False)
        return lambda outs, keep, arguments: run(outs, [arguments["q"], arguments["k"]], arguments)


def _rotary(meaning: Callable[P, R]) -> _Rotary[P, R]:
    return _Rotary(meaning, writes=("q", "k"))


@_rotary
def apply_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    rotary_interleaved: bool = False,
    *,
    layout: str = "bshd",
) -> tuple[Tensor, Tensor]:
    """Rotate pairs ``(a, b)`` of channels to ``(a * cos - b * sin, b * cos + a * sin)``.

    Pairs are channels (i, i + n), or (2i, 2i + 1) if ``rotary_interleaved``, for the n entries of cos; the others stay.

    Args:
        q: (..., seq, heads, D), or (..., heads, seq, D) with ``layout="bhsd"``.
        k: as ``q`` with any number of heads.
        cos: (max_seq, n) with n <= D / 2, or (max_seq, D) with one entry a channel (equal within a pair); or rows of the
            tokens, (..., seq, n) broadcast to those of ``q``. Has no gradient.
        sin: as ``cos``.
        position_ids: rows of cos and sin (int32 or int64) broadcast to the tokens (..., seq); by default the index
            along seq. A position outside the table gives NaN on an accelerator, an error on the CPU.

    Computed in float32 (float64 for float64). ``apply_rotary_pos_emb_`` overwrites ``q`` and ``k``.
    Source: RoPE (Su et al. 2021); both cos forms of Transformers.
    """
    _check(q, k, cos, sin, position_ids, layout)
    tokens = _token_shape(q, layout)
    cos, sin = (_table(t, q.shape[-1], rotary_interleaved) for t in (cos, sin))
    if position_ids is not None:
        cos, sin = (torch.nn.functional.embedding(position_ids, t) for t in (cos, sin))
    elif cos.ndim == 2:
        cos, sin = cos[: tokens[-1]], sin[: tokens[-1]]
    turned = [_turn(_tokens_first(t, layout), cos.unsqueeze(-2), sin.unsqueeze(-2), rotary_interleaved) for t in (q, k)]
    return _tokens_first(turned[0], layout), _tokens_first(turned[1], layout)


def _turn(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    n, wide = cos.shape[-1], compute_type(t.dtype)
    x, c, s = t.to(wide), cos.to(wide), sin.to(wide)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    a, b = x[..., first], x[..., second]
    out = torch.empty_like(t).copy_(t)
    out[..., first] = (a * c - b * s).to(t.dtype)
    out[..., second] = (b * c + a * s).to(t.dtype)
    return out


@apply_rotary_pos_emb.shape_rule
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, rotary_interleaved: bool, layout: str
) -> list[tuple[int, ...]] | None:
    _check(q, k, cos, sin, position_ids, layout)
    plain = all(0 not in t.shape and t.stride() == _layout.contiguous(t.shape) for t in (q, k))
    return [tuple(q.shape), tuple(k.shape)] if plain else None


def _gradient(grads: tuple[Tensor, Tensor], needs: set[str], **named: Any) -> dict[str, Tensor]:
    wanted = {n: g for n, g in zip(("q", "k"), grads) if n in needs}
    outs = [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in wanted.values()]
    if wanted:
        _plan(named, list(wanted.values()), outs, back=True)(outs, list(wanted.values()), named)
    return dict(zip(wanted, outs))


apply_rotary_pos_emb.set_gradient(
    _gradient, ("grads", "needs", "cos", "sin", "position_ids", "rotary_interleaved", "layout"), of=("q", "k")
)
apply_rotary_pos_emb_ = apply_rotary_pos_emb.inplace
