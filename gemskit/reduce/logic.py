"""Truth of many elements: all, any, counts, and comparisons of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit._checks import describe
from gemskit._dtypes import common_dtype, compute_type
from gemskit._jit import jit
from gemskit._op import Named, P, R, operator
from gemskit.errors import ArgumentError, DtypeError
from gemskit.reduce._drive import Dims, Reduction, always
from gemskit.reduce._fold import Fold


@jit
def nonzero(input):
    """1 where ``input`` is true; NaN is."""
    return (input != 0).to(tl.int32)


@jit
def _add(a, b):
    return a + b


@jit
def _both(a, b):
    return a & b


@jit
def _either(a, b):
    return a | b


@jit
def _nonzeros(word):
    """The highest bit of each byte of ``word``: whether that is not 0."""
    return ((word & 0x7F7F7F7F) + 0x7F7F7F7F) | word


class Truth(Reduction[P, R]):
    """A reduction of whether elements are true: they are counted as ints, whatever their dtype."""

    def of(self, combine: Any, identity: int, words: Any = None) -> None:
        """Attach the associative step of two ints, and the map of four bytes at once where it is bitwise."""
        fold = Fold(self.name, map=nonzero, combine=combine, identity=(identity,), state=("index",), words=words)
        self._folds.append((always, fold))

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        input, dim = named["input"], named.get("dim")
        if dim is None or isinstance(dim, int) or len(dim) or not input.ndim or "keepdim" not in named:
            return super().plan(named, outs)
        # An empty dim folds nothing away here, unlike in sum.
        run = self._folds[0][1].plan(named, outs, tuple(input.shape), (), compute_type(input.dtype))
        return lambda outs, keep, arguments: run(outs, arguments)


def truth(aten: str) -> Callable[[Callable[P, R]], Truth[P, R]]:
    """Declare a reduction of truths."""
    return lambda meaning: Truth(meaning, aten=aten)


@truth("all.dims")
def all(input: Tensor, dim: Dims = None, keepdim: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Whether all elements over ``dim`` are true (all dimensions if None, none if empty); uint8 gives uint8.

    Source: ``torch.all``.
    """
    return torch.all(input, dim, keepdim)


@truth("any.dims")
def any(input: Tensor, dim: Dims = None, keepdim: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Whether an element over ``dim`` is true (all dimensions if None, none if empty); uint8 gives uint8.

    Source: ``torch.any``.
    """
    return torch.any(input, dim, keepdim)


@truth("count_nonzero.dim_IntList")
def count_nonzero(input: Tensor, dim: Dims = None) -> Tensor:
    """How many elements over ``dim`` (all if None or empty) are not 0; int64. Source: ``torch.count_nonzero``."""
    return torch.count_nonzero(input, dim)


@truth("_is_all_true")
def is_all_true(input: Tensor) -> Tensor:
    """Whether all elements of a bool tensor are True, as a bool tensor. Source: ``torch._is_all_true``."""
    if input.dtype != torch.bool:
        raise DtypeError(f"is_all_true: input must be bool, given {describe(input)}")
    return torch.all(input)


all.of(_both, 1, _nonzeros)
any.of(_either, 0, _nonzeros)
count_nonzero.of(_add, 0)
is_all_true.of(_both, 1, _nonzeros)


# -- comparisons ----------------------------------------------------------------------------------------------------------


@operator()
def _equal(input: Tensor, other: Tensor) -> Tensor:
    """Whether all elements of two tensors of one shape are equal, as a bool tensor; see :func:`equal`."""
    return torch.eq(input, other).all()


@operator()
def _allclose(
    input: Tensor, other: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> Tensor:
    """Whether all elements are close, as a bool tensor; see :func:`allclose`."""
    return torch.isclose(input, other, rtol, atol, equal_nan).all()


@jit
def _same(input, other):
    return (input == other).to(tl.int32)


@jit
def _close(input, other, rtol, atol, equal_nan):
    # Each step is rounded to the dtype of the operands, as torch's are.
    wide: tl.constexpr = rtol.dtype
    narrow: tl.constexpr = input.dtype if input.dtype.is_floating() else wide
    a, b = input.to(wide), other.to(wide)
    allowed = (tl.abs((b * rtol).to(narrow).to(wide)) + atol).to(narrow)
    error = tl.abs(a - b).to(narrow)
    close = (input == other) | ((error <= allowed) & (error < float("inf")))
    if equal_nan:
        close = close | ((a != a) & (b != b))
    return close.to(tl.int32)


_SAME = Fold("equal", map=_same, combine=_both, identity=(1,), state=("index",))
_CLOSE = Fold("allclose", map=_close, combine=_both, identity=(1,), state=("index",), keep=("input", "other"))


def _everywhere(
    fold: Fold, named: Mapping[str, object], out: Tensor, shape: Sequence[int], *how: torch.dtype
) -> None:  # fmt: skip
    ndim = max(len(shape), 1)
    fold(named, [out.view((1,) * ndim)], tuple(shape) or (1,), tuple(range(ndim)), *how)


@_equal.kernel
def _(outs: Sequence[Tensor], keep: object, input: Tensor, other: Tensor) -> None:
    common = common_dtype([input, other])
    _everywhere(_SAME, {"input": input, "other": other}, outs[0], input.shape, compute_type(common), common)


@_allclose.kernel
def _(outs: Sequence[Tensor], keep: object, input: Tensor, other: Tensor, **numbers: float) -> None:
    wide = compute_type(input.dtype if input.is_floating_point() else torch.get_default_dtype())
    shape = torch.broadcast_shapes(input.shape, other.shape)
    _everywhere(_CLOSE, {"input": input, "other": other, **numbers}, outs[0], shape, wide)


def equal(input: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and equal elements; NaN equals nothing. Waits for the device.

    Source: ``torch.equal``.
    """
    return input.shape == other.shape and bool(_equal(input, other).item())


def allclose(input: Tensor, other: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> bool:
    """Whether ``|input - other| <= atol + rtol * |other|`` for all elements, broadcast. Waits for the device.

    Equal infinities are close, NaNs only with ``equal_nan``. Both have one dtype. Source: ``torch.allclose``.
    """
    if rtol < 0 or atol < 0:
        raise ArgumentError(f"allclose: rtol and atol must be at least 0, given {rtol} and {atol}")
    return bool(_allclose(input, other, float(rtol), float(atol), equal_nan).item())
