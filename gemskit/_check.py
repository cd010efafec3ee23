"""``python -m gemskit check``: the conformance checks of every operator on this machine's accelerator.

Its report is rewritten as checks are made, so that a run that is cut short can be gone on with (--resume).
"""

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gemskit import _conformance, backends
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit._report import environment, goes_on, replace
from gemskit._workers import share

#: Checks that a process makes before it is given others: all those of attention take 424 s where 63 processes take 500.
PART = 10

#: An operator and the first of some of its checks.
Part = tuple[str, int]


def _parts(name: str) -> Iterator[Part]:
    for first in range(0, sum(1 for _ in _conformance.cases(REGISTRY[name])), PART):
        yield name, first


def _cases(part: Part) -> Iterator[_conformance.Case]:
    return itertools.islice(_conformance.cases(REGISTRY[part[0]]), part[1], part[1] + PART)


#: What says in a report which check a row is of.
WHICH = ("op", "kind", "dtype", "layout")


def _which(case: _conformance.Case) -> tuple[str, ...]:
    return case.op, case.kind, str(case.dtype).removeprefix("torch."), case.layout


def check_part(part: Part, device: str, interpreted: bool) -> list[dict[str, Any]]:
    """Some checks of one operator, as report rows."""
    import gemskit  # noqa: F401

    rows = []
    with interpret() if interpreted else contextlib.nullcontext():
        for case in _cases(part):
            start = time.perf_counter()
            known = _conformance.EXPECTED.get(case.name)
            try:
                detail = _conformance.run(case, device)
                status = "passed" if known is None else "unexpected pass"
            except AssertionError as e:
                status, detail = ("failed" if known is None else "expected"), str(e) if known is None else known
            except Exception as e:  # a crash of one check must not hide the others
                status, detail = "failed", "".join(traceback.format_exception_only(e)).strip()
            row: dict[str, Any] = dict(zip(WHICH, _which(case)))
            rows.append({**row, "status": status, "detail": detail, "seconds": round(time.perf_counter() - start, 3)})
    return rows


def main(argv: list[str]) -> int:
    """The command; exit status 1 where a check failed unexplained."""
    parser = argparse.ArgumentParser(prog="python -m gemskit check", description=__doc__)
    parser.add_argument("ops", nargs="*", help="operators to check (default: all)")
    parser.add_argument("--report", type=Path, help="write a JSON report here, and a Markdown table beside it")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes (default: up to 8)")
    parser.add_argument("--resume", action="store_true", help="keep what the report has, and check the others")
    parser.add_argument("--interpret", action="store_true", help="run the kernels on CPU tensors")
    options = parser.parse_args(argv)
    if options.resume and not options.report:
        parser.error("--resume goes on with the report that --report names")
    names = options.ops or [n for n, op in REGISTRY.items() if not op.random]
    unknown = [n for n in names if n not in REGISTRY]
    if unknown:
        parser.error(f"no operator {', '.join(unknown)}; python -m gemskit ops lists them")
    interpreted = options.interpret or backends.vendor.device_type == "cpu"
    device = "cpu" if interpreted else backends.device
    machine = "interpreter" if interpreted else torch.get_device_module(device).get_device_name(0)
    count = 1 if interpreted else torch.accelerator.device_count()
    start = time.perf_counter()
    done: dict[Part, list[dict[str, Any]]] = {}
    parts = {n: list(_parts(n)) for n in names}
    if options.resume and options.report.exists():
        before = json.loads(options.report.read_text())
        goes_on("check", before, environment(machine))
        kept = {tuple(r[k] for k in WHICH): r for r in before["checks"] if r["status"] in ("passed", "expected")}
        for part in itertools.chain(*parts.values()):
            checks = [_which(case) for case in _cases(part)]
            if all(c in kept for c in checks):
                done[part] = [kept[c] for c in checks]
    # The largest operators are those of nn, which are declared last; the pointwise ones are small. First parts come first: those
    # of one operator share kernels, and made at the same time each would compile them (43 % more time in all).
    tasks = sorted(
        (p for n in reversed(names) for p in parts[n] if p not in done),
        key=lambda p: (REGISTRY[p[0]].family == "pointwise", p[1]),
    )
    work = functools.partial(check_part, device=device, interpreted=interpreted)
    written = start
    with contextlib.suppress(KeyboardInterrupt):
        for part, rows, error in share(work, tasks, [n % count for n in range(options.jobs)]):
            name = part[0]
            if rows is None or error:
                died = dict(op=name, kind="all", dtype="", layout="", status="failed", detail=error, seconds=0.0)
                rows = [*(rows or ()), died]
            done[part] = rows
            if all(p in done for p in parts[name]):
                print(_line(name, [r for p in parts[name] for r in done[p]]), flush=True)
            if options.report and time.perf_counter() - written > 1:
                written = time.perf_counter()
                write(options.report, _rows(parts, done), written - start, machine)
    every = _rows(parts, done)
    if options.report:
        write(options.report, every, time.perf_counter() - start, machine)
    failed = [r for r in every if r["status"] in ("failed", "unexpected pass")]
    for r in failed:
        print(f"{r['op']} {r['kind']} {r['dtype']} {r['layout']}: {r['status']}: {r['detail'][:400]}")
    whole = sum(all(p in done for p in parts[n]) for n in names)
    if whole < len(names):
        print(f"cut short: {len(names) - whole} operators were not checked, or in part")
    print(f"{whole} operators, {len(every)} checks in {time.perf_counter() - start:.0f} s: {_counted(every)}")
    return 1 if failed or whole < len(names) else 0


def _rows(parts: Mapping[str, Sequence[Part]], done: Mapping[Part, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [r for some in parts.values() for p in some for r in done.get(p, ())]


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
