"""Whole quotients and what they leave, exact for floats as C's ``fmod`` is."""

from __future__ import annotations

import triton.language as tl
from triton.language.extra import libdevice

from gemskit import language
from gemskit._jit import jit
from gemskit.pointwise import _fast


@jit
def _near(x, y):
    """A whole number near ``x / y``, and what it leaves of ``x``; both exact where :func:`_far` is false."""
    # So much smaller that what is below one half is not rounded up to 1, where the rest would not be a float.
    n = tl.math.fma(_fast.quotient(x, y), 1 - 2.0**-21, 12582912.0) - 12582912.0
    return n, tl.math.fma(-n, y, x)


@jit
def _far(r, y):
    """Whether the rest of one of the block is no rest: the quotient is above 2**20 or not finite.

    ``fmod`` takes 50 instructions and two branches an element. The result of the short way is complete before this is asked:
    operands that wait for the answer take registers.
    """
    return not _fast.largest(tl.abs(r) - 0.75 * tl.abs(y)) <= 0


@jit
def _apart(r, y):
    """Whether the rest ``r``, which is not zero, and ``y`` have different signs."""
    return (r != 0) & ((r < 0) != (y < 0))


@jit
def floor_div(x, y):
    """The exact quotient, rounded down."""
    if x.dtype == tl.float32:
        n, r = _near(x, y)
        # Zero has the sign of the quotient.
        sign = (x.to(tl.int32, bitcast=True) ^ y.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        whole = libdevice.copysign(tl.where(_apart(r, y), n - 1, n), sign)
        if _far(r, y):
            whole = _floor_div(x, y)
        return whole
    elif x.dtype.is_floating():
        return _floor_div(x, y)
    else:
        # Triton's // truncates.
        q = x // y
        return q - ((x - q * y != 0) & ((x < 0) != (y < 0))).to(q.dtype)


@jit
def _floor_div(x, y):
    # The remainder decides, not the rounded quotient: floor(1 / 0.1) would be 10, and the answer is 9.
    r = libdevice.fmod(x, y)
    q = language.div(x - r, y)
    q = tl.where(_apart(r, y), q - 1, q)
    whole = libdevice.floor(q)
    whole = tl.where(q - whole > 0.5, whole + 1, whole)
    zero = libdevice.copysign(q * 0, language.div(x, y))
    return tl.where(y == 0, language.div(x, y), tl.where(q == 0, zero, whole))


@jit
def remainder(x, y):
    """What the quotient rounded down leaves: zero with the sign of ``x``, or something with that of ``y``."""
    if x.dtype == tl.float32:
        _, r = _near(x, y)
        rest = tl.where(_apart(r, y), r + y, tl.where(r == 0, libdevice.copysign(r, x), r))
        if _far(r, y):
            rest = _remainder(x, y)
        return rest
    else:
        return _remainder(x, y)


@jit
def _remainder(x, y):
    rest = libdevice.fmod(x, y) if x.dtype.is_floating() else x % y
    return tl.where(_apart(rest, y), rest + y, rest)


@jit
def fmod(x, y):
    """What the quotient rounded toward zero leaves, with the sign of ``x``."""
    if x.dtype == tl.float32:
        _, r = _near(x, y)
        rest = libdevice.copysign(tl.where(_apart(r, x), r + libdevice.copysign(y, x), r), x)
        if _far(r, y):
            rest = libdevice.fmod(x, y)
        return rest
    elif x.dtype.is_floating():
        return libdevice.fmod(x, y)
    else:
        return x % y
