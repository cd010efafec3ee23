"""What every operator must keep, as checks that walk the registry.

``tests/test_ops.py`` runs them under the interpreter, ``python -m gemskit check`` on the accelerator of this machine. Nothing
here names an operator except the two tables at the end, which give a reason for each entry.

The reference is the operator's meaning in float64 on the CPU. A result passes if its largest error is at most 1.5 times that
of torch in the same dtype, or a few units of the dtype (:func:`slack`); ints, bools, NaNs and infinities must be equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from gemskit import _launch
from gemskit._op import REGISTRY, Op
from gemskit.errors import ArgumentError, DimError, GemskitError, GradientError, NoKernel
from gemskit.testing import LAYOUTS, Make, Sample, load

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64, torch.int8, torch.uint8, torch.int16, torch.bool)
#: Dtypes in which gradients and layouts are checked besides float32.
GRADIENTS = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One check of one operator over all its samples."""

    op: str
    kind: str
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        return "-".join((self.op, self.kind, str(self.dtype).removeprefix("torch."), self.layout))


def cases(op: Op[..., Any]) -> Iterator[Case]:
    """All checks of ``op``."""
    name = op.name
    for dtype in (*FLOATS, *INTS):
        yield Case(name, "forward", dtype)
    for layout in LAYOUTS[1:]:
        yield Case(name, "forward", torch.float32, layout)
    yield Case(name, "forward", torch.bfloat16, "mixed")
    if (name, "special") not in EXEMPT:
        for dtype in FLOATS:
            yield Case(name, "special", dtype)
    if op.differentiable:
        for dtype in GRADIENTS:
            yield Case(name, "gradient", dtype)
        for layout in LAYOUTS[1:]:
            yield Case(name, "gradient", torch.float32, layout)
    if op.complex:
        yield Case(name, "forward", torch.complex64)
        yield Case(name, "forward", torch.complex128, "mixed")
        if op.differentiable:
            yield Case(name, "gradient", torch.complex64)
            yield Case(name, "gradient", torch.complex128, "mixed")
        if op.inplace_name:
            yield Case(name, "inplace", torch.complex64)
    if op.has_out:
        for layout in ("contiguous", "transposed"):
            yield Case(name, "out", torch.float32, layout)
    if op.inplace_name:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(name, "inplace", dtype)
        yield Case(name, "inplace", torch.float32, "strided")
    yield Case(name, "errors")


def run(case: Case, device: str = "cpu") -> str:
    """Run one check; returns ``"passed"`` or why it was not applicable, raises AssertionError where it fails."""
    check: Callable[[Case, Op[..., Any], Make], str] = globals()[f"_{case.kind}"]
    make = Make(case.dtype, case.layout, special=case.kind == "special", device=device)
    # torch's fused attention reads unaligned tensors with aligned loads (misaligned address on an H200, torch 2.11).
    with poisoned(), torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        return check(case, REGISTRY[case.op], make)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (ints: the largest value), so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*|.*degrees of freedom.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def samples_of(op: Op[..., Any], make: Make) -> Iterator[Sample]:
    """The samples that are run (not those for benchmarks)."""
    return (s for s in load()[op.name](make) if s.note != "big")


# -- the checks -----------------------------------------------------------------------------------------------------------


def _forward(case: Case, op: Op[..., Any], make: Make) -> str:
    refused = 0
    for sample in _each(op, make):
        torch_result = _wanted(op, sample)
        before = [t.clone() for t in _tensors(sample)]
        launches = _launch.launches().total()
        result = _repeat(make, lambda: _attempt(op, sample))
        if isinstance(torch_result, Exception):
            assert isinstance(result, GemskitError), (
                f"{_show(sample)}: torch refuses ({torch_result}), gemskit gave {_brief(result)}"
            )
            refused += 1
            continue
        if isinstance(result, NoKernel) and _refusal(case):
            refused += 1
            continue
        if isinstance(result, GemskitError) and make.device != "cpu":
            # And the reverse (abs of bools): what torch refuses on the CPU is refused everywhere.
            if isinstance(_attempt(op.meaning, _on_cpu(sample)), Exception):
                refused += 1
                continue
        if isinstance(result, Exception):
            raise AssertionError(f"{_show(sample)}: {type(result).__name__}: {result}") from result
        _compare(op, _flat(result), _flat(torch_result), _reference(op, sample), sample)
        if any(t.numel() for t in _flat(result)):
            assert _launch.launches().total() > launches, f"{_show(sample)}: no kernel was launched"
        for old, new in zip(before, _tensors(sample)):
            assert torch.equal(_bits(old), _bits(new)), f"{_show(sample)}: an input was written"
    if case.dtype == torch.float32 and make.device == "cpu":
        assert not refused or _refusal(case), f"{refused} float32 samples were refused"
    return "passed" if not refused else f"{refused} refused, as torch does or for the reason in REFUSED"


