"""``python -m gemskit bench``: verify, then time operators against torch eager and torch.compile, beside the roofline.

Every row runs in one process: gemskit, torch eager and torch.compile on the same tensors, medians of ``do_bench`` with a cold
L2. The floor is the larger of bytes over the measured copy bandwidth and FLOPs over the measured rate of a large product.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from gemskit import _bench_cases, backends
from gemskit._bench_cases import BenchCase
from gemskit._conformance import slack
from gemskit._op import REGISTRY, Op
from gemskit._report import environment
from gemskit.errors import DeviceError, MissingExtra
from gemskit.testing import Make, Sample


def main(argv: list[str]) -> int:
    """The command."""
    if "--host" in argv:
        from gemskit._bench_host import main as host

        return host([a for a in argv if a != "--host"])
    parser = argparse.ArgumentParser(prog="python -m gemskit bench", description=__doc__)
    parser.add_argument("ops", nargs="*", help="operators to time (default: all)")
    parser.add_argument("--report", type=Path, help="write JSON here; a Markdown table and SVG and PNG plots beside it")
    parser.add_argument("--host", action="store_true", help="time the host instead; --host --help tells its options")
    parser.add_argument(
        "--no-compile", nargs="*", metavar="PACKAGE", help="leave torch.compile out (of the rows of these packages)"
    )
    parser.add_argument("--render", type=Path, help="only draw the table and plots of an existing JSON report")
    options = parser.parse_args(argv)
    if options.render:
        render(options.render)
        return 0
    if backends.vendor.device_type == "cpu":
        raise DeviceError(
            "bench: times kernels on an accelerator, and none was found; python -m gemskit info says what was"
        )
    every = list(_bench_cases.cases())
    rows = [c for c in every if not options.ops or {c.op, _public(c.op)} & {*options.ops}]
    if not rows:
        known = sorted({_public(c.op) for c in every})
        parser.error(f"no benchmark for {', '.join(options.ops)}; there are {', '.join(known)}")
    roof = Roof.measure()
    print(f"copy {roof.bandwidth / 1e12:.2f} TB/s, bf16 product {roof.flops / 1e12:.0f} TFLOP/s")
    found = []
    for case in rows:
        out = options.no_compile
        compiled = out is None or (bool(out) and _package(REGISTRY[case.op]) not in out)
        row = time_case(case, roof, compiled)
        found.append(row)
        print(_row(row), flush=True)
    print(_summary(found))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        facts = environment(torch.get_device_module(backends.device).get_device_name(0))
        report = dict(**facts, bandwidth=roof.bandwidth, flops=roof.flops, rows=found)
        options.report.write_text(json.dumps(report, indent=0) + "\n")
        render(options.report)
    return 0 if all(r["ok"] for r in found) else 1


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
    row: dict[str, Any] = dict(
        op=_public(case.op), package=_package(op), label=case.label, dtype=str(case.dtype).removeprefix("torch."),
        backward=case.backward,
    )  # fmt: skip
    tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
    leaves = [t.requires_grad_() for t in tensors if case.backward and t.dtype.is_floating_point]
    times: dict[str, float] = {}
    outs: dict[str, list[Tensor]] = {}
    upstream = 0
    for name, fn in candidates.items():
        try:
            call, result, upstream = _prepared(fn, sample, leaves)
            outs[name] = [t.detach() for t in result]
            times[name] = _milliseconds(call)
        except Exception as e:  # one row that fails is one row
            row[f"{name}_error"] = f"{type(e).__name__}: {e}"[:300]
    read = sample.read or sum(_bytes(t) for t in tensors)
    moved = read + upstream + sum(_bytes(t) for t in outs.get("eager", ()))
    # Attention's backward has five products where its forward has two.
    flops = sample.flops * (2.5 if case.backward else 1)
    row.update(times=times, floor=roof.floor(moved, flops), flops=flops, bytes=moved)
    row["ok"], row["error"], row["eager_error"] = _verify(case, sample, leaves, outs)
    return row


def _public(name: str) -> str:
    """Operators with an underscore are what functions without one call."""
    return name.lstrip("_")


def _package(op: Op[..., Any]) -> str:
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


def _row(row: dict[str, Any]) -> str:
    t = row["times"]
    mine = t.get("gemskit", math.nan)
    parts = [f"{row['op'][:22]:22} {row['label'][:28]:28} {mine:8.4f} ms {row['floor'] / mine:5.0%} of roof"]
    parts += [f"{name} {t[name]:8.4f} ({t[name] / mine:4.2f}x)" for name in ("eager", "compile") if name in t]
    if not row["ok"]:
        parts.append(
            f"WRONG: error {row['error']:.3g}, eager's {row['eager_error']:.3g} {row.get('gemskit_error', '')}"
        )
    return "  ".join(parts)


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for peer in ("eager", "compile"):
        ratios = _ratios(rows, peer)
        if ratios:
            lines.append(
                f"geometric mean against torch {peer}: {_mean(ratios):.2f}x over {len(ratios)} rows, "
                f"{sum(x < 0.95 for x in ratios)} under 0.95x"
            )
            packages = list(dict.fromkeys(r["package"] for r in rows if "package" in r))
            if len(packages) > 1:
                parts = [(p, _ratios([r for r in rows if r.get("package") == p], peer)) for p in packages]
                lines[-1] += f" ({', '.join(f'{p} {_mean(x):.2f}x of {len(x)}' for p, x in parts if x)})"
    return "\n".join(lines)


def _ratios(rows: Sequence[dict[str, Any]], peer: str) -> list[float]:
    return [r["times"][peer] / r["times"]["gemskit"] for r in rows if {peer, "gemskit"} <= set(r["times"])]


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def render(path: Path) -> None:
    """The Markdown page and the plots of a JSON report."""
    report = json.loads(path.read_text())
    rows = report["rows"]
    facts = {k: report[k] for k in ("machine", "date", "gemskit", "commit", "torch", "triton", "python", "command")}
    facts |= {k: report[k] for k in ("note",) if k in report}
    lines = [
        f"# Benchmarks on {report['machine']}", "", *(f"- {k}: {v}" for k, v in facts.items()),
        f"- roof: copy {report['bandwidth'] / 1e12:.2f} TB/s, bf16 product {report['flops'] / 1e12:.0f} TFLOP/s, same run",
        "", *(f"{line}.\n" for line in _summary(rows).splitlines()),
        f"![speed against torch eager]({path.stem}.svg)", "",
        "Milliseconds (medians, cold L2); ratios are the peer's time over ours, so above 1 gemskit is faster. "
        "Every row was verified against float64 first. Where torch has no such operator, its time is that of the composition "
        "that its users write.", "",
        "| operator | case | dtype | gemskit ms | of roof | torch eager ms | ratio | torch.compile ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        t = r["times"]
        mine = t.get("gemskit")
        cells = [
            f"`{r['op']}`",
            r["label"],
            r["dtype"],
            f"{mine:.4f}" if mine else "failed",
            f"{r['floor'] / mine:.0%}" if mine else "",
        ]
        for peer in ("eager", "compile"):
            cells += [f"{t[peer]:.4f}", f"{t[peer] / mine:.2f}" if mine else ""] if peer in t else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    try:
        plot(path, report)
    except ImportError as e:
        raise MissingExtra('bench: plots need matplotlib: pip install "gemskit[bench]"') from e


def plot(path: Path, report: dict[str, Any]) -> None:
    """Bars of time against torch eager, one a row, coloured by which side is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in report["rows"] if {"gemskit", "eager"} <= set(r["times"])]
    ratios = [r["times"]["eager"] / r["times"]["gemskit"] for r in rows]
    roofs = [r["floor"] / r["times"]["gemskit"] for r in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.2 * len(rows)), sharey=True)
    places = range(len(rows))
    left.barh(places, [x - 1 for x in ratios], left=1, color=["#2a7f62" if x >= 1 else "#c0504d" for x in ratios])
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("torch eager time / gemskit time (right of 1: gemskit is faster)")
    left.set_yticks(places, [f"{r['op']}  {r['label']}" for r in rows], fontsize=7)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_title(f"gemskit {report['gemskit']} on {report['machine']}, {report['date']}", fontsize=10)
    right.barh(places, roofs, color="#4f81bd")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("share of the roof that gemskit reaches")
    for axes in (left, right):
        axes.grid(axis="x", linewidth=0.3)
        axes.set_axisbelow(True)
    figure.tight_layout()
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=110, bbox_inches="tight")
    pyplot.close(figure)
