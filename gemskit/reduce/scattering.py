"""Elements written by index.

An index outside its dimension raises on the CPU; on an accelerator, where raising would wait for the device, nothing is written.
Sums of ints and extremes are the same in every run. Sums of floats are atomic, in no fixed order, those of halves in float32 and
rounded once; of several values written to one element it keeps any. Under ``torch.use_deterministic_algorithms(True)`` sums do
not depend on timing, the last value (in the order of the index) is kept, and both take more memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._dtypes import Number, compute_type
from gemskit._op import operator
from gemskit.errors import ArgumentError, DtypeError, GradientError
from gemskit.pointwise._indexing import advanced, along, at_least_1d, corner, flat, masked, read, rows
from gemskit.pointwise._place import clear, copy, zeros
from gemskit.pointwise.indexing import _PLACES, Indices, expanded, trimmed
from gemskit.reduce import _scatter, _scatter_reduce
from gemskit.reduce._drive import element
from gemskit.reduce._fold import Fold

Grads = dict[str, Tensor | None]


def _picked(source: Tensor, where: Any, like: tuple[Sequence[int], torch.dtype], index: Tensor) -> Tensor:
    """The gradient of what was written: ``source`` read at the spots, zeros beyond the index."""
    out = torch.empty(tuple(like[0]), dtype=like[1], device=source.device)
    if tuple(out.shape) != tuple(index.shape):
        clear(out)
    read(corner(out, index), source, where(source))
    return out


def _without(grad: Tensor, where: Any) -> Tensor:
    """The gradient of what was overwritten: zero at the spots."""
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    _scatter.start(out, grad)
    _scatter.store(out, where, 0)
    return out


# -- elements along one dimension ------------------------------------------------------------------------------------------


@operator(aten="scatter.src")
def _scatter_src(
    input: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor | Number,
    reduce: str | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`scatter` of a tensor or a number."""
    if reduce is not None:
        return torch.scatter(input, dim, index, src, reduce=reduce)  # type: ignore[arg-type, call-overload, no-any-return]
    return torch.scatter(input, dim, index, src)  # type: ignore[arg-type]


@_scatter_src.kernel
def _(
    outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, src: Tensor | Number, reduce: str | None
) -> None:
    def where(t: Tensor) -> Any:
        return along(t, dim, index)

    source = corner(src, index) if isinstance(src, Tensor) else src
    if reduce is None:
        _scatter.start(outs[0], input)
        _scatter.store(outs[0], where, source)
    elif reduce == "add":
        _scatter.add(outs[0], input, where, source)
    else:
        _scatter.multiply(outs[0], input, dim, index, source)


@_scatter_src.gradient_by
def _(grad: Tensor, dim: int, index: Tensor, reduce: str | None, needs: set[str], like: Mapping[str, Any]) -> Grads:
    if reduce is not None:
        raise GradientError(f"scatter: has no gradient with reduce={reduce!r}, in torch neither; use scatter_reduce")

    def where(t: Tensor) -> Any:
        return along(t, dim, index)

    found: Grads = {"input": _without(grad, where) if "input" in needs else None}
    if "src" in needs:
        found["src"] = _picked(grad, where, like["src"], index)
    return found


_scatter_src_ = _scatter_src.inplace


def _source(name: str, src: Tensor | Number | None, value: Number | None, reduce: str | None) -> Tensor | Number:
    if (src is None) == (value is None):
        raise ArgumentError(f"{name}: takes either src or value, given {'both' if value is not None else 'neither'}")
    if reduce not in (None, "add", "multiply"):
        raise ArgumentError(f"{name}: reduce is {reduce!r}; accepted: None, 'add', 'multiply'")
    found = value if src is None else src
    assert found is not None
    return found


def scatter(
    input: Tensor, dim: int, index: Tensor, src: Tensor | Number | None = None, *, value: Number | None = None,
    reduce: str | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``input`` with ``src[i, j]`` (or ``value``) at ``[i, index[i, j]]`` for ``dim`` 1; ``reduce``: ``add`` or ``multiply``.

    ``src`` has the dtype of ``input`` and at least the size of ``index``. Of several values for one element any is kept, the
    last in deterministic mode. Source: ``torch.scatter``.
    """
    return _scatter_src(input, dim, index, _source("scatter", src, value, reduce), reduce, out=out)


def scatter_(
    input: Tensor, dim: int, index: Tensor, src: Tensor | Number | None = None, *, value: Number | None = None,
    reduce: str | None = None,
) -> Tensor:  # fmt: skip
    """In-place :func:`scatter`: overwrites ``input``. Source: ``torch.Tensor.scatter_``."""
    return _scatter_src_(input, dim, index, _source("scatter_", src, value, reduce), reduce)


@operator(aten="scatter_add")
def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input`` with ``src[i, j]`` added at ``[i, index[i, j]]`` for ``dim`` 1. Source: ``torch.scatter_add``."""
    return torch.scatter_add(input, dim, index, src)


@scatter_add.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, src: Tensor) -> None:
    _scatter.add(outs[0], input, lambda t: along(t, dim, index), corner(src, index))


