"""Copies that repeat, reorder or scatter: flips, rolls, repetitions, slices, pixel shuffles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gemskit import _launch, _layout, backends, language
from gemskit._dtypes import TRITON, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import operator
from gemskit.errors import ArgumentError, DtypeError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import SAME, Axis, _value, cast, copy, fit, place, search, stand_in

_Ints = int | tuple[int, ...] | list[int]


def _along(dim: int, ndim: int, axis: Axis) -> list[Axis]:
    axes = [SAME] * max(ndim, 1)
    axes[dim] = axis
    return axes


# -- flips and rolls --------------------------------------------------------------------------------------------------------


def _flipped(out: Tensor, input: Tensor, dims: Sequence[int]) -> Tensor:
    turned = {d % max(input.ndim, 1) for d in dims}
    return place(out, input, [Axis("flip") if d in turned else SAME for d in range(input.ndim)])


@operator(aten="flip")
def flip(input: Tensor, dims: Sequence[int]) -> Tensor:
    """The dimensions ``dims`` in reverse order. Source: ``torch.flip``."""
    return torch.flip(input, tuple(dims))


@flip.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, dims: Sequence[int]) -> None:
    _flipped(outs[0], input, dims)


@flip.gradient_by
def _(grad: Tensor, dims: Sequence[int]) -> dict[str, Tensor]:
    return {"input": _flipped(torch.empty_like(grad), grad, dims)}


def _tuple(v: int | Sequence[int]) -> tuple[int, ...]:
    return (v,) if isinstance(v, int) else tuple(v)


def _rolled(out: Tensor, input: Tensor, shifts: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    if not input.numel():
        return out
    if not dims and input.ndim != 1:
        # All elements in their logical order, as one dimension.
        flat = (
            input
            if input.is_contiguous()
            else copy(input, torch.empty(input.shape, dtype=input.dtype, device=input.device))
        )
        into = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        place(into.view(-1), flat.view(-1), [Axis("wrap", shifts[0] % input.numel())])
        return out if into is out else copy(into, out)
    moved = [0] * input.ndim
    for shift, d in zip(shifts, dims or (0,)):
        moved[d] += shift
    return place(out, input, [Axis("wrap", m % n) if m % n else SAME for m, n in zip(moved, input.shape)])


@operator(aten="roll")
def roll(
    input: Tensor, shifts: int | tuple[int, ...] | list[int], dims: int | tuple[int, ...] | list[int] = ()
) -> Tensor:
    """Each of ``dims`` shifted around by its number of ``shifts``; without ``dims`` all elements as if they were one row.

    Source: ``torch.roll``.
    """
    return torch.roll(input, shifts, dims)


@roll.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, shifts: _Ints, dims: _Ints) -> None:
    _rolled(outs[0], input, _tuple(shifts), _tuple(dims))


@roll.gradient_by
def _(grad: Tensor, shifts: _Ints, dims: _Ints) -> dict[str, Tensor]:
    back = tuple(-s for s in _tuple(shifts))
    return {"input": _rolled(torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), grad, back, _tuple(dims))}


# -- repetitions ------------------------------------------------------------------------------------------------------------


def _summed(grad: Tensor, out: Tensor, dims: Sequence[int]) -> Tensor:
    """``grad`` summed over ``dims``, in which ``out`` has size 1."""
    if not out.numel():
        return out
    if all(grad.shape[d] == 1 for d in dims):
        return copy(grad, out)
    # The reductions use Elementwise: at the head of this file the two would import each other.
    from gemskit.reduce._fold import Fold

    fold = _FOLDS.setdefault("sum", Fold("repeat_grad", map=_value, combine=language.add, identity=(0,)))
    fold({"value": grad}, [out], tuple(grad.shape), tuple(dims), compute_type(out.dtype))
    return out


_FOLDS: dict[str, Any] = {}


def _split(t: Tensor, lead: int, shape: Sequence[int], repeats: Sequence[int]) -> Tensor:
    """A repeated tensor as (repeats, size) for each dimension of ``shape`` after the first ``lead``."""
    for d in range(len(shape) - 1, -1, -1):
        t = t.unflatten(lead + d, (repeats[lead + d], shape[d]))
    return t


@operator(aten="repeat")
def repeat(input: Tensor, repeats: Sequence[int]) -> Tensor:
    """``input`` ``repeats[d]`` times along each dimension; leading numbers make new dimensions.

    Source: ``torch.Tensor.repeat``.
    """
    return input.repeat(tuple(repeats))


@repeat.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, repeats: Sequence[int]) -> None:
    if outs[0].numel():
        into = _split(outs[0], len(repeats) - input.ndim, input.shape, repeats)
        copy(_spread(input), into)


def _spread(t: Tensor) -> Tensor:
    """A dimension of size 1 before each of ``t``."""
    for d in range(t.ndim - 1, -1, -1):
        t = t.unsqueeze(d)
    return t


@repeat.gradient_by
def _(grad: Tensor, repeats: Sequence[int], like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    lead = len(repeats) - len(shape)
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    dims = [*range(lead), *range(lead, lead + 2 * len(shape), 2)]
    spread = _spread(dx)
    into = spread.reshape((1,) * lead + tuple(spread.shape))
    _summed(_split(grad, lead, shape, repeats), into, dims)
    return {"input": dx}


def tile(input: Tensor, dims: Sequence[int]) -> Tensor:
    """:func:`repeat`, with ``dims`` taken as 1 where it is shorter than the shape of ``input``. Source: ``torch.tile``."""
    return repeat(input, (*(1,) * (input.ndim - len(dims)), *dims))


@operator(aten="repeat_interleave.self_int")
def repeat_interleave_each(input: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    """:func:`repeat_interleave` with one number for all elements."""
    return torch.repeat_interleave(input, repeats, dim)


@repeat_interleave_each.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, repeats: int, dim: int | None) -> None:
    if outs[0].numel():
        into, source, _ = _interleaved(outs[0], input, input.shape, repeats, dim)
        copy(source, into)


def _interleaved(
    t: Tensor, one: Tensor, shape: Sequence[int], repeats: int, dim: int | None
) -> tuple[Tensor, Tensor, int]:
    """The repeated and the single tensor with a dimension for the repetitions, and which that is."""
    if dim is None or not shape:
        return t.reshape(*shape, repeats), one.unsqueeze(-1), len(shape)
    at = dim % len(shape) + 1
    return t.unflatten(at - 1, (shape[at - 1], repeats)), one.unsqueeze(at), at


@repeat_interleave_each.gradient_by
def _(grad: Tensor, repeats: int, dim: int | None, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    many, one, at = _interleaved(grad, dx, shape, repeats, dim)
    _summed(many, one, [at])
    return {"input": dx}


@operator()
def repeat_interleave_rows(input: Tensor, ends: Tensor, dim: int, output_size: int) -> Tensor:
    """Element p along ``dim`` of the result is the first whose number in ``ends`` (ascending) is greater than p."""
    if input.is_meta:
        return input.new_empty([output_size if d == dim % input.ndim else n for d, n in enumerate(input.shape)])
    at = torch.searchsorted(ends, torch.arange(output_size, device=ends.device), right=True)
    return input.index_select(dim, at.clamp_max(max(0, len(ends) - 1)))


@repeat_interleave_rows.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, ends: Tensor, dim: int, output_size: int) -> None:
    if ends.shape[0] == 1:
        copy(input.expand(outs[0].shape), outs[0])
    else:
        place(outs[0], input, _along(dim, input.ndim, Axis("ends")), table=_dense(ends))


def _dense(ends: Tensor) -> Tensor:
    return ends if ends.is_contiguous() else copy(ends, torch.empty(ends.shape, dtype=ends.dtype, device=ends.device))


@jit(repr=lambda _: "segments")
def _segments(
    out, grad, ends, sizes, out_strides, grad_strides, out_row, grad_row, rows, cols, width,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out[i] = sum of grad[ends[i - 1] : ends[i]]``."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    blocks = tl.cdiv(cols, BN)
    row = (i // blocks) * BM + tl.arange(0, BM)[:, None]
    col = (i % blocks) * BN + tl.arange(0, BN)[None, :]
    first = tl.load(ends + row - 1, (row > 0) & (row < rows), other=0)
    last = tl.minimum(tl.load(ends + row, row < rows, other=0), width)
    to, at = offset(col, sizes, out_strides), offset(col, sizes, grad_strides)
    total = tl.zeros((BM, BN), ACC)
    for k in range(tl.max(last - first)):
        p = first + k
        total += tl.load(grad + p * grad_row + at, (p < last) & (col < cols), other=0).to(ACC)
    tl.store(out + row * out_row + to, total.to(out.dtype.element_ty), (row < rows) & (col < cols))


def _repeated_gradient(grad: Tensor, ends: Tensor, dim: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    if not dx.numel():
        return {"input": dx}
    out, many = dx.movedim(dim, 0), grad.movedim(dim, 0)
    sizes, (out_strides, grad_strides) = _layout.collapse(out.shape[1:], [out.stride()[1:], many.stride()[1:]])
    rows, cols = out.shape[0], math.prod(out.shape[1:])
    config = backends.arch().config("gather")
    bn = min(config["block"], _layout.next_power_of_2(cols))
    bm = min(max(1, config["block"] // bn), _layout.next_power_of_2(rows))
    wide = _layout.any_wide(out, many)
    meta = dict(ACC=TRITON[compute_type(dtype)], BM=bm, BN=bn, WIDE=wide, num_warps=config["warps"])
    strided = (sizes, out_strides, grad_strides, out.stride(0), many.stride(0), rows, cols, many.shape[0])
    launch(_segments, (_layout.cdiv(rows, bm) * _layout.cdiv(cols, bn),), (dx, grad, _dense(ends), *strided), meta)
    return {"input": dx}


repeat_interleave_rows.set_gradient(_repeated_gradient, ("grad", "ends", "dim", "like"), of=("input",))


@jit(repr=lambda _: "repeat_index")
def _index(out, ends, size, width, MANY: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    p = i * BLOCK + tl.arange(0, BLOCK)
    if MANY:
        tl.store(out + p, search(ends, p, size, p < width).to(out.dtype.element_ty), p < width)
    else:
        tl.store(out + p, tl.zeros((BLOCK,), out.dtype.element_ty), p < width)


@operator()
def repeat_interleave_index(repeats: Tensor, ends: Tensor, output_size: int) -> Tensor:
    """For each p below ``output_size`` how many of ``ends``, the running sum of ``repeats``, are at most p."""
    if ends.is_meta:
        return repeats.new_empty(output_size)
    at = torch.searchsorted(ends, torch.arange(output_size, device=ends.device), right=True)
    return at.clamp_max(max(0, len(ends) - 1)).to(repeats.dtype)


@repeat_interleave_index.kernel
def _(outs: tuple[Tensor, ...], keep: Any, repeats: Tensor, ends: Tensor, output_size: int) -> None:
    config = backends.arch().config("pointwise")
    block = min(config["block"], _layout.next_power_of_2(output_size))
    meta = dict(
        MANY=ends.shape[0] > 1, BLOCK=block, WIDE=_layout.is_wide((output_size,), []), num_warps=config["warps"]
    )
    if output_size:
        launch(_index, (_layout.cdiv(output_size, block),), (outs[0], _dense(ends), ends.shape[0], output_size), meta)


def repeat_interleave(
    input: Tensor, repeats: Tensor | int | None = None, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """Each element along ``dim`` (of all elements in a row, if None) ``repeats`` times, one after the other.

    ``repeats`` is one number, or a tensor (int32 or int64, not negative) with one for each element; its sum is read from
    the device unless ``output_size`` says it. Alone, the first argument is ``repeats``, and the result says which element each
    place of a result would hold. Source: ``torch.repeat_interleave``.
    """
    if isinstance(repeats, int) and not isinstance(repeats, bool):
        return repeat_interleave_each(input, repeats, dim)
    counts = input if repeats is None else repeats
    if not isinstance(counts, Tensor) or counts.dtype not in (torch.int32, torch.int64) or counts.ndim > 1:
        raise ArgumentError(
            f"repeat_interleave: repeats must be an int, or a tensor of int32 or int64 with at most one dimension, given "
            f"{counts!r}"
        )
    if repeats is not None:
        if dim is None:
            input = _in_a_row(input)
        along = input.shape[dim or 0] if input.ndim else 1
        input = input.reshape(1) if not input.ndim else input
        if counts.numel() not in (1, along):
            raise ArgumentError(
                f"repeat_interleave: repeats must have 1 or {along} elements, as many as input has along dim {dim}; given "
                f"{counts.numel()}"
            )
        counts = counts.reshape(1).expand(along) if counts.numel() == 1 else counts
    from gemskit.reduce.scans import cumsum

    ends = cumsum(counts.reshape(1) if not counts.ndim else counts, 0)
    if output_size is None:
        output_size = int(ends[-1]) if len(ends) else 0
    if repeats is None:
        return repeat_interleave_index(counts, ends, output_size)
    return repeat_interleave_rows(input, ends, dim or 0, output_size)


def _in_a_row(t: Tensor) -> Tensor:
    return t.reshape(-1) if t.is_contiguous() else repeat(t, (1,) * t.ndim).reshape(-1)


# -- slices -----------------------------------------------------------------------------------------------------------------


def _selection(dim: int, index: int, shape: Sequence[int]) -> list[Axis]:
    return _along(dim, len(shape), Axis("window", index % shape[dim] if shape[dim] else 0))


def _slice(dim: int, start: int | None, end: int | None, step: int, shape: Sequence[int]) -> list[Axis]:
    first = slice(start, end, step).indices(shape[dim])[0]
    return _along(dim, len(shape), Axis("window" if step == 1 else "stepped", first, step))


def _like(like: tuple[tuple[int, ...], torch.dtype], device: torch.device) -> Tensor:
    return torch.empty(like[0], dtype=like[1], device=device)


@operator(aten="select_backward")
def select_backward(grad_output: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """The gradient of ``input.select(dim, index)``: ``grad_output`` there, elsewhere 0, in ``input_sizes``."""
    fit("select_backward", grad_output, stand_in(input_sizes).select(dim, index))
    return torch.ops.aten.select_backward(grad_output, input_sizes, dim, index)  # type: ignore[no-any-return]


@select_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_output: Tensor, input_sizes: Sequence[int], dim: int, index: int
) -> None:  # fmt: skip
    place(outs[0], grad_output.unsqueeze(dim % outs[0].ndim), _selection(dim, index, outs[0].shape))


@select_backward.gradient_by
def _(grad: Tensor, dim: int, index: int) -> dict[str, Tensor]:
    return {"grad_output": grad.select(dim, index)}


@operator(aten="slice_backward")
def slice_backward(
    grad_output: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """The gradient of ``input[..., start:end:step]`` along ``dim``: ``grad_output`` there, elsewhere 0."""
    fit("slice_backward", grad_output, _cut(stand_in(input_sizes), dim, start, end, step))
    return torch.ops.aten.slice_backward(grad_output, input_sizes, dim, start, end, step)  # type: ignore[no-any-return]


@slice_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_output: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int,
    step: int,
) -> None:  # fmt: skip
    place(outs[0], grad_output, _slice(dim, start, end, step, outs[0].shape))


@slice_backward.gradient_by
def _(grad: Tensor, dim: int, start: int, end: int, step: int) -> dict[str, Tensor]:
    return {"grad_output": _sliced(grad, dim, start, end, step)}


def _cut(t: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor:
    before = (slice(None),) * (dim % t.ndim)
    return t[before + (slice(start, end, step),)]


def _sliced(t: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor:
    part = _cut(t, dim, start, end, step)
    return t if part.shape == t.shape else part


@operator(aten="select_scatter")
def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """``input`` with ``src`` in the place of ``input.select(dim, index)``. Source: ``torch.select_scatter``."""
    fit("select_scatter", src, input.select(dim, index))
    return torch.select_scatter(input, src, dim, index)


@select_scatter.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, src: Tensor, dim: int, index: int) -> None:
    place(outs[0], src.unsqueeze(dim % input.ndim), _selection(dim, index, input.shape), base=input)


@select_scatter.gradient_by
def _(grad: Tensor, dim: int, index: int, like: Mapping[str, Any], needs: set[str]) -> dict[str, Tensor]:
    found = {}
    if "src" in needs:
        found["src"] = cast(grad.select(dim, index), like["src"][1])
    if "input" in needs:
        zeros = grad.select(dim, index).unsqueeze(dim % grad.ndim)
        axes = _selection(dim, index, grad.shape)
        found["input"] = place(_like(like["input"], grad.device), None, axes, base=grad, counts=zeros.shape)
    return found


@operator(aten="slice_scatter")
def slice_scatter(
    input: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """``input`` with ``src`` in the place of ``input[..., start:end:step]`` along ``dim``.

    Source: ``torch.slice_scatter``.
    """
    fit("slice_scatter", src, _cut(input, dim, start, end, step))
    return torch.slice_scatter(input, src, dim, start, end, step)


@slice_scatter.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, src: Tensor, dim: int, start: int | None, end: int | None,
    step: int,
) -> None:  # fmt: skip
    place(outs[0], src, _slice(dim, start, end, step, input.shape), base=input)


@slice_scatter.gradient_by
def _(
    grad: Tensor, dim: int, start: int | None, end: int | None, step: int, like: Mapping[str, Any], needs: set[str]
) -> dict[str, Tensor]:  # fmt: skip
    part, found = _sliced(grad, dim, start, end, step), {}
    if "src" in needs:
        found["src"] = cast(part, like["src"][1])
    if "input" in needs:
        axes = _slice(dim, start, end, step, grad.shape)
        found["input"] = place(_like(like["input"], grad.device), None, axes, base=grad, counts=part.shape)
    return found


# -- pixels -----------------------------------------------------------------------------------------------------------------


def _pixels(fine: Tensor, coarse: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """(..., C, H * r, W * r) and (..., C * r * r, H, W), both as (..., C, H, r, W, r)."""
    many = coarse.unflatten(-3, (coarse.shape[-3] // (factor * factor), factor, factor))
    wide = fine.unflatten(-1, (coarse.shape[-1], factor)).unflatten(-3, (coarse.shape[-2], factor))
    # (..., C, r, r, H, W)
    return wide, many.movedim((-4, -3), (-3, -1))


def _shuffled(fine: Tensor, coarse: Tensor, factor: int) -> Tensor:
    if fine.numel():
        wide, many = _pixels(fine, coarse, factor)
        copy(many, wide)
    return fine


def _unshuffled(coarse: Tensor, fine: Tensor, factor: int) -> Tensor:
    if fine.numel():
        wide, many = _pixels(fine, coarse, factor)
        copy(wide, many)
    return coarse


@operator(aten="pixel_shuffle")
def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """(..., C * r * r, H, W) as (..., C, H * r, W * r). Source: ``torch.pixel_shuffle``."""
    return torch.pixel_shuffle(input, upscale_factor)


@pixel_shuffle.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, upscale_factor: int) -> None:
    _shuffled(outs[0], input, upscale_factor)


@pixel_shuffle.gradient_by
def _(grad: Tensor, upscale_factor: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": _unshuffled(_like(like["input"], grad.device), grad, upscale_factor)}


@operator(aten="pixel_unshuffle")
def pixel_unshuffle(input: Tensor, downscale_factor: int, *, out: Tensor | None = None) -> Tensor:
    """(..., C, H * r, W * r) as (..., C * r * r, H, W). Source: ``torch.pixel_unshuffle``."""
    return torch.pixel_unshuffle(input, downscale_factor)


@pixel_unshuffle.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, downscale_factor: int) -> None:
    _unshuffled(outs[0], input, downscale_factor)


@pixel_unshuffle.gradient_by
def _(grad: Tensor, downscale_factor: int, like: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"input": _shuffled(_like(like["input"], grad.device), grad, downscale_factor)}


# -- classes ----------------------------------------------------------------------------------------------------------------


@jit
def _hot(tensor, position):
    return tensor == position


_HOT = Elementwise("one_hot", _hot)


@operator(aten="one_hot")
def _one_hot(tensor: Tensor, num_classes: int) -> Tensor:
    """:func:`one_hot` of a known number of classes."""
    if tensor.dtype != torch.int64:
        raise DtypeError(f"one_hot: tensor must be int64, given {tensor.dtype}")
    if tensor.is_meta:
        return tensor.new_empty((*tensor.shape, num_classes))
    return F.one_hot(tensor, num_classes)


@_one_hot.kernel
def _(outs: tuple[Tensor, ...], keep: Any, tensor: Tensor, num_classes: int) -> None:
    _HOT({"tensor": tensor.unsqueeze(-1), "dim": -1}, outs, torch.int64)


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """1 where the last, new dimension of size ``num_classes`` is the class that ``tensor`` (int64) says, elsewhere 0.

    -1 stands for the largest class plus 1, which is read from the device. A class outside of [0, num_classes) raises on the
    CPU; on an accelerator, where raising would wait for the device, its row is 0. Source: ``torch.nn.functional.one_hot``.
    """
    if num_classes == -1 and _launch.has_kernels(tensor.device):
        from gemskit.reduce.extrema import max as largest

        if not tensor.numel():
            raise ArgumentError("one_hot: num_classes must be given where tensor has no elements")
        num_classes = int(largest(tensor)) + 1
    return _one_hot(tensor, num_classes)
