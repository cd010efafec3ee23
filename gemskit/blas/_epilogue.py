"""What becomes of a product before it is stored, given at the call: ``mm(a, b, epilogue=...)``.

An operator and the code of an epilogue make another operator, whose parameters are the operands of the epilogue and those of
the product. It is made once and kept, so a call costs a look-up more than the product itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling
from triton.runtime.jit import JITFunction

from gemskit import _compile
from gemskit._bind import generated, parameters
from gemskit._dtypes import FLOAT8, compute_type
from gemskit._interpret import interpret
from gemskit._jit import jit
from gemskit._op import Op, P, R
from gemskit._sized import eagerly
from gemskit.errors import ArgumentError, DeclarationError, DtypeError, GradientError, ShapeError
from gemskit.pointwise._drive import Elementwise, Pointwise

#: Operators of epilogues that a product remembers; when full it forgets all.
DERIVED = 256


class Epilogue:
    """A function of each element of a product, computed in the product's kernel before the result is rounded and stored.

    ``fn`` is an elementwise operator of gemskit or declared with :func:`pointwise` (its first tensor parameter is the product;
    it brings meaning and gradient), or any ``@triton.jit`` function, which names ``acc`` (float32 of halves) and its operands.
    ``operands`` are tensors that broadcast to the result, numbers (passed at run time: a value never compiles), strings, bools
    or None. ``meaning(acc, **operands)`` is the same in plain torch, for CPU tensors; without one they run ``fn`` interpreted.
    Functions are known by identity: make them once, not at every call.
    """

    __slots__ = ("_interpreted", "dtype", "key", "steps", "values")

    def __init__(self, fn: Any, meaning: Callable[..., Tensor] | None = None, /, **operands: Any) -> None:
        #: (function, meaning, names of operands) one after the other, and all their operands.
        self.steps: tuple[tuple[Any, Any, tuple[str, ...]], ...] = ((fn, meaning, tuple(operands)),)
        self.values = tuple(operands.values())
        #: What the result is stored as; None: as the product's.
        self.dtype: torch.dtype | None = None
        #: What the code depends on. A jit function is hashed by its source, which takes longer than its identity.
        self.key: Any = ((id(fn), id(meaning), *operands), tuple([_kind(v) for v in self.values]), None)

    def then(self, after: AnyEpilogue) -> Epilogue:
        """This, and ``after`` it."""
        after = as_epilogue(after)
        return _of(self.steps + after.steps, self.values + after.values, after.dtype or self.dtype)

    def to(self, dtype: torch.dtype) -> Epilogue:
        """This, its result stored as ``dtype``."""
        return _of(self.steps, self.values, dtype)

    def __repr__(self) -> str:
        return f"Epilogue({', '.join(_name(fn) for fn, _, _ in self.steps)})"


#: What ``epilogue=`` takes: an :class:`Epilogue`, or a function of the accumulator alone.
AnyEpilogue: TypeAlias = "Epilogue | Op[..., Any] | JITFunction[Any]"


def as_epilogue(given: Any) -> Epilogue:
    """``given`` as an :class:`Epilogue`."""
    return given if isinstance(given, Epilogue) else Epilogue(given)


def _of(steps: Any, values: tuple[Any, ...], dtype: torch.dtype | None) -> Epilogue:
    made = Epilogue.__new__(Epilogue)
    made.steps, made.values, made.dtype = steps, values, dtype
    code = tuple([part for fn, meaning, names in steps for part in (id(fn), id(meaning), *names)])
    made.key = (code, tuple([_kind(v) for v in values]), dtype)
    return made


def _kind(v: Any) -> str:
    if isinstance(v, Tensor):
        return "Tensor"
    return "Number" if isinstance(v, (int, float)) and not isinstance(v, bool) else "str"


def _name(fn: Any) -> str:
    return str(getattr(fn, "__name__", fn)).strip("_") or "epilogue"


class Step:
    """One function of an epilogue, its operands by the names of their parameters in the derived operator."""

    def __init__(self, k: int, fn: Any, meaning: Any, names: tuple[str, ...]) -> None:
        self.op: Pointwise[..., Any] | None = None
        self.first, defaults = "acc", {}
        if isinstance(fn, Pointwise):
            if fn._formula is None or fn.results != 1 or not fn.tensors or meaning is not None:
                raise DeclarationError(
                    f"{fn.name} cannot be an epilogue: needed is an elementwise operator with a formula, of one result"
                )
            self.op, self.jit, self.meaning, self.first = fn, fn._formula.formula, fn.meaning, fn.tensors[0]
            defaults = {n: p.default for n, p in fn.signature.parameters.items() if p.default is not p.empty}
            known = fn.params
        elif isinstance(fn, JITFunction) and not fn.is_gluon():
            self.jit, self.meaning, known = fn, meaning, parameters(fn)
            if "acc" not in known:
                raise DeclarationError(f"{_name(fn)}: an epilogue names the accumulator acc; it has {known}")
        else:
            raise ArgumentError(
                f"epilogue must be an Epilogue, an elementwise operator or a @triton.jit function, given {fn!r}"
            )
        unknown = [n for n in names if n not in known or n == self.first]
        if unknown:
            raise ArgumentError(f"{_name(fn)}: no operands {unknown}; the epilogue has {known}")
        self.name, self.names = _name(fn), names
        #: Parameter names in the derived operator, by name in the function.
        self.own = {n: f"epilogue{k or ''}_{n}" for n in names}
        self.constants = {n: v for n, v in defaults.items() if n not in self.own and n != "out"}
        self._kernel: Elementwise | None = None

    def call(self) -> str:
        """The function called on ``acc``, as text."""
        given = {self.first: "acc", **{n: repr(v) for n, v in self.constants.items()}, **self.own}
        if self.op is not None:
            given["precise"] = "precise"
        missing = [n for n in parameters(self.jit) if n not in given]
        if missing:
            raise ArgumentError(
                f"{self.name}: the epilogue asks for {missing}, which is not given: Epilogue(fn, name=...)"
            )
        return ", ".join(given[n] for n in parameters(self.jit))

    def apply(self, acc: Tensor, operands: Mapping[str, Any]) -> Tensor:
        """What it means."""
        if self.meaning is not None:
            found: Tensor = self.meaning(acc, **operands)
            return found
        tensors = [v for v in (acc, *operands.values()) if isinstance(v, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise GradientError(f"epilogue {self.name}: {_NO_GRADIENT}")
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        out = torch.empty(shape, dtype=acc.dtype, device=acc.device)
        if not acc.is_meta:
            if self._kernel is None:
                self._kernel = Elementwise(f"{self.name}_epilogue", self.jit)
            with interpret(check=False):
                self._kernel({"acc": acc, **operands}, [out], acc.dtype)
        return out


_NO_GRADIENT = (
    "a @triton.jit function has no gradient; declare it with @pointwise and a gradient, apply it after the product, or call "
    "under torch.no_grad()"
)


class Fused(Op[P, R]):
    """A product that takes ``epilogue=``, which its meaning names and leaves to :meth:`fuse`."""

    def __init__(self, meaning: Callable[P, R], **options: Any) -> None:
        self._derived: dict[Any, Op[..., Any]] = {}
        whole = inspect.signature(meaning)
        #: Whether it takes ``epilogue=``.
        self.fuses = "epilogue" in whole.parameters
        if not self.fuses:
            super().__init__(meaning, **options)
            return

        @functools.wraps(meaning)
        def bare(*args: Any, epilogue: AnyEpilogue | None = None, **kwargs: Any) -> Any:
            if epilogue is None:
                return meaning(*args, **kwargs)
            epilogue = as_epilogue(epilogue)
            return self.fuse(epilogue).meaning(*epilogue.values, *args, **kwargs)

        own = [p for n, p in whole.parameters.items() if n != "epilogue"]
        bare.__signature__ = whole.replace(parameters=own)  # type: ignore[attr-defined]
        super().__init__(bare, **options)
        self.__wrapped__ = meaning

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():
            if kwargs.get("epilogue") is not None:
                return eagerly(self, args, kwargs)  # type: ignore[no-any-return]
            return _compile.call(self, args, {n: v for n, v in kwargs.items() if n != "epilogue"})  # type: ignore[no-any-return]
        return self._calls.call(*args, **kwargs)  # type: ignore[no-any-return]

    # The native launcher hands over what it does not know, ``epilogue=`` included.
    def _enter(self, /, *args: Any, epilogue: AnyEpilogue | None = None, **kwargs: Any) -> Any:
        if epilogue is None:
            return super()._enter(*args, **kwargs)
        given = epilogue if type(epilogue) is Epilogue else as_epilogue(epilogue)
        return self.fuse(given)._calls.call(*given.values, *args, **kwargs)

    def _enter_inplace(self, /, *args: Any, epilogue: AnyEpilogue | None = None, **kwargs: Any) -> Any:
        if epilogue is None:
            return super()._enter_inplace(*args, **kwargs)
        given = as_epilogue(epilogue)
        return self.fuse(given).inplace(*given.values, *args, **kwargs)

    def fuse(self, epilogue: Epilogue) -> Op[..., Any]:
        """The operator of the epilogue's operands and of our own parameters."""
        found = self._derived.get(epilogue.key)
        if found is None:
            if not self.fuses:
                raise ArgumentError(f"{self.name}: takes no epilogue=")
            if len(self._derived) >= DERIVED:
                self._derived.clear()
            steps = [Step(k, *step) for k, step in enumerate(epilogue.steps)]
            found = self._derived[epilogue.key] = self._derive(steps, epilogue)
        return found

    def _derive(self, steps: list[Step], epilogue: Epilogue) -> Op[..., Any]:
        extras = tuple(own for step in steps for own in step.own.values())
        annotations = {n: f"{kind} | None" if kind != "Tensor" else kind for n, kind in zip(extras, epilogue.key[1])}
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        added = [inspect.Parameter(n, positional, annotation=a) for n, a in annotations.items()]
        meaning = _meaning(self, steps, len(extras), epilogue.dtype)
        meaning.__signature__ = self.signature.replace(parameters=[*added, *self.signature.parameters.values()])  # type: ignore[attr-defined]
        meaning.__name__ = "_".join((self.name, *(step.name for step in steps)))
        meaning.__doc__, meaning.__module__ = f"{self.name} with {epilogue}.", "fused"
        derived = self._fused(meaning, extras, steps)
        derived.float8 = epilogue.dtype in FLOAT8
        _differentiate(derived, self, steps)
        return derived

    def _fused(self, meaning: Callable[..., Any], extras: tuple[str, ...], steps: list[Step]) -> Op[..., Any]:
        """The operator of ``meaning``, whose first parameters are ``extras``."""
        raise NotImplementedError


