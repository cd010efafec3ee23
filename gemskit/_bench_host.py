"""``python -m gemskit bench --host``: what a call costs the host, beside torch eager in the same process.

Inputs are so small that the device waits for the host. Both sides are called alternately, round by round with the order
swapped, and never more often between two synchronisations than the launch queue holds; figures are medians over rounds of
the time per call. Without an accelerator only what CPU tensors cost (the meaning path) and the import are measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gemskit
from gemskit import _native, backends
from gemskit._bench_rows import add_rms_norm, rotate, silu_and_mul
from gemskit._launch import record
from gemskit._op import REGISTRY, Op
from gemskit._report import environment
from gemskit.testing import Make

Args = tuple[tuple[Any, ...], dict[str, Any]]
Step = Callable[[], Any]

#: Launches between two synchronisations: the queue of a CUDA stream holds 1,024, and a full one makes a launch wait.
QUEUE = 800
#: The size that every case starts from; further shapes add multiples of 16, so that Triton's specialisation is the same.
SIZE, GROW = 256, 16
#: What is promised: times torch's (forward; forward and backward), microseconds, seconds and milliseconds.
FORWARD, BACKWARD, NEW_SHAPE_US, MEANING_US = 1.0, 1.3, 100.0, 3.0
COLD_S, COLD_PRODUCT_S, WARM_MS = 1.5, 5.0, 60.0

TABLES = ("forward", "backward", "shapes", "meaning", "import")


@dataclass(frozen=True)
class Case:
    """One row: a public function and what a torch user calls, on inputs that grow with ``n``."""

    name: str
    peer: Callable[..., Any]
    build: Callable[[Make, int], Args]
    note: str = ""
    #: torch has no such function; the peer is what its users write.
    composition: bool = False
    grad: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.note}".strip()

    @property
    def ours(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(gemskit, self.name)
        return found

    @property
    def overwrites(self) -> bool:
        return self.name.endswith("_") or self.note == "out="

    @property
    def op(self) -> Op[..., Any]:
        return REGISTRY[{"max": "max_dim", "var": "_var"}.get(self.name, self.name.rstrip("_"))]

    @property
    def family(self) -> str:
        return self.op.family

    @property
    def is_product(self) -> bool:
        return self.family == "gemm" or self.name == "scaled_dot_product_attention"


def _tensors(*shapes: Callable[[int], tuple[int, ...]], **kwargs: Any) -> Callable[[Make, int], Args]:
    return lambda make, n: (tuple(make(*s(n)) for s in shapes), dict(kwargs))


def _flat_shape(n: int) -> tuple[int, ...]:
    return (n,)


def _rows(n: int) -> tuple[int, ...]:
    return (4, n)


def _tokens(n: int) -> tuple[int, ...]:
    return (n, 64)


def _square(n: int) -> tuple[int, ...]:
    return (64, 64)


def _per_row(tensors: int, vectors: int) -> Callable[[Make, int], Args]:
    return lambda make, n: ((*(make(4, n) for _ in range(tensors)), (n,), *(make(n) for _ in range(vectors))), {})


def cases() -> list[Case]:
    """All rows, family by family."""
    one, two = _tensors(_flat_shape), _tensors(_flat_shape, _flat_shape)
    binary: list[tuple[str, Any, bool]] = [
        ("add", torch.add, True),
        ("sub", torch.sub, False),
        ("mul", torch.mul, True),
        ("div", torch.div, False),
    ]
    unary: list[tuple[str, Any, bool]] = [
        ("exp", torch.exp, True), ("log", torch.log, False), ("neg", torch.neg, False), ("relu", F.relu, True),
        ("silu", F.silu, True), ("gelu", F.gelu, True), ("sigmoid", torch.sigmoid, False), ("tanh", torch.tanh, True),
    ]  # fmt: skip
    positive: Callable[[Make, int], Args] = lambda make, n: ((make(n, low=0.5, high=2.0),), {})
    rows = [Case(name, fn, two, grad=grad) for name, fn, grad in binary]
    rows += [
        Case("add", torch.add, lambda make, n: ((make(n), 2.5), {}), "number"),
        Case("add", torch.add, lambda make, n: ((make(n), make(n)), {"out": make(n)}), "out="),
        Case("add_", torch.Tensor.add_, lambda make, n: ((make(n), make(n)), {})),
        Case("maximum", torch.maximum, two),
        Case("eq", torch.eq, two),
        Case("pow", torch.pow, lambda make, n: ((make(n), 2), {})),
        Case("where", torch.where, lambda make, n: ((make(n, dtype=torch.bool), make(n), make(n)), {})),
        Case("clamp", torch.clamp, lambda make, n: ((make(n), -1.0, 1.0), {})),
    ]
    rows += [Case(name, fn, positive if name == "log" else one, grad=grad) for name, fn, grad in unary]
    rows += [
        Case("sum", torch.sum, _tensors(_rows, dim=1), "dim", grad=True),
        Case("sum", torch.sum, _tensors(_rows), "all"),
        Case("mean", torch.mean, _tensors(_rows, dim=1), grad=True),
        Case("var", torch.var, _tensors(_rows, dim=1)),
        Case("amax", torch.amax, _tensors(_rows, dim=1), grad=True),
        Case("argmax", torch.argmax, _tensors(_rows, dim=1)),
        Case("max", torch.max, _tensors(_rows, dim=1), "dim"),
        Case("cumsum", torch.cumsum, _tensors(_rows, dim=1)),
        Case("mm", torch.mm, _tensors(_tokens, _square), grad=True),
        Case("addmm", torch.addmm, _tensors(lambda n: (64,), _tokens, _square)),
        Case("bmm", torch.bmm, _tensors(lambda n: (2, n, 64), lambda n: (2, 64, 64))),
        Case("linear", F.linear, _tensors(_tokens, _square, lambda n: (64,)), grad=True),
        Case("softmax", torch.softmax, _tensors(_rows, dim=1), grad=True),
        Case("log_softmax", torch.log_softmax, _tensors(_rows, dim=1), grad=True),
        Case("layer_norm", F.layer_norm, _per_row(1, 2), grad=True),
        Case("rms_norm", F.rms_norm, _per_row(1, 1), grad=True),
        Case("embedding", F.embedding, _lookup, grad=True),
        Case("cross_entropy", F.cross_entropy, _classes, grad=True),
        Case(
            "scaled_dot_product_attention", F.scaled_dot_product_attention,
            _tensors(*[lambda n: (1, 2, n, 64)] * 3, is_causal=True), grad=True,
        ),
        Case("fused_add_rms_norm", add_rms_norm, _per_row(2, 1), composition=True, grad=True),
        Case("silu_and_mul", silu_and_mul, _tensors(_rows), composition=True, grad=True),
        Case("apply_rotary_pos_emb", rotate, _rotated, composition=True, grad=True),
    ]  # fmt: skip
    return rows


def _lookup(make: Make, n: int) -> Args:
    return (make(n, dtype=torch.int64, low=0, high=32), make(32, 64)), {}


def _classes(make: Make, n: int) -> Args:
    return (make(4, n), make(4, dtype=torch.int64, low=0, high=n)), {}


def _rotated(make: Make, n: int) -> Args:
    return (make(1, n, 2, 32), make(1, n, 2, 32), make(n, 16), make(n, 16)), {}


# -- timing ---------------------------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if backends.vendor.device_type != "cpu":
        torch.accelerator.synchronize()


def alternate(mine: Step, peer: Step, rounds: int, calls: int) -> tuple[float, float]:
    """Median microseconds per call of both, in rounds that swap the order and synchronise in between."""
    found: tuple[list[float], list[float]] = ([], [])
    for r in range(rounds):
        for side in (0, 1) if r % 2 else (1, 0):
            found[side].append(_one_round(peer if side else mine, calls))
    return statistics.median(found[0]), statistics.median(found[1])


def _one_round(fn: Step, calls: int) -> float:
    synchronise()
    gc.collect(0)
    gc.disable()
    try:
        start = time.perf_counter_ns()
        for _ in repeat(None, calls):
            fn()
        return (time.perf_counter_ns() - start) / calls / 1e3
    finally:
        gc.enable()


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the ATen calls of a scope, backward included."""

    count: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def per_round(mine: Step, peer: Step, most: int) -> int:
    """Calls of a round, so that neither side fills the launch queue: two launches for every ATen call are assumed."""
    with record() as launched:
        mine()
    with _Dispatched() as dispatched:
        peer()
    busiest: int = max(1, len(launched), 2 * dispatched.count)
    return max(1, min(most, QUEUE // busiest))


def _flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _copied(args: Args) -> Args:
    """Arguments of their own, for calls that overwrite them; ``requires_grad`` is kept."""

    def copy(v: Any) -> Any:
        return v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    return tuple(map(copy, args[0])), {k: copy(v) for k, v in args[1].items()}


def bound(fn: Callable[..., Any], args: Args) -> Step:
    """``fn`` with its arguments: the same small wrapper for both sides."""
    (a, k) = args
    return (lambda: fn(*a, **k)) if k else (lambda: fn(*a))


def _differentiated(fn: Callable[..., Any], args: Args, op: Op[..., Any]) -> Step:
    """Forward and backward with a given incoming gradient, to every input that ``op`` has a gradient for."""
    named = [(n, t) for n, t in zip(op.params, args[0]) if isinstance(t, Tensor) and t.is_floating_point()]
    leaves = [t.requires_grad_() for n, t in named if n in op.differentiable]
    forward = bound(fn, args)
    grads = [torch.ones_like(o) for o in _flat(forward())]

    def step() -> Any:
        found = forward()
        return torch.autograd.grad(found, leaves, grads if isinstance(found, tuple) else grads[0])

    return step


def prepared(case: Case, device: str, n: int, backward: bool = False) -> tuple[Step, Step]:
    """Both sides on equal inputs, each checked against the other once and called three times."""
    args = case.build(Make(torch.float32, device=device), n)
    other = _copied(args)
    if backward:
        mine, peer = _differentiated(case.ours, args, case.op), _differentiated(case.peer, other, case.op)
    else:
        mine, peer = bound(case.ours, args), bound(case.peer, other)
    for got, want in zip(_flat(mine()), _flat(peer()), strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-3, atol=1e-3)
    for _ in range(3):
        mine()
        peer()
    synchronise()
    return mine, peer


# -- tables ---------------------------------------------------------------------------------------------------------------


def _row(case: Case, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row; where gemskit fails or differs from torch it says so and is not timed."""
    row: dict[str, Any] = {"op": case.label, "family": case.family, "composition": case.composition, "error": ""}
    try:
        row.update(measure())
    except (AssertionError, RuntimeError, ValueError, TypeError) as e:
        row["error"] = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    return row


def against_torch(case: Case, rounds: int, calls: int, backward: bool) -> dict[str, Any]:
    """Host time per call, forward or forward and backward."""

    def measure() -> dict[str, Any]:
        mine, peer = prepared(case, backends.device, SIZE, backward)
        count = per_round(mine, peer, calls)
        ours, torchs = alternate(mine, peer, rounds, count)
        return {"us": ours, "torch_us": torchs, "ratio": ours / torchs, "calls": count}

    return _row(case, measure)


def new_shapes(case: Case, shapes: int = 12) -> dict[str, Any]:
    """The first call of shapes never seen, of kernels that are compiled: sizes grow by multiples of 16."""

    def measure() -> dict[str, Any]:
        times = []
        # Sizes that no other table uses, all below 512, where the tile of a row would grow and be compiled.
        for k in range(shapes + 3):
            n = SIZE + GROW * (k + 1)
            args = case.build(Make(torch.float32, device=backends.device, seed=k), n)
            step = bound(case.ours, args)
            us = _one_round(step, 1)
            # The first three warm kernels for both roundings of a tile.
            if k >= 3:
                times.append(us)
        return {"us": statistics.median(times), "worst_us": max(times)}

    return _row(case, measure)


def meaning(case: Case, rounds: int, calls: int) -> dict[str, Any]:
    """CPU tensors: what our call takes beyond the torch call that it makes."""

    def measure() -> dict[str, Any]:
        mine, peer = prepared(case, "cpu", 16)
        ours, torchs = alternate(mine, peer, rounds, calls)
        return {"us": ours, "torch_us": torchs, "overhead_us": ours - torchs}

    return _row(case, measure)


def _child(code: str, **env: str) -> dict[str, Any]:
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, check=False, timeout=300
    )
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def first(label: str) -> None:
    """In a process of its own: seconds of the very first call, once the device, torch and the compiler are awake."""
    case = next(c for c in cases() if c.label == label)
    torch.empty(1, device=backends.device)
    square = torch.ones(16, 16, device=backends.device)
    torch.mm(square, square)
    (gemskit.exp if case.name != "exp" else gemskit.neg)(square)
    step = bound(case.ours, case.build(Make(torch.float32, device=backends.device), SIZE))
    synchronise()
    start = time.perf_counter()
    step()
    returned = time.perf_counter() - start
    synchronise()
    print(json.dumps({"returned": returned, "seconds": time.perf_counter() - start}))


def first_call(case: Case) -> dict[str, Any]:
    """Two fresh processes that share a new Triton cache: the first compiles, the second loads."""

    def measure() -> dict[str, Any]:
        code = f"from gemskit._bench_host import first; first({case.label!r})"
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = (_child(code, TRITON_CACHE_DIR=folder)["seconds"] for _ in range(2))
        return {"cold_s": cold, "warm_ms": warm * 1e3, "bar_s": COLD_PRODUCT_S if case.is_product else COLD_S}

    return _row(case, measure)


_IMPORT = """
import json, os, time
import torch
def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before, start = rss(), time.perf_counter()
import gemskit
print(json.dumps({"ms": (time.perf_counter() - start) * 1e3, "mib": rss() - before}))
"""


def import_cost(runs: int = 5) -> dict[str, float]:
    """Milliseconds and MiB of ``import gemskit`` (with triton) after ``import torch``: medians over fresh processes."""
    found = [_child(_IMPORT) for _ in range(runs)]
    return {key: statistics.median(f[key] for f in found) for key in ("ms", "mib")}


def launcher() -> str:
    """Which launcher serves calls: the native one says so itself."""
    # Not the file: where it lies says nothing to others.
    return _native.status().partition(" (/")[0]


def settle() -> None:
    """Build the native launcher where it is not there yet: it would take the host's time, and serve from then on."""
    _native.load(wait=True)
    gemskit.neg(torch.ones(1, device=backends.device))


# -- the report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """How a table is shown: its columns, and what in a row is held against a bar."""

    title: str
    said: str
    columns: tuple[tuple[str, str, str], ...]
    over: Callable[[dict[str, Any]], bool]
    worst: str


_BOTH = (("us", "gemskit us", ".2f"), ("torch_us", "torch us", ".2f"))
_RATIO = (*_BOTH, ("ratio", "gemskit / torch", ".2f"), ("calls", "calls a round", "d"))
SHOWN = {
    "forward": Table(
        "Forward", f"Host microseconds per call; the bar is {FORWARD:g}x torch eager.", _RATIO,
        lambda r: r["ratio"] > FORWARD, "ratio",
    ),
    "backward": Table(
        "Forward and backward",
        f"Host microseconds of a call and `torch.autograd.grad` with a given gradient; the bar is {BACKWARD:g}x torch eager.",
        _RATIO, lambda r: r["ratio"] > BACKWARD, "ratio",
    ),
    "shapes": Table(
        "First call of a new shape", f"Kernels are compiled, the shape is new; the bar is {NEW_SHAPE_US:g} us.",
        (("us", "median us", ".1f"), ("worst_us", "worst us", ".1f")), lambda r: r["us"] > NEW_SHAPE_US, "us",
    ),
    "meaning": Table(
        "CPU tensors",
        f"The meaning in plain torch; what gemskit adds to the torch call has a bar of {MEANING_US:g} us.",
        (*_BOTH, ("overhead_us", "overhead us", ".2f")), lambda r: r["overhead_us"] > MEANING_US, "overhead_us",
    ),
    "first": Table(
        "Very first call",
        "A fresh process each, call and synchronisation, nothing subtracted; before it the device was initialised and torch and "
        "another gemskit operator had launched. Cold: an empty Triton cache. Warm: a second process with the same cache. "
        f"The bars are {COLD_S:g} s cold ({COLD_PRODUCT_S:g} s for products and attention) and {WARM_MS:g} ms warm.",
        (("cold_s", "cold s", ".2f"), ("warm_ms", "warm ms", ".1f"), ("bar_s", "cold bar s", "g")),
        lambda r: r["cold_s"] > r["bar_s"] or r["warm_ms"] > WARM_MS, "cold_s",
    ),
}  # fmt: skip


def summary(key: str, rows: Sequence[dict[str, Any]]) -> str:
    """One line: the geometric mean (compositions apart), the worst row, and how many are over the bar."""
    table = SHOWN[key]
    good = [r for r in rows if not r["error"]]
    parts = []
    for name, some in (
        ("geometric mean", [r for r in good if not r["composition"]]),
        ("compositions", [r for r in good if r["composition"]]),
    ):
        if some and "ratio" in some[0]:
            parts.append(f"{name} {geomean(r['ratio'] for r in some):.2f}x torch over {len(some)} rows")
    counted = [r for r in good if not r["composition"]] or good
    if counted:
        bad = max(counted, key=lambda r: float(r[table.worst]))
        parts.append(f"worst {table.worst} {bad[table.worst]:.2f} ({bad['op']})")
    parts.append(f"{sum(map(table.over, good))} of {len(good)} over the bar")
    if len(good) < len(rows):
        parts.append(f"{len(rows) - len(good)} FAILED")
    return f"{table.title}: " + ", ".join(parts)


def geomean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def markdown(key: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table; compositions stand last and are marked, what is over its bar is marked."""
    table = SHOWN[key]
    lines = [f"## {table.title}", "", table.said, "", f"{summary(key, rows)}.", ""]
    lines.append("| operator | " + " | ".join(c[1] for c in table.columns) + " | |")
    lines.append("|---" * (len(table.columns) + 2) + "|")
    for r in sorted(rows, key=lambda r: r["composition"]):
        notes = ["composition"] if r["composition"] else []
        if r["error"]:
            cells = [""] * len(table.columns)
            notes.append(f"FAILED: {r['error']}".replace("|", "/"))
        else:
            cells = [format(r[name], form) for name, _, form in table.columns]
            notes += ["over the bar"] if table.over(r) else []
        lines.append(f"| {r['op']} | " + " | ".join(cells) + f" | {', '.join(notes)} |")
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any]) -> str:
    """The Markdown report."""
    facts = {k: v for k, v in report.items() if not isinstance(v, (dict, list))}
    lines = [f"# Host time on {report['machine']}", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    if cost := report.get("import"):
        lines += [f"- import: {cost['ms']:.0f} ms and {cost['mib']:.0f} MiB beyond `import torch` (medians)", ""]
    return "\n".join(lines) + "\n" + "\n".join(markdown(k, report[k]) for k in SHOWN if k in report)


def main(argv: list[str]) -> int:
    """The command; exit status 1 where a row failed or is wrong."""
    parser = argparse.ArgumentParser(prog="python -m gemskit bench --host", description=__doc__)
    parser.add_argument("ops", nargs="*", help="functions to time (default: all)")
    parser.add_argument("--report", type=Path, help="write JSON here, and a Markdown page beside it")
    parser.add_argument("--rounds", type=int, default=31, help="rounds of each side (default: 31)")
    parser.add_argument(
        "--calls", type=int, default=200, help="calls a round, fewer if they launch much (default: 200)"
    )
    parser.add_argument("--tables", default=",".join(TABLES), help=f"some of {','.join(TABLES)} (default: all)")
    parser.add_argument("--first-call", action="store_true", help="also time the very first call, two processes a row")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time for --first-call (default: 1)")
    options = parser.parse_args(argv)
    wanted = options.tables.split(",")
    if strays := [t for t in wanted if t not in TABLES]:
        parser.error(f"no table {', '.join(strays)}; there are {', '.join(TABLES)}")
    chosen = [c for c in cases() if not options.ops or c.name in options.ops]
    if not chosen or (strays := sorted(set(options.ops) - {c.name for c in chosen})):
        parser.error(f"no row for {', '.join(strays or options.ops)}; there are {', '.join(c.name for c in cases())}")
    gpu = backends.vendor.device_type != "cpu"
    machine = torch.get_device_module(backends.device).get_device_name(0) if gpu else "CPU"
    report: dict[str, Any] = environment(machine)
    rounds, calls = options.rounds, options.calls
    if gpu:
        settle()
    served = [launcher()]

    def table(key: str, rows: Iterable[dict[str, Any]]) -> None:
        report[key] = list(rows)
        print(markdown(key, report[key]), flush=True)

    if gpu and "forward" in wanted:
        table("forward", (against_torch(c, rounds, calls, False) for c in chosen))
    if gpu and "backward" in wanted:
        table("backward", (against_torch(c, rounds, calls, True) for c in chosen if c.grad))
    if gpu and "shapes" in wanted:
        table("shapes", map(new_shapes, (c for c in chosen if not c.overwrites)))
    # An in-place call or out= is a torch call and a copy on CPU tensors: its difference is not the overhead.
    plain = [c for c in chosen if not c.overwrites and not c.composition]
    if "meaning" in wanted and plain:
        table("meaning", (meaning(c, rounds, calls) for c in plain))
    if gpu and options.first_call:
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            table("first", pool.map(first_call, (c for c in chosen if not c.overwrites)))
    if "import" in wanted:
        report["import"] = import_cost()
        print(f"import: {report['import']['ms']:.0f} ms and {report['import']['mib']:.0f} MiB beyond import torch")
    # Twice: one that is built in the background may have taken over on the way.
    served.append(launcher())
    report["launcher"] = ", then ".join(dict.fromkeys(served))
    print(f"launcher: {report['launcher']}" + ("" if gpu else "; no accelerator: only the tables of CPU tensors"))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=0) + "\n")
        options.report.with_suffix(".md").write_text(page(report))
    return int(any(r["error"] for k in SHOWN for r in report.get(k, ())))
