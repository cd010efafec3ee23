"""Operators inside ``torch.compile`` and ``torch.export``: each is one opaque operator of the ``gemskit`` library.

``gemskit::NAME`` runs the eager operator. Where a gradient is needed, autograd replaces it by ``gemskit::NAME__forward``, which
also returns what the gradient asks for, and ``gemskit::NAME__backward``. ``gemskit::NAME_`` overwrites its arguments. The fake
rule is the meaning, on ``meta`` stand-ins. On CPU tensors the same operators run the meaning, or kernels under ``interpret()``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch._library import simple_registry

from gemskit import _checks, _launch
from gemskit._compile_kept import KEPT, Spec, rows
from gemskit._dtypes import _category
from gemskit.errors import ArgumentError, DeclarationError, GemskitError, GradientError, NoKernel

if TYPE_CHECKING:
    from gemskit._op import Op

Values: TypeAlias = tuple[Any, ...]

_LIBRARY = torch.library.Library("gemskit", "FRAGMENT")  # type: ignore[no-untyped-call]

#: Schema types of annotations that hold no tensor. Aliases are known by their names, as annotations are strings.
_TYPES = {
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
    "Number": "Scalar",
    "Scalar": "Scalar",
    "torch.dtype": "ScalarType",
    "Dims": "int[]?",
    "int | tuple[int, ...] | list[int]": "int[]",
    "Shape": "SymInt[]",
    "Sequence[int]": "SymInt[]",
}

#: What ``_specs`` found, by operator and layout: CPU results take the strides that the fake rule promised.
_SPECS: dict[Any, Any] = {}

#: In the place of a CPU call's seed: kernels ran, by the interpreter.
_KERNELS = -1


# -- values and results ---------------------------------------------------------------------------------------------------


def _flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _first(grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient of the first result that has one."""
    return next(g for g in grads if g is not None)


