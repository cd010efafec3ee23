"""``python -m gemskit check``: the conformance checks of every operator on this machine's accelerator."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
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

#: Checks that a process makes before it is given others. All of an operator took 424 s of attention and of 63 processes the
#: 494 that a run took, where the rest would have been done in 280.
PART = 10

#: An operator and the first of some of its checks.
Part = tuple[str, int]


def check_part(part: Part, device: str, interpreted: bool) -> list[dict[str, Any]]:
    """Some checks of one operator, as report rows."""
    import gemskit  # noqa: F401

    (name, first), rows = part, []
    with interpret() if interpreted else contextlib.nullcontext():
        for case in itertools.islice(_conformance.cases(REGISTRY[name]), first, first + PART):
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
    work = functools.partial(check_part, device=device, interpreted=interpreted)
    parts = {n: [(n, k) for k in range(0, len(list(_conformance.cases(REGISTRY[n]))), PART)] for n in names}
    done: dict[Part, list[dict[str, Any]]] = {}
    # The largest operators are those of nn, which are declared last; the pointwise ones are small.
    tasks = sorted((p for n in reversed(names) for p in parts[n]), key=lambda p: REGISTRY[p[0]].family == "pointwise")
    with contextlib.suppress(KeyboardInterrupt):
        for part, rows, error in share(work, tasks, [n % count for n in range(options.jobs)]):
            name = part[0]
            if rows is None or error:
                died = dict(op=name, kind="all", dtype="", layout="", status="failed", detail=error, seconds=0.0)
                rows = [*(rows or ()), died]
            done[part] = rows
            if not all(p in done for p in parts[name]):
                continue
            found[name] = [r for p in parts[name] for r in done[p]]
            print(_line(name, found[name]), flush=True)
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
