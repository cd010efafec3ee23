"""The engine of the interpreter: Triton's operations on numpy arrays, for a group of programs at once.

It stands in the place of the compiler's IR builder: Triton's own semantics call it, so types and shapes are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from . import _interpret_numerics as numerics
from ._interpret_memory import Memory, Origin, Storage, keep_origin, same_length, uniform
from .errors import DtypeError

Array = Any
Handle = stock.TensorHandle
np_dtype = stock._get_np_dtype
_ATOMIC = stock._ir.ATOMIC_OP
_BF16_ATOMIC = {_ATOMIC.FADD: np.add, _ATOMIC.MAX: np.fmax, _ATOMIC.MIN: np.fmin}
_ACQUIRING = (stock._ir.MEM_SEMANTIC.ACQUIRE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)

TYPES = {
    torch.bool: tl.int1, torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
    torch.uint8: tl.uint8, torch.uint16: tl.uint16, torch.uint32: tl.uint32, torch.uint64: tl.uint64,
    torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16,
} | {torch_type: triton_type for triton_type, torch_type in numerics.SMALL.items()}  # fmt: skip


class Descriptor:
    """A tensor descriptor: base pointer, shape, strides and block of a view."""

    def __init__(self, base: Any, shape: list[Any], strides: list[Any], block_shape: list[int], padding: Any) -> None:
        self.base, self.shape, self.strides = base, shape, strides
        self.block_shape, self.padding, self.round_f32_to_tf32 = block_shape, padding, False
        size = base.dtype.element_ty.primitive_bitwidth // 8
        if (base.data % 16).any():
            raise ValueError("tensor descriptor: the base must be aligned to 16 bytes")
        if any(((s.data * size) % 16).any() for s in strides[:-1]):
            raise ValueError("tensor descriptor: every stride but the last must be a multiple of 16 bytes")
        if (strides[-1].data != 1).any():
            raise ValueError("tensor descriptor: the last stride must be 1")


class GridBuilder(Memory, stock.InterpreterBuilder):  # type: ignore[misc]
    """Builds nothing: computes every operation at once for a group of programs."""

    def __init__(self) -> None:
        Memory.__init__(self)
        stock.InterpreterBuilder.__init__(self)
        precisions = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
        self.options = dataclasses.replace(
            stock.InterpreterOptions(), sanitize_overflow=False, debug=True, allowed_dot_input_precisions=precisions
        )

    # ---- memory ----------------------------------------------------------------------------------------------------

    def create_load(self, ptr: Any, *_: Any) -> Any:
        return self._load(ptr, None, None)

    def create_store(self, ptr: Any, value: Any, *_: Any) -> None:
        self._store(ptr, value.data, None)

    def create_masked_load(self, ptr: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        return self._load(ptr, mask.data, None if other is None else other.data)

    def create_masked_store(self, ptr: Any, value: Any, mask: Any, *_: Any, **__: Any) -> None:
        self._store(ptr, value.data, mask.data)

    def create_atomic_rmw(self, op: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        shape = (len(self.number), *ptr.data.shape[1:])
        p, v, m = (np.ascontiguousarray(np.broadcast_to(h.data, shape)) for h in (ptr, value, mask))
        full = keep_origin(Handle(p, ptr.dtype), ptr)
        origin, _, index = self.locate(full, m, v.itemsize, "atomic")
        if index is None:
            self._one_by_one()
        elif len(self.number) > 1 and origin is not None:
            target = origin.storage.view(v.itemsize)
            self.log.append((target, index[m], target[index[m]]))
        self.ordered = True
        if sem in _ACQUIRING:
            self.synchronised[self.number] = True
        if value.dtype.scalar == tl.bfloat16:
            return Handle(numerics.atomic_bf16(_BF16_ATOMIC.get(op), p, v, m), tl.bfloat16)
        return super().create_atomic_rmw(op, full, Handle(v, value.dtype), Handle(m, tl.int1), sem, scope)

    def create_atomic_cas(self, ptr: Any, cmp: Any, value: Any, sem: Any, scope: Any) -> Any:
        self._one_by_one()  # compare-and-swap builds locks
        self.locate(ptr, None, value.data.itemsize, "atomic")
        if sem in _ACQUIRING:
            self.synchronised[self.number] = True
        return super().create_atomic_cas(ptr, cmp, value, sem, scope)

    def create_atomic_poll(self, *args: Any) -> Any:
        self._one_by_one()
        return super().create_atomic_poll(*args)

    def create_addptr(self, ptr: Any, offset: Any) -> Any:
        size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        step = np.multiply(offset.data, size, dtype=np.int64, casting="unsafe").view(np.uint64)
        return keep_origin(Handle(ptr.data + step, ptr.dtype), ptr)

    # ---- programs --------------------------------------------------------------------------------------------------

    def create_get_program_id(self, axis: int) -> Any:
        ids = self.pid[axis]
        return Handle(ids[:1] if (ids == ids[0]).all() else ids, tl.int32)

    def create_print(self, prefix: str, hexadecimal: bool, values: list[Any], *_: Any) -> None:
        self._one_by_one()
        super().create_print(prefix, hexadecimal, values, *_)

    def create_assert(self, condition: Any, message: Any, *_: Any) -> None:
        if not self.check:
            return
        holds = condition.data.reshape(condition.data.shape[0], -1).all(1)
        if not holds.all():
            file, line = self.where()
            at = f"kernel {self.kernel}, {file}:{line}, program {self.program(int(self.number[int(holds.argmin())]))}"
            raise AssertionError(f"{message or 'assertion failed'}: {at}")

    def create_assume(self, condition: Any) -> None:
        self.create_assert(condition, "tl.assume does not hold")

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def cast_impl(self, src: Any, dst: Any, *_: Any) -> Any:
        return Handle(numerics.convert(src.data, src.dtype.scalar, dst.scalar), dst.scalar)

    create_si_to_fp = create_ui_to_fp = create_fp_to_si = create_fp_to_ui = create_fp_ext = cast_impl
    create_fp_trunc = create_int_cast = cast_impl

    def create_fp_to_fp(self, src: Any, dst: Any, rounding: Any = None) -> Any:
        toward_zero = rounding == stock._ir.ROUNDING_MODE.RTZ
        return Handle(numerics.convert(src.data, src.dtype.scalar, dst.scalar, toward_zero), dst.scalar)

    def create_bitcast(self, src: Any, dst: Any) -> Any:
        out = Handle(src.data.view(np_dtype(dst)), dst.scalar)
        if not dst.is_ptr():
            return out
        same = len({h.get_element_ty().primitive_bitwidth // 8 for h in (src, out)}) == 1
        return keep_origin(out, src) if same else out

    create_int_to_ptr = create_ptr_to_int = create_bitcast

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        out = numerics.binary(lhs.data, rhs.data, lhs.dtype.scalar, op)
        return Handle(out, tl.int1 if out.dtype == np.bool_ else lhs.dtype.scalar)

    def unary_op(self, arg: Any, op: Any) -> Any:
        return Handle(numerics.unary(arg.data, arg.dtype.scalar, op), arg.dtype.scalar)

    def create_erf(self, arg: Any) -> Any:
        return self.unary_op(arg, numerics.erf)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda a: 1 / np.sqrt(a))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        return Handle(numerics.fma(x.data, y.data, z.data, z.dtype.scalar), z.dtype.scalar)

    def create_umulhi(self, lhs: Any, rhs: Any) -> Any:
        return Handle(numerics.umulhi(lhs.data, rhs.data), lhs.dtype.scalar)

    def create_clampf(self, x: Any, low: Any, high: Any, nan: Any) -> Any:
        small, large = (np.fmax, np.fmin) if nan == stock._ir.PROPAGATE_NAN.NONE else (np.maximum, np.minimum)
        return self.binary_op(self.binary_op(x, low, small), high, large)

    def create_dot(self, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        x, y = (numerics.widen(h.data, h.dtype.scalar) if h.dtype.scalar in numerics.SMALL else h.data for h in (a, b))
        return Handle(numerics.dot(x, y, acc.data), acc.dtype.scalar)

    def create_extern_elementwise(self, lib: str, path: str, symbol: str, args: list[Any], ret: Any, pure: bool) -> Any:
        out = numerics.libdevice(symbol)(*(h.data for h in args))
        return Handle(np.asarray(out).astype(np_dtype(ret.scalar), copy=False), ret.scalar)

    # ---- shape -----------------------------------------------------------------------------------------------------

    def create_make_range(self, ty: Any, start: int, stop: int) -> Any:
        return Handle(np.arange(start, stop, dtype=np.int32)[None], tl.int32)

    def create_reshape(self, a: Any, shape: Any, *_: Any) -> Any:
        return keep_origin(Handle(a.data.reshape(a.data.shape[0], *shape), a.dtype.scalar), a)

    def create_trans(self, a: Any, order: Any) -> Any:
        return keep_origin(Handle(np.transpose(a.data, (0, *[d + 1 for d in order])), a.dtype.scalar), a)

    def create_expand_dims(self, a: Any, axis: int) -> Any:
        return keep_origin(Handle(np.expand_dims(a.data, axis + 1), a.dtype.scalar), a)

    def create_broadcast(self, a: Any, shape: Any) -> Any:
        return keep_origin(Handle(np.broadcast_to(a.data, (a.data.shape[0], *shape)), a.dtype.scalar), a)

    def create_splat(self, ty: Any, a: Any) -> Any:
        shape, n = tuple(ty.shape), a.data.shape[0]
        data = np.broadcast_to(a.data.reshape(n, *(1,) * len(shape)), (n, *shape))
        return keep_origin(Handle(data, a.dtype.scalar), a)

    def create_unsplat(self, a: Any) -> Any:
        return keep_origin(Handle(a.data.reshape(a.data.shape[0], -1)[:, 0], a.dtype.scalar), a)

    def create_cat(self, lhs: Any, rhs: Any, *_: Any) -> Any:
        return Handle(np.concatenate(same_length(lhs.data, rhs.data), axis=1), lhs.dtype.scalar)

    def create_join(self, lhs: Any, rhs: Any) -> Any:
        return Handle(np.stack(same_length(lhs.data, rhs.data), axis=-1), lhs.dtype.scalar)

    def create_gather(self, src: Any, index: Any, axis: int) -> Any:
        a, i = same_length(src.data, index.data)
        return Handle(np.take_along_axis(a, i, axis=axis + 1), src.dtype.scalar)

    def create_histogram(self, data: Any, bins: int, mask: Any) -> Any:
        d, m = np.broadcast_arrays(data.data, np.bool_(True) if mask is None else mask.data)
        rows = [np.bincount(x[y & (x >= 0) & (x < bins)], minlength=bins) for x, y in zip(d, m, strict=True)]
        return Handle(np.stack(rows).astype(np.int32), tl.int32)

    # ---- tensor descriptors ----------------------------------------------------------------------------------------

    def create_make_tensor_descriptor(
        self, base: Any, shape: Any, strides: Any, block: Any, signed: bool, padding: Any = None
    ) -> Any:
        return Descriptor(base, shape, strides, block, padding)

    def _block(self, d: Descriptor, offsets: list[Array]) -> tuple[Any, Array]:
        """Pointers and mask of a block; an offset is a scalar per program, or already a block."""
        n = len(d.block_shape)
        size = d.base.dtype.element_ty.primitive_bitwidth // 8
        column = (-1, *(1,) * n)
        address: Array = d.base.data.reshape(column)
        mask: Array = np.ones((1,) * (n + 1), bool)
        for axis, off in enumerate(offsets):
            if off.ndim == 1:
                off = off.reshape(column).astype(np.int64)
                off = off + np.arange(d.block_shape[axis]).reshape(1, *(-1 if i == axis else 1 for i in range(n)))
            address = address + (off * size * d.strides[axis].data.reshape(column).astype(np.int64)).astype(np.uint64)
            mask = mask & (off >= 0) & (off < d.shape[axis].data.reshape(column))
        return keep_origin(Handle(address, d.base.dtype.scalar), d.base), mask

    def _descriptor_load(self, d: Descriptor, offsets: list[Array]) -> Any:
        ptr, mask = self._block(d, offsets)
        dtype = ptr.get_element_ty()
        nan = dtype.is_floating() and d.padding == stock._ir.PADDING_OPTION.PAD_NAN
        other = numerics.convert(np.full(1, np.nan), tl.float64, dtype) if nan else None
        out = self._load(ptr, mask, other)
        if d.round_f32_to_tf32 and dtype == tl.float32:
            out.data = stock._round_f32_to_tf32(out.data)
        return out

    def create_descriptor_load(self, d: Descriptor, offsets: list[Any], *_: Any, **__: Any) -> Any:
        return self._descriptor_load(d, [h.data for h in offsets])

    def create_descriptor_store(self, d: Descriptor, value: Any, offsets: list[Any]) -> None:
        ptr, mask = self._block(d, [h.data for h in offsets])
        self._store(ptr, value.data, mask)

    def create_descriptor_reduce(self, kind: Any, d: Descriptor, value: Any, offsets: list[Any]) -> None:
        ptr, mask = self._block(d, [h.data for h in offsets])
        element, name = ptr.get_element_ty(), kind.name
        if element.is_floating():
            name = {"ADD": "FADD"}.get(name, name)
        elif name in ("MIN", "MAX") and element.is_int_unsigned():
            name = "U" + name
        sem = stock._ir.MEM_SEMANTIC.RELAXED
        self.create_atomic_rmw(getattr(_ATOMIC, name), ptr, value, Handle(mask, tl.int1), sem, None)

    @staticmethod
    def _rows(d: Descriptor, x: Any, y: Any) -> list[Array]:
        rows, first = x.data.astype(np.int64)[:, :, None], y.data.astype(np.int64)[:, None, None]
        return [rows, first + np.arange(d.block_shape[-1])]

    def create_descriptor_gather(self, d: Descriptor, x: Any, y: Any, *_: Any) -> Any:
        return self._descriptor_load(d, self._rows(d, x, y))

    def create_descriptor_scatter(self, d: Descriptor, value: Any, x: Any, y: Any) -> None:
        ptr, mask = self._block(d, self._rows(d, x, y))
        self._store(ptr, value.data, mask)


BUILDER = GridBuilder()
SEMANTIC = TritonSemantic(BUILDER)


def _tensor(data: Array, scalar: Any) -> Any:
    return tl.tensor(Handle(data, scalar), tl.block_type(scalar, list(data.shape[1:])) if data.ndim > 1 else scalar)


# ---- reductions and scans ------------------------------------------------------------------------------------------


def _value(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


def _combine(fn: Any, xs: list[Array], ys: list[Array], types: list[Any]) -> list[Array]:
    pair = [_tensor(a, t) for part in (xs, ys) for a, t in zip(part, types, strict=True)]
    out = fn(*pair)
    out = out if isinstance(out, (tuple, tl.tuple)) else (out,)
    return [SEMANTIC.cast(SEMANTIC.to_tensor(v), t).handle.data for v, t in zip(out, types, strict=True)]


_UFUNC = {
    id(getattr(tl.standard, name)): ufunc
    for name, ufunc in {
        "_sum_combine": np.add, "_prod_combine": np.multiply, "_elementwise_max": np.fmax,
        "_elementwise_min": np.fmin, "_xor_combine": np.bitwise_xor,
    }.items()
}  # fmt: skip


def _prepare(values: Any) -> tuple[bool, list[Any], list[Array]]:
    several = isinstance(values, (tuple, tl.tuple))
    inputs = list(values) if several else [values]
    return several, [t.dtype.scalar for t in inputs], same_length(*[t.handle.data for t in inputs])


def reduce(values: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any) -> Any:
    """``tl.reduce``: one numpy call for the usual operations, else log2(n) pairwise combinations in order."""
    axis, keep_dims = _value(axis), _value(keep_dims)
    several, types, xs = _prepare(values)
    rank = xs[0].ndim - 1
    ax = 1 if axis is None else axis % rank + 1
    if axis is None:
        xs = [x.reshape(x.shape[0], -1) for x in xs]
    ufunc = _UFUNC.get(id(combine_fn)) if len(xs) == 1 else None
    if ufunc is not None:
        x = numerics.widen(xs[0], types[0]) if types[0] in numerics.SMALL else xs[0]
        typed = {} if ufunc in (np.fmax, np.fmin) else {"dtype": x.dtype}
        total = ufunc.reduce(x, axis=ax, keepdims=True, **typed)
        xs = [numerics.narrow(total, types[0]) if types[0] in numerics.SMALL else total]
    while xs[0].shape[ax] > 1:
        even, odd = ((slice(None),) * ax + (slice(k, None, 2),) for k in (0, 1))
        xs = same_length(*_combine(combine_fn, [x[even] for x in xs], [x[odd] for x in xs], types))
    if keep_dims:
        xs = [x.reshape(-1, *(1,) * rank) if axis is None else x for x in xs]
    else:
        xs = [np.squeeze(x, ax) for x in xs]
    out = tuple(_tensor(np.ascontiguousarray(x), t) for x, t in zip(xs, types, strict=True))
    return out if several else out[0]


def scan(values: Any, axis: Any, combine_fn: Any, reverse: Any = False, **_: Any) -> Any:
    """``tl.associative_scan``: numpy's accumulate for sum and product, else log2(n) shifted combinations."""
    axis, reverse = _value(axis), _value(reverse)
    several, types, xs = _prepare(values)
    ax = axis % (xs[0].ndim - 1) + 1
    if reverse:
        xs = [np.flip(x, ax) for x in xs]
    ufunc = _UFUNC.get(id(combine_fn))
    if ufunc in (np.add, np.multiply) and len(xs) == 1 and types[0] not in numerics.SMALL:
        xs = [ufunc.accumulate(xs[0], axis=ax, dtype=xs[0].dtype)]
    else:
        before = (slice(None),) * ax
        shift, n = 1, xs[0].shape[ax]
        while shift < n:
            head, tail = (*before, slice(0, shift)), (*before, slice(shift, n))
            ys = _combine(combine_fn, [np.roll(x, shift, ax) for x in xs], xs, types)
            xs = [np.concatenate(same_length(x[head], y[tail]), axis=ax) for x, y in zip(xs, ys, strict=True)]
            shift *= 2
    if reverse:
        xs = [np.flip(x, ax) for x in xs]
    out = tuple(_tensor(np.ascontiguousarray(x), t) for x, t in zip(xs, types, strict=True))
    return out if several else out[0]


