"""Attention of dense, packed and paged sequences, tokens before heads: the interface of flash-attn and vLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gemskit._dtypes import compute_type
from gemskit._op import operator
from gemskit.errors import ArgumentError, NoKernel
from gemskit.nn import _attention_host as host
from gemskit.nn import _flash_meaning as meaning
from gemskit.nn._attention_host import Problem
from gemskit.nn.attention import draw, launch_numbers
from gemskit.pointwise import exp, mul, neg, sub, zeros_like
from gemskit.pointwise.copying import copy_
from gemskit.reduce import sum


@operator(floats=("q",))
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None, alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0, dropout_p: float = 0.0,
    softmax_scale: float | None = None, left: int = -1, right: int = -1, softcap: float = 0.0, num_splits: int = 0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the functions of this module call: the result, and the log-sum-exp of each row, (.., Hq, tokens).

    q is (B, Sq, Hq, D), or (T, Hq, D) with ``cu_seqlens_q`` (B + 1); k and v likewise with Hkv heads, or pages
    (pages, P, Hkv, D) named by ``block_table`` (B, n). Row i of a sequence sees columns from ``i + Sk - Sq - left`` to
    ``i + Sk - Sq + right``; -1 is no bound. ``s_aux`` are logits of a key without value. ``num_splits`` 0 chooses by rule.
    Differentiable by q, k, v and s_aux, not with pages or scales; ``deterministic``: by sums in a fixed order. Tokens outside of
    every sequence are not written.
    """
    meaning.check(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, alibi_slopes, s_aux)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    rows = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_full(rows, -math.inf, dtype=compute_type(q.dtype))
    if q.is_meta or isinstance(q, FakeTensor):
        return out, lse
    scale = 1 / math.sqrt(q.shape[-1] or 1) if softmax_scale is None else softmax_scale
    found = []
    group = q.shape[-2] // k.shape[-2]
    parts = meaning.sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    for b, here, mine, keys, values in parts:
        wide = compute_type(q.dtype)
        scales = [1.0 if t is None else t[b].to(wide)[:, None] for t in (q_descale, k_descale, v_descale)]
        mine = mine.to(wide) * (scales[0].repeat_interleave(group, 0) if isinstance(scales[0], Tensor) else 1.0)
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        result, total = meaning.one(
            mine, keys.to(wide) * scales[1], values.to(wide) * scales[2], scale, left, right, softcap, slopes, s_aux,
            dropout_p,
        )  # fmt: skip
        found.append((b, here, result.to(q.dtype), total))
    if cu_seqlens_q is None:
        results, totals = [r for _, _, r, _ in found], [t for *_, t in found]
        return (torch.stack(results), torch.stack(totals)) if found else (out, lse)
    for _, here, result, total in found:
        out = out.slice_scatter(result, 0, here.start, here.stop)
        lse = lse.slice_scatter(total, 1, here.start, here.stop)
    return out, lse


flash_attention.float8 = True


def _problem(named: dict[str, Any]) -> Problem:
    """The kernels' view of a call: (batch, heads, rows, columns)."""
    q, k, v, table = named["q"], named["k"], named["v"], named["block_table"]
    bounds_q, bounds_k, used = named["cu_seqlens_q"], named["cu_seqlens_k"], named["seqused_k"]
    packed = bounds_q is not None
    batch = bounds_q.shape[0] - 1 if packed else q.shape[0]
    length = (named["max_seqlen_q"] or q.shape[0]) if packed else q.shape[1]
    if table is not None:
        size = table.shape[1] * k.shape[1]
        if used is not None:
            bounds_k = None
        # A bound for the sizes of launches only: what is used may be no more.
        size = min(size, named["max_seqlen_k"] or size)
    else:
        size = (named["max_seqlen_k"] or k.shape[0]) if packed else k.shape[1]
    keys, values = ((t.unsqueeze(0) if t.dim() == 3 else t).transpose(1, 2) for t in (k, v))
    left, right = (None if n < 0 else n for n in (named["left"], named["right"]))
    return Problem(
        (q.unsqueeze(0) if packed else q).transpose(1, 2), keys, values, batch, length, size, named["softmax_scale"],
        dropout=named["dropout_p"], left=left, right=right, bottom=True, cap=named["softcap"],
        slopes=named["alibi_slopes"], sinks=named["s_aux"], bounds_q=bounds_q, bounds_k=bounds_k, used=used, table=table,
        descale=(named["q_descale"], named["k_descale"], named["v_descale"]),
        name="flash_attention", deterministic=named["deterministic"],
    )  # fmt: skip


def _four(t: Tensor, packed: bool) -> Tensor:
    return (t.unsqueeze(0) if packed else t).transpose(1, 2)