@scatter_add.gradient_by
def _(grad: Tensor, dim: int, index: Tensor, needs: set[str], like: Mapping[str, Any]) -> Grads:
    found: Grads = {"input": grad}
    if "src" in needs:
        found["src"] = _picked(grad, lambda t: along(t, dim, index), like["src"], index)
    return found


scatter_add_ = scatter_add.inplace


@operator(aten="scatter_reduce.two")
def scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``input`` with ``src[i, j]`` reduced into ``[i, index[i, j]]`` for ``dim`` 1: sum, prod, mean, amax or amin.

    Without ``include_self`` what is written to does not take part. Each element of a product looks through the whole index along
    ``dim``. The gradient of extremes is shared by ties. Source: ``torch.scatter_reduce``.
    """
    if reduce == "mean" and input.dtype == torch.bool:
        raise DtypeError("scatter_reduce: bools have no mean; accepted are ints and floats")
    return torch.scatter_reduce(input, dim, index, src, reduce, include_self=include_self)


@scatter_reduce.kernel
def _(
    outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str,
    include_self: bool,
) -> None:  # fmt: skip
    _scatter_reduce.reduce_into(outs[0], input, dim, index, corner(src, index), reduce, include_self)


@scatter_reduce.gradient_by
def _(
    grad: Tensor, input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool, out: Tensor,
    needs: set[str],
) -> Grads:  # fmt: skip
    return _scatter_reduce.gradients(grad, input, dim, index, src, reduce, include_self, out, needs)


scatter_reduce_ = scatter_reduce.inplace


# -- rows ------------------------------------------------------------------------------------------------------------------


@operator(aten="index_add")
def index_add(
    input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Number = 1, out: Tensor | None = None
) -> Tensor:
    """``input`` with ``alpha * source[:, j]`` added at ``[:, index[j]]`` for ``dim`` 1. Source: ``torch.index_add``."""
    return torch.index_add(input, dim, index, source, alpha=alpha)


@index_add.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Number) -> None:
    _scatter.add(outs[0], input, lambda t: rows(t, dim, index), at_least_1d(source), by=_factor(alpha))


def _factor(alpha: Number) -> Number | None:
    return None if type(alpha) is int and alpha == 1 else alpha


@index_add.gradient_by
def _(grad: Tensor, dim: int, index: Tensor, alpha: Number, needs: set[str], like: Mapping[str, Any]) -> Grads:
    found: Grads = {"input": grad}
    if "source" in needs:
        dx = _rows_of(grad, dim, index, like["source"])
        if _factor(alpha) is not None:
            scaled = torch.empty_like(dx)
            _SCALE({"value": dx, "by": alpha}, [scaled], compute_type(dx.dtype))
            dx = scaled
        found["source"] = dx
    return found


def _rows_of(grad: Tensor, dim: int, index: Tensor, like: tuple[Sequence[int], torch.dtype]) -> Tensor:
    out = torch.empty(tuple(like[0]), dtype=like[1], device=grad.device)
    read(out, grad, rows(grad, dim, index))
    return out


_SCALE = _scatter.SCALE
index_add_ = index_add.inplace


@operator(aten="index_copy")
def index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input`` with ``source[:, j]`` at ``[:, index[j]]`` for ``dim`` 1; duplicates as in :func:`scatter`.

    Source: ``torch.index_copy``.
    """
    return torch.index_copy(input, dim, index, source)


@index_copy.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    _scatter.start(outs[0], input)
    _scatter.store(outs[0], lambda t: rows(t, dim, index), at_least_1d(source))


@index_copy.gradient_by
def _(grad: Tensor, dim: int, index: Tensor, needs: set[str], like: Mapping[str, Any]) -> Grads:
    found: Grads = {"input": _without(grad, lambda t: rows(t, dim, index)) if "input" in needs else None}
    if "source" in needs:
        found["source"] = _rows_of(grad, dim, index, like["source"])
    return found


