"""``python -m gemskit check``: the conformance checks of every operator on this machine's accelerator."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemskit import _conformance, backends
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit._report import environment, replace
from gemskit._workers import share


def check_op(name: str, device: str, interpreted: bool) -> list[dict[str, Any]]:
    """All checks of one operator, as report rows."""
    import gemskit  # noqa: F401

    rows = []
    with interpret() if interpreted else contextlib.nullcontext():
        for case in _conformance.cases(REGISTRY[name]):
            start = time.perf_counter()
            known = _conformance.EXPECTED.get(case.name)
            try:
                detail = _conformance.run(case, device)
                status = "passed" if known is None else "unexpected pass"
            except AssertionError as e:
                status, detail = ("failed" if known is None else "expected"), str(e) if known is None else known
            except Exception as e:  # a crash of one check must not hide the others
                status, detail = "failed", "".join(traceback.format_exception_only(e)).strip()
            rows.append(
                dict(op=name, kind=case.kind, dtype=str(case.dtype).removeprefix("torch."), layout=case.layout, status=status,
                     detail=detail, seconds=round(time.perf_counter() - start, 3))
            )  # fmt: skip
    return rows


def main(argv: list[str]) -> int:
    """The command; exit status 1 where a check failed unexplained."""
    parser = argparse.ArgumentParser(prog="python -m gemskit check", description=__doc__)
    parser.add_argument("ops", nargs="*", help="operators to check (default: all)")
    parser.add_argument("--report", type=Path, help="write a JSON report here, and a Markdown table beside it")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes (default: up to 8)")
    parser.add_argument("--interpret", action="store_true", help="run the kernels on CPU tensors")
    options = parser.parse_args(argv)
    names = options.ops or [n for n, op in REGISTRY.items() if not op.random]
    unknown = [n for n in names if n not in REGISTRY]
    if unknown:
        parser.error(f"no operator {', '.join(unknown)}; python -m gemskit ops lists them")
    interpreted = options.interpret or backends.vendor.device_type == "cpu"
    device = "cpu" if interpreted else backends.device
    machine = "interpreter" if interpreted else torch.get_device_module(device).get_device_name(0)
    count = 1 if interpreted else torch.accelerator.device_count()
    start = time.perf_counter()
    found: dict[str, list[dict[str, Any]]] = {}
    work = functools.partial(check_op, device=device, interpreted=interpreted)
    # The largest operators last would leave one process alone with them.
    tasks = sorted(names, key=lambda n: REGISTRY[n].family == "pointwise")
    with contextlib.suppress(KeyboardInterrupt):
        for name, rows, error in share(work, tasks, [n % count for n in range(options.jobs)]):
            if rows is None or error:
                died = dict(op=name, kind="all", dtype="", layout="", status="failed", detail=error, seconds=0.0)
                rows = [*(rows or ()), died]
            found[name] = rows
            print(_line(name, rows), flush=True)
            if options.report:
                # After every operator, so that a run that is cut short leaves what it has found.
                write(
                    options.report, [r for n in names for r in found.get(n, ())], time.perf_counter() - start, machine
                )
    every = [r for n in names for r in found.get(n, ())]
    failed = [r for r in every if r["status"] in ("failed", "unexpected pass")]
    for r in failed:
        print(f"{r['op']} {r['kind']} {r['dtype']} {r['layout']}: {r['status']}: {r['detail'][:400]}")
    if len(found) < len(names):
        print(f"cut short: {len(names) - len(found)} operators were not checked")
    print(f"{len(found)} operators, {len(every)} checks in {time.perf_counter() - start:.0f} s: {_counted(every)}")
    return 1 if failed or len(found) < len(names) else 0


def _counted(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{n} {s}" for s, n in Counter(r["status"] for r in rows).items())


def _line(name: str, rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(r["status"] for r in rows)
    return f"{name:32} " + "  ".join(f"{n} {s}" for s, n in counts.items())


def write(path: Path, rows: Sequence[dict[str, Any]], took: float, machine: str) -> None:
    """The JSON report, and the same as a Markdown page."""
    counts = Counter(r["status"] for r in rows)
    facts = environment(machine)
    replace(path, json.dumps(dict(**facts, seconds=round(took), counts=counts, checks=rows), indent=0) + "\n")
    ops: dict[str, dict[str, Counter[str]]] = {}
    for r in rows:
        column = r["kind"] if r["kind"] != "forward" or r["layout"] != "contiguous" else r["dtype"]
        column = "layouts" if r["kind"] == "forward" and r["layout"] != "contiguous" else column
        ops.setdefault(r["op"], {}).setdefault(column, Counter())[r["status"]] += 1
    columns = list(dict.fromkeys(c for o in ops.values() for c in o))
    lines = [
        f"# Conformance on {machine}", "",
        f"{len(ops)} operators, {len(rows)} checks: {_counted(rows)}.",
        "", *(f"- {k}: {v}" for k, v in facts.items()), "",
        "A cell says how many checks passed of how many; the [contract](../index.md#the-contract) says what each is. "
        "A dtype that torch refuses passes by being refused here too; the JSON report says where.", "",
        "| operator | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|",
    ]  # fmt: skip
    for name, found in ops.items():
        cells = [f"{c['passed'] + c['expected']}/{c.total()}" if (c := found.get(k)) else "" for k in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    replace(path.with_suffix(".md"), "\n".join(lines) + "\n")
