"""The operator: one declaration, every variant derived from it.

An operator is declared as a typed function whose body *is* its meaning, in plain torch. The meaning is the test oracle,
the shape and dtype rule (run on ``meta`` tensors, once per new shape) and the path of CPU tensors. A family decorator
(``pointwise``, ``reduction``, ``rowwise``, ``gemm``, or ``operator`` for a free kernel) makes an :class:`Op` of it and says
which kernel runs on an accelerator.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from gemskit import _checks, _launch, backends
from gemskit._checks import describe
from gemskit._plan import PLANS
from gemskit._plan import layout as _layout
from gemskit.errors import ArgumentError, DeclarationError, GradientError, NoKernel

P = ParamSpec("P")
R = TypeVar("R")

#: Every declared operator by name. Tests, docs, benchmarks and the ATen adapter walk this.
REGISTRY: dict[str, Op[..., Any]] = {}


def operators() -> tuple[str, ...]:
    """The names of all declared operators."""
    return tuple(REGISTRY)


#: What a kernel sees: the arguments by parameter name.
Named = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a layout of arguments needs: its outputs and the launch into them."""

    outs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    run: Callable[..., None]


class Op(Generic[P, R]):
    """A callable operator with its kernel, gradient and variants.

    Families override :meth:`plan`. An operator with a free kernel attaches it with :meth:`kernel`.
    """

    family = "free"
    #: Whether ``out`` may be the very tensor that is read (every element is read before it is written).
    elementwise = False

    def __init__(
        self, meaning: Callable[P, R], *, aten: str | None = None, writes: Sequence[str] = (), random: bool = False,
        floats: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.meaning, self.aten, self.random = meaning, aten, random
        self.name = self.__name__ = meaning.__name__
        self.__doc__, self.__module__, self.__wrapped__ = meaning.__doc__, meaning.__module__, meaning
        if not meaning.__doc__:
            raise DeclarationError(f"{self.name}: an operator has a docstring")
        # Operators that users declare are theirs: no name of ours is taken from them, no test of ours walks over them.
        ours = self.__module__.partition(".")[0] == "gemskit"
        if ours and self.name in REGISTRY:
            raise DeclarationError(f"{self.name}: declared twice")
        self.signature = inspect.signature(meaning)
        names = list(self.signature.parameters)
        self.has_out = "out" in names
        self.params = tuple(n for n in names if n != "out")
        # Strings where the author's module postpones annotations, types where not.
        kinds = {
            n: a if isinstance(a := p.annotation, str) else inspect.formatannotation(a)
            for n, p in self.signature.parameters.items()
        }
        #: Parameters that take tensors (or numbers that stand for one).
        self.tensors = tuple(n for n in self.params if "Tensor" in kinds[n])
        #: Numbers that only the launch needs: their values never make a new plan or kernel.
        self.scalars = tuple(
            n for n in self.params if n not in self.tensors and kinds[n].split(" | ")[0] in ("float", "Number")
        )
        #: The tensors that the in-place variant overwrites, one for each output.
        self.writes = tuple(writes) or self.tensors[:1]
        #: Parameters that take floating-point tensors only (torch finds out in its kernels, so a meta run does not).
        self.floats = tuple(floats)
        self.inplace_name: str | None = None
        self._order = _ordering(self)
        self._plans: dict[Any, Plan] = {}
        self._free: Callable[..., None] | None = None
        self._vjp: Callable[..., Mapping[str, Tensor | None]] | None = None
        self._saves: tuple[str, ...] = ()
        self.differentiable: tuple[str, ...] = ()
        if ours:
            REGISTRY[self.name] = self

    def __repr__(self) -> str:
        return f"<gemskit operator {self.name}{self.signature}>"

    # -- declaring -------------------------------------------------------------------------------------------------
    def kernel(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Attach a free kernel: ``fn(outs, keep, **arguments)`` launches into ``outs``.

        ``keep`` is a dict when a gradient will be needed (what is put there can be asked for by the gradient), else None.
        """
        self._free = fn
        return fn

    def gradient_by(self, fn: Callable[..., Mapping[str, Tensor | None]]) -> Callable[..., Mapping[str, Tensor | None]]:
        """Attach a gradient written with other operators.

        ``fn`` names what it needs: ``grad`` (or ``grads``), parameters, ``out`` (or ``outs``), what the kernel kept, and
        ``needs`` (the set of parameter names whose gradient is wanted). It returns gradients by parameter name.
        """
        self.set_gradient(fn, tuple(inspect.signature(fn).parameters))
        return fn

    def set_gradient(
        self, fn: Callable[..., Mapping[str, Tensor | None]], names: Sequence[str], of: Sequence[str] | None = None
    ) -> None:
        """Attach ``fn(**names)`` as the gradient with respect to the tensors ``of`` (all by default)."""
        self._vjp, self._saves = fn, tuple(names)
        self.differentiable = tuple(of if of is not None else self.tensors)

    # -- calling ---------------------------------------------------------------------------------------------------
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        values, out = self._order(*args, **kwargs)
        return self._call(values, out)  # type: ignore[no-any-return]

    @functools.cached_property
    def inplace(self) -> Callable[P, R]:
        """The variant that overwrites its first tensor argument (or those in ``writes``) and returns it."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            values, out = self._order(*args, **kwargs)
            if out is not None:
                raise ArgumentError(f"{self.name}_: takes no out=; it writes {' and '.join(self.writes)}")
            return self._call_inplace(values)  # type: ignore[no-any-return]

        self.inplace_name = call.__name__ = call.__qualname__ = f"{self.name}_"
        call.__module__ = self.__module__
        call.__signature__ = self.signature.replace(  # type: ignore[attr-defined]
            parameters=[p for n, p in self.signature.parameters.items() if n != "out"]
        )
        call.__doc__ = f"In-place :func:`{self.name}`: overwrites {' and '.join(f'``{w}``' for w in self.writes)}."
        return call

    def _call(self, values: tuple[Any, ...], out: Any) -> Any:
        kernels, needs_grad, values = _checks.inspect_tensors(self, values)
        if needs_grad and out is not None:
            raise GradientError(f"{self.name}: out= takes no part in autograd, but an argument requires a gradient")
        if not kernels:
            if _launch._recording:
                _launch.note(self.name, "meaning")
            found = self._meaning(values)
            return found if out is None else _checks.write_out(self, out, found)
        if needs_grad and self._has_gradient(values):
            found = _Differentiable.apply(self, False, *values)  # type: ignore[no-untyped-call]
            return found if isinstance(found, Tensor) else self._tuple(found)
        if out is None:
            return self._tuple(self.forward(values))
        return _checks.into_out(self, out, values)

    def _call_inplace(self, values: tuple[Any, ...]) -> Any:
        targets = tuple(values[self.params.index(w)] for w in self.writes)
        kernels, needs_grad, values = _checks.inspect_tensors(self, values)
        _checks.inplace_targets(self, targets, needs_grad and torch.is_grad_enabled())
        if kernels and self.elementwise:
            _checks.inplace_overlap(self, targets, values)
        if not kernels:
            found = self._meaning(values)
            flat = found if isinstance(found, tuple) else (found,)
            _checks.inplace_results(self, targets, [(tuple(f.shape), f.dtype) for f in flat])
            for target, value in zip(targets, flat):
                target.copy_(value)
            return targets[0] if len(targets) == 1 else targets
        if needs_grad and self._has_gradient(values):
            found = _Differentiable.apply(self, True, *values)  # type: ignore[no-untyped-call]
            return found if isinstance(found, Tensor) else self._tuple(found)
        if needs_grad and any(t.requires_grad for t in targets):
            raise GradientError(
                f"{self.name}_: its result has no gradient, but what it overwrites takes part in autograd; detach it"
            )
        self.forward(values, targets)
        return targets[0] if len(targets) == 1 else targets

    def _has_gradient(self, values: tuple[Any, ...]) -> bool:
        """False where torch has none either (a bool or int result); a gradient that we lack is refused."""
        if not any(dtype.is_floating_point for _, _, dtype in self._planned(values, None).outs):
            return False
        for n, v in zip(self.params, values):
            if isinstance(v, Tensor) and v.requires_grad and n not in self.differentiable:
                raise NoKernel(
                    f"{self.name}: no gradient with respect to {n}; differentiable are {self.differentiable or 'none'}. "
                    f"Detach {n}, or call under torch.no_grad()"
                )
        return True

    def _tuple(self, outs: tuple[Tensor, ...]) -> Any:
        """Outputs as the operator returns them."""
        return outs[0] if len(outs) == 1 else outs

    def _meaning(self, values: tuple[Any, ...], given: tuple[Any, ...] | None = None) -> Any:
        """The meaning of ``values``; errors describe ``given``, where ``values`` are stand-ins for it."""
        try:
            return self.meaning(**dict(zip(self.params, values)))  # type: ignore[call-arg]
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as e:
            raise _checks.translate(self, given or values, e) from e

    # -- kernels ---------------------------------------------------------------------------------------------------
    def forward(
        self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None = None, keep: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Run the kernel, without autograd, into ``outs`` (in-place targets) or fresh outputs."""
        plan = self._planned(values, outs)
        device = next(v.device for v in values if isinstance(v, Tensor))
        if outs is None:
            outs = tuple(torch.empty_strided(s, t, dtype=d, device=device) for s, t, d in plan.outs)
        elif not self.elementwise and _checks.feeds(self, outs, values):
            # addmm_(x, x, y): a product would read of its factor what it has just written.
            for target, value in zip(outs, self.forward(values, None, keep)):
                target.copy_(value)
            return outs
        else:
            torch.autograd.graph.increment_version(outs)
        self._run(plan, outs, values, keep)
        return outs

    def _run(
        self, plan: Plan, outs: tuple[Tensor, ...], values: tuple[Any, ...], keep: dict[str, Tensor] | None
    ) -> None:
        if _launch._recording:
            _launch._op.append(self.name)
            try:
                plan.run(outs, keep, dict(zip(self.params, values)))
            finally:
                _launch._op.pop()
        else:
            plan.run(outs, keep, dict(zip(self.params, values)))

    def _planned(self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None) -> Plan:
        key = (
            *map(_key, self.params, values, [n in self.scalars for n in self.params]),
            outs and tuple(map(_layout, outs)),
            backends.forced(),
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(values, outs)
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _make_plan(self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None) -> Plan:
        _checks.served(self, values)
        meta = tuple(_on_meta(v) if isinstance(v, Tensor) else v for v in values)
        found = self._meaning(meta, values)
        specs = tuple(
            (tuple(t.shape), tuple(t.stride()), t.dtype) for t in (found if isinstance(found, tuple) else (found,))
        )
        if outs:
            _checks.inplace_results(self, outs, [(s, d) for s, _, d in specs])
        _checks.results(self, specs)
        layouts = tuple(map(_layout, outs)) if outs else specs
        device = next(v.device for v in values if isinstance(v, Tensor))
        # Stand-ins on meta: a plan must not keep a tensor alive. The device is current, its architecture sets the numbers.
        with torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext():
            return Plan(specs, self.plan(dict(zip(self.params, meta)), tuple(_meta(*spec) for spec in layouts)))

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        """The launch for arguments and outputs of this layout (given as meta tensors): ``run(outs, keep, arguments)``."""
        free = self._free
        if free is None:
            raise NoKernel(f"{self.name}: no kernel for {describe(dict(named))}")
        return lambda outs, keep, arguments: free(outs, keep, **arguments)


def _meta(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")


def _on_meta(t: Tensor) -> Tensor:
    return _meta(t.shape, t.stride(), t.dtype)


def _key(name: str, v: Any, scalar: bool) -> Any:
    if isinstance(v, Tensor):
        return (*_layout(v), v.device)
    if isinstance(v, float) or (scalar and not isinstance(v, bool)):
        return type(v)
    # 1, 1.0 and True are equal as keys but not as arguments; a list is as good a shape as a tuple.
    return type(v), tuple(v) if isinstance(v, list) else v


def _ordering(op: Op[Any, Any]) -> Callable[..., tuple[tuple[Any, ...], Any]]:
    """A function with the operator's signature that returns its arguments in order: 0.2 us where ``bind`` takes 3.7."""
    defaults: dict[str, Any] = {}
    parts: list[str] = []
    star = False
    for n, p in op.signature.parameters.items():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        if p.default is p.empty:
            parts.append(n)
        else:
            defaults[f"_{n}"] = p.default
            parts.append(f"{n}=_{n}")
    values = " ".join(f"{n}," for n in op.params)
    text = f"def {op.name}({', '.join(parts)}): return ({values}), {'out' if op.has_out else 'None'}"
    exec(text, defaults)
    return defaults[op.name]  # type: ignore[no-any-return]


class _Differentiable(torch.autograd.Function):
    """The gradient of any operator. Only entered when an argument needs one."""

    @staticmethod
    def forward(ctx: Any, op: Op[..., Any], inplace: bool, *values: Any) -> Any:
        named = dict(zip(op.params, values))
        keep: dict[str, Tensor] = {}
        if inplace:
            outs = tuple(named[w] for w in op.writes)
            # The gradient may need what is about to be overwritten.
            for n in op.writes:
                if n in op._saves:
                    named[n] = named[n].clone()
            op.forward(values, outs, keep)
            ctx.mark_dirty(*outs)
        else:
            outs = op.forward(values, None, keep)
        ctx.mark_non_differentiable(*(o for o in outs if not o.dtype.is_floating_point))
        save = {n: named[n] for n in op.params if n in op._saves}
        for i, o in enumerate(outs):
            if ("out" if i == 0 else f"out{i}") in op._saves or "outs" in op._saves:
                save[f"out{i}" if i else "out"] = o
        save.update({n: t for n, t in keep.items() if n in op._saves})
        if "like" in op._saves:
            save["like"] = {n: (v.shape, v.dtype) for n, v in named.items() if isinstance(v, Tensor)}
        ctx.op = op
        ctx.names = [n for n, v in save.items() if isinstance(v, Tensor)]
        ctx.rest = {n: v for n, v in save.items() if not isinstance(v, Tensor)}
        ctx.save_for_backward(*(save[n] for n in ctx.names))
        (first, *others) = outs
        return outs if others else first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op: Op[..., Any] = ctx.op
        if torch.is_grad_enabled():
            # Kernels are no part of autograd: a second derivative would silently miss this operator's share.
            raise GradientError(f"{op.name}: has no second derivative; take the first one without create_graph=True")
        have = {**ctx.rest, **dict(zip(ctx.names, ctx.saved_tensors))}
        needs = {n for n, need in zip(op.params, ctx.needs_input_grad[2:]) if need}
        have.update(grad=next(iter(grads)), grads=grads, needs=needs)
        if "outs" in op._saves:
            have["outs"] = tuple(v for n, v in have.items() if n.startswith("out"))
        assert op._vjp is not None
        found = op._vjp(**{n: have.get(n) for n in op._saves})
        return (None, None, *(found.get(n) if n in needs else None for n in op.params))


def operator(
    *, aten: str | None = None, writes: Sequence[str] = (), random: bool = False, floats: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an operator with a free kernel; attach it with ``@op.kernel`` and its gradient with ``@op.gradient_by``."""

    def declare(meaning: Callable[P, R]) -> Op[P, R]:
        return Op(meaning, aten=aten, writes=writes, random=random, floats=floats)

    return declare
