"""Elements selected by a mask or by being distinct. The sizes of the results depend on the data: the host reads a count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import accumulate_type
from gemskit._jit import jit
from gemskit._layout import offset
from gemskit._replay import Replayed
from gemskit._sized import sized
from gemskit.errors import DtypeError, NoKernel, ShapeError
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._compact import SMALL, Chosen, Compaction, Flag, flat, total
from gemskit.reduce._drive import element
from gemskit.reduce._fold import Fold
from gemskit.reduce._sort import sort_into


@jit
def _is_set(ins, i, live, sizes, strides):
    return tl.load(ins[0] + offset(i, sizes, strides[0]), live, other=0) != 0


@jit
def _coordinates(outs, ins, at, i, live, chosen, n, sizes, strides, extra):
    # extra: the sizes of the input, and the strides of the result.
    shape, row, col = extra
    rest = i
    for d in tl.static_range(len(shape) - 1, -1, -1):
        place = rest
        if d > 0:
            place = rest % shape[d]
            rest = rest // shape[d]
        tl.store(outs[0] + at * row + d * col, place.to(tl.int64), chosen)


@jit
def _values(outs, ins, at, i, live, chosen, n, sizes, strides, extra):
    # All are read, several at once: a load of those chosen would be of one element each.
    tl.store(outs[0] + at, tl.load(ins[0] + offset(i, sizes, strides[0]), live), chosen)


@jit
def _back(outs, ins, at, i, live, chosen, n, sizes, strides, extra):
    # extra: the stride of the gradient, which is no operand of the space.
    grad, step = extra
    value = tl.load(grad + at * step, chosen, other=0)
    tl.store(outs[0] + i, tl.where(chosen, value, 0).to(outs[0].dtype.element_ty), live)


_SET = Flag("nonzero_flag", _is_set)
_POSITIONS = Compaction("nonzero", _coordinates)
_SELECTED = Compaction("masked_select", _values)
_SPREAD = Compaction("masked_select_grad", _back)
_SUM = Fold("masked_select_sum", map=element, combine=language.add, identity=(0,))


@sized(aten="nonzero")
def nonzero(
    input: Tensor, *, as_tuple: bool = False, out: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Positions of the elements that are not zero, in row-major order: (n, input.ndim), int64. NaN is not zero.

    With ``as_tuple`` one vector for each dimension. The host reads the count. Source: ``torch.nonzero``.
    """
    return torch.nonzero(input, as_tuple=as_tuple)  # type: ignore[call-overload, no-any-return]


