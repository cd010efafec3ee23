"""Drawn values: uniform, normal, exponential, bernoulli, integers, dropout.

A seed is drawn on the device from torch's generator, so that ``torch.manual_seed``, ``generator=`` and captured graphs work as
torch's; what an element gets depends on the seed and on its logical index, not on the memory layout or the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _launch, language
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit._op import P, R
from gemskit.errors import ArgumentError, DtypeError
from gemskit.pointwise._draw import Drawn
from gemskit.pointwise._drive import pointwise
from gemskit.pointwise.creation import _DIGITS, Device, Size, _finished, _made, _shape


def _drawn(*, source: str, ints: bool = False, floats: Sequence[str] = ()) -> Callable[[Callable[P, R]], Drawn[P, R]]:
    return functools.partial(Drawn, source=source, ints=ints, floats=floats)


def _seed(input: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
    """A seed on the device: drawn from torch's generator there without a host read, so that a captured graph draws anew."""
    if not torch.compiler.is_compiling() and not _launch.has_kernels(input.device):
        return None
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=input.device, generator=generator)


# -- dropout ---------------------------------------------------------------------------------------------------------------


@_drawn(source="uniform")
def _dropout(input: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """:func:`dropout` with the mask that ``seed`` (int64, 0-dim) draws; ``None`` draws from torch, on CPU tensors only."""
    return torch.nn.functional.dropout(input, p)


@_dropout.formula
@jit
def _(input, p, drawn):
    return input * tl.where(drawn >= p, 1 / (1 - p), 0)


_dropout.linear()


def _checked(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ArgumentError(f"{name}: p is a probability, between 0 and 1; given {p!r}")
    return float(p)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by ``1 / (1 - p)``; ``input`` itself if not ``training``.

    The mask follows ``torch.manual_seed`` and the logical index of an element, not its memory layout; it is drawn again for
    the gradient, never stored. With ``inplace`` the input is overwritten. Source: ``torch.nn.functional.dropout``.
    """
    if inplace:
        return dropout_(input, p, training)
    p = _checked("dropout", p)
    return _dropout(input, p, _seed(input)) if training and p else input


def dropout_(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """In-place :func:`dropout`: overwrites ``input``. Source: ``torch.dropout_``."""
    p = _checked("dropout_", p)
    return _dropout_(input, p, _seed(input)) if training and p else input


_dropout_ = _dropout.inplace


@pointwise(aten="native_dropout_backward")
def native_dropout_backward(grad_output: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``grad_output * mask * scale``: the gradient of a dropout that stored its ``mask`` (bool).

    Source: ``torch.ops.aten.native_dropout_backward``.
    """
    return torch.ops.aten.native_dropout_backward(grad_output, mask, scale)  # type: ignore[no-any-return]


@native_dropout_backward.formula
@jit
def _(grad_output, mask, scale):
    return grad_output * mask * scale


# -- uniform ---------------------------------------------------------------------------------------------------------------


@_drawn(source="uniform", floats=("input",))
def _uniform(input: Tensor, low: float, high: float, top: float, seed: Tensor | None) -> Tensor:
    """Values in [low, high) in the place of ``input``; none is above ``top``, to which rounding might lead."""
    return torch.empty_like(input).uniform_(low, high)


@_uniform.formula
@jit
def _(low, high, top, drawn):
    return tl.minimum(low + drawn * (high - low), top)


_uniform_ = _uniform.inplace


def _below(high: float, dtype: torch.dtype) -> float:
    """The largest value of ``dtype`` below ``high``."""
    if high == 0:
        return -torch.finfo(dtype).tiny
    fraction, exponent = math.frexp(high)
    least = math.frexp(torch.finfo(dtype).tiny)[1]
    unit = math.ldexp(1.0, max(exponent - (fraction == 0.5), least) - _DIGITS[dtype])
    return (math.ceil(high / unit) - 1) * unit


def uniform_(input: Tensor, from_: float = 0.0, to: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite ``input`` with uniform values in [from_, to), never ``to`` itself: steps of 2**-24 (float64: 2**-53).

    Rounding to float16 and bfloat16 stops at the value below ``to``. Source: ``torch.Tensor.uniform_``.
    """
    if not from_ <= to:
        raise ArgumentError(
            f"uniform_: values are from from_ to to, which must not be smaller; given {from_!r}, {to!r}"
        )
    seed = _seed(input, generator)
    if seed is None:
        return input.uniform_(from_, to, generator=generator)
    top = max(_below(to, input.dtype), from_) if input.dtype in _DIGITS and math.isfinite(to) else to
    return _uniform_(input, float(from_), float(to), float(top), seed)


def rand(
    *size: Size, generator: torch.Generator | None = None, out: Tensor | None = None,
    dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Uniform values in [0, 1). Source: ``torch.rand``."""
    made = _made("rand", _shape(size), out, dtype, device)
    return _finished(uniform_(made, generator=generator), requires_grad)


def rand_like(
    input: Tensor, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
    device: Device = None, requires_grad: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:  # fmt: skip
    """Uniform values in [0, 1), as many as ``input`` has. Source: ``torch.rand_like``."""
    made = torch.empty_like(input, dtype=dtype, device=device, memory_format=memory_format)
    return _finished(uniform_(made, generator=generator), requires_grad)


# -- normal ----------------------------------------------------------------------------------------------------------------


@_drawn(source="normal", floats=("input",))
def _normal(input: Tensor, mean: Tensor | Number, std: Tensor | Number, seed: Tensor | None) -> Tensor:
    """``mean + std * z`` with standard normal ``z``, in the place of ``input``."""
    return torch.empty_like(input).normal_().mul_(std).add_(mean)


@_normal.formula
@jit
def _(mean, std, drawn):
    return mean + std * drawn


_normal_ = _normal.inplace


def normal_(input: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite ``input`` with normal values. Source: ``torch.Tensor.normal_``."""
    _spread("normal_", std)
    seed = _seed(input, generator)
    if seed is None:
        return input.normal_(mean, std, generator=generator)
    return _normal_(input, float(mean), float(std), seed)


def _spread(name: str, std: Tensor | float) -> None:
    if not isinstance(std, Tensor) and not std >= 0:
        raise ArgumentError(f"{name}: std is a standard deviation, at least 0; given {std!r}")


def normal(
    mean: Tensor | float, std: Tensor | float = 1.0, size: Sequence[int] | None = None, *,
    generator: torch.Generator | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None,
    device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Normal values: of the shape that the tensors ``mean`` and ``std`` broadcast to, or of ``size`` where both are numbers.

    The signs of a tensor ``std`` are not looked at, which would wait for the device. Source: ``torch.normal``.
    """
    _spread("normal", std)
    tensors = [v for v in (mean, std) if isinstance(v, Tensor)]
    if not tensors or size is not None:
        if tensors or size is None:
            raise ArgumentError("normal: either mean or std is a tensor, or size is given; not both, not neither")
        made = _made("normal", size, out, dtype, device)
        return _finished(normal_(made, mean, std, generator=generator), requires_grad)  # type: ignore[arg-type]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    made = _made("normal", shape, out, tensors[0].dtype, tensors[0].device)
    seed = _seed(made, generator)
    if seed is None:
        return torch.normal(mean, std, generator=generator, out=out)  # type: ignore[arg-type]
    return _normal_(made, mean, std, seed)


def randn(
    *size: Size, generator: torch.Generator | None = None, out: Tensor | None = None,
    dtype: torch.dtype | None = None, device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Standard normal values. Source: ``torch.randn``."""
    made = _made("randn", _shape(size), out, dtype, device)
    return _finished(normal_(made, generator=generator), requires_grad)


def randn_like(
    input: Tensor, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
    device: Device = None, requires_grad: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:  # fmt: skip
    """Standard normal values, as many as ``input`` has. Source: ``torch.randn_like``."""
    made = torch.empty_like(input, dtype=dtype, device=device, memory_format=memory_format)
    return _finished(normal_(made, generator=generator), requires_grad)


# -- exponential -----------------------------------------------------------------------------------------------------------


@_drawn(source="uniform_positive", floats=("input",))
def _exponential(input: Tensor, lambd: float, seed: Tensor | None) -> Tensor:
    """Exponential values of rate ``lambd`` in the place of ``input``."""
    return torch.empty_like(input).exponential_(lambd)


@_exponential.formula
@jit
def _(lambd, drawn):
    # log(1) = 0 is no value of the distribution; half a unit of 1 stands for it, as in torch.
    least: tl.constexpr = 5.960464477539063e-08 if drawn.dtype == tl.float32 else 1.1102230246251565e-16
    return language.div(tl.maximum(-language.log(drawn), least), lambd)


_exponential_ = _exponential.inplace


def exponential_(input: Tensor, lambd: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite ``input`` with exponential values of rate ``lambd``, above 0 and finite.

    Source: ``torch.Tensor.exponential_``.
    """
    if not lambd > 0:
        raise ArgumentError(f"exponential_: lambd is a rate above 0; given {lambd!r}")
    seed = _seed(input, generator)
    if seed is None:
        return input.exponential_(lambd, generator=generator)
    return _exponential_(input, float(lambd), seed)


# -- bernoulli -------------------------------------------------------------------------------------------------------------


@_drawn(source="uniform")
def _bernoulli(input: Tensor, p: Tensor | Number, seed: Tensor | None) -> Tensor:
    """1 with probability ``p``, else 0, in the place of ``input``."""
    return torch.empty_like(input).bernoulli_(p)


@_bernoulli.formula
@jit
def _(p, drawn):
    return tl.where(drawn < p, 1.0, 0.0)


_bernoulli_ = _bernoulli.inplace


def bernoulli_(input: Tensor, p: Tensor | float = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite ``input`` with 1 where a draw of probability ``p`` (a number, or a tensor that broadcasts) succeeds, else 0.

    Probabilities in a tensor are not checked, which would wait for the device. Source: ``torch.Tensor.bernoulli_``.
    """
    if not isinstance(p, Tensor):
        p = _checked("bernoulli_", p)
    seed = _seed(input, generator)
    if seed is None:
        return input.bernoulli_(p, generator=generator)
    return _bernoulli_(input, p, seed)


def bernoulli(
    input: Tensor, p: float | None = None, *, generator: torch.Generator | None = None, out: Tensor | None = None
) -> Tensor:
    """1 with the probability that ``input`` holds (or with ``p``), else 0. Source: ``torch.bernoulli``."""
    if p is None and not input.is_floating_point():
        raise DtypeError(f"bernoulli: input holds probabilities, floating point; given {input.dtype}")
    if out is None:
        made = torch.empty_like(input)
    else:
        made = _made("bernoulli", input.shape, out, None, input.device)
    return bernoulli_(made, input if p is None else p, generator=generator)


# -- integers --------------------------------------------------------------------------------------------------------------


@_drawn(source="words", ints=True)
def _random(input: Tensor, low: Number, last: Number, wide: bool, seed: Tensor | None) -> Tensor:
    """Integers from ``low`` to ``last`` in the place of ``input``; ``wide`` draws 64 bits for each, not 32."""
    if last == 2**63 - 1:
        return torch.empty_like(input, dtype=torch.int64).random_(int(low), None).to(input.dtype)
    return torch.empty_like(input).random_(int(low), int(last) + 1)


@_random.formula
@jit
def _(low, last, drawn):
    # The high half of a product maps a word to the range without a division.
    span = (last - low + 1).to(drawn.dtype)
    scaled = tl.umulhi(drawn, tl.broadcast_to(span, drawn.shape))
    # All of 2**64 values: the span is 0.
    return low + tl.where(span == 0, drawn, scaled).to(tl.int64)


_random_ = _random.inplace
#: Spans up to here take one word of 32 bits: no value is favoured by more than 2**-12 of its probability.
_NARROW = 1 << 20


def random_(input: Tensor, *bounds: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Overwrite ``input`` with integers: ``random_(input, to)`` in [0, to), ``random_(input, from, to)`` in [from, to).

    Without ``to`` (or with None for it) up to all that the dtype holds: of floats, that it holds without a gap.
    Source: ``torch.Tensor.random_``.
    """
    if len(bounds) > 2:
        raise ArgumentError(f"random_: takes to, or from and to; given {bounds!r}")
    if not torch.compiler.is_compiling() and not _launch.has_kernels(input.device):
        return input.random_(*bounds, generator=generator)
    dtype = input.dtype
    if dtype.is_complex:
        raise DtypeError(f"random_: no kernel for {dtype}")
    low, to = (0, None) if not bounds else (0, bounds[0]) if len(bounds) == 1 else bounds
    low = 0 if low is None else low
    if dtype.is_floating_point:
        most, top = 2 ** _DIGITS[dtype], min(int(torch.finfo(dtype).max), 2**63 - 1)
        least = -top
    else:
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        top = most
    last = most if to is None else to - 1
    if not least <= low <= last <= top:
        raise ArgumentError(f"random_: from must be below to, both in {dtype}; given from {low} to {last + 1}")
    seed = _seed(input, generator)
    return _random_(input, low, last, last - low >= _NARROW, seed)


def randint(
    low: int, high: int | Sequence[int] | None = None, size: Sequence[int] | None = None, *,
    generator: torch.Generator | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None,
    device: Device = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Integers in [low, high), int64 unless ``dtype`` says otherwise; ``randint(high, size)`` starts at 0.

    Source: ``torch.randint``.
    """
    shape = high if size is None else size
    first, last = (0, low) if size is None else (low, high)
    if not isinstance(shape, (tuple, list)) or not isinstance(last, (int, torch.SymInt)):
        raise ArgumentError(f"randint: takes high and size, or low, high and size; given {(low, high, size)}")
    made = _made("randint", shape, out, dtype or (torch.int64 if out is None else None), device)
    return _finished(random_(made, first, last, generator=generator), requires_grad)