def _memory(values: Sequence[Any]) -> set[int]:
    """The storages of the tensors among ``values``."""
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def _device(values: Sequence[Any]) -> torch.device:
    """The device that an operator runs on: 0-dim CPU tensors come along."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    return next((t.device for t in tensors if t.ndim or t.device.type != "cpu"), tensors[0].device)


def _kernels(values: Sequence[Any]) -> bool:
    """Whether kernels run; all tensors are on one device here."""
    return _launch.has_kernels(next(v.device for v in values if isinstance(v, Tensor)))


def _meaning(op: Op[..., Any], values: Values) -> list[Tensor]:
    """Results on ``meta``, for their shapes, strides and dtypes."""
    stands = [
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v
        for v in values
    ]
    try:
        return _flat(op.meaning(**dict(zip(op.params, stands))))
    except (RuntimeError, ValueError, TypeError, IndexError) as e:
        if isinstance(e, GemskitError) or type(e).__module__.startswith("torch."):
            raise
        raise _checks.translate(op, values, e) from e


def _promised(op: Op[..., Any], values: Values, found: Sequence[Tensor]) -> list[Tensor]:
    """``found`` in the strides of the fake rule, which on the CPU are not always torch's."""
    layout = [(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else (type(v), str(v)) for v in values]
    key = (op, *layout)
    specs = _SPECS.get(key)
    if specs is None:
        if len(_SPECS) > 4096:
            _SPECS.clear()
        specs = _SPECS[key] = [(tuple(t.shape), t.stride()) for t in _meaning(op, values)]
    given = _memory(values)
    # Some of torch's functions return their argument: conj_physical of real numbers.
    own = [t.clone() if _memory((t,)) & given else t for t in found]
    return [_restrided(t, shape, stride) for t, (shape, stride) in zip(own, specs)]


def _restrided(t: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    if t.stride() == tuple(stride):
        return t
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=t.dtype, device=t.device).copy_(t)


@contextlib.contextmanager
def _drawing(random: bool, seed: int) -> Iterator[None]:
    """torch's CPU generator at ``seed``, for meanings that draw: the gradient's draw is that of the forward pass."""
    generator = torch.default_generator
    before = generator.get_state() if random else None
    try:
        if random:
            # torch.manual_seed would seed the accelerator's too.
            generator.manual_seed(seed)
        yield
    finally:
        if before is not None:
            generator.set_state(before)


# -- the operators --------------------------------------------------------------------------------------------------------


class Bound:
    """An operator as torch.library knows it. Its arguments are flat: one that is a tensor or a number takes two places."""

    def __init__(self, op: Op[..., Any]) -> None:
        self.op = op
        kinds = {n: _kind(op, n) for n in op.params}
        self.either = tuple("|" in kinds[n] for n in op.params)
        self.flatten = _flattening(op, kinds)
        #: Whether it may draw without being given a seed.
        self.draws = "dropout_p" in op.params
        self.random = op.random or self.draws
        #: The places of flat arguments, by parameter.
        self.flat = [n for n, e in zip(op.params, self.either) for _ in range(1 + e)]
        parameters = op.signature.parameters.values()
        self.positional = len([p for p in parameters if p.name != "out" and p.kind is not p.KEYWORD_ONLY])
        self.targets = tuple(op.params.index(w) for w in op.writes)
        self.results = _results(op)
        known = {*op.params, "like", "needs"}
        self.kept = tuple(n for n in op._saves if n not in known and not re.fullmatch(r"(out|grad)s?\d*", n))
        self.rule = KEPT.get(op.name, rows if hasattr(op, "saves") else None)
        if self.kept and self.rule is None:
            raise DeclarationError(f"{op.name}: no rule for the shapes of {self.kept}, which its gradient asks for")
        # A gradient that reads neither the input nor the result is the same along what was folded away.
        reads = {*op.tensors, "out", "out1", "outs"} & set(op._saves)
        self.even = op.family == "reduction" and not reads
        ours = op.__module__.partition(".")[0] == "gemskit"
        self.name = op.name if ours else f"{op.__module__}_{op.name}".replace(".", "_")
        self._declare(kinds)

    def _declare(self, kinds: Mapping[str, str]) -> None:
        op, name = self.op, self.name
        parts = [f"{kinds[n].partition('|')[0]} {n}" for n in op.params]
        for i, n in enumerate(op.params):
            if self.either[i]:
                parts[i] = f"Tensor? {n}, Scalar? {n}_number"
        inputs = ", ".join(parts + ["Tensor? draw"] * self.draws)
        result = "Tensor" if self.results == 1 else f"({', '.join(['Tensor'] * self.results)})"
        tags = (torch.Tag.nondeterministic_seeded,) if self.random else ()
        _define(name, f"({inputs}) -> {result}", self._run, tags)
        _LIBRARY.impl(name, self._autograd, "Autograd")  # type: ignore[no-untyped-call]
        self.call = _traced(name, self._fake)
        self.overwrites = op.inplace_name is not None
        if op.inplace_name:
            for i in self.targets:
                mark = chr(ord("a") + self.targets.index(i))
                parts[i] = re.sub(r"^Tensor\??", f"Tensor({mark}!)", parts[i])
            written = ", ".join(parts + ["Tensor? draw"] * self.draws)
            _define(f"{name}_", f"({written}) -> ()", self._run_inplace)
            self.write = _traced(f"{name}_", self._fake_inplace)
        if op.differentiable:
            _define(f"{name}__forward", f"({inputs}) -> Tensor[]", self._run_kept, tags)
            optional = re.sub(r"Tensor(?!\?)", "Tensor?", inputs)
            like = ", ".join(f"SymInt[]? {n}_shape, ScalarType? {n}_dtype" for n in op.differentiable)
            schema = f"(Tensor?[] grads, Tensor?[] outs, Tensor?[] kept, {optional}, {like}) -> Tensor[]"
            _define(f"{name}__backward", schema, self._run_gradient)

    @functools.cached_property
    def forward(self) -> Any:
        """The operator that also returns what the gradient asks for."""
        return _traced(f"{self.name}__forward", self._fake_kept)

    @functools.cached_property
    def backward(self) -> Any:
        """The gradient's operator."""
        return _traced(f"{self.name}__backward", self._fake_gradient)

    # -- arguments ------------------------------------------------------------------------------------------------------
    def values(self, flat: Sequence[Any]) -> Values:
        """The operator's arguments in order."""
        if len(self.flat) == len(self.op.params):
            return tuple(flat[: len(self.flat)])
        found, places = [], iter(flat)
        for either in self.either:
            v = next(places)
            number = next(places) if either else None
            found.append(number if v is None else v)
        return tuple(found)

    def _seed(self, flat: Sequence[Any], values: Values) -> int:
        """What the CPU's meaning draws from."""
        given = flat[len(self.flat)] if self.draws else dict(zip(self.op.params, values)).get("seed")
        return 0 if given is None else int(given)

    # -- the operator ---------------------------------------------------------------------------------------------------
    def _run(self, *flat: Any) -> Any:
        values = self.values(flat)
        found = _flat(self._eager(values)) if _kernels(values) else self._on_cpu(flat, values)
        return found[0] if self.results == 1 else tuple(found)

    def _eager(self, values: Values) -> Any:
        n = self.positional
        return self.op._calls.call(*values[:n], **dict(zip(self.op.params[n:], values[n:])))

    def _on_cpu(self, flat: Sequence[Any], values: Values) -> list[Tensor]:
        with torch.no_grad(), torch._C._DisableAutocast(), _drawing(self.random, self._seed(flat, values)):
            return _promised(self.op, values, _flat(self._eager(values)))

    def _fake(self, *flat: Any) -> Any:
        values = self.values(flat)
        device = _device(values)
        meant = _meaning(self.op, values)
        found = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in meant]
        return found[0] if self.results == 1 else tuple(found)

    def _autograd(self, *flat: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in flat):
            if self.op.differentiable:
                found = _Gradient.apply(self, *flat)  # type: ignore[no-untyped-call]
                return found[0] if self.results == 1 else found
        with torch._C._AutoDispatchBelowAutograd():
            return self.call(*flat)

    # -- in place -------------------------------------------------------------------------------------------------------
    def _run_inplace(self, *flat: Any) -> None:
        values = self.values(flat)
        named = dict(zip(self.op.params, values))
        if _kernels(values):
            self.op.inplace(**named)
            return
        with torch.no_grad(), torch._C._DisableAutocast(), _drawing(self.random, self._seed(flat, values)):
            self.op.inplace(**named)

    def _fake_inplace(self, *flat: Any) -> None:
        values = self.values(flat)
        specs = [(t.shape, t.dtype) for t in _meaning(self.op, values)]
        _checks.inplace_results(self.op, [values[i] for i in self.targets], specs)

    # -- with a gradient ------------------------------------------------------------------------------------------------
    def specs(self, values: Values, out: Tensor) -> dict[str, Spec]:
        """What the forward pass keeps: on the CPU also the seed of the meaning, or that kernels ran."""
        found = self.rule(self.op, dict(zip(self.op.params, values)), out) if self.rule and self.kept else {}
        kept = {n: found[n] for n in self.kept if n in found}
        return {**kept, "state": ((1,), torch.int64)} if out.device.type == "cpu" else kept

    def _run_kept(self, *flat: Any) -> list[Tensor]:
        values = self.values(flat)
        if _kernels(values):
            with torch.no_grad():
                outs, keep = self.op._trainings.call(*values)
            kept = [keep[n] for n in self.kept if keep.get(n) is not None]
            state = _KERNELS
        else:
            outs, state = self._on_cpu(flat, values), self._seed(flat, values)
            # The meaning keeps nothing: its gradient is taken of the arguments again.
            kept = [torch.empty(s, dtype=d) for n, (s, d) in self.specs(values, outs[0]).items() if n != "state"]
        if outs[0].device.type == "cpu":
            kept.append(torch.tensor([state], dtype=torch.int64))
        return [*outs, *kept]

    def _fake_kept(self, *flat: Any) -> list[Tensor]:
        outs = _flat(self._fake(*flat))
        specs = self.specs(self.values(flat), outs[0])
        return [*outs, *(torch.empty(s, dtype=d, device=outs[0].device) for s, d in specs.values())]

    def _split(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the backward operator: grads, outs, kept, flat arguments, (shape, dtype) by name."""
        grads, outs, kept, *rest = arguments
        count = len(self.flat) + self.draws
        sizes = zip(self.op.differentiable, rest[count::2], rest[count + 1 :: 2])
        like = {n: (torch.Size(shape), dtype) for n, shape, dtype in sizes if shape is not None}
        return grads, outs, kept, rest[:count], like

    def _result(self, n: str, like: Mapping[str, Any], grad: Tensor, named: Mapping[str, Any], device: Any) -> Tensor:
        """An empty gradient of ``n`` in the strides that most gradients have on their own."""
        shape, dtype = like[n]
        if self.even:
            shape = self.folded(shape, named)
        given = named.get(n)
        if self.op.family == "pointwise" and shape == grad.shape:
            return torch.empty_like(grad, dtype=dtype, device=device)
        if self.op.family in ("free", "reduction") and isinstance(given, Tensor) and not self.even:
            return torch.empty_like(given, device=device)
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def folded(self, shape: Sequence[int], named: Mapping[str, Any]) -> torch.Size:
        """``shape`` with size 1 along the dimensions of a reduction."""
        dim, ndim = named.get("dim"), max(len(shape), 1)
        dims = {d % ndim for d in ([dim] if isinstance(dim, int) else dim or range(ndim))}
        return torch.Size([1 if d in dims else n for d, n in enumerate(shape)])

    def _fake_gradient(self, *arguments: Any) -> list[Tensor]:
        grads, _, _, flat, like = self._split(arguments)
        named = dict(zip(self.op.params, self.values(flat)))
        grad = _first(grads)
        return [self._result(n, like, grad, named, grad.device) for n in like]

    def _run_gradient(self, *arguments: Any) -> list[Tensor]:
        op = self.op
        grads, outs, kept, flat, like = self._split(arguments)
        values = self.values(flat)
        named = dict(zip(op.params, values))
        grad = _first(grads)
        state = int(kept[-1]) if grad.device.type == "cpu" else _KERNELS
        if state != _KERNELS:
            found = self._meaning_gradient(grads, values, set(like), state)
        else:
            have: dict[str, Any] = {n: v for n, v in named.items() if n in op._saves}
            have.update({f"out{i}" if i else "out": t for i, t in enumerate(outs) if t is not None})
            have.update(zip(self.kept, kept))
            tensors = {n: v for n, v in have.items() if isinstance(v, Tensor)}
            rest = {n: v for n, v in have.items() if not isinstance(v, Tensor)}
            shapes = tuple([(n, tuple(s), d) for n, (s, d) in like.items()]) if "like" in op._saves else ()
            how = tuple(tensors), tuple(rest), tuple(rest.values()), shapes
            needs = tuple([n in like for n in op.params])
            with torch.no_grad():
                found = dict(zip(op.params, op._gradients.call(how, needs, *grads, *tensors.values())))
        results = []
        given = _memory((*grads, *outs, *flat))
        for n in like:
            t, want = found.get(n), self._result(n, like, grad, named, "meta")
            if t is not None and self.even and t.shape != want.shape:
                t = t[tuple(slice(0, m) for m in want.shape)]
            # An operator returns no view of its arguments, nor one tensor twice.
            same = t is not None and t.shape == want.shape and t.stride() == want.stride()
            # torch's zeros without memory are none that an operator may return either.
            if t is None or not same or t._is_zerotensor() or _memory((t,)) & given:
                fresh = torch.empty_like(want, device=grad.device)
                t = fresh.zero_() if t is None or not t.numel() else fresh.copy_(t)
            given |= _memory((t,))
            results.append(t)
        return results

    def _meaning_gradient(self, grads: Sequence[Tensor], values: Values, needs: set[str], seed: int) -> dict[str, Any]:
        """torch's gradient of the meaning, which runs again: on CPU tensors only."""
        # Backend kernels run with autograd's dispatch keys excluded.
        keys = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
        drawing = _drawing(self.random, seed)
        with torch._C._ForceDispatchKeyGuard(*keys), torch._C._DisableAutocast(), torch.enable_grad(), drawing:
            leaves = {n: v.detach().requires_grad_() for n, v in zip(self.op.params, values) if n in needs}
            named = {**dict(zip(self.op.params, values)), **leaves}
            found = _flat(self.op.meaning(**named))
            pairs = [(o, g) for o, g in zip(found, grads) if o.requires_grad]
            if not pairs:
                return {}
            outs, weights = zip(*pairs)
            got = torch.autograd.grad(outs, list(leaves.values()), weights, allow_unused=True)
        return dict(zip(leaves, got))


class _Gradient(torch.autograd.Function):
    """``NAME__forward`` and ``NAME__backward`` as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, *flat: Any) -> Any:
        op = bound.op
        values = bound.values(flat)
        for n, v in zip(op.params, values):
            if isinstance(v, Tensor) and v.requires_grad and n not in op.differentiable:
                raise NoKernel(
                    f"{op.name}: no gradient with respect to {n}; differentiable are {op.differentiable}. "
                    f"Detach {n}, or call under torch.no_grad()"
                )
        with torch._C._AutoDispatchBelowAutograd():
            found = bound.forward(*flat)
        outs, rest = tuple(found[: bound.results]), found[bound.results :]
        kept = dict(zip(bound.specs(values, outs[0]), rest))
        ctx.floats = [o.dtype.is_floating_point or o.dtype.is_complex for o in outs]
        ctx.mark_non_differentiable(*(o for o, floats in zip(outs, ctx.floats) if not floats))
        # Without kernels the gradient is the meaning's, which needs every argument.
        whole = outs[0].device.type == "cpu"
        saves = set(op._saves)
        drop = [isinstance(v, Tensor) and not (whole or n in saves) for n, v in zip((*bound.flat, "draw"), flat)]
        saved = [None if d else v for d, v in zip(drop, flat)]
        names = ["out", *(f"out{i}" for i in range(1, len(outs)))]
        back = [o if n in saves or "outs" in saves else None for n, o in zip(names, outs)]
        order = (*bound.kept, "state") if whole else bound.kept
        ctx.bound, ctx.counts = bound, (len(back), len(order))
        parts = [*back, *(kept.get(n) for n in order), *saved]
        ctx.rest = [None if isinstance(v, Tensor) else v for v in parts]
        ctx.at = [i for i, v in enumerate(parts) if isinstance(v, Tensor)]
        ctx.save_for_backward(*(parts[i] for i in ctx.at))
        first = {n: i for i, n in reversed(list(enumerate(bound.flat)))}
        wanted = {n: flat[first[n]] for n in op.differentiable if ctx.needs_input_grad[1 + first[n]]}
        ctx.first, ctx.like = first, {n: (t.shape, t.dtype) for n, t in wanted.items()}
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        bound: Bound = ctx.bound
        op = bound.op
        if torch.is_grad_enabled():
            raise GradientError(f"{op.name}: has no second derivative; take the first one without create_graph=True")
        parts = list(ctx.rest)
        for i, t in zip(ctx.at, ctx.saved_tensors):
            parts[i] = t
        outs, kept = ctx.counts
        sizes: list[Any] = []
        for n in op.differentiable:
            shape, dtype = ctx.like.get(n, (None, None))
            sizes += [shape, dtype]
        given = [g if floats else None for g, floats in zip(grads, ctx.floats)]
        found = bound.backward(given, parts[:outs], parts[outs : outs + kept], *parts[outs + kept :], *sizes)
        results: list[Any] = [None] * (len(ctx.needs_input_grad) - 1)
        for n, g in zip(ctx.like, found):
            # The same for all elements that were folded: a view that autograd's neighbours may fuse.
            results[ctx.first[n]] = g.expand(ctx.like[n][0]) if bound.even else g
        return (None, *results)


def _define(name: str, schema: str, run: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _traced(name: str, fake: Callable[..., Any]) -> Any:
    """The operator with its fake rule, which only tracing needs: it costs as much as the definition."""
    # Library._register_fake looks for the caller's module: 230 us an operator.
    simple_registry.singleton.find(f"gemskit::{name}").fake_impl.register(fake, "gemskit", _LIBRARY)
    return getattr(torch.ops.gemskit, name).default


def _kind(op: Op[..., Any], name: str) -> str:
    """The schema type of a parameter; ``Tensor?|Scalar`` where a number may stand for a tensor."""
    given = op.signature.parameters[name].annotation
    text = given if isinstance(given, str) else inspect.formatannotation(given)
    text = re.sub(r"(collections\.abc|typing)\.", "", text)
    bare = text.removesuffix(" | None")
    optional = "?" if bare != text else ""
    if "Tensor" in bare:
        return f"Tensor{optional}" + ("|Scalar" if "Number" in bare or "float" in bare or "Scalar" in bare else "")
    if bare.startswith("Literal["):
        return "str" + optional
    if bare not in _TYPES:
        raise DeclarationError(
            f"{op.name}: no schema type for {name}: {text}; known: Tensor, Literal, {', '.join(_TYPES)}"
        )
    return _TYPES[bare] + optional


def _flattening(op: Op[..., Any], kinds: Mapping[str, str]) -> Callable[..., list[Any]]:
    """A function of the arguments in order that gives them as the schema takes them. Tracing guards its code, no more."""
    how = {n: "*either({})" if "|" in k else "listed({})" if "[]" in k else "{}" for n, k in kinds.items()}
    parts = [how[n].format(n) for n in op.params]
    if "dropout_p" in op.params:
        parts.append(f"drawn(dropout_p, {op.tensors[0]})")
    return _flattener(", ".join(op.params), ", ".join(parts))


@functools.cache
def _flattener(params: str, parts: str) -> Callable[..., list[Any]]:
    # Compiling the text takes 0.2 ms, and most operators share theirs with others.
    scope: dict[str, Any] = {"either": _either, "listed": _listed, "drawn": _drawn}
    exec(f"def flatten({params}): return [{parts}]", scope)
    return scope["flatten"]  # type: ignore[no-any-return]


def _either(v: Any) -> tuple[Any, Any]:
    return (v, None) if v is None or isinstance(v, Tensor) else (None, v)


def _listed(v: Any) -> Any:
    return v if v is None else [v] if isinstance(v, (int, torch.SymInt)) else list(v)


def _drawn(p: float, like: Tensor) -> Tensor | None:
    """An argument of its own: two calls with the same arguments are not one. On the CPU it seeds the meaning."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device) if p else None


def _results(op: Op[..., Any]) -> int:
    """How many tensors an operator returns."""
    text = str(op.signature.return_annotation)
    if text.startswith("torch.return_types."):
        return int(getattr(torch.return_types, text.rpartition(".")[2]).n_sequence_fields)
    return text.count("Tensor") if text.startswith("tuple[") else 1


def register(*ops: Op[..., Any]) -> None:
    """Make ``ops`` known to torch.library, when their kernels, gradients and in-place variants are attached."""
    for op in ops:
        op._bound = Bound(op)  # type: ignore[attr-defined]


# -- traced by torch.compile ----------------------------------------------------------------------------------------------


def _bound(op: Op[..., Any]) -> Bound:
    bound: Bound | None = getattr(op, "_bound", None)
    if bound is None:
        raise ArgumentError(f"{op.name}: unknown to torch.compile; call {op.name}.register() where it is declared")
    return bound


def _together(op: Op[..., Any], values: Values) -> Values:
    """0-dim CPU tensors beside an accelerator's are moved outside of the operator, where their gradient returns."""
    if not op.elementwise:
        return values
    device = _device(values)
    return tuple([
        v.to(device) if isinstance(v, Tensor) and v.ndim == 0 and v.device.type == "cpu" and device.type != "cpu" else v
        for v in values
    ])  # fmt: skip


def _needs_grad(values: Values) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def call(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``op(*args, **kwargs)`` is under torch.compile."""
    bound = _bound(op)
    values, out = op._order(*args, **kwargs)
    if not any(isinstance(v, Tensor) for v in values):
        raise ArgumentError(f"{op.name}: at least one argument must be a Tensor; given {values}")
    if out is not None and _needs_grad(values):
        raise GradientError(f"{op.name}: out= takes no part in autograd, but an argument requires a gradient")
    found = bound.call(*bound.flatten(*_together(op, values)))
    if out is None:
        return found if bound.results == 1 else op._tuple(found)
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    _write(op, outs, (found,) if bound.results == 1 else found, "out")
    return out if isinstance(out, Tensor) else op._tuple(outs)


def call_inplace(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``op.inplace(*args, **kwargs)`` is under torch.compile."""
    bound = _bound(op)
    values, out = op._order(*args, **kwargs)
    if out is not None:
        raise ArgumentError(f"{op.name}_: takes no out=; it writes {' and '.join(op.writes)}")
    targets = [values[i] for i in bound.targets]
    for t in targets:
        if not isinstance(t, Tensor):
            raise ArgumentError(f"{op.name}_: {' and '.join(op.writes)} must be tensors to be overwritten, given {t}")
    again = any(v is t for t in targets for i, v in enumerate(values) if i not in bound.targets)
    # A copy where autograd follows the target or an argument is the target too (functionalization knows both), and for a
    # variant that was made after the operator was registered.
    if again or _needs_grad(values) or not bound.overwrites:
        # The gradient may need what is about to be overwritten.
        values = tuple([v.clone() if i in bound.targets else v for i, v in enumerate(values)])
        found = bound.call(*bound.flatten(*_together(op, values)))
        _write(op, targets, (found,) if bound.results == 1 else found, "the target")
    else:
        bound.write(*bound.flatten(*_together(op, values)))
    return targets[0] if len(targets) == 1 else tuple(targets)


def _write(op: Op[..., Any], targets: Sequence[Tensor], found: Sequence[Tensor], what: str) -> None:
    for t, f in zip(targets, found):
        if t.shape != f.shape:
            raise ArgumentError(
                f"{op.name}: {what} has shape {tuple(t.shape)}, the result {tuple(f.shape)}; torch.compile resizes nothing"
            )
        # What torch.can_cast says, which is not traced.
        if _category(f.dtype) > _category(t.dtype):
            raise ArgumentError(f"{op.name}: result type {f.dtype} can't be cast to {what}'s type {t.dtype}")
        t.copy_(f)
