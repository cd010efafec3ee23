"""Many tensors in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit import _checks, _launch
from gemskit._op import operator
from gemskit.errors import ArgumentError
from gemskit.pointwise._place import cast, join, narrow

#: How many tensors one launch joins.
GROUP = 8


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


@operator(aten="cat")
def _cat(
    t0: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
    t3: Tensor | None = None,
    t4: Tensor | None = None,
    t5: Tensor | None = None,
    t6: Tensor | None = None,
    t7: Tensor | None = None,
    dim: int = 0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`cat` of up to 8 tensors."""
    return torch.cat(_given(t0, t1, t2, t3, t4, t5, t6, t7), dim)


def _legacy(t: Tensor) -> bool:
    """torch skips empty tensors of one dimension, whatever the others have."""
    return t.ndim == 1 and not t.shape[0]


@_cat.kernel
def _(outs: tuple[Tensor, ...], keep: Any, dim: int, **tensors: Tensor | None) -> None:
    start, pieces = 0, []
    for t in tensors.values():
        if t is not None and not _legacy(t):
            pieces.append((outs[0].narrow(dim, start, t.shape[dim]), t))
            start += t.shape[dim]
    join(pieces)


@_cat.gradient_by
def _(grad: Tensor, dim: int, like: dict[str, Any], needs: set[str]) -> dict[str, Tensor]:
    start, found = 0, {}
    for n, (shape, dtype) in like.items():
        if shape == (0,):
            found[n] = torch.empty(0, dtype=dtype, device=grad.device)
            continue
        if n in needs:
            found[n] = cast(narrow(grad, dim, start, shape[dim]), dtype)
        start += shape[dim]
    return found


@operator(aten="stack")
def _stack(
    t0: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
    t3: Tensor | None = None,
    t4: Tensor | None = None,
    t5: Tensor | None = None,
    t6: Tensor | None = None,
    t7: Tensor | None = None,
    axis: int = 0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`stack` of up to 8 tensors."""
    return torch.stack(_given(t0, t1, t2, t3, t4, t5, t6, t7), axis)


@_stack.kernel
def _(outs: tuple[Tensor, ...], keep: Any, axis: int, **tensors: Tensor | None) -> None:
    join([(outs[0].select(axis, i), t) for i, t in enumerate(_given(*tensors.values()))])


@_stack.gradient_by
def _(grad: Tensor, axis: int, like: dict[str, Any], needs: set[str]) -> dict[str, Tensor]:
    return {n: cast(grad.select(axis, i), dtype) for i, (n, (_, dtype)) in enumerate(like.items()) if n in needs}


def _checked(name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence) or not len(tensors):
        raise ArgumentError(f"{name}: tensors must be a list or tuple of at least one Tensor, given {tensors!r}")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise ArgumentError(f"{name}: tensors[{i}] must be a Tensor, given {type(t).__name__} {t!r}")
    return tensors


def _grouped(tensors: Sequence[Tensor], dim: int, out: Tensor | None, stacked: bool) -> Tensor:
    """More tensors than one launch takes: groups go to their part of the result.

    Under autograd and ``torch.compile``, which follow no writes into parts, groups are joined first.
    """
    op: Callable[..., Tensor] = _stack if stacked else _cat
    groups = [tensors[i : i + GROUP] for i in range(0, len(tensors), GROUP)]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if recorded or torch.compiler.is_compiling() or not _launch.has_kernels(tensors[0].device):
        return cat([_joined(op, g, dim) for g in groups], dim, out=out)
    stand_ins = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    try:
        found = (torch.stack if stacked else torch.cat)(stand_ins, dim)
    except (RuntimeError, IndexError) as e:
        raise _checks.translate(_stack if stacked else _cat, (*tensors[:GROUP], dim), e) from e
    result = torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=tensors[0].device)
    start = 0
    for g in groups:
        n = len(g) if stacked else sum(0 if _legacy(t) else t.shape[dim] for t in g)
        _joined(op, g, dim, out=result.narrow(dim, start, n))
        start += n
    return result if out is None else cat([result], dim, out=out)


def _joined(op: Callable[..., Tensor], group: Sequence[Tensor], dim: int, **out: Tensor | None) -> Tensor:
    return op(*group, *(None,) * (GROUP - len(group)), dim, **out)


def cat(tensors: Sequence[Tensor], dim: int = 0, *, out: Tensor | None = None) -> Tensor:
    """``tensors`` one after the other along ``dim``; they have one shape but there, and are promoted to one dtype.

    Empty tensors of one dimension are skipped. Up to 8 tensors take one launch. Source: ``torch.cat``.
    """
    tensors = _checked("cat", tensors)
    if len(tensors) <= GROUP:
        return _joined(_cat, tensors, dim, out=out)
    return _grouped(tensors, dim, out, stacked=False)


def stack(tensors: Sequence[Tensor], dim: int = 0, *, out: Tensor | None = None) -> Tensor:
    """``tensors`` of one shape along a new dimension ``dim``, promoted to one dtype. Source: ``torch.stack``."""
    tensors = _checked("stack", tensors)
    if len(tensors) <= GROUP:
        return _joined(_stack, tensors, dim, out=out)
    return _grouped(tensors, dim, out, stacked=True)


def hstack(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """:func:`cat` along the second dimension; along the first for tensors of one. Source: ``torch.hstack``."""
    lined = [t.reshape(1) if not t.ndim else t for t in _checked("hstack", tensors)]
    return cat(lined, 0 if lined[0].ndim == 1 else 1, out=out)


def vstack(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """:func:`cat` along the first dimension, where tensors of one dimension are rows. Source: ``torch.vstack``."""
    return cat([t if t.ndim > 1 else t.reshape(1, -1) for t in _checked("vstack", tensors)], 0, out=out)