_special = _forward


def _gradient(case: Case, op: Op[..., Any], make: Make) -> str:
    for sample in _each(op, make):
        got = _repeat(make, lambda: _attempt(lambda *a, **k: _grads(op, op, a, k, case.layout), sample))
        peer = _on_cpu(sample) if op.name in FAULTY else sample
        like = _attempt(lambda *a, **k: _grads(op, op.meaning, a, k, case.layout), peer)
        if isinstance(like, Exception):
            continue
        if isinstance(got, Exception):
            raise AssertionError(f"{_show(sample)}: {type(got).__name__}: {got}") from got
        exact = _attempt(lambda *a, **k: _grads(op, op.meaning, a, k, case.layout), _as64(sample))
        assert not isinstance(exact, Exception), exact
        for name, g in got.items():
            assert (g is None) == (like[name] is None), (
                f"{_show(sample)}: gradient of {name} is {g}, torch's {like[name]}"
            )
            if g is not None:
                _compare(op, [g], [like[name]], [exact[name]], sample, f"gradient of {name}")
    return "passed"


def _out(case: Case, op: Op[..., Any], make: Make) -> str:
    for sample in _each(op, make):
        found = _wanted(op, sample)
        if isinstance(found, Exception):
            raise found
        want = [w.to(make.device) for w in _flat(found)]
        shaped = [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in want]
        outs = [o.mT.contiguous().mT if case.layout == "transposed" and o.ndim > 1 else o for o in shaped]
        result = _repeat(make, lambda: _call(op, sample, outs))
        assert all(a is b for a, b in zip(_flat(result), outs)), f"{_show(sample)}: out was not returned"
        _compare(op, outs, want, _reference(op, sample), sample)
        empty = [torch.empty(0, dtype=w.dtype, device=w.device) for w in want]
        _compare(op, _flat(_call(op, sample, empty)), want, _reference(op, sample), sample)
        if want[0].dtype.is_floating_point:
            wrong = [torch.empty(w.shape, dtype=torch.int32, device=w.device) for w in want]
            _raises(ArgumentError, lambda: _call(op, sample, wrong), f"{_show(sample)}: int32 out")
            leaf = [torch.empty_like(w).requires_grad_(w.dtype.is_floating_point) for w in want]
            _raises(GradientError, lambda: _call(op, sample, leaf), f"{_show(sample)}: out that requires a gradient")
    return "passed"


def _inplace(case: Case, op: Op[..., Any], make: Make) -> str:
    ran = 0
    for sample in _each(op, make):
        position = [op.params.index(w) for w in op.writes]
        targets = [_argument(op, sample, p) for p in position]
        if not all(isinstance(t, Tensor) for t in targets):
            continue
        want = _wanted(op, sample)
        if isinstance(want, Exception) or any(
            w.shape != t.shape or not torch.can_cast(w.dtype, t.dtype) or w.is_complex() != t.is_complex()
            for w, t in zip(_flat(want), targets)
        ):
            result = _attempt(op.inplace, sample)
            assert isinstance(result, (GemskitError, RuntimeError)), (
                f"{_show(sample)}: the result does not fit, but was written"
            )
            continue
        reference = _reference(op, sample)
        if make.device != "cpu":
            _repeat(
                make,
                lambda: op.inplace(*[v.clone() if isinstance(v, Tensor) else v for v in sample.args], **sample.kwargs),
            )
        versions = [t._version for t in targets]
        result = _flat(op.inplace(*sample.args, **sample.kwargs))
        assert all(r is t for r, t in zip(result, targets)), f"{_show(sample)}: the target was not returned"
        assert all(t._version > v for t, v in zip(targets, versions)), f"{_show(sample)}: the version was not bumped"
        _compare(op, result, [w.to(t.dtype) for w, t in zip(_flat(want), targets)], reference, sample)
        ran += 1
        first = targets[0]
        if first.ndim and first.shape[0] > 1 and first.numel():
            wide = _replaced(op, sample, position[0], first[:1].expand(first.shape))
            _raises(ArgumentError, lambda: op.inplace(*wide.args, **wide.kwargs), f"{_show(wide)}: expanded target")
        if first.dtype.is_floating_point:
            leaf = _replaced(op, sample, position[0], first.detach().clone().requires_grad_())
            _raises(GradientError, lambda: op.inplace(*leaf.args, **leaf.kwargs), f"{_show(leaf)}: leaf target")
    # A real result does not fit into complex memory: abs_ of complex numbers is refused, as torch refuses it.
    assert ran or make.dtype.is_complex, "no sample could run in place"
    return "passed"