def _flagged_positions(input: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _SET(tuple(input.shape), input)
    return _positions(input, chosen, input.numel()), chosen.counts


def _positions(input: Tensor, chosen: Chosen, n: int) -> Tensor:
    shape = tuple(input.shape)
    # Each dimension's positions lie together, as torch's do.
    found = torch.empty((input.ndim, n), dtype=torch.int64, device=input.device)
    if found.numel():
        _POSITIONS([found], chosen, [], shape, (shape, found.stride(1), found.stride(0)))
    return found


_small_positions = Replayed(_flagged_positions)


@nonzero.kernel
def _(keep: Any, input: Tensor, as_tuple: bool) -> tuple[Any, ...]:
    if as_tuple and not input.ndim:
        input = input.view(1)
    n = input.numel()
    if n * input.ndim * 8 <= SMALL:
        found, counts = _small_positions(input)
        found = found.narrow(1, 0, total(counts, n))
    else:
        chosen = _SET(tuple(input.shape), input)
        found = _positions(input, chosen, total(chosen.counts, n))
    # One result, which is a tuple.
    return (found.unbind(0),) if as_tuple else (found.t(),)


@sized(aten="masked_select")
def masked_select(input: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Elements of ``input`` where the bool ``mask`` is set, both broadcast, in row-major order: (n,).

    The host reads the count. Source: ``torch.masked_select``.
    """
    return torch.masked_select(input, mask)


def _flagged_selected(input: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = torch.broadcast_shapes(input.shape, mask.shape)
    chosen = _SET(tuple(shape), mask)
    return _selected(input, shape, chosen, shape.numel()), *chosen


def _selected(input: Tensor, shape: torch.Size, chosen: Chosen, n: int) -> Tensor:
    found = torch.empty(n, dtype=input.dtype, device=input.device)
    if n:
        _SELECTED([found], chosen, [input], shape)
    return found


_small_selected = Replayed(_flagged_selected)


@masked_select.kernel
def _(keep: Any, input: Tensor, mask: Tensor) -> tuple[Tensor]:
    if mask.dtype != torch.bool:
        raise DtypeError(f"masked_select: mask must be a bool tensor, given {mask.dtype}")
    shape = _broadcast("masked_select", input, mask)
    n = shape.numel()
    if n * input.itemsize <= SMALL:
        found, *flags = _small_selected(input, mask)
        chosen = Chosen(*flags)
        found = found.narrow(0, 0, total(chosen.counts, n))
    else:
        chosen = _SET(tuple(shape), mask)
        found = _selected(input, shape, chosen, total(chosen.counts, n))
    if keep is not None:
        keep.update(chosen._asdict())
    return (found,)


@masked_select.gradient_by
def _(grad: Tensor, mask: Tensor, counts: Tensor, words: Tensor, like: Mapping[str, Any]) -> dict[str, Tensor]:
    want, dtype = like["input"]
    shape = torch.broadcast_shapes(tuple(want), mask.shape)
    whole = torch.empty(shape, dtype=dtype, device=grad.device)
    _SPREAD([whole], Chosen(counts, words), [], shape, (grad, grad.stride(0)))
    if shape == want:
        return {"input": whole}
    return {"input": _SUM.to_shape({"input": whole}, shape, (want, dtype), accumulate_type(dtype))}


def _broadcast(name: str, *tensors: Tensor) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(*(t.shape for t in tensors)))
    except RuntimeError:
        shapes = " and ".join(str(list(t.shape)) for t in tensors)
        raise ShapeError(f"{name}: shapes {shapes} do not broadcast; accepted: sizes that are equal or 1") from None


@jit
def _differs(ins, i, live, sizes, strides):
    # NaN differs from NaN.
    here = tl.load(ins[0] + offset(i, sizes, strides[0]), live)
    before = tl.load(ins[0] + offset(tl.maximum(i - 1, 0), sizes, strides[0]), live)
    return live & ((here != before) | (i == 0))


@jit
def _runs(outs, ins, at, i, live, chosen, n, sizes, strides, extra):
    values, inverse, starts = outs
    tl.store(values + at, tl.load(ins[0] + offset(i, sizes, strides[0]), chosen), chosen)
    if inverse is not None:
        place = i
        if len(ins) == 2:
            place = tl.load(ins[1] + i, live, other=0)
        tl.store(inverse + place, at.to(tl.int64), live)
    if starts is not None:
        tl.store(starts + at, i.to(tl.int64), chosen)
        # One more, so that a count is the difference of two.
        tl.store(starts + at + 1, at * 0 + n, live & (i == n - 1))


@jit
def _length(stop, start):
    return stop - start


_DIFFERS = Flag("unique_flag", _differs)
_RUNS = Compaction("unique", _runs)
#: Elements from which on to ask for their range is worth its time, that of about one pass of a sort.
_MANY = 1 << 18
_LENGTHS = Elementwise("unique_counts", _length)


def _distinct(
    input: Tensor, order: Tensor | None, shape: torch.Size, return_inverse: bool, return_counts: bool
) -> tuple[Any, ...]:
    """The first of each run of equal elements; where the elements of ``shape``, which ``order`` sorts, went; run lengths."""
    ins = [input] if order is None else [input, order]
    chosen = _DIFFERS(tuple(input.shape), input)
    n, device = total(chosen.counts, input.numel()), input.device
    values = torch.empty(n, dtype=input.dtype, device=device)
    inverse = torch.empty(shape, dtype=torch.int64, device=device) if return_inverse else None
    starts = torch.empty(n + 1, dtype=torch.int64, device=device) if return_counts else None
    if n:
        _RUNS([values, inverse, starts], chosen, ins, input.shape)  # type: ignore[list-item]
    found = [values]
    if inverse is not None:
        found.append(inverse)
    if starts is not None:
        lengths = torch.empty(n, dtype=torch.int64, device=device)
        _LENGTHS({"stop": starts[1:], "start": starts[:-1]}, [lengths], torch.int64)
        found.append(lengths)
    return tuple(found)


def _plain(input: Tensor, dim: int | None) -> int | None:
    """``dim``, or None where it changes nothing: torch's way by slices orders NaNs differently."""
    return None if input.ndim == 1 and dim in (0, -1) else dim


def _flat(name: str, input: Tensor, dim: int | None) -> None:
    if _plain(input, dim) is not None:
        raise NoKernel(
            f"{name}: no kernel for dim={dim} of {list(input.shape)}, which compares slices; accepted: dim=None, or a vector"
        )


def _bits(keys: Tensor) -> int:
    """How many of the lowest bits of many wide integers differ: all others need no pass of the radix sort. 0: perhaps all."""
    if keys.dtype not in (torch.int32, torch.int64) or keys.numel() < _MANY:
        return 0
    # At the head of this file they would import each other.
    from gemskit.reduce.extrema import aminmax

    low, high = (int(v) for v in aminmax(keys))
    return max(1, (low ^ high).bit_length()) if (low < 0) == (high < 0) else 0


@sized(aten="_unique2")
def unique(
    input: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False,
    dim: int | None = None,
) -> Any:  # fmt: skip
    """Distinct elements in order; also, if asked for, where each element of ``input`` is among them, and how often each occurs.

    Sorted in any case; NaNs are distinct from each other. ``dim`` has a kernel for vectors only. The host reads the count.
    Source: ``torch.unique``.
    """
    more = dict(return_inverse=return_inverse, return_counts=return_counts)
    return torch.unique(input, sorted=sorted, dim=_plain(input, dim), **more)  # type: ignore[no-untyped-call]


@unique.kernel
def _(
    keep: Any, input: Tensor, sorted: bool, return_inverse: bool, return_counts: bool, dim: int | None
) -> tuple[Any, ...]:
    _flat("unique", input, dim)
    keys = flat(input)
    ordered = torch.empty_like(keys)
    # Without the places less is moved: integers that are equal are the same.
    order = torch.empty(keys.shape, dtype=torch.int64, device=keys.device) if return_inverse else None
    sort_into(ordered, order, keys, 0, False, bits=_bits(keys))
    return _distinct(ordered, order, input.shape, return_inverse, return_counts)


@sized(aten="unique_consecutive")
def unique_consecutive(
    input: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Any:
    """The first of each run of equal elements; also, if asked for, the run of each element, and the lengths of the runs.

    NaNs are distinct from each other. ``dim`` has a kernel for vectors only. The host reads the count.
    Source: ``torch.unique_consecutive``.
    """
    more = dict(return_inverse=return_inverse, return_counts=return_counts)
    return torch.unique_consecutive(input, dim=_plain(input, dim), **more)  # type: ignore[no-untyped-call]


@unique_consecutive.kernel
def _(keep: Any, input: Tensor, return_inverse: bool, return_counts: bool, dim: int | None) -> tuple[Any, ...]:
    _flat("unique_consecutive", input, dim)
    return _distinct(input, None, input.shape, return_inverse, return_counts)
