"""Every operator under torch.compile, as one opaque operator, with its gradient; and in exported programs."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import walks
from torch import Tensor, nn

import gemskit
from gemskit import _compile, _conformance
from gemskit._op import REGISTRY, Op
from gemskit.testing import Make, Sample

# Structured traces for a tool of torch's: pytest would format and keep each of them, a third of the time. It attaches to
# every logger that there is; this one it does not find.
torch._logging._internal.trace_log = logging.Logger("unheard")

Fn = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

#: One of each family under the interpreter; the walk runs all of them as meanings.
INTERPRETED = ("gelu", "where", "_var", "max_dim", "cumsum", "linear", "layer_norm", "fused_add_rms_norm", "softmax")
INTERPRETED += ("cross_entropy", "scaled_dot_product_attention", "embedding", "apply_rotary_pos_emb", "silu_and_mul")

#: Those whose sizes depend on the data are no part of a graph.
OPS = [name for name, op in REGISTRY.items() if op.family != "sized"]
SIZED = [name for name in REGISTRY if name not in OPS]

#: Before any test ran: others make variants that are not public.
INPLACE = {name: op.inplace_name for name, op in REGISTRY.items() if op.inplace_name}


class Graphs:
    """A backend that keeps the targets of what it compiles: of Dynamo's graph, and of forward and backward below it."""

    def __init__(self) -> None:
        self.frames = 0
        self.targets: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        self.frames += 1
        self._note(module)
        return aot_autograd(fw_compiler=self._inner, bw_compiler=self._inner)(module, inputs)

    def _inner(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        self._note(module)
        return make_boxed_func(module.forward)

    def _note(self, module: torch.fx.GraphModule) -> None:
        self.targets += [str(n.target) for n in module.graph.nodes if "gemskit" in str(n.target)]


def compiled(fn: Fn, graphs: Graphs | None = None, **options: Any) -> Fn:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=graphs or Graphs(), **options)


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def runs(op: Op[..., Any], most: int = 99, device: str = "cpu") -> Iterator[Sample]:
    """Samples that the eager operator takes, the short ones."""
    for sample in _conformance.samples_of(op, Make(device=device)):
        if most and not sample.note.startswith("long"):
            with contextlib.suppress(ValueError, RuntimeError, TypeError, IndexError):
                op(*sample.args, **sample.kwargs)
                most -= 1
                yield sample


def fits(op: Op[..., Any], values: tuple[Any, ...], found: Any) -> bool:
    """Whether the result can overwrite what the in-place variant writes."""
    targets = [values[op.params.index(w)] for w in op.writes]
    return all(
        isinstance(t, Tensor) and t.shape == f.shape and torch.can_cast(f.dtype, t.dtype)
        for t, f in zip(targets, flat(found))
    )


