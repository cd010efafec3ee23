"""The kernel behind all random operators: Philox by the logical index of an element.

Counter ``c`` under the key ``seed`` gives four words of 32 bits, for the elements ``4 c`` to ``4 c + 3`` (two of 64 bits, for
``2 c`` and ``2 c + 1``). A value depends on the seed and the index alone, whatever the memory layout and the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends, language
from gemskit._bind import SCALARS, adapter, arguments, fill, generated, given, parameters, scalar_types, slots
from gemskit._dtypes import TRITON, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._op import Named, Op, P, R
from gemskit._plan import Planned
from gemskit.pointwise._drive import Elementwise

#: Filled in: the formula by the names of its parameters, and what makes values of four words.
FORMULA: Any = None
SOURCE: Any = None


# -- sources: values of the four words of a counter --------------------------------------------------------------------------


@jit
def _fraction(word):
    """In [0, 1), a multiple of 2**-24."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@jit
def _uniform(a, b, c, d):
    return _fraction(a), _fraction(b), _fraction(c), _fraction(d)


@jit
def _positive(word):
    """In (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@jit
def _uniform_positive(a, b, c, d):
    return _positive(a), _positive(b), _positive(c), _positive(d)


@jit
def _polar(radius, quarter, angle, TERMS: tl.constexpr):
    """A point at ``radius`` in one of four quarters, by an angle between -pi/4 and pi/4: sine and cosine by their series."""
    square = angle * angle
    x = square * 0 + 1
    y = x
    for k in tl.static_range(TERMS, 0, -1):
        x = 1 - square * x * (1 / (2 * k * (2 * k - 1)))
        y = 1 - square * y * (1 / (2 * k * (2 * k + 1)))
    radius = tl.where((quarter & 2) == 0, radius, -radius)
    x, y = radius * x, radius * (y * angle)
    turned = (quarter & 1) != 0
    return tl.where(turned, y, x), tl.where(turned, x, y)


@jit
def _box_muller(a, b):
    radius = tl.sqrt(-2 * language.log(_positive(a)))
    # Two bits choose the quarter, the others as a signed number are the angle in it.
    angle = (b << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10
    return _polar(radius, b >> 30, angle, 4)


@jit
def _normal(a, b, c, d):
    v, w = _box_muller(a, b)
    x, y = _box_muller(c, d)
    return v, w, x, y


@jit
def _words(a, b, c, d):
    return a, b, c, d


@jit
def _joined(high, low):
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@jit
def _joined_words(a, b, c, d):
    return _joined(a, b), _joined(c, d)


@jit
def _fraction64(high, low):
    """In [0, 1), a multiple of 2**-53."""
    return (_joined(high, low) >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@jit
def _uniform64(a, b, c, d):
    return _fraction64(a, b), _fraction64(c, d)


@jit
def _uniform_positive64(a, b, c, d):
    return 1 - _fraction64(a, b), 1 - _fraction64(c, d)


@jit
def _normal64(a, b, c, d):
    radius = tl.sqrt(-2 * language.log(1 - _fraction64(a, b)))
    bits = _joined(c, d)
    angle = (bits << 2).to(tl.int64, bitcast=True).to(tl.float64) * 8.515303950216386e-20
    return _polar(radius, bits >> 62, angle, 8)


@dataclass(frozen=True, eq=False)
class Source:
    """``make(a, b, c, d)`` returns ``lanes`` blocks of values."""

    make: Any
    lanes: int


#: By name: for values of up to 32 bits and for wider ones.
SOURCES = {
    "uniform": (Source(_uniform, 4), Source(_uniform64, 2)),
    "uniform_positive": (Source(_uniform_positive, 4), Source(_uniform_positive64, 2)),
    "normal": (Source(_normal, 4), Source(_normal64, 2)),
    "words": (Source(_words, 4), Source(_joined_words, 2)),
}


# -- the kernel ------------------------------------------------------------------------------------------------------------


@jit
def _philox(seed, counter):
    """The four words; for int32 and int64 counters alike."""
    low = counter.to(tl.uint32, bitcast=counter.dtype.primitive_bitwidth == 32)
    high = (counter.to(tl.int64) >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, high * 0, high * 0)


@jit
def _one_of_four(seed, index):
    a, b, c, d = _philox(seed, index // 4)
    a, b, c, d = SOURCE(a, b, c, d)
    k = index % 4
    return tl.where(k < 2, tl.where(k == 0, a, b), tl.where(k == 2, c, d))


@jit
def _one_of_two(seed, index):
    a, b, c, d = _philox(seed, index // 2)
    a, b = SOURCE(a, b, c, d)
    return tl.where(index % 2 == 0, a, b)


@jit
def _rows(
    outs, ins, seed, n, s0, s1, s2, s3,
    COMPUTE: tl.constexpr, EVERY: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # EVERY says per operand whether it has a value for each element, or one for all.
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    a, b, c, d = _philox(tl.load(seed), start * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES))
    if LANES == 4:
        a, b, c, d = SOURCE(a, b, c, d)
        drawn = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        a, b = SOURCE(a, b, c, d)
        drawn = tl.interleave(a, b)
    i = start * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    values = ()
    for k in tl.static_range(len(ins)):
        if EVERY[k]:
            v = tl.load(ins[k] + i, live)
        else:
            v = tl.load(ins[k])
        values = values + (v.to(COMPUTE),)  # type: ignore[assignment]
    result = FORMULA(values + (drawn,), s0, s1, s2, s3)
    for k in tl.static_range(len(outs)):
        tl.store(outs[k] + i, result.to(outs[k].dtype.element_ty), live)


class Draws(Planned):
    """A formula of ``drawn`` values, operands and numbers, as a kernel; the argument ``seed`` is a tensor of one int64."""

    def __init__(self, name: str, formula: Any) -> None:
        self.name, self.formula = name, formula
        self._reads = parameters(formula)
        self.names = (*(n for n in self._reads if n != "drawn"), "seed")
        self._bound: dict[Any, tuple[Any, tuple[str, ...]]] = {}
        self._by_index: dict[Source, Elementwise] = {}
        super().__init__()

    def plan(
        self, named: Named, outs: Sequence[Tensor], compute: torch.dtype, source: Source
    ) -> Callable[[Sequence[Tensor], Named], None]:
        """The launch for operands ``named`` and ``outs`` (meta tensors suffice)."""
        shape = tuple(outs[0].shape)
        if 0 in shape:
            return lambda outs, named: None
        operands = [n for n in self._reads if isinstance(named.get(n), Tensor)]
        every = tuple(tuple(named[n].shape) == shape and len(shape) > 0 for n in operands)
        dense = [*outs, *(named[n] for n, each in zip(operands, every) if each)]
        lone = all(each or named[n].numel() == 1 for n, each in zip(operands, every))
        if not lone or any(t.stride() != _layout.contiguous(shape) and not t.is_contiguous() for t in dense):
            return self._indexed(source).plan(named, outs, compute)
        count = math.prod(shape)
        config = backends.arch().config("pointwise")
        block = min(config["block"], max(source.lanes, _layout.next_power_of_2(count)))
        kernel, runtime = self._bind(named, operands, compute, source)
        meta = dict(
            COMPUTE=TRITON[compute],
            EVERY=every,
            LANES=source.lanes,
            BLOCK=block,
            WIDE=_layout.is_wide((count,), ()),
            num_warps=config["warps"],
        )

        def run(outs: Sequence[Tensor], named: Named) -> None:
            ins, scalars = tuple([named[n] for n in operands]), slots([named[n] for n in runtime])
            launch(kernel, (_layout.cdiv(count, block),), (tuple(outs), ins, named["seed"], count, *scalars), meta)

        return run

    def _bind(
        self, named: Named, operands: Sequence[str], compute: torch.dtype, source: Source
    ) -> tuple[Any, tuple[str, ...]]:
        """The filled driver, and the names of its run-time scalars."""
        key = (compute, source, given(self.names, named))
        if key not in self._bound:
            reads = {n: f"values[{k}]" for k, n in enumerate((*operands, "drawn"))}
            runtime, expressions = arguments(self._reads, {n: named.get(n) for n in self._reads}, reads, compute)
            call = adapter(self.name, f"values, {', '.join(SCALARS)}", self.formula, expressions)
            kernel = fill(_rows, self.name, scalar_types(runtime, compute), FORMULA=call, SOURCE=source.make)
            self._bound[key] = kernel, runtime
        return self._bound[key]

    def _indexed(self, source: Source) -> Elementwise:
        """The same values for any strides: each element draws all words of its counter and takes its own."""
        found = self._by_index.get(source)
        if found is None:
            one = fill(_one_of_four if source.lanes == 4 else _one_of_two, f"{self.name}_one", SOURCE=source.make)
            call = f"    return F({', '.join('ONE(seed, index)' if n == 'drawn' else n for n in self._reads)})"
            pool = ", ".join((*self.names, "index"))
            formula = generated(f"{self.name}_indexed", pool, call, F=self.formula, ONE=one)
            found = self._by_index[source] = Elementwise(self.name, formula, keep=("seed",))
        return found


# -- the operator ----------------------------------------------------------------------------------------------------------


@jit
def _nothing():
    return tl.zeros((1, 1), tl.float32)


_zeros = Elementwise("drawn_grad", _nothing)


class Drawn(Op[P, R]):
    """An operator of values drawn from the ``seed``, its last parameter. Its gradient is zero unless it says otherwise."""

    family = "pointwise"
    passes_scalars = True
    elementwise = True
    _kernel: Draws

    def __init__(self, meaning: Callable[P, R], *, source: str, ints: bool = False, **options: Any) -> None:
        super().__init__(meaning, random=True, **options)
        self._source, self._ints = SOURCES[source], ints

    def formula(self, fn: Any) -> Any:
        """Attach the value of an element: a jit function that names ``drawn`` and the parameters it needs."""
        self._kernel = Draws(self.name, fn)
        of = tuple(n for n in self.tensors if n != "seed")

        def vjp(needs: set[str], like: Mapping[str, Any], grad: Tensor) -> dict[str, Tensor]:
            found = {n: torch.empty(like[n][0], dtype=like[n][1], device=grad.device) for n in of if n in needs}
            for zeros in found.values():
                _zeros({}, (zeros,), compute_type(zeros.dtype))
            return found

        self.set_gradient(vjp, ("needs", "like", "grad"), of)
        return fn

    def linear(self) -> None:
        """The gradient is the operator itself, of the incoming gradient."""
        (first, *rest) = self.params

        def vjp(like: Mapping[str, Any], grad: Tensor, **named: Any) -> dict[str, Tensor]:
            out = torch.empty_like(grad, dtype=like[first][1])
            self._kernel({first: grad, **named}, (out,), *self._how_drawn(named, grad.dtype))
            return {first: out}

        self.set_gradient(vjp, ("like", "grad", *rest), (first,))

    def _how_drawn(self, named: Named, dtype: torch.dtype) -> tuple[torch.dtype, Source]:
        """The type computed in, and the source: wide where that is float64, or where the operator asks for it."""
        compute = torch.int64 if self._ints else torch.float64 if dtype == torch.float64 else torch.float32
        return compute, self._source[bool(named.get("wide", compute == torch.float64))]

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        run = self._kernel.plan(named, outs, *self._how_drawn(named, outs[0].dtype))
        return lambda outs, keep, arguments: run(outs, arguments)