index_copy_ = index_copy.inplace


@operator(aten="index_fill.int_Scalar")
def index_fill(input: Tensor, dim: int, index: Tensor, value: Tensor | Number) -> Tensor:
    """``input`` with ``value`` (a number or a 0-dim tensor) at ``[:, index]`` for ``dim`` 1; negative indices wrap.

    Source: ``torch.index_fill``.
    """
    return torch.index_fill(input, dim, index, value)  # type: ignore[arg-type]


@index_fill.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, dim: int, index: Tensor, value: Tensor | Number) -> None:
    _scatter.start(outs[0], input)
    _scatter.store(outs[0], lambda t: _scatter.wrapped(rows(t, dim, index)), value)


@index_fill.gradient_by
def _(grad: Tensor, dim: int, index: Tensor, needs: set[str], like: Mapping[str, Any]) -> Grads:
    def where(t: Tensor) -> Any:
        return _scatter.wrapped(rows(t, dim, index))

    found: Grads = {"input": _without(grad, where) if "input" in needs else None}
    if "value" in needs:
        # Each row once, however often it was filled.
        grad = at_least_1d(grad)
        shape = [n if d == dim % grad.ndim else 1 for d, n in enumerate(grad.shape)]
        hits = zeros(shape, torch.int32, grad.device)
        _scatter.count(hits.view(-1), lambda t: _scatter.wrapped(rows(t, 0, index)))
        named = {"grad": grad, "hits": hits}
        found["value"] = _HIT.to_shape(named, tuple(grad.shape), like["value"], compute_type(grad.dtype))
    return found


def _total(grad: Tensor, like: tuple[Sequence[int], torch.dtype]) -> Tensor:
    """``grad`` summed down to the shape that was broadcast."""
    if tuple(like[0]) == tuple(grad.shape):
        return grad
    return _TOTAL.to_shape({"input": grad}, tuple(grad.shape), like, compute_type(grad.dtype))


_HIT = Fold.of_formula("index_fill_grad", _scatter.hit, 1, 0, keep=("hits",))
_TOTAL = Fold.of_formula("index_put_grad", element, 1, 0, keep=())
index_fill_ = index_fill.inplace


# -- several dimensions ----------------------------------------------------------------------------------------------------


@operator(aten="index_put")
def _index_put(
    input: Tensor,
    values: Tensor,
    accumulate: bool,
    i0: Tensor | None,
    i1: Tensor | None = None,
    i2: Tensor | None = None,
    i3: Tensor | None = None,
    i4: Tensor | None = None,
    i5: Tensor | None = None,
    i6: Tensor | None = None,
    i7: Tensor | None = None,
) -> Tensor:
    """:func:`index_put` by ints, one argument for each dimension."""
    indices = trimmed(i0, i1, i2, i3, i4, i5, i6, i7)
    found: Tensor = torch.ops.aten.index_put(input, indices, values, accumulate)
    return found


@_index_put.kernel
def _(
    outs: Sequence[Tensor], keep: Any, input: Tensor, values: Tensor, accumulate: bool, **indices: Tensor | None
) -> None:
    found = trimmed(*indices.values())

    def where(t: Tensor) -> Any:
        return advanced(t, found)

    if accumulate:
        _scatter.add(outs[0], input, where, values)
    else:
        _scatter.start(outs[0], input)
        _scatter.store(outs[0], where, values)


def _index_put_gradient(
    grad: Tensor, accumulate: bool, needs: set[str], like: Mapping[str, Any], **indices: Tensor | None
) -> Grads:
    trim = trimmed(*indices.values())

    def where(t: Tensor) -> Any:
        return advanced(t, trim)

    found: Grads = {"input": grad}
    if "input" in needs and not accumulate:
        found["input"] = _without(grad, where)
    if "values" in needs:
        spots = where(grad)
        dx = torch.empty(spots.shape, dtype=grad.dtype, device=grad.device)
        read(dx, grad, spots)
        found["values"] = _total(dx, like["values"])
    return found


_index_put.set_gradient(_index_put_gradient, ("grad", "accumulate", "needs", "like", *_PLACES), of=("input", "values"))
_index_put_ = _index_put.inplace


def _values(name: str, input: Tensor, values: Tensor) -> Tensor:
    if values.dtype != input.dtype:
        raise DtypeError(f"{name}: values must have the dtype of input, {input.dtype}, given {values.dtype}")
    if values.device != input.device and values.device.type == "cpu" and not values.ndim:
        return values.to(input.device)
    return values