@flash_attention.kernel
def _(outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, **named: Any) -> None:
    out, lse = outs
    if 0 in out.shape:
        return
    p = _problem(named)
    p.seed = draw(p.dropout, out.device)
    packed = named["cu_seqlens_q"] is not None
    rows = lse.unsqueeze(0) if packed else lse
    host.run(p, _four(out, packed), rows, launch_numbers(named["q"]), parts=named["num_splits"])
    if keep is not None and p.seed is not None:
        keep["seed"] = p.seed


def _gradients(
    grads: tuple[Tensor, ...], out: Tensor, out1: Tensor, needs: set[str], **named: Any
) -> dict[str, Tensor]:
    if named["block_table"] is not None or any(named[f"{n}_descale"] is not None for n in "qkv"):
        raise NoKernel("flash_attention: no gradient with block_table or scales; call it under torch.no_grad()")
    seed = named.pop("seed")
    named |= dict(q_descale=None, k_descale=None, v_descale=None)
    q, packed = named["q"], named["cu_seqlens_q"] is not None
    make = zeros_like if packed else torch.empty_like  # tokens outside of every sequence
    found: dict[str, Tensor] = {n: make(named[n]) for n in ("q", "k", "v") if n in needs}
    p = _problem(named)
    p.seed = seed
    if p.empty:
        return {n: zeros_like(named[n]) for n in needs}
    lse, grad_lse = ((t.unsqueeze(0) if packed else t) for t in (out1, grads[1]))
    to = {n: _four(t, packed) for n, t in found.items()}
    delta = host.run_backward(
        p, _four(grads[0], packed), grad_lse, _four(out, packed), lse, launch_numbers(q),
        to_query=to.get("q"), to_key=to.get("k"), to_value=to.get("v"),
    )  # fmt: skip
    if "s_aux" in needs:
        # The sink takes exp(s_aux - lse) of every row and gives no value.
        weight = exp(sub(named["s_aux"].unsqueeze(-1), lse))
        found["s_aux"] = neg(sum(mul(weight, delta), (0, 2)))
    return found


flash_attention.set_gradient(
    _gradients,
    (
        "grads", "out", "out1", "needs", "seed",
        *(n for n in flash_attention.params if n != "num_splits"),
    ),
    of=("q", "k", "v", "s_aux"),
)  # fmt: skip


def _window(causal: bool, window_size: Sequence[int] | None) -> tuple[int, int]:
    left, right = (-1, -1) if window_size is None else window_size
    return int(left), 0 if causal else int(right)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """``softmax(scale * q @ k.mT) @ v`` for q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D); differentiable.

    ``causal`` and ``window_size`` (left, right) are aligned at the bottom right; scores become ``softcap * tanh(s / softcap)``,
    then lose ``alibi_slopes * |i + Sk - Sq - j|``. ``return_attn_probs`` adds the log-sum-exp (B, Hq, Sq), and None in the
    place of the probabilities. The result is bitwise repeatable, gradients are with ``deterministic`` or under
    ``torch.use_deterministic_algorithms(True)``. Source: ``flash_attn.flash_attn_func``.
    """
    left, right = _window(causal, window_size)
    out, lse = flash_attention(
        q, k, v, alibi_slopes=alibi_slopes, dropout_p=dropout_p, softmax_scale=softmax_scale, left=left, right=right,
        softcap=softcap, deterministic=deterministic,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, q_v: Tensor | None = None,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Sequence[int] | None = None, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    return_softmax_lse: bool = False, out: Tensor | None = None, scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    s_aux: Tensor | None = None, num_splits: int = 0, fa_version: int = 2,
) -> Any:  # fmt: skip
    """:func:`flash_attn_func` of packed sequences: q (Tq, Hq, D), k and v (Tk, Hkv, D), bounds ``cu_seqlens_*`` (B + 1) int32.

    With ``block_table`` (B, n) int32, k and v are caches (pages, P, Hkv, D), and ``seqused_k`` (B,) counts keys. ``s_aux``
    (Hq,) are sink logits; ``*_descale`` (B, Hkv) scale float8. A row that sees no key gives 0 and lse -inf. Returns out
    (Tq, Hq, D), written into ``out`` if given, and with ``return_softmax_lse`` the log-sum-exp (Hq, Tq). ``q_v`` has no kernel;
    ``scheduler_metadata`` and ``fa_version`` are not needed. Source: ``vllm_flash_attn.flash_attn_varlen_func``.
    """
    if q_v is not None:
        raise NoKernel("flash_attn_varlen_func: q_v was given; accepted is None")
    left, right = _window(causal, window_size)
    found, lse = flash_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, alibi_slopes, s_aux, q_descale, k_descale, v_descale,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, left, right, softcap, num_splits, deterministic,
    )  # fmt: skip
    if out is not None:
        if out.shape != found.shape:
            raise ArgumentError(
                f"flash_attn_varlen_func: out has shape {list(out.shape)}, the result {list(found.shape)}"
            )
        found = copy_(out, found)
    if return_attn_probs:
        return found, lse, None
    return (found, lse) if return_softmax_lse else found
