"""One row of the benchmark: verified against float64, then timed beside torch eager and torch.compile.

All three are called on the same tensors in the same process; times are medians of :mod:`gemskit._bench_clock`. The floor is
the larger of bytes over the measured copy bandwidth and FLOPs over the measured rate of a large product.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.nn.attention import SDPBackend

from gemskit import _bench_liger, backends
from gemskit._bench_cases import BenchCase, Way
from gemskit._bench_clock import milliseconds
from gemskit._conformance import slack
from gemskit._op import REGISTRY, Op
from gemskit.testing import Make, Sample


class Roof:
    """The two ceilings of this machine, measured."""

    def __init__(self, bandwidth: float, flops: float) -> None:
        self.bandwidth, self.flops = bandwidth, flops

    @classmethod
    def measure(cls) -> Roof:
        """A copy of 1 GiB and a bf16 product of 8192³, in bytes and FLOPs a second."""
        a = torch.randn(1 << 28, device=backends.device)
        b = torch.empty_like(a)
        copy = milliseconds(lambda: b.copy_(a), b.nbytes)
        x, y = (torch.randn(8192, 8192, device=backends.device, dtype=torch.bfloat16) for _ in range(2))
        product = milliseconds(lambda: torch.mm(x, y.t()), x.nbytes)
        return cls(2 * a.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3)

    def __str__(self) -> str:
        return f"copy {self.bandwidth / 1e12:.2f} TB/s, bf16 product {self.flops / 1e12:.0f} TFLOP/s"

    def floor(self, moved: int, flops: float) -> float:
        """Milliseconds below which nothing can run."""
        return max(moved / self.bandwidth, flops / self.flops) * 1e3


def time_case(case: BenchCase, roof: Roof, compiled: bool) -> dict[str, Any]:
    """One row: verified against float64, then timed."""
    op = REGISTRY[case.op]
    sample = case.build(Make(case.dtype, device=backends.device, fast=True))
    row: dict[str, Any] = dict(**identity(case), package=package(op), family=family(op))
    tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
    leaves = [t.requires_grad_() for t in tensors if case.backward and t.dtype.is_floating_point]
    sides = [("gemskit", Way("", op)), *(("eager", way) for way in case.ways or (Way("", case.peer or op.meaning),))]
    if compiled:
        torch._dynamo.reset()
        sides.append(("compile", Way("", torch.compile(case.peer or op.meaning, dynamic=False))))
    times: dict[str, float] = {}
    took: dict[str, float] = {}
    outs: dict[str, list[Tensor]] = {}
    others: dict[str, list[Tensor]] = {}
    peers: dict[str, float | str] = {}
    upstream: list[Tensor] = []

    def side(name: str, way: Way, given: Sample, leaves: Sequence[Tensor]) -> None:
        nonlocal upstream
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), _only(way.backend):
                if way.backend is not None:
                    warnings.simplefilter("ignore")  # why a backend does not serve: the row says that it does not
                call, result, upstream = _prepared(case, way.call, given, leaves)
                found = milliseconds(call, sum(map(_bytes, result)))
            peers[way.name] = found
            each = [t.detach() for t in result]
            if case.ways and name == "eager":
                others[way.name] = each
            if found < times.get(name, math.inf):
                times[name], outs[name] = found, each
                row.pop(f"{name}_error", None)
                if way.name:
                    row["peer"] = way.name
        except Exception as e:  # one row that fails is one row
            peers[way.name] = said = f"{type(e).__name__}: {e}"[:300]
            if name not in times:
                row[f"{name}_error"] = said
        took[name] = round(took.get(name, 0) + time.perf_counter() - start, 2)

    for name, way in sides:
        side(name, way, sample, leaves)
    if case.ways:
        row["peers"] = {way.name: peers[way.name] for way in case.ways}
    read = sample.read or sum(_bytes(t) for t in tensors)
    moved = read + sum(map(_bytes, upstream)) + sum(_bytes(t) for t in outs.get("eager", ()))
    # Attention's backward has five products where its forward has two.
    flops = sample.flops * (2.5 if case.backward and not case.whole else 1)
    row.update(times=times, floor=roof.floor(moved, flops), flops=flops, bytes=moved)
    start = time.perf_counter()
    row["ok"], errors = _verify(case, sample, leaves, {**others, **outs}, upstream)
    row["error"], row["eager_error"] = (errors.get(n, math.nan) for n in ("gemskit", "eager"))
    if others:
        row["errors"] = {n: errors.get(n, math.nan) for n in others}
    others.clear()
    took["verification"] = round(time.perf_counter() - start, 2)
    if (liger := _bench_liger.peer(case, sample)) is not None:
        outs.clear()
        fn, own = liger
        side("liger", Way("", fn), own, [t for t in own.args if t.requires_grad])
    #: Seconds of this row, compilation included.
    row["took"] = took
    return row


def _only(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    return nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(backend)


def identity(case: BenchCase) -> dict[str, Any]:
    """What tells a row from all others."""
    dtype = str(case.dtype).removeprefix("torch.")
    return dict(op=public(case.op), label=case.label, dtype=dtype, backward=case.backward)


def public(name: str) -> str:
    """Operators with an underscore are what functions without one call."""
    return name.lstrip("_")


def package(op: Op[..., Any]) -> str:
    """``"pointwise"``, ``"reduce"``, ``"blas"`` or ``"nn"``."""
    return op.__module__.split(".")[1]


def family(op: Op[..., Any]) -> str:
    """What rows are judged together by: the package, in whose place products, attention and other fused rows are told apart."""
    if "attention" in op.name:
        return "attention"
    return {"blas": "products", "nn": "rows"}.get(package(op), package(op))


def _prepared(
    case: BenchCase, fn: Callable[..., Any], sample: Sample, leaves: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
) -> tuple[Callable[[], Any], list[Tensor], list[Tensor]]:  # fmt: skip
    """What is timed (the call, its backward, or both), its results once, and the incoming gradients (drawn, if not given)."""

    def results() -> list[Tensor]:
        found = _flat(fn(*sample.args, **sample.kwargs))
        return found[:1] if case.first else found

    if not leaves:

        def forward() -> Any:
            with torch.no_grad():
                return fn(*sample.args, **sample.kwargs)

        with torch.no_grad():
            return forward, results(), []
    outs = [o for o in results() if o.requires_grad]
    if upstream is None:
        generator = torch.Generator(outs[0].device).manual_seed(1)
        upstream = [torch.randn(o.shape, generator=generator, device=o.device).to(torch.bfloat16) for o in outs]
    grads = [g.to(o.dtype) for g, o in zip(upstream, outs, strict=True)]

    def backward() -> Any:
        return torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad([o for o in results() if o.requires_grad], leaves, grads)

    first = list(backward())
    if case.whole:
        outs.clear()
    return both if case.whole else backward, first, grads


def _verify(
    case: BenchCase, sample: Sample, leaves: Sequence[Tensor], outs: dict[str, list[Tensor]], upstream: Sequence[Tensor]
) -> tuple[bool, dict[str, float]]:
    """Whether gemskit's error against float64 is within 1.5 times torch eager's (or a few units), and all errors."""
    if "gemskit" not in outs or "eager" not in outs:
        return False, {}
    try:
        reference = _exact(case, sample, leaves, torch.float64, upstream)
    except torch.OutOfMemoryError:  # the scores of a long sequence
        reference = _exact(case, sample, leaves, torch.float32, upstream)
    op, dtype = REGISTRY[case.op], outs["gemskit"][0].dtype
    if case.compare is not None:
        outs, reference = {n: case.compare(sample, found) for n, found in outs.items()}, case.compare(sample, reference)
    if case.cut is not None:
        outs = {n: list(map(case.cut, found)) for n, found in outs.items()}
    errors = {name: _error(found, reference) for name, found in outs.items()}
    return errors["gemskit"] <= max(1.5 * errors["eager"], slack(op, dtype, bool(leaves))), errors


def _error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest error relative to an element plus the root mean square, or the share of ints and bools that are wrong."""
    if [t.shape for t in found] != [t.shape for t in reference]:
        return math.inf
    worst = 0.0
    for g, e in zip(found, reference):
        if not g.dtype.is_floating_point:
            worst = max(worst, float((g != e).double().mean()) if g.numel() else 0.0)
        elif g.numel():
            e = torch.where(e.abs() > torch.finfo(g.dtype).max, e.sign() * math.inf, e)
            g = g.to(e.dtype)
            finite = e[e.isfinite()]
            scale = e.abs() + (finite.square().mean().sqrt() if finite.numel() else 1)
            same = (g == e) | (g.isnan() & e.isnan())
            # What is NaN or infinite on one side only is as wrong as can be.
            worst = max(worst, float(torch.where(same, 0, (g - e).abs() / scale).nan_to_num(math.inf, math.inf).max()))
    return worst


def _exact(
    case: BenchCase, sample: Sample, leaves: Sequence[Tensor], dtype: torch.dtype, upstream: Sequence[Tensor]
) -> list[Tensor]:
    """The results (or gradients) of the meaning in a wide dtype, of the part that the row verifies."""
    torch.get_device_module(backends.device).empty_cache()

    def wide(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        part = v.detach() if case.cut is None else case.cut(v.detach())
        if part.dtype.is_floating_point:
            return part.to(dtype).requires_grad_(any(v is leaf for leaf in leaves))
        return part

    exact = Sample(tuple(map(wide, sample.args)), {k: wide(v) for k, v in sample.kwargs.items()})
    widened = [t for t in (*exact.args, *exact.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    grads = list(upstream) if case.cut is None else list(map(case.cut, upstream))
    with torch.nn.attention.sdpa_kernel([SDPBackend.MATH]):
        fn = case.exact or REGISTRY[case.op].meaning
        return [t.detach() for t in _prepared(case, fn, exact, widened, grads)[1]]


def _bytes(t: Tensor) -> int:
    """Bytes that reading ``t`` once moves: what is expanded counts once."""
    return math.prod(n for n, s in zip(t.shape, t.stride()) if s) * t.element_size()


def _flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
