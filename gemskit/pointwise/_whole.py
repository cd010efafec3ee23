"""Whole quotients and what they leave, exact for floats as C's ``fmod`` is."""

from __future__ import annotations

import triton.language as tl
from triton.language.extra import libdevice

from gemskit import language
from gemskit._jit import jit
from gemskit.pointwise import _fast


@jit
def _near(x, y):
    """``x / y``, a whole number at most 0.9 away, what that leaves of ``x``, and whether the last two are exact for all.

    They are below 2**18. ``fmod`` takes 50 instructions and two branches an element, this 9.
    """
    t = x / y
    # So much smaller that what is below one half is not rounded up to 1, where the rest would not be a float.
    n = tl.math.fma(t, 1 - 2.0**-21, 12582912.0) - 12582912.0
    r = tl.math.fma(-n, y, x)
    # r * 0 is NaN where r is not finite.
    return t, n, r, _fast.below(t + r * 0, 2.0**18)


@jit
def _apart(r, y):
    """Whether the rest ``r``, which is not zero, and ``y`` have different signs."""
    return (r != 0) & ((r < 0) != (y < 0))


@jit
def floor_div(x, y):
    """The exact quotient, rounded down."""
    if x.dtype == tl.float32:
        t, n, r, near = _near(x, y)
        if near:
            whole = libdevice.copysign(tl.where(_apart(r, y), n - 1, n), t)
        else:
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
        t, n, r, near = _near(x, y)
        if near:
            rest = tl.where(_apart(r, y), r + y, tl.where(r == 0, libdevice.copysign(r, x), r))
        else:
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
        t, n, r, near = _near(x, y)
        if near:
            rest = libdevice.copysign(tl.where(_apart(r, x), r + libdevice.copysign(y, x), r), x)
        else:
            rest = libdevice.fmod(x, y)
        return rest
    elif x.dtype.is_floating():
        return libdevice.fmod(x, y)
    else:
        return x % y
