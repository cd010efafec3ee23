"""The command ``check``: its report, whole, cut short and gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemskit import _check, _workers
from gemskit.errors import ArgumentError


def share(work: Any, tasks: Any, devices: Any) -> Iterator[Any]:
    """As `_workers.share`, in this process."""
    for task in tasks:
        yield task, work(task), ""


def test_a_report_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(_check, "share", share)
    report = tmp_path / "check.json"
    command = ["--interpret", "relu", "silu", "--report", str(report)]

    def cut(work: Any, tasks: Any, devices: Any) -> Iterator[Any]:
        yield from share(work, tasks[:3], devices)
        raise KeyboardInterrupt

    with monkeypatch.context() as short:
        short.setattr(_check, "share", cut)
        assert _check.main(command) == 1
    assert "cut short: 2 operators were not checked, or in part" in capsys.readouterr().out
    before = json.loads(report.read_text())
    assert 0 < len(before["checks"]) <= 3 * _check.PART

    made: list[Any] = []

    def counted(work: Any, tasks: Any, devices: Any) -> Iterator[Any]:
        made.extend(tasks)
        yield from share(work, tasks, devices)

    monkeypatch.setattr(_check, "share", counted)
    # What failed is checked again.
    before["checks"][0]["status"] = "failed"
    report.write_text(json.dumps(before))
    assert _check.main([*command, "--resume"]) == 0
    whole = json.loads(report.read_text())["checks"]
    checks = [tuple(r[k] for k in _check.WHICH) for r in whole]
    assert len(set(checks)) == len(checks) and {r["op"] for r in whole} == {"relu", "silu"}
    assert all(r["status"] == "passed" for r in whole)
    parts = [p for name in ("relu", "silu") for p in _check._parts(name)]
    assert len(made) == len(parts) - 2 and [c[0] for c in checks] == sorted(c[0] for c in checks)
    assert "| relu | 1/1 |" in report.with_suffix(".md").read_text()

    monkeypatch.setenv("GEMSKIT_COMMIT", "another")
    with pytest.raises(ArgumentError, match="another"):
        _check.main([*command, "--resume"])
    with pytest.raises(SystemExit):
        _check.main(["relu", "--resume"])


def test_a_process_that_dies_fails_its_checks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def dies(work: Any, tasks: Any, devices: Any) -> Iterator[Any]:
        for n, task in enumerate(tasks):
            yield (task, None, "its process ended with status -11") if n == 1 else (task, work(task), "")

    monkeypatch.setattr(_check, "share", dies)
    assert _check.main(["--interpret", "relu"]) == 1
    assert "relu all  : failed: its process ended with status -11" in capsys.readouterr().out


def test_processes_share_the_parts() -> None:
    parts = list(_check._parts("relu"))
    assert [first for _, first in parts] == list(range(0, len(parts) * _check.PART, _check.PART))
    assert _check.share is _workers.share
