"""The public API as type checkers see it: results are typed, and planted mistakes are found."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemskit  # noqa: F401
from gemskit._op import REGISTRY

ROOT = Path(__file__).parents[1]
PROBE = ROOT / "tests" / "typing_probe.py"
MARKED = {number for number, line in enumerate(PROBE.read_text().splitlines(), 1) if "  # error: " in line}


def _run(module: str, *arguments: str) -> str:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-m", module, *arguments, str(PROBE)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout


def _check(found: dict[int, str]) -> None:
    assert len(MARKED) >= 10
    missed = MARKED - set(found)
    assert not missed, f"mistakes that were not found, in the lines {sorted(missed)}"
    wrong = {line: text for line, text in found.items() if line not in MARKED}
    assert not wrong, f"complaints about correct lines: {wrong}"


def test_mypy() -> None:
    # Only the probe: the package itself is another gate.
    text = _run("mypy", "--strict", "--follow-imports=silent", "--no-error-summary")
    _check({int(m[1]): m[0] for m in re.finditer(r"typing_probe\.py:(\d+): error: .*", text)})


def test_basedpyright() -> None:
    report = json.loads(_run("basedpyright", "--outputjson", "--pythonpath", sys.executable))["generalDiagnostics"]
    errors = [d for d in report if d["severity"] == "error"]
    _check({d["range"]["start"]["line"] + 1: d["message"] for d in errors})


@pytest.mark.parametrize("name", list(REGISTRY))
def test_signatures_are_annotated(name: str) -> None:
    signature = inspect.signature(REGISTRY[name].meaning)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare, f"{name}: no annotation on {bare}"
    assert signature.return_annotation is not signature.empty, f"{name}: no annotation on the result"