def index_put(input: Tensor, indices: Indices, values: Tensor, accumulate: bool = False) -> Tensor:
    """``input`` with ``values`` (broadcast) at ``[indices]``, added there if ``accumulate``; indices as in :func:`index`.

    Duplicates as in :func:`scatter`. Source: ``torch.index_put``.
    """
    values = _values("index_put", input, values)
    return _index_put(input, values, accumulate, *expanded("index_put", input, indices))


def index_put_(input: Tensor, indices: Indices, values: Tensor, accumulate: bool = False) -> Tensor:
    """In-place :func:`index_put`: overwrites ``input``. Source: ``torch.Tensor.index_put_``."""
    values = _values("index_put_", input, values)
    return _index_put_(input, values, accumulate, *expanded("index_put_", input, indices))


# -- by mask ---------------------------------------------------------------------------------------------------------------


def _counted(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """How many elements of ``mask``, broadcast to ``shape``, are True up to and including each."""
    # Scans are of this package.
    from gemskit.reduce.scans import cumsum

    size = tuple(shape)
    if tuple(mask.shape) != size or not mask.is_contiguous():
        dense = torch.empty(size, dtype=torch.bool, device=mask.device)
        copy(mask.expand(size), dense)
        mask = dense
    dtype = torch.int32 if mask.numel() < 2**31 else torch.int64
    (found,) = cumsum.forward((mask.view(-1), 0, dtype))
    return found.view(size)


def _in_order(t: Tensor, mask: Tensor, shape: Sequence[int]) -> Any:
    """The elements of ``t``, one after the other where ``mask`` is True."""
    spots = flat(t, _counted(mask, shape), wraps=False)
    return masked(_scatter.shifted(spots, 1), mask)


@operator(aten="masked_scatter")
def masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``input`` with the elements of ``source``, one after the other, where ``mask`` (bool, broadcast) is True.

    ``source`` has at least as many elements; missing ones raise on the CPU and leave ``input`` as it is on an accelerator.
    Source: ``torch.masked_scatter``.
    """
    return torch.masked_scatter(input, mask, source)


@masked_scatter.kernel
def _(outs: Sequence[Tensor], keep: Any, input: Tensor, mask: Tensor, source: Tensor) -> None:
    out = outs[0]
    read(out, source, _in_order(source, mask, out.shape), input)


@masked_scatter.gradient_by
def _(grad: Tensor, mask: Tensor, needs: set[str], like: Mapping[str, Any]) -> Grads:
    found: Grads = {"input": None}
    if "input" in needs:
        kept = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _scatter.UNMASKED({"grad": grad, "mask": mask}, [kept], compute_type(grad.dtype))
        found["input"] = _total(kept, like["input"])
    if "source" in needs:
        shape, dtype = like["source"]
        source = torch.empty(tuple(shape), dtype=dtype, device=grad.device)
        _collect(source, grad, mask)
        found["source"] = source
    return found


masked_scatter_ = masked_scatter.inplace


def _collect(out: Tensor, grad: Tensor, mask: Tensor) -> None:
    """The elements of ``grad`` where ``mask`` is True, one after the other; zeros after them."""
    _scatter.start(out, None)
    if out.numel() and grad.numel():
        _scatter.put(out, _in_order(out, mask, grad.shape), grad)


def masked_scatter_backward(grad_output: Tensor, mask: Tensor, sizes: int | tuple[int, ...] | list[int]) -> Tensor:
    """The elements of ``grad_output`` where ``mask`` is True, one after the other, then zeros: a tensor of ``sizes``.

    Source: ``torch.ops.aten.masked_scatter_backward``.
    """
    return _masked_scatter_grad(grad_output, mask, sizes)


@operator(aten="masked_scatter_backward")
def _masked_scatter_grad(grad_output: Tensor, mask: Tensor, sizes: int | tuple[int, ...] | list[int]) -> Tensor:
    """:func:`masked_scatter_backward`. Compiled gradients have that name."""
    size = [sizes] if isinstance(sizes, int) else list(sizes)
    if grad_output.device.type == "meta":
        return grad_output.new_empty(size)
    found: Tensor = torch.ops.aten.masked_scatter_backward(grad_output, mask.expand_as(grad_output), size)
    return found


@_masked_scatter_grad.kernel
def _(outs: Sequence[Tensor], keep: Any, grad_output: Tensor, mask: Tensor, sizes: Any) -> None:
    _collect(outs[0], grad_output, mask)