def _errors(case: Case, op: Op[..., Any], make: Make) -> str:
    sample = next(samples_of(op, make))
    if "dim" in op.params:
        away = _replaced(op, sample, op.params.index("dim"), 9)
        error = _raises(DimError, lambda: op(*away.args, **away.kwargs), "dim=9")
        assert op.name in str(error) and "9" in str(error), f"the message does not say what is wrong: {error}"
    place = next(i for i, n in enumerate(op.params) if n in op.tensors)
    for bad in ("text", object()):
        wrong = _replaced(op, sample, place, bad)
        error = _raises(ArgumentError, lambda: op(*wrong.args, **wrong.kwargs), f"{op.params[place]}={bad!r}")
        assert op.name in str(error) and op.params[place] in str(error), (
            f"the message does not say what is wrong: {error}"
        )
    mixed = _replaced(op, sample, place, torch.empty(3, 5, 7, device="meta"))
    others = [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, Tensor)]
    if len(others) > 1:
        _raises(ArgumentError, lambda: op(*mixed.args, **mixed.kwargs), "tensors on two devices")
    return "passed"


def slack(op: Op[..., Any], dtype: torch.dtype, gradient: bool) -> float:
    """The error that always passes, relative to an element plus the root mean square.

    Elementwise: 2 units, 4 for a gradient formula, which rounds more often. Where sums are taken in another order than
    torch's: 32 units of float32 and float64 (torch is its own reference in float64; on these small samples its luck with one
    order is no bound, and an exponential turns the rounding of a score s into s units); 4 of the halves, whose intermediate
    products are rounded to the input type by matrix units.
    """
    if not dtype.is_floating_point:
        return 0.0
    gradient = gradient or op.name.endswith("_backward")
    units = (4 if gradient else 2) if op.family == "pointwise" else 4 if dtype.itemsize == 2 else 32
    units = max(units, UNITS.get((op.name, dtype), 0))
    return units * torch.finfo(dtype).eps


# -- pieces ---------------------------------------------------------------------------------------------------------------


def _each(op: Op[..., Any], make: Make) -> Iterator[Sample]:
    assert op.name in load(), f"{op.name} has no samples"
    # Long rows take another path through a driver, the same one for every dtype and layout: float32 and one half stand for all.
    whole = make.layout == "contiguous" and make.dtype in (torch.float32, torch.bfloat16) and not make.special
    for sample in samples_of(op, make):
        if whole or not sample.note.startswith("long"):
            yield sample


def _repeat(make: Make, call: Callable[[], Any]) -> Any:
    """The result of ``call``; on an accelerator the third, as the first is planned, the second traced, and that a replay."""
    for _ in range(0 if make.device == "cpu" else 2):
        call()
    return call()