# ---- values --------------------------------------------------------------------------------------------------------


def quiet() -> Any:
    """Overflow and invalid operations are ordinary values in a kernel."""
    return np.errstate(all="ignore")


def scalar(value: float, dtype: Any) -> Any:
    """A number as a scalar tensor of ``dtype``."""
    if dtype.is_int() and isinstance(value, float):
        raise DtypeError(f"interpret: the float {value} was given for a parameter of type {dtype}")
    wide = np.array([value], np.float64) if dtype.is_floating() else np.array([value], np_dtype(dtype))
    return _tensor(numerics.convert(wide, tl.float64, dtype) if dtype.is_floating() else wide, dtype)


def pointer(tensor: torch.Tensor, element: Any, name: str) -> Any:
    """The address of a tensor's first element, knowing the storage that it may touch."""
    start = tensor.untyped_storage().data_ptr()
    storage = next((s for s in BUILDER.storages if s.start == start), None)
    if storage is None:
        storage = Storage(tensor.untyped_storage())
        BUILDER.storages.append(storage)
    storage.names.append(name)
    handle = Handle(np.array([tensor.data_ptr()], np.uint64), tl.pointer_type(element))
    handle.origin = Origin(name, storage)
    return tl.tensor(handle, handle.dtype)


def loop(first: Any, second: Any = None, step: Any = 1, **_: Any) -> Iterator[Any]:
    """``range`` of a kernel. Programs may differ in start and step; those that differ in length are split."""
    start, stop = (0, first) if second is None else (first, second)
    start, stop, step = (SEMANTIC.to_tensor(_value(v)) for v in (start, stop, 1 if step is None else step))
    dtype = SEMANTIC.integer_promote_impl(SEMANTIC.integer_promote_impl(start.dtype, stop.dtype), step.dtype)
    low, high, by = (t.handle.data.reshape(-1).astype(np.int64) for t in (start, stop, step))
    count = np.maximum(0, -(-(high - low) // by))
    for k in range(int(uniform(count))):
        yield _tensor((low + k * by).astype(np_dtype(dtype)), dtype)


def decide(x: Any) -> bool:
    """The truth of a single element, the same in all programs of the group."""
    data, dtype = x.handle.data, x.dtype.scalar
    return bool(uniform((numerics.widen(data, dtype) if dtype in numerics.SMALL else data) != 0))


def truth(x: Any) -> bool:
    """Triton's own code asks blocks for their truth to see whether they were given: those are true."""
    return x.type.is_block() or decide(x)


def integer(x: Any) -> int:
    return int(uniform(x.handle.data))


def transposed(x: Any) -> Any:
    return _tensor(np.swapaxes(x.handle.data, -1, -2), x.dtype)
