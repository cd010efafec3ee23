"""Attention with functions of the user's: any change of a score, any mask, forward and backward, without storing scores.

The examples are jit functions to be passed, or to be copied: :func:`alibi` and :func:`soft_cap` change scores,
:func:`sliding_window` and :func:`same_document` are masks.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from gemskit import _launch, language
from gemskit._bind import generated, parameters
from gemskit._interpret import interpret
from gemskit._jit import jit
from gemskit.errors import ArgumentError, DeviceError, DtypeError, GradientError, ShapeError
from gemskit.nn import _attention_host as host
from gemskit.nn._attention_host import Mods, Problem
from gemskit.nn.attention import launch_numbers
from gemskit.pointwise import zeros_like


@jit
def alibi(score, batch, head, q_index, kv_index, slopes):  # type: ignore[no-untyped-def]
    """The score less the head's slope for each place between query and key; ``slopes`` (heads,). It is additive."""
    return score - tl.load(slopes + head) * tl.abs(q_index - kv_index)


@jit
def soft_cap(score, batch, head, q_index, kv_index, cap):  # type: ignore[no-untyped-def]
    """``cap * tanh(score / cap)``; its ``score_grad`` is :func:`soft_cap_grad`."""
    return cap * language.tanh(score / cap)


@jit
def soft_cap_grad(score, batch, head, q_index, kv_index, cap):  # type: ignore[no-untyped-def]
    """The derivative of :func:`soft_cap`."""
    t = language.tanh(score / cap)
    return 1 - t * t


@jit
def sliding_window(batch, head, q_index, kv_index, width):  # type: ignore[no-untyped-def]
    """The last ``width`` keys up to the query's own place."""
    return (kv_index <= q_index) & (q_index - kv_index < width)


@jit
def same_document(batch, head, q_index, kv_index, documents):  # type: ignore[no-untyped-def]
    """Keys of the query's own document; ``documents`` has a number for each place."""
    return tl.load(documents + q_index) == tl.load(documents + kv_index)


@jit
def _one(score, batch, head, rows, cols, aux):  # type: ignore[no-untyped-def]
    return score * 0 + 1


@functools.lru_cache(maxsize=256)
def _adapted(fn: Any, kind: str, first: str, count: int) -> Any:
    """``fn`` as a function of ``first`` and the tuple of all that it reads."""
    if not isinstance(fn, JITFunction):
        raise ArgumentError(f"attention: {kind} is {fn!r}; accepted is a function under @triton.jit")
    names = parameters(fn)
    expected = len(first.split(", ")) + count
    if len(names) != expected:
        raise ArgumentError(
            f"attention: {kind} has the parameters {names}, expected are {expected}: {first}, and one for each of the "
            f"{count} in aux"
        )
    rest = "".join(f", aux[{i}]" for i in range(count))
    return generated(f"{kind}_of_{fn.__name__}", f"{first}, aux", f"    return F({first}{rest})", F=fn)


def _mods(score_mod: Any, score_grad: Any, mask_mod: Any, aux: tuple[Any, ...], shared: bool) -> Mods:
    places = "batch, head, rows, cols"
    score = None if score_mod is None else _adapted(score_mod, "score_mod", f"score, {places}", len(aux))
    slope = None
    if score is not None and score_grad is not None:
        additive = isinstance(score_grad, int)
        slope = _one if additive else _adapted(score_grad, "score_grad", f"score, {places}", len(aux))
    visible = None if mask_mod is None else _adapted(mask_mod, "mask_mod", places, len(aux))
    return Mods(score, slope, visible, aux, shared)