def formula(steps: list[Step], before: Any) -> Any:
    """The jit function of ``acc``, the parameters of the epilogue ``before`` and the operands of ``steps``."""
    names = [n for n in parameters(before) if n != "acc"]
    lines = [f"    acc = F({', '.join(parameters(before))})"]
    lines += [f"    acc = S{k}({step.call()})" for k, step in enumerate(steps)]
    pool = dict.fromkeys(["acc", *names, *(own for step in steps for own in step.own.values())])
    if any(step.op is not None and "precise" in parameters(step.jit) for step in steps):
        pool["precise"] = None
    functions = {f"S{k}": step.jit for k, step in enumerate(steps)}
    return generated("epilogue", ", ".join(pool), "\n".join([*lines, "    return acc"]), F=before, **functions)


def _meaning(base: Op[..., Any], steps: list[Step], extras: int, dtype: torch.dtype | None) -> Callable[..., Any]:
    def meaning(*args: Any, **kwargs: Any) -> Tensor:
        given: dict[str, Any] = base.signature.bind(*args[extras:], **kwargs).arguments
        like = base.meaning(**{n: v.to("meta") if isinstance(v, Tensor) else v for n, v in given.items()})
        if not like.dtype.is_floating_point:
            raise DtypeError(f"an epilogue is of floating-point products, not of {like.dtype}")
        compute = compute_type(like.dtype)
        if like.device == next(v for v in given.values() if isinstance(v, Tensor)).device:
            found = like.to(compute)
        else:
            given.pop("out_dtype", None)
            wide = {n: v.to(compute_type(v.dtype)) if isinstance(v, Tensor) else v for n, v in given.items()}
            found = base.meaning(**wide).to(compute)
        left = list(args[:extras])
        for step in steps:
            operands = {n: left.pop(0) for n in step.names}
            for name, v in operands.items():
                if isinstance(v, Tensor):
                    operands[name] = v.to(compute) if v.is_floating_point() else v
                    if v.ndim > like.ndim or any(n not in (1, m) for n, m in zip(v.shape[::-1], like.shape[::-1])):
                        raise ShapeError(
                            f"{base.name}: {name} of the epilogue has shape {list(v.shape)}, which does not broadcast to "
                            f"that of the result, {list(like.shape)}"
                        )
            found = step.apply(found, operands)
        result: Tensor = found.to(dtype or like.dtype)
        return result

    return meaning