def _call(op: Op[..., Any], sample: Sample, outs: Sequence[Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resize.*")
        return op(*sample.args, **sample.kwargs, out=outs[0] if len(outs) == 1 else tuple(outs))


def _attempt(fn: Callable[..., Any], sample: Sample) -> Any:
    try:
        return fn(*sample.args, **sample.kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as e:
        return e


def _wanted(op: Op[..., Any], sample: Sample) -> Any:
    """torch's result or error. Its devices have fewer kernels than its CPU (2.11: angle of halves, products of ints)."""
    found = _attempt(op.meaning, sample)
    return _attempt(op.meaning, _on_cpu(sample)) if isinstance(found, Exception) else found


def _raises(kind: type[Exception], fn: Callable[[], Any], what: str) -> Exception:
    try:
        fn()
    except kind as e:
        return e
    except Exception as e:
        raise AssertionError(f"{what}: raised {type(e).__name__}: {e}, not {kind.__name__}") from e
    raise AssertionError(f"{what}: was not refused")


def _grads(op: Op[..., Any], fn: Callable[..., Any], args: Any, kwargs: Any, layout: str) -> dict[str, Tensor | None]:
    """Gradients of a fixed weighting of the outputs, by parameter name. Every second call leaves the last input out."""
    leaves: dict[str, Tensor] = {}
    values = []
    for n, v in zip(op.params, args):
        if n in op.differentiable and isinstance(v, Tensor) and _differs(v):
            v = leaves[n] = v.detach().requires_grad_()
        values.append(v)
    named = dict(kwargs)
    for n, v in kwargs.items():
        if n in op.differentiable and isinstance(v, Tensor) and _differs(v):
            named[n] = leaves[n] = v.detach().requires_grad_()
    outs = [o for o in _flat(fn(*values, **named)) if _differs(o)]
    if not leaves or not outs or not any(o.requires_grad for o in outs):
        return {}
    generator = torch.Generator().manual_seed(7)
    weights = []
    for o in outs:
        w = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(o.dtype).to(o.device)
        if o.is_complex():
            w = w * (1 + 0.5j)
        if layout == "expanded":
            w = torch.full((), 0.5, dtype=o.dtype, device=o.device).expand(o.shape)
        elif layout == "transposed" and o.ndim > 1:
            w = w.mT.contiguous().mT
        weights.append(w)
    before = [w.clone() for w in weights]
    grads = torch.autograd.grad(outs, list(leaves.values()), weights, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(before, weights)), "an incoming gradient was written"
    return dict(zip(leaves, grads))


def _compare(
    op: Op[..., Any], got: Sequence[Tensor], like: Sequence[Tensor], exact: Sequence[Tensor], sample: Sample,
    what: str = "result",
) -> None:  # fmt: skip
    assert len(got) == len(like), f"{_show(sample)}: {len(got)} outputs, torch gives {len(like)}"
    for k, (g, t, e) in enumerate(zip(got, like, exact)):
        label = f"{_show(sample)}: {what} {k}"
        assert g.shape == t.shape, f"{label}: shape {list(g.shape)}, torch's {list(t.shape)}"
        assert g.dtype == t.dtype, f"{label}: dtype {g.dtype}, torch's {t.dtype}"
        g, t = g.detach().cpu(), t.detach().cpu()
        if g.is_complex():
            g, t, e = (torch.view_as_real(v.detach().cpu().resolve_conj()) for v in (g, t, e))
        if not g.dtype.is_floating_point:
            assert torch.equal(g, t), f"{label}: {_first(g, t)}"
            continue
        g64, t64, e64 = g.double(), t.double(), e.detach().cpu().double()
        nan = torch.isnan(t64)
        # torch's vectorised CPU code turns gelu(inf) into NaN where its float64 does not: there either answer is right.
        sure = nan == torch.isnan(e64)
        assert torch.equal(torch.isnan(g64)[sure], nan[sure]), (
            f"{label}: NaN where torch has none or the reverse, {_first(g, t)}"
        )
        nan |= torch.isnan(g64)
        inf = torch.isinf(t64) | torch.isinf(g64)
        # Where float64 is finite and torch's dtype overflows, rounding decides; both answers are right.
        firm = inf & ~nan & ~(torch.isfinite(e64) & (e64.abs() > torch.finfo(g.dtype).max * 0.99))
        assert torch.equal(g64[firm], t64[firm]), f"{label}: infinities differ, {_first(g, t)}"
        live = ~(nan | inf | ~torch.isfinite(e64))
        if not live.any():
            continue
        g64, t64, e64 = g64[live], t64[live], e64[live]
        # Gradients that cancel to nothing are measured against the incoming ones, which have unit size.
        unit = 1.0 if what != "result" and op.family != "pointwise" else torch.finfo(g.dtype).tiny
        scale = e64.abs() + e64.square().mean().sqrt().clamp_min(unit)
        mine, torchs = ((g64 - e64).abs() / scale).max().item(), ((t64 - e64).abs() / scale).max().item()
        allowed = max(1.5 * torchs, slack(op, g.dtype, what != "result"))
        assert mine <= allowed, (
            f"{label}: error {mine:.3g}, torch's {torchs:.3g}, allowed {allowed:.3g}; {_first(g, t)}"
        )


def _first(g: Tensor, t: Tensor) -> str:
    different = ~((g == t) | ((g != g) & (t != t)))
    if g.ndim == 0:
        return f"got {g.item()}, torch {t.item()}"
    worst = torch.where(different, (g.double() - t.double()).abs().nan_to_num(torch.inf), -1.0)
    at = tuple(int(i) for i in torch.unravel_index(worst.argmax(), g.shape))
    return f"at {at} got {g[at].item()}, torch {t[at].item()} ({int(different.sum())} of {g.numel()} differ)"


def _reference(op: Op[..., Any], sample: Sample) -> list[Tensor]:
    wide = _as64(sample)
    return _flat(op.meaning(*wide.args, **wide.kwargs))


def _as64(sample: Sample) -> Sample:
    def wide(v: Any) -> Any:
        if isinstance(v, Tensor):
            v = v.detach().cpu()
            return v.to(torch.complex128) if v.is_complex() else v.double() if v.dtype.is_floating_point else v
        return torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v

    return replace(sample, args=tuple(map(wide, sample.args)), kwargs={k: wide(v) for k, v in sample.kwargs.items()})


def _on_cpu(sample: Sample) -> Sample:
    def moved(v: Any) -> Any:
        return v.cpu() if isinstance(v, Tensor) else v

    return replace(sample, args=tuple(map(moved, sample.args)), kwargs={k: moved(v) for k, v in sample.kwargs.items()})


def _argument(op: Op[..., Any], sample: Sample, place: int) -> Any:
    return sample.args[place] if place < len(sample.args) else sample.kwargs.get(op.params[place])


def _replaced(op: Op[..., Any], sample: Sample, place: int, value: Any) -> Sample:
    if place < len(sample.args):
        return replace(sample, args=(*sample.args[:place], value, *sample.args[place + 1 :]))
    return replace(sample, kwargs={**sample.kwargs, op.params[place]: value})


def _flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _tensors(sample: Sample) -> list[Tensor]:
    return [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, Tensor)]


def _bits(t: Tensor) -> Tensor:
    if t.dtype.itemsize == 1:
        return t.view(torch.uint8)
    return torch.nan_to_num(t, nan=12345.0) if t.dtype.is_floating_point else t


def _differs(t: Tensor) -> bool:
    """Whether it may require a gradient."""
    return t.dtype.is_floating_point or t.is_complex()


def _brief(v: Any) -> str:
    return f"{type(v).__name__}: {v}" if isinstance(v, Exception) else type(v).__name__


def _show(sample: Sample) -> str:
    def one(v: Any) -> str:
        if isinstance(v, Tensor):
            return f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
        return repr(v)

    parts = [*map(one, sample.args), *(f"{k}={one(v)}" for k, v in sample.kwargs.items())]
    return f"({', '.join(parts)}){' ' + sample.note if sample.note else ''}"


# -- tables ---------------------------------------------------------------------------------------------------------------

#: Inputs that torch takes on a CPU and that our kernels refuse with NoKernel: (operator, dtypes, reason).
REFUSED: tuple[tuple[tuple[str, ...], tuple[torch.dtype, ...], str], ...] = ()

#: Checks that say nothing, and why: (operator, kind) -> reason.
EXEMPT: dict[tuple[str, str], str] = {
    ("hardtanh_backward", "special"): "at NaN torch gives 0 where its CPU code is vectorised, elsewhere the gradient",
    **{
        (name, "special"): "torch's backends differ among each other on NaN and inf (the CPU one turns a "
        "NaN row into zeros, the math one spreads a NaN that causality skips); tests/test_attention.py pins ours"
        for name in ("scaled_dot_product_attention", "scaled_dot_product_attention_lse", "flash_attention")
    },
}

#: Operators whose gradient in torch 2.11 reads out of bounds where gradients are not aligned: the CPU's counts.
FAULTY = ("pad",)

#: Units that elementwise operators may be off by where the general bound says nothing.
UNITS: dict[tuple[str, torch.dtype], int] = {
    # i1(-8) of an int is off by 4.3 units on NVIDIA; torch has a series of its own.
    ("special_i1", torch.float32): 8,
    # The reference is torch in float64, whose 1 - x * x cancels near 1; the product (1 - x) (1 + x) does not.
    ("asin", torch.float64): 64,
    ("acos", torch.float64): 64,
    ("acosh", torch.float64): 64,
    ("atanh", torch.float64): 1024,
    ("arctanh", torch.float64): 1024,
    # The gradient with respect to one number is a sum of many: 4.3 units.
    ("logaddexp", torch.float32): 8,
    # Of complex64, by four real operations: 5 units.
    ("sqrt", torch.float32): 8,
}

#: Checks that fail for a known reason: case name, or operator and kind -> reason. An unexpected pass fails the run.
EXPECTED: dict[str, str] = {}


def _refusal(case: Case) -> str | None:
    return next((why for ops, dtypes, why in REFUSED if case.op in ops and case.dtype in dtypes), None)
