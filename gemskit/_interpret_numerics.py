"""Arithmetic of the interpreter: exact casts for bfloat16 and float8, fused multiply-add, libdevice.

numpy has neither bfloat16 nor float8, so both are held as their bits (uint16, uint8). Every operation on them goes
through float32 and rounds once to nearest even, as the hardware does.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import _get_np_dtype as np_dtype

Array = Any

SMALL: dict[Any, torch.dtype] = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_WRAPPING = (np.add, np.subtract, np.multiply)


def _torch(a: Array) -> torch.Tensor:
    return torch.from_numpy(np.require(a, requirements=("C", "W")))


def widen(bits: Array, dtype: Any) -> Array:
    """Bits of bfloat16 or float8 to float32 (exact)."""
    if dtype == tl.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if bits.size == 0:
        return bits.astype(np.float32)
    return _torch(bits).view(SMALL[dtype]).float().numpy()


def _to_odd(x: Array) -> Array:
    """float64 to float32 rounded to odd, so that a second rounding to a narrower type is still exact."""
    f = x.astype(np.float32)
    bits = f.view(np.int32) - (np.abs(f.astype(np.float64)) > np.abs(x))
    inexact = np.isfinite(x) & (f.astype(np.float64) != x)
    return np.where(inexact, bits | 1, f.view(np.int32)).astype(np.int32).view(np.float32)


def narrow(x: Array, dtype: Any, toward_zero: bool = False) -> Array:
    """float32 or float64 to the bits of bfloat16 or float8: to nearest even, or toward zero.

    bfloat16 overflows to infinity; float8 saturates, as ``cvt.rn.satfinite`` does.
    """
    f = _to_odd(x) if x.dtype == np.float64 else np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))
    if dtype == tl.bfloat16:
        u = f.view(np.uint32)
        up = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
        bits = ((u + up) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(f), np.uint16(0x7FC0), bits)
    t, target = _torch(f), SMALL[dtype]
    limit = torch.finfo(target).max
    bits = torch.where(t.isnan(), t, t.clamp(-limit, limit)).to(target).view(torch.uint8).numpy()
    if toward_zero:
        bits = bits - (np.abs(widen(bits, dtype)) > np.abs(f)).astype(np.uint8)
    return bits


def convert(data: Array, src: Any, dst: Any, toward_zero: bool = False) -> Array:
    """Value cast between two scalar types."""
    if src == dst:
        return data
    if src in SMALL:
        data = widen(data, src)
    if dst in SMALL:
        return narrow(data if data.dtype.kind == "f" else data.astype(np.float64), dst, toward_zero)
    out = data.astype(np_dtype(dst))
    if toward_zero and dst == tl.float16:
        grew = np.abs(out.astype(data.dtype)) > np.abs(data)
        out = (out.view(np.uint16) - grew.astype(np.uint16)).view(np.float16)
    return out


def binary(a: Array, b: Array, dtype: Any, op: Callable[[Array, Array], Array]) -> Array:
    """``op(a, b)`` in ``dtype``; a comparison gives bool. int1 wraps around like any other integer type."""
    if dtype in SMALL:
        out = op(widen(a, dtype), widen(b, dtype))
        return out if out.dtype == np.bool_ else narrow(out, dtype)
    if a.dtype == np.bool_ and b.dtype == np.bool_ and op in _WRAPPING:
        return (op(a.astype(np.int8), b.astype(np.int8)) & 1).astype(np.bool_)
    out = op(a, b)
    if out.dtype == np.bool_:
        return out
    return out.astype(np_dtype(dtype), copy=False)


def unary(a: Array, dtype: Any, op: Callable[[Array], Array]) -> Array:
    if dtype in SMALL:
        return narrow(op(widen(a, dtype)), dtype)
    return op(a).astype(a.dtype, copy=False)


def fma(x: Array, y: Array, z: Array, dtype: Any) -> Array:
    """``x * y + z`` with one rounding (float64: two, numpy has no wider type that is portable)."""
    if dtype == tl.float64:
        return x * y + z
    if dtype in SMALL:
        x, y, z = widen(x, dtype), widen(y, dtype), widen(z, dtype)
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    # TwoSum: what the float64 addition lost decides the last bit, then the narrowing below rounds correctly.
    tail = total - product
    lost = (product - (total - tail)) + (addend - tail)
    bits = total.view(np.int64) - (((lost < 0) & (total > 0)) | ((lost > 0) & (total < 0)))
    exact = ~np.isfinite(lost) | (lost == 0)
    total = np.where(exact, total, (bits | 1).view(np.float64))
    return narrow(total, dtype) if dtype in SMALL else total.astype(np_dtype(dtype))


def umulhi(a: Array, b: Array) -> Array:
    """High half of the unsigned product."""
    width = a.dtype.itemsize * 8
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    x, y = a.astype(unsigned).astype(np.uint64), b.astype(unsigned).astype(np.uint64)
    if width < 64:
        return ((x * y) >> np.uint64(width)).astype(unsigned).astype(a.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    mid = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    cross = (x & low) * (y >> half) + (mid & low)
    return ((x >> half) * (y >> half) + (mid >> half) + (cross >> half)).astype(a.dtype)


def dot(a: Array, b: Array, acc: Array) -> Array:
    """``a @ b + acc`` in the accumulator's type; integers through float64, exact below 2**53 and fast."""
    if acc.dtype.kind in "iu":
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64).astype(acc.dtype) + acc
    wide = np.float64 if acc.dtype == np.float64 else np.float32
    return (np.matmul(a.astype(wide, copy=False), b.astype(wide, copy=False)) + acc).astype(acc.dtype, copy=False)


