"""New tensors: filled, counted, spaced.

A function here allocates and calls an operator in place, whose formula does not read what it overwrites. On devices without
kernels torch fills the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling
from triton.language.extra import libdevice

from gemskit import _launch, language
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit._layout import cdiv
from gemskit._op import Named, operator
from gemskit.errors import ArgumentError, DeviceError, DtypeError, GradientError, ShapeError
from gemskit.pointwise._drive import Elementwise, pointwise

Size: TypeAlias = int | Sequence[int]
Device: TypeAlias = torch.device | str | int | None

#: Bits of the significand.
_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


def _shape(size: Sequence[Size]) -> Sequence[int]:
    """Sizes as torch takes them: ``f(2, 3)`` or ``f((2, 3))``."""
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        return size[0]
    return size  # type: ignore[return-value]


def _made(name: str, shape: Sequence[int], out: Tensor | None, dtype: torch.dtype | None, device: Device) -> Tensor:
    """An empty tensor, or ``out`` in that shape."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype is not None and dtype != out.dtype:
        raise DtypeError(f"{name}: dtype {dtype} does not match that of out, {out.dtype}")
    if device is not None and torch.device(device).type != out.device.type:
        raise DeviceError(f"{name}: device {device} does not match that of out, {out.device}")
    if out.requires_grad and torch.is_grad_enabled():
        raise GradientError(f"{name}: out= takes no part in autograd, but out requires a gradient")
    if out.shape != torch.Size(shape):
        out.resize_(shape)
    return out


def _finished(made: Tensor, requires_grad: bool) -> Tensor:
    return made.requires_grad_() if requires_grad else made


def _ours(t: Tensor) -> bool:
    """Whether an operator writes ``t``; otherwise torch does."""
    return is_compiling() or _launch.has_kernels(t.device)


def _number(name: str, v: object) -> None:
    if not isinstance(v, (int, float, Tensor, torch.SymInt, torch.SymFloat)):
        raise DtypeError(f"{name}: takes real numbers, given {v!r}")


# -- fill ------------------------------------------------------------------------------------------------------------------


@pointwise(aten="fill.Tensor")
def _fill(input: Tensor, value: Tensor | Number) -> Tensor:
    """A tensor like ``input`` that holds ``value`` everywhere. ``input`` is not read."""
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"value must be a number or a 0-dim tensor, it has shape {list(value.shape)}")
    return torch.fill(input, value)  # type: ignore[arg-type]


@_fill.formula
@jit
def _(value):
    return value


@_fill.gradient
@jit
def _(grad):
    return tl.zeros_like(grad), grad


_fill_ = _fill.inplace


def _fitting(name: str, v: Tensor | Number, dtype: torch.dtype) -> None:
    """Refuse numbers that ``dtype`` cannot hold, as torch does. Negative ones wrap around in uint8."""
    if isinstance(v, Tensor) or dtype == torch.bool or is_compiling():
        return
    if dtype.is_floating_point:
        fits = not math.isfinite(v) or abs(v) <= torch.finfo(dtype).max
    elif dtype.is_complex:
        return
    else:
        most = torch.iinfo(dtype).max
        fits = (-most if dtype == torch.uint8 else torch.iinfo(dtype).min) <= v <= most
    if not fits:
        raise ArgumentError(f"{name}: {v!r} cannot be converted to {dtype} without overflow")


def fill(input: Tensor, value: Tensor | Number, *, out: Tensor | None = None) -> Tensor:
    """A tensor like ``input`` that holds ``value``, a number or a 0-dim tensor, everywhere. Source: ``torch.fill``."""
    _number("fill", value)
    _fitting("fill", value, input.dtype)
    if out is None:
        return _fill(input, value)
    return fill_(_made("fill", input.shape, out, input.dtype, input.device), value)


def fill_(input: Tensor, value: Tensor | Number) -> Tensor:
    """Overwrite ``input`` with ``value``, a number or a 0-dim tensor on any device. Source: ``torch.fill_``."""
    _number("fill_", value)
    _fitting("fill_", value, input.dtype)
    if isinstance(value, Tensor) and not is_compiling():
        if value.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
            # x.fill_(x[0]): it must be read before it is overwritten.
            value = torch.empty_like(value).copy_(value) if not _ours(input) else _fill(value, value)
    return _fill_(input, value)


