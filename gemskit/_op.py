"""The operator: one declaration, every variant derived from it.

An operator is declared as a typed function whose body *is* its meaning, in plain torch. The meaning is the test oracle,
the shape and dtype rule (run on ``meta`` tensors, once per new shape) and the path of CPU tensors. A family decorator
(``pointwise``, ``reduction``, ``rowwise``, ``gemm``, or ``operator`` for a free kernel) makes an :class:`Op` of it and says
which kernel runs on an accelerator. (``sized``, in _sized.py, is for results whose size depends on the data.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import ParamSpec

from gemskit import _checks, _compile, _launch, _replay, _signature, backends
from gemskit._checks import describe
from gemskit._layout import contiguous
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


#: Shape, stride and dtype of a result.
_Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

#: What a kernel sees: the arguments by parameter name.
Named = Mapping[str, Any]


@dataclass
class Plan:
    """What a layout of arguments needs: its outputs and the launch into them."""

    outs: tuple[_Spec, ...]
    run: Callable[..., None]
    #: Whether it served a call before: what is called twice is worth a trace.
    again: bool = False


class Op(Generic[P, R]):
    """A callable operator with its kernel, gradient and variants.

    Families override :meth:`plan`. An operator with a free kernel attaches it with :meth:`kernel`.
    """

    family = "free"
    #: Whether numbers (``scalars``) go into launches as they are, so that their values never matter to a replay.
    passes_scalars = False
    #: Whether there is a kernel for complex numbers.
    complex = False
    #: Whether there is a kernel for float8.
    float8 = False
    #: Whether ``out`` may be the very tensor that is read (every element is read before it is written).
    elementwise = False

    def __init__(
        self, meaning: Callable[P, R], *, aten: str | None = None, writes: Sequence[str] = (), random: bool = False,
        floats: Sequence[str] = (), named: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.meaning, self.aten, self.random = meaning, aten, random
        #: The named tuple of torch's that several outputs come back in.
        self.named = named
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
            n
            for n in self.params
            if n not in self.tensors and kinds[n].split(" | ")[0] in ("float", "Number", "Scalar")
        )
        #: The tensors that the in-place variant overwrites, one for each output.
        self.writes = tuple(writes) or self.tensors[:1]
        #: Parameters that take floating-point tensors only (torch finds out in its kernels, so a meta run does not).
        self.floats = tuple(floats)
        self.inplace_name: str | None = None
        self._order, self._mean = _signature.ordering(self), _signature.meaning_of(self)
        #: Where tensors are taken, and what may be given in their place.
        self.stand_ins = tuple(
            (i, _signature.stand_ins(kinds[n])) for i, n in enumerate(self.params) if n in self.tensors
        )
        self._is_scalar = tuple(n in self.scalars for n in self.params)
        self._is_sizes = tuple(n == "normalized_shape" for n in self.params)
        self._shapes: Callable[..., Sequence[tuple[int, ...]] | None] | None = None
        self._plans: dict[Any, Plan] = {}
        #: The dtypes of the results by :meth:`kind`, where :meth:`shapes` gives the rest.
        self._kinds: dict[Any, tuple[torch.dtype, ...]] = {}
        # 2: any number, 1: floats only, as an int that stands for a tensor may decide something (pow(x, 2), pow(x, -1)).
        linked = [self.passes_scalars * (2 if n in self.scalars else n in self.tensors) for n in self.params]
        places = [self.params.index(w) for w in self.writes]
        has = _signature.parameters(self.signature)
        self._calls = _replay.Table(self._call, linked, (), self._enter, has)
        self._overwrites = _replay.Table(self._call_inplace, linked, places, self._enter_inplace, has)
        self._intos = _replay.Table(self._call_into, (*linked, 0), [len(linked)])
        self._trainings = _replay.Table(self._train, linked)
        self._gradients = _replay.Table(self._differentiate)
        self._calls.link(self._trainings, self._intos)
        self._free: Callable[..., None] | None = None
        self._vjp: Callable[..., Mapping[str, Tensor | None]] | None = None
        self._saves: tuple[str, ...] = ()
        self._saves_outs = False
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
        self._saves_outs = any(n.startswith("out") for n in names)
        self.differentiable = tuple(of if of is not None else self.tensors)

    def register(self) -> None:
        """Make the operator, with all that is attached to it, known to ``torch.compile`` and ``torch.export``."""
        _compile.register(self)

    # -- calling ---------------------------------------------------------------------------------------------------
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():
            return _compile.call(self, args, kwargs)  # type: ignore[no-any-return]
        return self._calls.call(*args, **kwargs)  # type: ignore[no-any-return]

    @functools.cached_property
    def inplace(self) -> Callable[P, R]:
        """The variant that overwrites its first tensor argument (or those in ``writes``) and returns it."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if is_compiling():
                return _compile.call_inplace(self, args, kwargs)  # type: ignore[no-any-return]
            return self._overwrites.call(*args, **kwargs)  # type: ignore[no-any-return]

        self.inplace_name = call.__name__ = call.__qualname__ = f"{self.name}_"
        call.__module__ = self.__module__
        call.__signature__ = self.signature.replace(  # type: ignore[attr-defined]
            parameters=[p for n, p in self.signature.parameters.items() if n != "out"]
        )
        call.__doc__ = f"In-place :func:`{self.name}`: overwrites {' and '.join(f'``{w}``' for w in self.writes)}."
        return call

    def _enter(self, /, *args: Any, **kwargs: Any) -> Any:
        values, out = self._order(*args, **kwargs)
        if out is not None:
            return self._intos(*values, out)
        return self._calls(*values) if self._calls._replays else self._call(*values)

    def _enter_inplace(self, /, *args: Any, **kwargs: Any) -> Any:
        values, out = self._order(*args, **kwargs)
        if out is not None:
            raise ArgumentError(f"{self.name}_: takes no out=; it writes {' and '.join(self.writes)}")
        return self._overwrites(*values)

    def _call(self, *given: Any) -> Any:
        kernels, needs_grad, values = _checks.inspect_tensors(self, given)
        if not kernels:
            if _launch._recording:
                _launch.note(self.name, "meaning")
            return self._meaning(values)
        if needs_grad and self._has_gradient(values):
            found = _Differentiable.apply(self, False, *values)  # type: ignore[no-untyped-call]
            return found if isinstance(found, Tensor) else self._tuple(found)
        plan = self._planned(values, None)
        outs = self._fresh(plan, values, None)
        if plan.again and values is given and self._calls.wants(given, again=True):
            one = len(outs) == 1
            self._calls.learn(given, self._forwarding(values), single=one, wrap=None if one else self._tuple)
        plan.again = True
        return self._tuple(outs)

    def _call_into(self, *given: Any) -> Any:
        before, out = given[:-1], given[-1]
        kernels, needs_grad, values = _checks.inspect_tensors(self, before)
        if needs_grad:
            raise GradientError(f"{self.name}: out= takes no part in autograd, but an argument requires a gradient")
        if not kernels:
            if _launch._recording:
                _launch.note(self.name, "meaning")
            return _checks.write_out(self, out, self._meaning(values))
        found = _checks.into_out(self, out, values)
        if values is before and isinstance(out, Tensor) and self._intos.wants(given):
            self._intos.learn(given, self._forwarding(values, (out,), places=(len(values),)), single=True)
        return found

    def _call_inplace(self, *given: Any) -> Any:
        table = self._overwrites
        targets = tuple(given[at] for at in table.writes)
        kernels, needs_grad, values = _checks.inspect_tensors(self, given)
        _checks.inplace_targets(self, targets, needs_grad and torch.is_grad_enabled())
        if kernels:
            _checks.plain_targets(f"{self.name}_: the target", targets)
        if kernels and self.elementwise:
            _checks.inplace_overlap(self, targets, values)
        if not kernels:
            if needs_grad and torch.is_grad_enabled():
                # The gradient may need what is about to be overwritten.
                values = tuple([v.clone() if any(v is t for t in targets) else v for v in values])
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
        one = len(targets) == 1
        if values is given and table.wants(given):
            table.learn(given, self._forwarding(values, targets, places=table.writes), single=one)
        return targets[0] if one else targets

    def _has_gradient(self, values: tuple[Any, ...]) -> bool:
        """False where torch has none either (a bool or int result); a gradient that we lack is refused."""
        if not any(_differs(dtype) for _, _, dtype in self._planned(values, None).outs):
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
        return outs[0] if len(outs) == 1 else self.named(outs) if self.named else outs

    def _meaning(self, values: tuple[Any, ...], given: tuple[Any, ...] | None = None) -> Any:
        """The meaning of ``values``; errors describe ``given``, where ``values`` are stand-ins for it."""
        try:
            return self._mean(*values)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, ArithmeticError) as e:
            raise _checks.translate(self, given or values, e) from e

    # -- kernels ---------------------------------------------------------------------------------------------------
    def forward(
        self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None = None, keep: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Run the kernel, without autograd, into ``outs`` (in-place targets) or fresh outputs."""
        plan = self._planned(values, outs)
        if outs is None:
            return self._fresh(plan, values, keep)
        if not self.elementwise and _checks.feeds(self, outs, values):
            # addmm_(x, x, y): a product would read of its factor what it has just written.
            from gemskit.pointwise._place import copy  # declares operators, which need this module

            found = self.forward(values, None, keep)
            torch.autograd.graph.increment_version(outs)
            for target, value in zip(outs, found):
                copy(value, target)
            return outs
        torch.autograd.graph.increment_version(outs)
        self._run(plan, outs, values, keep)
        return outs

    def _fresh(self, plan: Plan, values: tuple[Any, ...], keep: dict[str, Tensor] | None) -> tuple[Tensor, ...]:
        device = _device_of(values)
        outs = tuple([torch.empty_strided(s, t, dtype=d, device=device) for s, t, d in plan.outs])
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

    def _forwarding(
        self, values: tuple[Any, ...], targets: tuple[Tensor, ...] | None = None, kept: dict[str, Any] | None = None,
        places: Sequence[int] = (),
    ) -> Callable[..., Sequence[Tensor | None]]:  # fmt: skip
        """What `forward` does to ``values``, as a function of stand-ins that can be traced; ``targets`` are at ``places``."""
        plan = self._planned(values, targets)

        def run(*given: Any) -> Sequence[Tensor | None]:
            if targets is not None:
                outs = tuple(given[at] for at in places)
            else:
                outs = tuple(torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in plan.outs)
            plan.run(outs, kept, dict(zip(self.params, given)))
            return *outs, *(kept or {}).values()

        return run

    def _train(self, *values: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The outputs, and what the kernel keeps for the gradient."""
        keep: dict[str, Any] = {}
        outs = self.forward(values, None, keep)
        if self._trainings.wants(values):
            again, wrap = self._forwarding(values, None, {}), functools.partial(_split, len(outs), tuple(keep))
            self._trainings.learn(values, again, wrap=wrap, autograd=self._taking_part(values, outs, keep))
        return outs, keep

    def _saved(self, values: Sequence[Any], outs: Sequence[Tensor], keep: Mapping[str, Any]) -> dict[str, Any]:
        """What the gradient needs, by name, and for each where it is among the values, outputs and what was kept."""
        found = {n: (v, i) for i, (n, v) in enumerate(zip(self.params, values)) if n in self._saves}
        at = len(values)
        if self._saves_outs:
            names = enumerate(("out", "out1", "out2")[: len(outs)])
            found.update((n, (outs[i], at + i)) for i, n in names if n in self._saves or "outs" in self._saves)
        at += len(outs)
        found.update((n, (v, at + i)) for i, (n, v) in enumerate(keep.items()) if n in self._saves)
        return found

    def _how(self, values: Sequence[Any], saved: Mapping[str, Any]) -> _How:
        tensors = tuple([n for n, (v, _) in saved.items() if isinstance(v, Tensor)])
        rest = [(n, v) for n, (v, _) in saved.items() if not isinstance(v, Tensor)]
        like: Any = ()
        if "like" in self._saves:
            like = tuple([(n, tuple(v.shape), v.dtype) for n, v in zip(self.params, values) if isinstance(v, Tensor)])
        return tensors, tuple([n for n, _ in rest]), tuple([v for _, v in rest]), like

    def _taking_part(self, values: Sequence[Any], outs: Sequence[Tensor], keep: Mapping[str, Any]) -> tuple[Any, ...]:
        """The same for the native launcher, which makes a node of autograd itself."""
        saved = self._saved(values, outs, keep)
        how = self._how(values, saved)
        slots = [i for n, (_, i) in saved.items() if n in how[1]]
        numbers = tuple(
            (place, i)
            for place, i in enumerate(slots)
            if i < len(values) and _replay.links(self._trainings.linked[i], values[i])
        )
        sources = tuple(i for v, i in saved.values() if isinstance(v, Tensor))
        bits = sum(1 << i for i, n in enumerate(self.params) if n in self.differentiable)
        return self.name, self._gradients.call, how, self._tuple, numbers, sources, len(outs), bits

    def _differentiate(self, how: _How, needs: tuple[bool, ...], *tensors: Any) -> tuple[Tensor | None, ...]:
        """The gradients by parameter; ``tensors`` are those of the outputs, then what was saved."""
        assert self._vjp is not None
        given, tensors = tensors, _checks.in_memory(tensors)
        outputs = len(tensors) - len(how[0])
        have: dict[str, Any] = dict(zip(how[0], tensors[outputs:]))
        have.update(zip(how[1], how[2]))
        have["like"] = {n: (shape, dtype) for n, shape, dtype in how[3]}
        have.update({f"grad{i}": g for i, g in enumerate(tensors[:outputs])})
        have.update(grad=tensors[0], grads=tensors[:outputs], needs={n for n, need in zip(self.params, needs) if need})
        if "outs" in self._saves:
            have["outs"] = tuple(v for n, v in have.items() if n.startswith("out"))
        found = self._vjp(**{n: have.get(n) for n in self._saves})
        result = tuple(found.get(n) if need else None for n, need in zip(self.params, needs))
        values = (how, needs, *given)
        if self._gradients.wants(values):
            self._gradients.learn(values, self._differentiate)
        return result

    def _planned(self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None) -> Plan:
        key = (
            *[_key(v, scalar) for v, scalar in zip(values, self._is_scalar)],
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
        _replay.upgrade()
        with _replay.aside():
            return self._new_plan(values, outs)

    def _new_plan(self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None) -> Plan:
        _checks.served(self, values)
        specs = self._results(values)
        if outs:
            _checks.inplace_results(self, outs, [(s, d) for s, _, d in specs])
        _checks.results(self, specs)
        _checks.targets(self, outs or (), [d for _, _, d in specs])
        # The device is current: its architecture sets the numbers.
        with _launch.guard(_device_of(values)):
            if self.float8:
                _checks.float8(self, values)
            own = backends.override(self.name, _device_of(values))
            if own is not None:
                return Plan(specs, _unplanned(own.load()))
            return Plan(specs, self.plan(dict(zip(self.params, values)), outs or tuple([_meta(*s) for s in specs])))

    def _results(self, values: tuple[Any, ...]) -> tuple[_Spec, ...]:
        """Shape, stride and dtype of the results: from the meaning, which takes 0.02 to 0.1 ms, or from what is known of it."""
        shapes, kind = self.shapes(values), None
        if shapes is not None:
            kind = self.kind(values)
            known = self._kinds.get(kind)
            if known is not None:
                return tuple([(s, contiguous(s), d) for s, d in zip(shapes, known)])
        found = self._meaning(tuple(_on_meta(v) if isinstance(v, Tensor) else v for v in values), values)
        specs = tuple((tuple(t.shape), _dense(t), t.dtype) for t in (found if isinstance(found, tuple) else (found,)))
        if shapes is not None and [s[:2] for s in specs] == [(s, contiguous(s)) for s in shapes]:
            if len(self._kinds) >= PLANS:
                self._kinds.clear()
            self._kinds[kind] = tuple(d for _, _, d in specs)
        return specs

    def kind(self, values: Sequence[Any]) -> Any:
        """All of the arguments but sizes and strides."""
        return tuple(
            [
                (v.dtype, v.ndim) if isinstance(v, Tensor) else len(v) if sizes else _key(v, scalar)
                for v, scalar, sizes in zip(values, self._is_scalar, self._is_sizes)
            ]
        )

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        """The shapes of the results, row-major, of arguments that fit together; None where only the meaning knows.

        It must not answer for arguments that the meaning refuses for their sizes. Each answer is compared with the meaning
        once for every :meth:`kind`.
        """
        return self._shapes(*values) if self._shapes is not None else None

    def shape_rule(self, fn: Callable[..., Sequence[tuple[int, ...]] | None]) -> None:
        """Attach ``fn(*arguments)``, which answers for :meth:`shapes`."""
        self._shapes = fn

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        """The launch for arguments and outputs of this layout: ``run(outs, keep, arguments)``. It keeps none of them."""
        if self._free is None:
            raise NoKernel(f"{self.name}: no kernel for {describe(dict(named))}")
        return _unplanned(self._free)


def _unplanned(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel that plans nothing, as a launch."""
    return lambda outs, keep, arguments: kernel(outs, keep, **arguments)


def _differs(dtype: torch.dtype) -> bool:
    """Whether results of ``dtype`` have gradients."""
    return dtype.is_floating_point or dtype.is_complex


def _device_of(values: Sequence[Any]) -> torch.device:
    for v in values:
        if isinstance(v, Tensor):
            return v.device
    raise AssertionError("a call has at least one tensor argument")


def _meta(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")


def _dense(t: Tensor) -> tuple[int, ...]:
    """Strides without two elements at one place, which torch 2.11 gives results of select_scatter on meta."""
    aliased = any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape))
    return contiguous(t.shape) if aliased else tuple(t.stride())


def _on_meta(t: Tensor) -> Tensor:
    return _meta(t.shape, t.stride(), t.dtype)


def _key(v: Any, scalar: bool) -> Any:
    if isinstance(v, Tensor):
        return (*_layout(v), v.device)
    if isinstance(v, float) or (scalar and not isinstance(v, bool)):
        return type(v)
    # 1, 1.0 and True are equal as keys but not as arguments; a list is as good a shape as a tuple.
    return type(v), tuple(v) if isinstance(v, list) else v


def _split(outputs: int, names: tuple[str, ...], results: Sequence[Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return tuple(results[:outputs]), dict(zip(names, results[outputs:]))


#: What a gradient gets besides tensors: the names of the saved tensors, the names and values of the rest, and shape and dtype
#: of the tensor parameters.
_How = tuple[
    tuple[str, ...], tuple[str, ...], tuple[Any, ...], tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
]  # fmt: skip


class _Differentiable(torch.autograd.Function):
    """The gradient of any operator. Only entered when an argument needs one."""

    @staticmethod
    def forward(ctx: Any, op: Op[..., Any], inplace: bool, *values: Any) -> Any:
        given: Sequence[Any] = values
        if inplace:
            outs = tuple(values[at] for at in op._overwrites.writes)
            # The gradient may need what is about to be overwritten.
            given = [v.clone() if n in op.writes and n in op._saves else v for n, v in zip(op.params, values)]
            keep: dict[str, Any] = {}
            op.forward(values, outs, keep)
            ctx.mark_dirty(*outs)
        else:
            outs, keep = op._trainings.call(*values)
        ctx.floats = [_differs(o.dtype) for o in outs]
        if not all(ctx.floats):
            ctx.mark_non_differentiable(*(o for o in outs if not _differs(o.dtype)))
        saved = op._saved(given, outs, keep)
        ctx.op, ctx.how = op, op._how(given, saved)
        ctx.save_for_backward(*[v for v, _ in saved.values() if isinstance(v, Tensor)])
        (first, *others) = outs
        return outs if others else first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        op: Op[..., Any] = ctx.op
        if torch.is_grad_enabled():
            _replay.no_second_derivative(op.name)
        grads = tuple(g if has else None for g, has in zip(grads, ctx.floats))
        return (None, None, *op._gradients.call(ctx.how, ctx.needs_input_grad[2:], *grads, *ctx.saved_tensors))


def operator(
    *, aten: str | None = None, writes: Sequence[str] = (), random: bool = False, floats: Sequence[str] = (),
    named: Callable[[Any], Any] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:  # fmt: skip
    """Declare an operator with a free kernel; attach it with ``@op.kernel`` and its gradient with ``@op.gradient_by``."""

    def declare(meaning: Callable[P, R]) -> Op[P, R]:
        return Op(meaning, aten=aten, writes=writes, random=random, floats=floats, named=named)

    return declare