# ---- gradients -----------------------------------------------------------------------------------------------------------


@jit
def _same(acc):
    return acc


def _unchanged(acc: Tensor) -> Tensor:
    return acc


def _differentiate(derived: Op[..., Any], base: Fused[..., Any], steps: list[Step]) -> None:
    """Attach the gradient, where all steps have one: that of the steps one by one, from a product computed again.

    Saving what the steps get instead would take as much memory as not fusing them.
    """
    if not base.differentiable or any(step.op is None or not step.op.differentiable for step in steps):
        derived._has_gradient = functools.partial(_refuse, derived, steps)  # type: ignore[method-assign]
        return
    ops = [(step, step.op) for step in steps if step.op is not None]
    #: The last of the values between the steps that a gradient reads (0: the product); -1: none.
    last = -1
    for k, (step, op) in enumerate(ops):
        last = k + ("out" in op._saves) if step.first in op._saves or "out" in op._saves else last
    extras = [o for step, _ in ops for o in step.own.values()]
    again = [n for n in base.params if last >= 0 or n in base._saves]

    def gradient(grad: Tensor, needs: set[str], like: Mapping[str, Any], **named: Any) -> dict[str, Tensor | None]:
        dtype = like[base.tensors[0]][1]
        values: list[Tensor] = []
        if last >= 0:
            exact = Epilogue(_same, _unchanged).to(compute_type(dtype))
            values.append(base.fuse(exact)(*(named[n] for n in base.params if n != "out")))
            for step, op in ops[:last]:
                values.append(op(values[-1], **{n: named[o] for n, o in step.own.items()}))
        found: dict[str, Tensor | None] = {}
        for k in range(len(ops) - 1, -1, -1):
            step, op = ops[k]
            inner = any(n in needs for n in base.params) or any(o in needs for s, _ in ops[:k] for o in s.own.values())
            have = {**step.constants, **{n: named.get(o) for n, o in step.own.items()}}
            have.update(grad=grad, grads=(grad,), out=values[k + 1] if k + 1 < len(values) else None)
            have[step.first] = values[k] if k < len(values) else None
            have["needs"] = {n for n, o in step.own.items() if o in needs} | ({step.first} if inner else set())
            have["like"] = {n: like[o] for n, o in step.own.items() if o in like}
            have["like"][step.first] = (tuple(grad.shape), dtype)
            assert op._vjp is not None
            got = op._vjp(**{n: have.get(n) for n in op._saves})
            found.update({step.own[n]: got.get(n) for n in step.own if step.own[n] in needs})
            if not inner:
                return found
            passed = got[step.first]
            assert passed is not None
            grad = passed
        have = {**named, "grad": grad, "grads": (grad,), "needs": needs & {*base.params}, "like": like}
        assert base._vjp is not None
        return {**found, **base._vjp(**{n: have.get(n) for n in base._saves})}

    of = [o for step, op in ops for n, o in step.own.items() if n in op.differentiable]
    saves = dict.fromkeys(("grad", "needs", "like", *extras, *again))
    derived.set_gradient(gradient, tuple(saves), (*of, *base.differentiable))


def _refuse(op: Op[..., Any], steps: list[Step], values: tuple[Any, ...]) -> bool:
    names = [s.name for s in steps if s.op is None or not s.op.differentiable]
    raise GradientError(f"{op.name}: epilogue {', '.join(names) or 'of this product'}: {_NO_GRADIENT}")