def atomic_bf16(op: Callable[[Array, Array], Array] | None, p: Array, value: Array, mask: Array) -> Array:
    """Atomics on bfloat16 at the addresses ``p``, lane by lane; without ``op`` an exchange. Returns the old bits."""
    out = np.zeros(p.shape, np.uint16)
    for i in zip(*np.nonzero(mask), strict=True):
        cell = np.frombuffer(memoryview((ctypes.c_uint16 * 1).from_address(int(p[i]))), np.uint16)
        out[i] = cell[0]
        new = value[i].reshape(1)
        cell[0] = (new if op is None else binary(cell, new, tl.bfloat16, op))[0]
    return out


def erf(a: Array) -> Array:
    return _torch(a).erf().numpy()


# ---- libdevice -----------------------------------------------------------------------------------------------------


def _by_torch(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Array], Array]:
    return lambda a: fn(_torch(a)).numpy()


def _half_away(a: Array) -> Array:
    return np.trunc(a + np.copysign(a.dtype.type(0.5), a)) * (np.abs(a) < 2**52) + a * (np.abs(a) >= 2**52)


def _bit_count(a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1).sum(-1)


def _leading_zeros(a: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(a).astype(a.dtype.newbyteorder(">"))[..., None].view(np.uint8), axis=-1)
    return np.where(bits.any(-1), bits.argmax(-1), a.dtype.itemsize * 8)


_OF_TORCH = "erf erfc erfinv lgamma tanh sinh cosh asinh acosh atanh log1p expm1 rsqrt"
_OF_NUMPY = (
    "exp exp2 log log2 log10 sqrt floor ceil trunc rint sin cos tan cbrt isnan isinf signbit fmod hypot copysign "
    "nextafter ldexp fmax fmin abs"
)
_LIBDEVICE: dict[str, Callable[..., Array]] = {name: getattr(np, name) for name in _OF_NUMPY.split()}
_LIBDEVICE |= {name: _by_torch(getattr(torch, name)) for name in _OF_TORCH.split()}
_LIBDEVICE |= {
    name: _by_torch(getattr(torch.special, special))
    for name, special in {
        "j0": "bessel_j0", "j1": "bessel_j1", "y0": "bessel_y0", "y1": "bessel_y1", "erfcx": "erfcx",
        "cyl_bessel_i0": "i0", "cyl_bessel_i1": "i1", "normcdf": "ndtr", "normcdfinv": "ndtri",
    }.items()
}  # fmt: skip
_LIBDEVICE |= {
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "atan2": np.arctan2, "pow": np.power, "powi": np.power,
    "nearbyint": np.rint, "fabs": np.abs, "llabs": np.abs, "max": np.maximum, "min": np.minimum,
    "exp10": lambda a: np.power(a.dtype.type(10), a), "tgamma": np.vectorize(math.gamma), "round": _half_away,
    "llround": _half_away, "llrint": np.rint, "rcbrt": lambda a: 1 / np.cbrt(a), "rcp": lambda a: 1 / a,
    "sinpi": lambda a: np.sin(a * a.dtype.type(np.pi)), "cospi": lambda a: np.cos(a * a.dtype.type(np.pi)),
    "fdim": lambda a, b: np.where(np.isnan(a) | np.isnan(b), a + b, np.maximum(a - b, 0)),
    "remainder": lambda a, b: a - b * np.rint(a / b), "div": np.divide, "fdivide": np.divide, "add": np.add,
    "sub": np.subtract, "mul": np.multiply, "finite": np.isfinite, "isfinite": np.isfinite,
    "fma": lambda a, b, c: fma(a, b, c, tl.float64 if a.dtype == np.float64 else tl.float32),
    "popc": _bit_count, "popcll": _bit_count, "clz": _leading_zeros, "clzll": _leading_zeros, "umulhi": umulhi,
    "rhypot": lambda a, b: 1 / np.hypot(a, b), "ilogb": lambda a: np.frexp(a)[1] - 1,
    "logb": lambda a: np.frexp(a)[1] - 1,
    "saturate": lambda a: np.clip(np.nan_to_num(a, nan=0.0), 0, 1),
}  # fmt: skip


def libdevice(symbol: str) -> Callable[..., Array]:
    """The CPU function of a device library symbol such as ``__nv_erff`` or ``__ocml_erf_f32``."""
    name = re.sub(r"^__(nv|ocml)_(native_|fast_)?|_f(16|32|64)$", "", symbol)
    rounded = re.sub(r"_r[nzud]$", "", name)
    # The type is written behind the name (erff), and before it where a rounding mode follows (ddiv_rn).
    for candidate in (name, re.sub("[fd]$", "", name), rounded, re.sub("^[fd]", "", rounded)):
        if candidate in _LIBDEVICE:
            return _LIBDEVICE[candidate]
    raise NotImplementedError(f"libdevice function {symbol} has no CPU counterpart in the interpreter")
