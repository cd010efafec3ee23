"""One row of the benchmark: verified against float64, then timed beside torch eager and torch.compile.

All three are called on the same tensors in the same process; times are medians of ``do_bench`` with a cold L2. The floor is
the larger of bytes over the measured copy bandwidth and FLOPs over the measured rate of a large product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from gemskit import backends
from gemskit._bench_cases import BenchCase
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
        copy = _milliseconds(lambda: b.copy_(a))
        x, y = (torch.randn(8192, 8192, device=backends.device, dtype=torch.bfloat16) for _ in range(2))
        product = _milliseconds(lambda: torch.mm(x, y.t()))
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
    candidates: dict[str, Callable[..., Any]] = {"gemskit": op, "eager": case.peer or op.meaning}
    if compiled:
        torch._dynamo.reset()
        candidates["compile"] = torch.compile(case.peer or op.meaning, dynamic=False)
    row: dict[str, Any] = dict(**identity(case), package=package(op))
    tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
    leaves = [t.requires_grad_() for t in tensors if case.backward and t.dtype.is_floating_point]
    times: dict[str, float] = {}
    took: dict[str, float] = {}
    outs: dict[str, list[Tensor]] = {}
    upstream = 0
    for name, fn in candidates.items():
        start = time.perf_counter()
        try:
            call, result, upstream = _prepared(fn, sample, leaves)
            outs[name] = [t.detach() for t in result]
            times[name] = _milliseconds(call)
        except Exception as e:  # one row that fails is one row
            row[f"{name}_error"] = f"{type(e).__name__}: {e}"[:300]
        took[name] = round(time.perf_counter() - start, 2)
    read = sample.read or sum(_bytes(t) for t in tensors)
    moved = read + upstream + sum(_bytes(t) for t in outs.get("eager", ()))
    # Attention's backward has five products where its forward has two.
    flops = sample.flops * (2.5 if case.backward else 1)
    row.update(times=times, floor=roof.floor(moved, flops), flops=flops, bytes=moved)
    start = time.perf_counter()
    row["ok"], row["error"], row["eager_error"] = _verify(case, sample, leaves, outs)
    took["verification"] = round(time.perf_counter() - start, 2)
    #: Seconds of this row, compilation included.
    row["took"] = took
    return row


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


def _prepared(
    fn: Callable[..., Any], sample: Sample, leaves: Sequence[Tensor]
) -> tuple[Callable[[], Any], list[Tensor], int]:
    """What is timed (the call, or only its backward), its results once, and the bytes of incoming gradients."""
    if not leaves:
        with torch.no_grad():
            first = _flat(fn(*sample.args, **sample.kwargs))

        def forward() -> Any:
            with torch.no_grad():
                return fn(*sample.args, **sample.kwargs)

        return forward, first, 0
    outs = [o for o in _flat(fn(*sample.args, **sample.kwargs)) if o.requires_grad]
    generator = torch.Generator(outs[0].device).manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, device=o.device).to(torch.bfloat16).to(o.dtype) for o in outs]

    def backward() -> Any:
        return torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return backward, list(backward()), sum(map(_bytes, grads))


def _verify(
    case: BenchCase, sample: Sample, leaves: Sequence[Tensor], outs: dict[str, list[Tensor]]
) -> tuple[bool, float, float]:
    """Whether gemskit's error against float64 is within 1.5 times torch eager's (or a few units), and both errors."""
    if "gemskit" not in outs or "eager" not in outs:
        return False, math.nan, math.nan
    op = REGISTRY[case.op]
    try:
        reference = _exact(op, sample, leaves, torch.float64)
    except torch.OutOfMemoryError:  # the scores of a long sequence
        reference = _exact(op, sample, leaves, torch.float32)
    dtype = outs["gemskit"][0].dtype
    if case.compare is not None:
        outs, reference = {n: case.compare(sample, found) for n, found in outs.items()}, case.compare(sample, reference)
    mine, eager = (_error(outs[name], reference) for name in ("gemskit", "eager"))
    return mine <= max(1.5 * eager, slack(op, dtype, bool(leaves))), mine, eager


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


def _exact(op: Op[..., Any], sample: Sample, leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The results (or gradients) of the meaning in a wide dtype."""
    torch.get_device_module(backends.device).empty_cache()

    def wide(v: Any) -> Any:
        if isinstance(v, Tensor) and v.dtype.is_floating_point:
            return v.detach().to(dtype).requires_grad_(any(v is leaf for leaf in leaves))
        return v

    exact = Sample(tuple(map(wide, sample.args)), {k: wide(v) for k, v in sample.kwargs.items()})
    widened = [t for t in (*exact.args, *exact.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        return [t.detach() for t in _prepared(op.meaning, exact, widened)[1]]


def _milliseconds(fn: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    found: Any = do_bench(fn, warmup=20, rep=80, return_mode="median")
    return float(found)


def _bytes(t: Tensor) -> int:
    """Bytes that reading ``t`` once moves: what is expanded counts once."""
    return math.prod(n for n, s in zip(t.shape, t.stride()) if s) * t.element_size()


def _flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