def _problem(query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Problem:
    bottom, causal = how["bottom_right"], how["is_causal"]
    return Problem(
        query, key, value, query.shape[0], query.shape[2], key.shape[2], how["scale"], right=0 if causal else None,
        bottom=causal and bottom, mods=how["mods"], name="attention",
    )  # fmt: skip


def _where(query: Tensor) -> Any:
    """Where kernels run: CPU tensors have them by the interpreter alone."""
    if _launch.has_kernels(query.device):
        return contextlib.nullcontext()
    if query.device.type == "cpu":
        return interpret()
    raise DeviceError(f"attention: no kernels for tensors on {query.device}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
        p = _problem(query, key, value, how)
        out = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=p.type, device=query.device)
        if p.empty:
            out.zero_()
            lse.fill_(-math.inf)
        else:
            with _where(query):
                host.run(p, out, lse, launch_numbers(query))
        ctx.how = how
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError("attention: has no second derivative; take the first one without create_graph=True")
        query, key, value, out, lse = ctx.saved_tensors
        p = _problem(query, key, value, ctx.how)
        if p.mods.score is not None and p.mods.slope is None:
            raise GradientError(
                "attention: a gradient of score_mod needs score_grad, its derivative by the score (1 where it only adds)"
            )
        wanted = [torch.empty_like(t) if n else None for t, n in zip((query, key, value), ctx.needs_input_grad)]
        with _where(query):
            if p.empty:
                return (*(None if t is None else zeros_like(t) for t in wanted), None)
            to_query, to_key, to_value = wanted
            host.run_backward(
                p, grads[0], grads[1], out, lse, launch_numbers(query),
                to_query=to_query, to_key=to_key, to_value=to_value,
            )  # fmt: skip
        return (*wanted, None)


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any = ..., mask_mod: Any = ..., score_grad: Any = ...,
    aux: Sequence[Any] = ..., scale: float | None = ..., is_causal: bool = ..., bottom_right: bool = ...,
    mask_shared: bool = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any = ..., mask_mod: Any = ..., score_grad: Any = ...,
    aux: Sequence[Any] = ..., scale: float | None = ..., is_causal: bool = ..., bottom_right: bool = ...,
    mask_shared: bool = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any = None, mask_mod: Any = None, score_grad: Any = None,
    aux: Sequence[Any] = (), scale: float | None = None, is_causal: bool = False, bottom_right: bool = False,
    mask_shared: bool = False, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of query (B, Hq, L, E) over key (B, H, S, E) and value (B, H, S, Ev) with a user's scores and mask.

    ``score_mod(score, batch, head, q_index, kv_index, *aux)`` and ``mask_mod(batch, head, q_index, kv_index, *aux)`` are
    functions under ``@triton.jit``: the scaled score becomes what the first returns, and takes part where the second returns
    True. They are called with blocks that broadcast (indices int32) and read the tensors and numbers in ``aux`` themselves;
    indices lie within L and S. Tiles in which ``mask_mod`` leaves nothing are skipped; ``mask_shared`` says that it does not
    ask for batch and head, so that the tiles are listed once.

    Differentiable by query, key and value; with ``score_mod`` its derivative by the score is to be given as ``score_grad``, a
    function of the same arguments, or 1 where ``score_mod`` only adds. Each of the H heads serves Hq / H query heads. A row
    without any score gives zeros. ``return_lse`` adds the log-sum-exp (B, Hq, L). On CPU tensors the kernels are interpreted.
    """
    for n, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ShapeError(f"attention: {n} is (batch, heads, rows, columns), given {list(t.shape)}")
        if not t.is_floating_point() or t.dtype != query.dtype:
            raise DtypeError(f"attention: {n} is {t.dtype}; accepted is one floating-point dtype for all three")
        if t.device != query.device:
            raise DeviceError(f"attention: {n} is on {t.device}, query on {query.device}")
    if (
        query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]
        or key.shape[1] == 0 or query.shape[1] % key.shape[1]
    ):  # fmt: skip
        raise ShapeError(
            f"attention: query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit together"
        )
    how = dict(
        mods=_mods(score_mod, score_grad, mask_mod, tuple(aux), mask_shared), scale=scale, is_causal=is_causal,
        bottom_right=bottom_right,
    )  # fmt: skip
    out, lse = cast("tuple[Tensor, Tensor]", _Attention.apply(query, key, value, how))  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out
