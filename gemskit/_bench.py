"""``python -m gemskit bench``: verify, then time operators against torch eager and torch.compile, beside the roofline.

Rows are shared over the devices, one process each; a row is timed in one process, which measured the roof of its device. The
report is rewritten after every row, so that a run that is cut short can be drawn (--render) or gone on with (--resume).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gemskit import _bench_cases, _bench_report, backends
from gemskit._bench_cases import BenchCase
from gemskit._bench_reasons import reason
from gemskit._bench_run import Roof, family, identity, package, public, time_case
from gemskit._op import REGISTRY
from gemskit._report import environment, goes_on, replace
from gemskit._warmup import warmup
from gemskit._workers import share
from gemskit.errors import DeviceError
from gemskit.testing import Make


def main(argv: list[str]) -> int:
    """The command."""
    if "--host" in argv:
        from gemskit._bench_host import main as host

        return host([a for a in argv if a != "--host"])
    if "--model" in argv:
        from gemskit._bench_model import main as model

        return model([a for a in argv if a != "--model"])
    options = _options(argv)
    if options.render:
        _bench_report.render(options.render)
        return 0
    if backends.vendor.device_type == "cpu":
        raise DeviceError(
            "bench: times kernels on an accelerator, and none was found; python -m gemskit info says what was"
        )
    start = time.perf_counter()
    cases: dict[int, BenchCase] = options.cases
    report: dict[str, Any] = environment(torch.get_device_module(backends.device).get_device_name(0))
    rows: dict[int, dict[str, Any]] = {}
    seen: set[int] = set()
    if options.resume and options.report.exists():
        rows = _resumed(json.loads(options.report.read_text()), report, cases)
        print(f"{len(rows)} of {len(cases)} rows are in the report")
    todo = [n for n in cases if n not in rows]
    if options.jobs > 1 and todo:
        done = warmup(_calls(cases[n] for n in todo), jobs=options.jobs, gradients=False)
        print(f"{str(done).splitlines()[0]}; {len(done.not_warmed)} calls not warmed", flush=True)
    devices = options.devices[: max(1, len(todo))]
    tasks = [(n, _compiled(cases[n], options.no_compile)) for n in todo]
    try:
        for (n, _), found, error in share(_one, tasks, devices):
            if found is None:
                found = dict(**_known(cases[n]), times={}, ok=False, gemskit_error=error[:300])
            elif found["device"] not in seen:
                seen.add(found["device"])
                print(f"device {found['device']}: {Roof(*found['roof'])}")
            rows[n] = found
            print(_bench_report.line(found), flush=True)
            if options.report:
                report.update(seconds=round(time.perf_counter() - start), planned=len(cases))
                _write(options.report, report, [rows[n] for n in sorted(rows)])
    except KeyboardInterrupt:
        print(f"cut short after {len(rows)} of {len(cases)} rows")
    whole = [rows[n] for n in sorted(rows)]
    print(_bench_report.summary(whole))
    for row, ratio in _bench_report.slower(whole):
        why = reason(row["op"], row["label"]) or "unexplained"
        print(f"{ratio:.2f}x eager: {row['op']} {row['label']}: {why}")
    print(f"{len(todo)} rows on {len(devices)} devices in {time.perf_counter() - start:.0f} s", flush=True)
    if options.report and whole:
        _bench_report.render(options.report)
    return 0 if len(whole) == len(cases) and all(r["ok"] for r in whole) else 1


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gemskit bench", description=__doc__)
    parser.add_argument("ops", nargs="*", help="operators to time (default: all)")
    parser.add_argument("--report", type=Path, help="write JSON here; a Markdown table and SVG and PNG plots beside it")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the report has, and time the others")
    parser.add_argument("--render", type=Path, help="only draw the table and plots of an existing JSON report")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1,
        help="processes that compile kernels before the first row (default: the CPUs)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", default="1", help="accelerators that share the rows: all, or how many (default: 1)"
    )
    parser.add_argument(
        "--no-compile", nargs="*", metavar="PACKAGE", help="leave torch.compile out (of the rows of these packages)"
    )
    parser.add_argument("--host", action="store_true", help="time the host instead; --host --help tells its options")
    parser.add_argument("--model", action="store_true", help="time a model instead; --model --help tells its options")
    options = parser.parse_args(argv)
    if options.resume and not options.report:
        parser.error("--resume goes on with the report that --report names")
    every = dict(enumerate(_bench_cases.cases()))
    options.cases = {n: c for n, c in every.items() if not options.ops or {c.op, public(c.op)} & {*options.ops}}
    if not options.cases:
        known = sorted({public(c.op) for c in every.values()})
        parser.error(f"no benchmark for {', '.join(options.ops)}; there are {', '.join(known)}")
    if options.devices != "all" and not options.devices.isdecimal():
        parser.error(f"--devices takes all or a number, not {options.devices!r}")
    count = 1 if backends.vendor.device_type == "cpu" else torch.accelerator.device_count()
    options.devices = list(range(count))[: None if options.devices == "all" else max(1, int(options.devices))]
    return options


def _known(case: BenchCase) -> dict[str, Any]:
    """What a row says even if its process died."""
    op = REGISTRY[case.op]
    return dict(**identity(case), package=package(op), family=family(op))


def _compiled(case: BenchCase, left_out: Sequence[str] | None) -> bool:
    """Whether torch.compile is timed: ``--no-compile`` alone leaves it out everywhere."""
    if not case.compiled:
        return False
    return left_out is None or (bool(left_out) and package(REGISTRY[case.op]) not in left_out)


def _calls(cases: Iterator[BenchCase]) -> Iterator[tuple[Any, ...]]:
    """What the rows call, for `warmup`; what tells a row to have gradients is that its tensors require them."""
    for case in cases:
        sample = case.build(Make(case.dtype, device="meta", empty=True))
        for t in (*sample.args, *sample.kwargs.values()):
            if case.backward and isinstance(t, torch.Tensor) and t.is_floating_point():
                t.requires_grad_()
        yield REGISTRY[case.op], sample.args, sample.kwargs


# -- in the processes ------------------------------------------------------------------------------------------------------


@functools.cache
def _prepared() -> tuple[list[BenchCase], Roof]:
    """Once a process."""
    return list(_bench_cases.cases()), Roof.measure()


def _one(task: tuple[int, bool]) -> dict[str, Any]:
    """The row, with the device and its roof."""
    number, compiled = task
    cases, roof = _prepared()
    row = time_case(cases[number], roof, compiled)
    return row | dict(device=torch.accelerator.current_device_index(), roof=(roof.bandwidth, roof.flops))


# -- the report ------------------------------------------------------------------------------------------------------------


def _resumed(before: dict[str, Any], now: dict[str, Any], cases: dict[int, BenchCase]) -> dict[int, dict[str, Any]]:
    """The rows of a report that need not be timed again."""
    goes_on("bench", before, now)
    found: dict[int, dict[str, Any]] = {}
    for n, case in cases.items():
        which = identity(case).items()
        row = next((r for r in before["rows"] if r["ok"] and which <= r.items()), None)
        if row is not None:
            found[n] = row
    return found


def _write(path: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The report so far, whole at any time."""
    roofs = sorted({tuple(r["roof"]) for r in rows if "roof" in r}) or [(math.nan, math.nan)]
    bandwidth, flops = (statistics.median(column) for column in zip(*roofs))
    devices = len({r["device"] for r in rows if "device" in r})
    facts = {**report, "devices": devices, "bandwidth": bandwidth, "flops": flops, "roofs": roofs}
    replace(path, json.dumps({**facts, "rows": rows}, indent=0) + "\n")