def zero(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Zeros like ``input``. Source: ``torch.ops.aten.zero``."""
    return fill(input, 0, out=out)


def zero_(input: Tensor) -> Tensor:
    """Overwrite ``input`` with zeros. Source: ``torch.zero_``."""
    return _fill_(input, 0)


def _filled(name: str, made: Tensor, value: Tensor | Number, requires_grad: bool = False) -> Tensor:
    """``made``, overwritten."""
    _fitting(name, value, made.dtype)
    with torch.no_grad():
        if _ours(made):
            _fill_(made, value)
        else:
            made.fill_(value)
    return _finished(made, requires_grad)


def full(
    size: Size, fill_value: Tensor | Number, *, out: Tensor | None = None, dtype: torch.dtype | None = None,
    device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """A tensor of ``fill_value``, in the dtype that this has unless given (bool, int64, the default float dtype).

    Source: ``torch.full``.
    """
    _number("full", fill_value)
    if dtype is None and out is None:
        if isinstance(fill_value, Tensor):
            kind = fill_value.dtype
            dtype = torch.get_default_dtype() if kind.is_floating_point else kind if kind == torch.bool else torch.int64
        else:
            dtype = torch.bool if isinstance(fill_value, bool) else torch.int64 if isinstance(fill_value, int) else None
    return _filled("full", _made("full", _shape((size,)), out, dtype, device), fill_value, requires_grad)


def ones(
    *size: Size, out: Tensor | None = None, dtype: torch.dtype | None = None, device: Device = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """A tensor of ones. Source: ``torch.ones``."""
    return _filled("ones", _made("ones", _shape(size), out, dtype, device), 1, requires_grad)


def zeros(
    *size: Size, out: Tensor | None = None, dtype: torch.dtype | None = None, device: Device = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """A tensor of zeros. Source: ``torch.zeros``."""
    return _filled("zeros", _made("zeros", _shape(size), out, dtype, device), 0, requires_grad)


def scalar_tensor(
    s: Number, *, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False
) -> Tensor:
    """A 0-dim tensor of the number ``s``, in the default float dtype unless given. Source: ``torch.scalar_tensor``."""
    _number("scalar_tensor", s)
    return _filled("scalar_tensor", torch.empty((), dtype=dtype, device=device), s, requires_grad)


def full_like(
    input: Tensor, fill_value: Tensor | Number, *, dtype: torch.dtype | None = None, device: Device = None,
    requires_grad: bool = False, memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:  # fmt: skip
    """A tensor of ``fill_value`` in the shape, dtype and layout of ``input``. Source: ``torch.full_like``."""
    _number("full_like", fill_value)
    made = torch.empty_like(input, dtype=dtype, device=device, memory_format=memory_format)
    return _filled("full_like", made, fill_value, requires_grad)


def ones_like(
    input: Tensor, *, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:  # fmt: skip
    """Ones in the shape, dtype and layout of ``input``. Source: ``torch.ones_like``."""
    made = torch.empty_like(input, dtype=dtype, device=device, memory_format=memory_format)
    return _filled("ones_like", made, 1, requires_grad)


def zeros_like(
    input: Tensor, *, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:  # fmt: skip
    """Zeros in the shape, dtype and layout of ``input``. Source: ``torch.zeros_like``."""
    made = torch.empty_like(input, dtype=dtype, device=device, memory_format=memory_format)
    return _filled("zeros_like", made, 0, requires_grad)


def new_full(
    input: Tensor, size: Size, fill_value: Tensor | Number, *, dtype: torch.dtype | None = None, device: Device = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """A tensor of ``fill_value`` in the dtype and on the device of ``input``. Source: ``torch.Tensor.new_full``."""
    _number("new_full", fill_value)
    made = input.new_empty(_shape((size,)), dtype=dtype, device=device)
    return _filled("new_full", made, fill_value, requires_grad)


def new_ones(
    input: Tensor, *size: Size, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False
) -> Tensor:
    """Ones in the dtype and on the device of ``input``. Source: ``torch.Tensor.new_ones``."""
    return _filled("new_ones", input.new_empty(_shape(size), dtype=dtype, device=device), 1, requires_grad)


def new_zeros(
    input: Tensor, *size: Size, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False
) -> Tensor:
    """Zeros in the dtype and on the device of ``input``. Source: ``torch.Tensor.new_zeros``."""
    return _filled("new_zeros", input.new_empty(_shape(size), dtype=dtype, device=device), 0, requires_grad)


def eye(
    n: int, m: int | None = None, *, out: Tensor | None = None, dtype: torch.dtype | None = None, device: Device = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Ones on the diagonal of ``n`` rows and ``m`` columns (``n`` unless given), zeros elsewhere. Source: ``torch.eye``."""
    m = n if m is None else m
    if n < 0 or m < 0:
        raise ShapeError(f"eye: n and m are at least 0, given {n} and {m}")
    made = _filled("eye", _made("eye", (n, m), out, dtype, device), 0)
    _filled("eye", made.diagonal(), 1)
    return _finished(made, requires_grad)


# -- ranges ----------------------------------------------------------------------------------------------------------------


def _no_bools(input: Tensor) -> None:
    """torch refuses these with values only, not on ``meta``."""
    if input.dtype == torch.bool:
        raise TypeError("counts and spaced values are ints or floats, not bool")


@pointwise()
def _arange(input: Tensor, start: Number, step: Number) -> Tensor:
    """``start + step * index`` in the place of ``input``, which has one dimension."""
    _no_bools(input)
    wide = torch.float64 if input.dtype.is_floating_point else torch.int64
    index = torch.arange(input.numel(), dtype=wide, device=input.device).view(input.shape)
    return (start + step * index).to(input.dtype)


@_arange.formula
@jit
def _(start, step, index):
    return start + step * index.to(start.dtype)


_arange_ = _arange.inplace


def _count(start: Number, end: Number, step: Number, dtype: torch.dtype) -> int:
    """How many elements a range has: by whole numbers for int64, by doubles for all others, as torch counts."""
    given = f"Given start={start!r}, end={end!r}, step={step!r}"
    if not step:
        raise ArgumentError(f"arange: step must not be zero. {given}")
    if any(isinstance(v, float) and not math.isfinite(v) for v in (start, end)):
        raise ArgumentError(f"arange: start and end must be finite. {given}")
    if (end < start) if step > 0 else (end > start):
        raise ArgumentError(f"arange: end must lie in the direction of step. {given}")
    if dtype != torch.int64:
        return math.ceil((float(end) - float(start)) / float(step))
    first, last, by = int(start), int(end), int(step)
    if not by:
        raise ArgumentError(f"arange: step is no whole number other than zero. {given}")
    return max(0, -((first - last) // by))


def arange(
    start: Number, end: Number | None = None, step: Number = 1, *, out: Tensor | None = None,
    dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """``start``, ``start + step``, ... before ``end``; ``arange(end)`` starts at 0. int64 if all are ints.

    ``ceil((end - start) / step)`` elements. Source: ``torch.arange``.
    """
    if end is None:
        start, end = 0, start
    for v in (start, end, step):
        _number("arange", v)
    kind = dtype or (out.dtype if out is not None else None)
    if kind is None:
        kind = torch.get_default_dtype() if any(isinstance(v, float) for v in (start, end, step)) else torch.int64
    if kind == torch.bool or kind.is_complex:
        raise DtypeError(f"arange: no kernel for {kind}; counts are ints or floats")
    made = _made("arange", (_count(start, end, step, kind),), out, kind, device)
    if not _ours(made):
        torch.arange(start, end, step, out=made)
    elif made.dtype.is_floating_point:
        _arange_(made, float(start), float(step))
    else:
        _arange_(made, int(start), int(step))
    return _finished(made, requires_grad)


def _spacing(dtype: torch.dtype, steps: int) -> torch.dtype:
    """The type that spaced values are computed in: one that counts ``steps`` exactly."""
    short = dtype.is_floating_point and dtype != torch.float64 and steps < 2**24
    return torch.float32 if short else torch.float64


@jit
def _spaced(start, end, steps, whole, index):
    """From either end towards the middle, so that both ends are exact."""
    if whole:
        start, end = start.to(tl.int64).to(tl.float64), end.to(tl.int64).to(tl.float64)
    i = index.to(steps.dtype)
    last = steps - 1
    step = language.div(end - start, tl.maximum(last, 1))
    half = tl.floor(steps * 0.5)
    return tl.where((i < half) | (last == 0), start + step * i, end - step * (last - i))


@jit
def _linear(start, end, steps, whole, index):
    return _spaced(start, end, steps, whole, index)


@jit
def _powers(start, end, steps, base, whole, index):
    value = language.pow(base + 0 * index.to(steps.dtype), _spaced(start, end, steps, whole, index))
    if whole:
        # A power that is off by units below an integer must not be cut to the one before.
        near = libdevice.nearbyint(value)
        value = tl.where(tl.abs(value - near) <= 1e-15 * value, near, value)
    return value


_linspaced, _logspaced = Elementwise("linspace", _linear), Elementwise("logspace", _powers)


@operator()
def _linspace(input: Tensor, start: Tensor | Number, end: Tensor | Number, steps: int) -> Tensor:
    """``steps`` values from ``start`` to ``end`` in the place of ``input``."""
    _no_bools(input)
    if input.is_meta:
        # torch would read the ends that are tensors.
        return torch.empty(steps, dtype=input.dtype, device=input.device)
    return torch.linspace(start, end, steps, dtype=input.dtype, device=input.device)


@operator()
def _logspace(input: Tensor, start: Tensor | Number, end: Tensor | Number, steps: int, base: float) -> Tensor:
    """``base`` to the power of ``steps`` values from ``start`` to ``end`` in the place of ``input``."""
    _no_bools(input)
    if input.is_meta:
        # torch would read the ends that are tensors.
        return torch.empty(steps, dtype=input.dtype, device=input.device)
    return torch.logspace(start, end, steps, base, dtype=input.dtype, device=input.device)


def _run_spaced(kernel: Elementwise, outs: Sequence[Tensor], named: Named) -> None:
    (out,) = outs
    found = {n: float(v) if isinstance(v, (bool, int)) else v for n, v in named.items()}
    whole = not out.dtype.is_floating_point
    kernel({**found, "whole": whole}, outs, _spacing(out.dtype, out.numel()))


@_linspace.kernel
def _(outs: tuple[Tensor, ...], keep: object, **named: object) -> None:
    _run_spaced(_linspaced, outs, named)


@_logspace.kernel
def _(outs: tuple[Tensor, ...], keep: object, **named: object) -> None:
    _run_spaced(_logspaced, outs, named)


_linspace_, _logspace_ = _linspace.inplace, _logspace.inplace


def _space(
    name: str, ends: Sequence[Tensor | Number], steps: int, out: Tensor | None, dtype: torch.dtype | None,
    device: Device,
) -> Tensor:  # fmt: skip
    """What ``linspace`` and ``logspace`` write into."""
    for v in ends:
        _number(name, v)
        if isinstance(v, Tensor) and (v.ndim or v.is_complex()):
            raise ArgumentError(f"{name}: start and end are real numbers or 0-dim tensors, given shape {list(v.shape)}")
    if steps < 0:
        raise ArgumentError(f"{name}: the number of steps is at least 0, given {steps}")
    made = _made(name, (steps,), out, dtype, device)
    if made.dtype == torch.bool or made.dtype.is_complex:
        raise DtypeError(f"{name}: no kernel for {made.dtype}; spaced values are ints or floats")
    for v in ends:
        _fitting(name, v, made.dtype)
    return made


def linspace(
    start: Tensor | Number, end: Tensor | Number, steps: int, *, out: Tensor | None = None,
    dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """``steps`` evenly spaced values from ``start`` to ``end``, both included. Tensors have no dimensions.

    Source: ``torch.linspace``.
    """
    made = _space("linspace", (start, end), steps, out, dtype, device)
    if _ours(made):
        _linspace_(made, start, end, steps)
    else:
        torch.linspace(start, end, steps, out=made)
    return _finished(made, requires_grad)


def logspace(
    start: Tensor | Number, end: Tensor | Number, steps: int, base: float = 10.0, *, out: Tensor | None = None,
    dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """``base`` to the power of ``linspace(start, end, steps)``. Source: ``torch.logspace``."""
    made = _space("logspace", (start, end), steps, out, dtype, device)
    if _ours(made):
        _logspace_(made, start, end, steps, float(base))
    else:
        torch.logspace(start, end, steps, base, out=made)
    return _finished(made, requires_grad)


# -- triangles -------------------------------------------------------------------------------------------------------------


@jit
def _before(i, cols, offset):
    """How many elements the rows before ``i`` have up to column ``row + offset``."""
    first = tl.maximum(-offset, 0)
    whole = tl.maximum(cols - 1 - offset, first)
    t = tl.minimum(tl.maximum(i, first), whole)
    return (t - first) * (first + t + 2 * offset + 1) // 2 + cols * tl.maximum(i - whole, 0)


@jit
def _triangle(out, row_stride, stride, cols, offset, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(cols, BLOCK)
    col = (i % tiles) * BLOCK + tl.arange(0, BLOCK)
    i = i // tiles
    if UPPER:
        first = tl.minimum(tl.maximum(i + offset, 0), cols)
        at = i * cols - _before(i, cols, offset - 1) + col - first
        live = (col >= first) & (col < cols)
    else:
        at = _before(i, cols, offset) + col
        live = (col <= i + offset) & (col < cols)
    kind = out.dtype.element_ty
    tl.store(out + at * stride, (col * 0 + i).to(kind), live)
    tl.store(out + row_stride + at * stride, col.to(kind), live)


@operator()
def _tri_indices(input: Tensor, row: int, col: int, offset: int, upper: bool) -> Tensor:
    """:func:`tril_indices`, or :func:`triu_indices` if ``upper``, in the place of ``input``."""
    make = torch.triu_indices if upper else torch.tril_indices
    return make(row, col, offset, dtype=input.dtype, device=input.device)


@_tri_indices.kernel
def _(outs: tuple[Tensor, ...], keep: object, input: Tensor, row: int, col: int, offset: int, upper: bool) -> None:
    (out,) = outs
    if not out.numel():
        return
    # Beyond the corners nothing changes, and sums stay small.
    offset = max(-row, min(col, offset))
    grid, block = row * cdiv(col, 1024), 1024
    _launch.launch(_triangle, (grid,), (out, *out.stride(), col, offset), dict(UPPER=upper, BLOCK=block, num_warps=4))


_tri_indices_ = _tri_indices.inplace


def _indices(
    name: str, row: int, col: int, offset: int, upper: bool, dtype: torch.dtype, device: Device, requires_grad: bool
) -> Tensor:
    make = torch.triu_indices if upper else torch.tril_indices
    if dtype == torch.bool or dtype.is_complex:
        raise DtypeError(f"{name}: no kernel for {dtype}; indices are ints")
    try:
        made = torch.empty(make(row, col, offset, dtype=dtype, device="meta").shape, dtype=dtype, device=device)
    except RuntimeError as e:
        raise ShapeError(f"{name}: {e}. Given row={row}, col={col}, offset={offset}") from e
    if _ours(made):
        _tri_indices_(made, row, col, offset, upper)
        return _finished(made, requires_grad)
    return _finished(make(row, col, offset, dtype=dtype, device=device), requires_grad)


def tril_indices(
    row: int, col: int, offset: int = 0, *, dtype: torch.dtype = torch.int64, device: Device = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Rows and columns, two rows of them, of a matrix's elements on and below diagonal ``offset``.

    Source: ``torch.tril_indices``.
    """
    return _indices("tril_indices", row, col, offset, False, dtype, device, requires_grad)


def triu_indices(
    row: int, col: int, offset: int = 0, *, dtype: torch.dtype = torch.int64, device: Device = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Rows and columns, two rows of them, of a matrix's elements on and above diagonal ``offset``.

    Source: ``torch.triu_indices``.
    """
    return _indices("triu_indices", row, col, offset, True, dtype, device, requires_grad)


# -- nothing to compute ----------------------------------------------------------------------------------------------------


def empty(
    *size: Size, out: Tensor | None = None, dtype: torch.dtype | None = None, device: Device = None,
    requires_grad: bool = False, pin_memory: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:  # fmt: skip
    """A tensor of uninitialized memory. Source: ``torch.empty``."""
    if out is not None:
        return _finished(_made("empty", _shape(size), out, dtype, device), requires_grad)
    return torch.empty(
        _shape(size), dtype=dtype, device=device, requires_grad=requires_grad, pin_memory=pin_memory,
        memory_format=memory_format,
    )  # fmt: skip


def empty_like(
    input: Tensor, *, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:  # fmt: skip
    """Uninitialized memory in the shape, dtype and layout of ``input``. Source: ``torch.empty_like``."""
    return torch.empty_like(input, dtype=dtype, device=device, requires_grad=requires_grad, memory_format=memory_format)


def new_empty(
    input: Tensor, *size: Size, dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False
) -> Tensor:
    """Uninitialized memory in the dtype and on the device of ``input``. Source: ``torch.Tensor.new_empty``."""
    return input.new_empty(_shape(size), dtype=dtype, device=device, requires_grad=requires_grad)


def new_empty_strided(
    input: Tensor, size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None,
    device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Uninitialized memory of these strides. Source: ``torch.Tensor.new_empty_strided``."""
    return input.new_empty_strided(tuple(size), tuple(stride), dtype=dtype, device=device, requires_grad=requires_grad)