def leaves(op: Op[..., Any], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """``values`` away from where gradients are infinite, and where results are numbers, as leaves where they have one."""
    for low in (0.5, 1.5):
        found = tuple(
            (low + v.abs() / (1 + v.abs()) / 2).detach() if isinstance(v, Tensor) and v.is_floating_point() else v
            for v in values
        )
        if not any(t.isnan().any() for t in flat(op(**dict(zip(op.params, found))))):
            break
    return tuple(
        v.requires_grad_(n in op.differentiable) if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in zip(op.params, found)
    )


def same(op: Op[..., Any], sample: Sample) -> None:
    """One sample, compiled and eager: results and gradients."""
    args, kwargs = sample.args, sample.kwargs
    graphs = Graphs()
    fn = compiled(lambda *a, **k: op(*a, **k), graphs)
    want, got = op(*args, **kwargs), fn(*args, **kwargs)
    assert type(got) is type(want)
    assert graphs.targets == [f"gemskit.{op.name}.default"] * 2
    if not op.random:
        torch.testing.assert_close(flat(got), flat(want), equal_nan=True)
        if op.differentiable:
            follows(op, sample, fn, graphs)


def follows(op: Op[..., Any], sample: Sample, fn: Fn, graphs: Graphs) -> None:
    """Results and gradients of ``fn``, which is compiled, are those of the eager operator."""
    found: list[Any] = []
    grads = []
    for f in (op, fn):
        try:
            keep = lambda *a, f=f, **k: (found.append(f(*a, **k)), found[-1])[1]
            grads.append(_conformance._grads(op, keep, sample.args, sample.kwargs, "contiguous"))
        except RuntimeError as e:
            # torch has no gradient of remainder(number, tensor).
            assert f is op and re.match("derivative for .* is not implemented", str(e)), e
            return
    assert type(found[0]) is type(found[1])
    torch.testing.assert_close(*map(flat, found), equal_nan=True)
    torch.testing.assert_close(*grads, equal_nan=True)
    both = {f"gemskit.{op.name}__{way}.default" for way in ("forward", "backward")}
    assert not grads[0] or both <= set(graphs.targets)


def overwrites(op: Op[..., Any], sample: Sample) -> None:
    values, _ = op._order(*sample.args, **sample.kwargs)
    if not INPLACE.get(op.name) or op.random or not fits(op, values, op(*sample.args, **sample.kwargs)):
        return
    pairs = [[v.clone() if isinstance(v, Tensor) else v for v in values] for _ in range(2)]
    graphs = Graphs()
    run = lambda *a: op.inplace(**dict(zip(op.params, a)))
    got, want = compiled(run, graphs)(*pairs[0]), run(*pairs[1])
    assert all(a is b for a, b in zip(flat(got), [pairs[0][op.params.index(w)] for w in op.writes]))
    torch.testing.assert_close(flat(got), flat(want), equal_nan=True)
    torch.testing.assert_close(*[[v for v in p if isinstance(v, Tensor)] for p in pairs], equal_nan=True)
    assert graphs.targets[0] == f"gemskit.{op.name}_.default"


@pytest.mark.parametrize("name", OPS)
def test_as_eager(name: str) -> None:
    op = REGISTRY[name]
    # One of each kind of arguments: shapes change nothing here, and compiling is slow.
    kinds: dict[Any, Sample] = {}
    for sample in runs(op):
        values, _ = op._order(*sample.args, **sample.kwargs)
        kinds.setdefault(tuple(v.ndim == 0 if isinstance(v, Tensor) else type(v) for v in values), sample)
    first, *more = kinds.values()
    whole = walks.drawn(name, "as_eager")
    if whole or op.random or not op.differentiable:
        for sample in (first, *more[:whole]):
            same(op, sample)
        if whole:
            overwrites(op, first)
    else:
        graphs = Graphs()
        follows(op, first, compiled(lambda *a, **k: op(*a, **k), graphs), graphs)


@pytest.mark.parametrize("name", SIZED)
def test_sizes_of_the_data_break_the_graph(name: str) -> None:
    op = REGISTRY[name]
    fn = lambda *a, **k: op(*a, **k)
    for sample in runs(op, 2):
        args, kwargs = sample.args, sample.kwargs
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(fn)(*args, **kwargs)
        broken = torch.compile(fn, backend="eager")
        torch.testing.assert_close(flat(broken(*args, **kwargs)), flat(op(*args, **kwargs)))
        grads = [_conformance._grads(op, f, args, kwargs, "contiguous") for f in (broken, op)]
        torch.testing.assert_close(*grads)


# It compares arguments with torch.allclose, which takes no float8.
@pytest.mark.parametrize("name", [name for name in walks.sample("opcheck", OPS) if not REGISTRY[name].float8])
def test_opcheck(name: str) -> None:
    op = REGISTRY[name]
    bound = _compile._bound(op)
    for sample in list(runs(op, 4)):
        values, _ = op._order(*sample.args, **sample.kwargs)
        # torch's own rule of a loss of one sample reads the target where shapes are symbols.
        if name == "cross_entropy" and values[0].ndim == 1:
            continue
        values = leaves(op, values)
        torch.library.opcheck(bound.call, tuple(bound.flatten(*values)))
        plain = tuple(v.detach() if isinstance(v, Tensor) else v for v in values)
        if INPLACE.get(op.name) and fits(op, plain, op(**dict(zip(op.params, plain)))):
            torch.library.opcheck(bound.write, tuple(bound.flatten(*plain)))
        break


@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels(name: str) -> None:
    """The kernels run, forward and backward, where the eager operator would run them."""
    op = REGISTRY[name]
    samples = [s for s in runs(op) if all(t.numel() for t in flat(op(*s.args, **s.kwargs)))]
    with gemskit.interpret():
        for sample in samples[:1]:
            with gemskit.record() as eager:
                op(*sample.args, **sample.kwargs)
            with gemskit.record() as calls:
                same(op, sample)
            assert "meaning" not in {c.kernel for c in calls}
            # Twice forward, then forward and backward, each compiled and eager.
            assert len(calls) >= 4 * len(eager) + 2
            values = leaves(op, op._order(*sample.args, **sample.kwargs)[0])
            torch.library.opcheck(_compile._bound(op).call, tuple(_compile._bound(op).flatten(*values)))
            overwrites(op, sample)


def test_a_gradient_follows_its_forward_pass() -> None:
    """Kernels forward and backward, or the meaning in both, wherever backward is called."""
    x = torch.randn(4, 6)
    fn = compiled(lambda t: gemskit.rms_norm(t, (6,)))
    found = []
    for inside in (True, False):
        leaf = x.clone().requires_grad_()
        with gemskit.interpret() if inside else contextlib.nullcontext():
            loss = fn(leaf).square().sum()
        with contextlib.nullcontext() if inside else gemskit.interpret():
            loss.backward()
        found.append(leaf.grad)
    leaf = x.clone().requires_grad_()
    nn.functional.rms_norm(leaf, (6,)).square().sum().backward()
    torch.testing.assert_close(found, [leaf.grad, leaf.grad])


class Block(nn.Module):
    """The modules, views between them, and attention over a transposed layout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = gemskit.RMSNorm(8), gemskit.LayerNorm(8)
        self.project, self.gate = nn.Linear(8, 16), gemskit.SiluAndMul()
        self.rotary = gemskit.RotaryEmbedding(4, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(self.project(self.second(self.first(x))))
        q = h.view(h.shape[0], h.shape[1], 2, 4)
        q, k = (t.transpose(1, 2) for t in self.rotary(q, q))
        a = gemskit.scaled_dot_product_attention(q, k, k, is_causal=True)
        return gemskit.mean(gemskit.add(a, 1, alpha=2), (1, -1))


def step(model: nn.Module, fn: Fn, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = fn(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("interpreted", [False, True])
def test_modules_with_dynamic_shapes(interpreted: bool) -> None:
    model, graphs = Block(), Graphs()
    fn = compiled(model, graphs, dynamic=True)
    with gemskit.interpret() if interpreted else contextlib.nullcontext():
        for batch, length in ((2, 5), (3, 7), (5, 9), (2, 6)):
            x = torch.randn(batch, length, 8)
            torch.testing.assert_close(step(model, fn, x), step(model, model, x))
    assert graphs.frames <= 2


DYNAMIC: dict[str, tuple[Fn, int]] = {
    "pointwise": (lambda x: gemskit.mul_(gemskit.silu(x), 2) + gemskit.where(gemskit.gt(x, 0), x, 0), 2),
    "numbers": (lambda x: gemskit.add(x, x.shape[0], alpha=x.shape[1]), 2),
    "reduce": (lambda x: gemskit.sum(x, 0) + gemskit.var(x, (0,)) + gemskit.amax(x, [0]), 2),
    "rows": (lambda x: gemskit.softmax(gemskit.layer_norm(x, (x.shape[-1],)), -1), 2),
    "products": (lambda x: gemskit.mm(gemskit.linear(x, x), x), 2),
    "scan": (lambda x: gemskit.cumsum(x, 1)[:, -1] + gemskit.max(x, 1).values, 2),
    "loss": (lambda x: gemskit.cross_entropy(x, gemskit.argmax(x, 1), label_smoothing=0.1), 2),
    "gather": (lambda x: gemskit.embedding(gemskit.argmin(x, 1) % 4, x), 2),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name: str) -> None:
    body, ndim = DYNAMIC[name]
    graphs = Graphs()
    fn = compiled(body, graphs)
    for shape in ((5, 6), (7, 9), (8, 12)):
        x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        for d in range(ndim):
            torch._dynamo.mark_dynamic(x, d)
        got, want = fn(x), body(y)
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close([got, x.grad], [want, y.grad])
    assert graphs.frames == 1


def test_functions_that_compose_operators() -> None:
    def body(fn: Fn, a: Tensor, b: Tensor) -> Any:
        return fn(a), *fn(a, 1), fn(a, dim=0, keepdim=True).indices, fn(a, b)

    x, y = torch.randn(4, 6), torch.randn(4, 6)
    for fn in (gemskit.max, gemskit.min):
        torch.testing.assert_close(compiled(functools.partial(body, fn))(x, y), body(fn, x, y))


@pytest.mark.parametrize("interpreted", [False, True])
def test_dropout(interpreted: bool) -> None:
    x = torch.ones(50, 60, requires_grad=True)
    with gemskit.interpret() if interpreted else contextlib.nullcontext():
        fn = compiled(lambda t: gemskit.dropout(t, 0.3))
        y, again = fn(x), fn(x)
        y.sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, y.detach())
        assert 0.25 < (y == 0).float().mean() < 0.35
        assert not torch.equal(y, again)
        # Equal calls draw anew each: they are not one.
        assert compiled(lambda t: gemskit.dropout(t, 0.3) - gemskit.dropout(t, 0.3))(x).abs().sum() > 0
        z = torch.ones(50, 60)
        assert 0.25 < (compiled(lambda t: gemskit.dropout_(t, 0.3))(z) == 0).float().mean() < 0.35
        assert (z == 0).any()


@pytest.mark.parametrize("interpreted", [False, True])
def test_attention_dropout(interpreted: bool) -> None:
    q, direction = torch.randn(1, 2, 9, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)

    def attention(t: Tensor) -> Tensor:
        return gemskit.scaled_dot_product_attention(t, t, t, None, 0.4)

    fn = compiled(attention)

    def at(t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fn(t.detach().requires_grad_()).sum().detach()

    with gemskit.interpret() if interpreted else contextlib.nullcontext():
        q.requires_grad_()
        torch.manual_seed(3)
        fn(q).sum().backward()
        assert q.grad is not None
        slope = (at(q + 1e-5 * direction) - at(q - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close(slope, (q.grad * direction).sum(), rtol=1e-5, atol=1e-5)
        assert compiled(lambda t: attention(t) - attention(t))(q.detach()).abs().sum() > 0


IN_PLACE: dict[str, Fn] = {
    "an input": lambda a, b: gemskit.silu_(a) + 1,
    "a view": lambda a, b: (gemskit.relu_(a[1:3]), a * 2)[1],
    "itself": lambda a, b: gemskit.add_(a, a),
    "a temporary": lambda a, b: gemskit.mul_(a * 2, b) + b,
    "twice": lambda a, b: gemskit.add_(gemskit.silu_(a), b),
    "two": lambda a, b: gemskit.fused_add_rms_norm_(a, b, (6,))[0] + b,
    "out": lambda a, b: gemskit.silu(a, out=b) + 1,
    "outs": lambda a, b: (gemskit.max(a, 1, out=(b[:, 0], torch.empty(4, dtype=torch.int64)))[0], b * 2)[1],
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_mutation(name: str) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    pairs = [(x.clone(), y.clone()) for _ in range(2)]
    got, want = compiled(IN_PLACE[name])(*pairs[0]), IN_PLACE[name](*pairs[1])
    torch.testing.assert_close((got, *pairs[0]), (want, *pairs[1]))


def test_mutation_with_a_gradient() -> None:
    def body(a: Tensor, b: Tensor) -> Tensor:
        h = gemskit.silu_(a * 2)
        gemskit.addmm_(h, b, b, alpha=0.5)
        return gemskit.clamp_(h, -1, 1) * b

    def plain(a: Tensor, b: Tensor) -> Tensor:
        h = nn.functional.silu(a * 2)
        return (h + 0.5 * b @ b).clamp(-1, 1) * b

    found = []
    for fn in (compiled(body), plain):
        leaf = [torch.randn(5, 5, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2)]
        fn(*leaf).sum().backward()
        found.append([t.grad for t in leaf])
    torch.testing.assert_close(*found)


def test_exported_programs_hold_operators() -> None:
    model, x = Block(), torch.randn(2, 5, 8)
    wanted = "rms_norm layer_norm silu_and_mul apply_rotary_pos_emb scaled_dot_product_attention add mean".split()
    sizes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("l", max=32)}}
    for strict in (False, True):
        program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
        targets = [str(n.target) for n in program.graph.nodes]
        assert [t for t in targets if "gemskit" in t] == [f"gemskit.{n}.default" for n in wanted]
        other = torch.randn(4, 9, 8)
        torch.testing.assert_close(program.module()(other), model(other))
        file = io.BytesIO()
        torch.export.save(program.run_decompositions(), file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(other), model(other))


def test_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 6, device="cuda")
        y = torch.ops.gemskit.silu.default(x.t())
        assert (y.shape, y.stride(), y.device.type) == ((6, 4), (1, 6), "cuda")
        lse = torch.ops.gemskit.layer_norm__forward.default(x, [6], None, None, 1e-5)
        assert [t.shape for t in lse] == [(4, 6), (4, 1), (4, 1)]


class Context:
    """Of an autograd function that runs without autograd, which needs a device for its threads."""

    def __init__(self, needs: list[bool]) -> None:
        self.needs_input_grad = (False, *needs)

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


@pytest.mark.parametrize("name", [name for name in OPS if REGISTRY[name].differentiable])
def test_what_an_accelerator_keeps(name: str) -> None:
    """On an accelerator the gradient gets what it names, and nothing else is kept."""
    from torch._subclasses import FakeTensorMode

    op = REGISTRY[name]
    bound = _compile._bound(op)
    for sample in runs(op, 2):
        values, _ = op._order(*sample.args, **sample.kwargs)
        with FakeTensorMode(), torch.no_grad():
            values = tuple(
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda") if isinstance(v, Tensor) else v
                for v in values
            )
            flattened = bound.flatten(*values)
            needs = [n in op.differentiable and isinstance(v, Tensor) for n, v in zip(bound.flat, flattened)]
            context: Any = Context([*needs, False][: len(flattened)])
            outs = _compile._Gradient.forward(context, bound, *flattened)
            kept = [n for n in op._saves if n in (*op.params, *bound.kept) or n.startswith("out")]
            assert len(context.saved_tensors) <= len(kept) + op._saves.count("outs") * (bound.results - 1)
            grads = _compile._Gradient.backward(context, *outs)[1:]
            for v, g, need in zip(flattened, grads, needs):
                assert (g is not None) == need
                if need:
                    assert (g.shape, g.dtype, g.device) == (v.shape, v.dtype, v.device)


def test_refusals() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(Exception, match="sum: Dimension out of range"):
        compiled(lambda t: gemskit.sum(t, 9))(x)
    with pytest.raises(Exception, match=r"torch\.compile resizes nothing"):
        compiled(lambda t: gemskit.silu(t, out=torch.empty(3)))(x)
    y = torch.compile(gemskit.silu, backend="eager", fullgraph=True)(x.requires_grad_())
    with pytest.raises(gemskit.errors.GradientError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only operators of gemskit, so that no compiler is needed."""
    # torch's cache on disk knows the traced call, not what the operator became in another version of gemskit.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def body(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        gemskit.silu_(c)
        return gemskit.sum(gemskit.mul(gemskit.silu(a), gemskit.rms_norm(b, (6,))))

    found = []
    torch._dynamo.reset()
    for fn in (torch.compile(body, fullgraph=True), body):
        a, b, c = (torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(3))
        y = fn(a.requires_grad_(), b.requires_grad_(), c)
        y.backward()
        found.append([y, a.grad, b.grad, c])
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_on_an_accelerator() -> None:
    """Kernels, and what is kept for the gradient no more than eager autograd keeps."""
    wrong: dict[str, Exception] = {}
    for op in map(REGISTRY.__getitem__, OPS):
        try:
            for sample in list(runs(op, 3, gemskit.device)):
                with gemskit.record() as calls:
                    same(op, sample)
                assert "meaning" not in {c.kernel for c in calls}
                overwrites(op, sample)
        except Exception as e:
            wrong[op.name] = e
    assert not wrong
    model = Block().to(gemskit.device)
    for options in ({}, {"dynamic": True}):
        torch._dynamo.reset()
        fn = torch.compile(model, fullgraph=True, **options)
        for length in (5, 9):
            x = torch.randn(2, length, 8, device=gemskit.device)
            torch.testing.assert_close(step(model, fn, x), step(model, model, x), rtol=1e-3, atol=1e-3)
