"""The benchmark of host time: what it measures, how it counts, and that it runs without an accelerator."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gemskit
from gemskit import _bench, _bench_host, backends
from gemskit._bench_host import Case

CASES = _bench_host.cases()
QUICK = ["--rounds", "2", "--calls", "3", "--tables", "meaning"]


def _case(label: str) -> Case:
    return next(c for c in CASES if c.label == label)


def test_cases_cover_the_library() -> None:
    assert len({c.name for c in CASES}) >= 30 and len({c.label for c in CASES}) == len(CASES)
    assert {"pointwise", "reduction", "scan", "gemm", "rowwise", "free"} <= {c.family for c in CASES}
    assert sum(c.grad for c in CASES) >= 10
    assert sum(c.composition for c in CASES) == 3


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_both_sides_agree(case: Case) -> None:
    """Each side on inputs of its own, for all sizes of the shape table."""
    for n in (_bench_host.SIZE, _bench_host.SIZE + _bench_host.GROW):
        _bench_host.prepared(case, "cpu", n)
    if case.grad:
        _bench_host.prepared(case, "cpu", 32, backward=True)


@pytest.mark.parametrize("label", ["add_", "apply_rotary_pos_emb", "max dim", "cross_entropy"])
def test_kernels_pass_through_the_tables(label: str) -> None:
    """With kernels interpreted on CPU tensors: each table has a row without an error."""
    if backends.vendor.device_type != "cpu":
        pytest.skip("the benchmark itself runs it on an accelerator")
    case = _case(label)
    with gemskit.interpret():
        rows = {"forward": _bench_host.against_torch(case, 1, 1, False), "shapes": _bench_host.new_shapes(case, 1)}
        if case.grad:
            rows["backward"] = _bench_host.against_torch(case, 1, 1, True)
    for key, row in rows.items():
        assert row["error"] == "" and row["us"] > 0
        assert f"| {label} |" in _bench_host.markdown(key, [row])


def test_a_wrong_result_is_not_timed() -> None:
    wrong = dataclasses.replace(_case("add"), peer=torch.sub)
    row = _bench_host.meaning(wrong, 1, 1)
    assert "AssertionError" in row["error"] and "us" not in row
    text = _bench_host.markdown("meaning", [row, _bench_host.meaning(_case("mul"), 1, 1)])
    assert "1 FAILED" in text and "| add |" in text and "of 1 over the bar" in text


def test_rounds_alternate_and_swap() -> None:
    order: list[str] = []
    _bench_host.alternate(lambda: order.append("o"), lambda: order.append("t"), 4, 2)
    assert "".join(order) in ("ttoo" + "oott" + "ttoo" + "oott", "oott" + "ttoo" + "oott" + "ttoo")


def test_time_is_per_call() -> None:
    mine, peer = _bench_host.alternate(lambda: time.sleep(0.004), lambda: time.sleep(0.001), 3, 5)
    assert 4000 <= mine and 1000 <= peer < mine


def test_the_launch_queue_stays_below_its_limit() -> None:
    x = torch.ones(3)

    def many() -> None:
        for _ in range(100):
            torch.add(x, x)

    assert _bench_host.per_round(lambda: None, lambda: None, 200) == 200
    assert _bench_host.per_round(lambda: None, many, 200) == _bench_host.QUEUE // 200
    assert _bench_host.per_round(lambda: [gemskit.add(x, x) for _ in range(100)], lambda: None, 200) == 8


def test_the_backward_is_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    forward = _bench_host._Dispatched()
    with forward:
        y = torch.tanh(x)
    both = _bench_host._Dispatched()
    with both:
        torch.autograd.grad(torch.tanh(x), x, torch.ones_like(y))
    assert both.count > forward.count + 1


def _numbers(op: str, ratio: float, composition: bool = False) -> dict[str, Any]:
    return {
        "op": op, "family": "free", "composition": composition, "error": "", "us": ratio * 5, "torch_us": 5.0,
        "ratio": ratio, "calls": 200,
    }  # fmt: skip


def test_compositions_stand_apart() -> None:
    rows = [_numbers("a", 0.5), _numbers("c", 9.0, True), _numbers("b", 2.0)]
    line = _bench_host.summary("forward", rows)
    assert "geometric mean 1.00x torch over 2 rows" in line and "compositions 9.00x torch over 1 rows" in line
    assert "worst ratio 2.00 (b)" in line and "2 of 3 over the bar" in line
    assert _bench_host.markdown("forward", rows).rstrip().splitlines()[-1].startswith("| c |")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "sub" / "host.json"
    assert _bench.main(["--host", "add", "softmax", "silu_and_mul", *QUICK, "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert "| add |" in out and "| softmax |" in out and "silu_and_mul" not in out and "launcher: " in out
    found = json.loads(report.read_text())
    assert {"machine", "date", "commit", "command", "torch", "triton", "launcher", "meaning"} <= set(found)
    assert [r["op"] for r in found["meaning"]] == ["add", "add number", "softmax"]
    page = report.with_suffix(".md").read_text()
    assert "## CPU tensors" in page and f"- commit: {found['commit']}" in page


@pytest.mark.parametrize("argv", [["frob"], ["add", "frob"], ["--tables", "frob"]])
def test_command_names_what_it_does_not_know(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _bench_host.main(argv)
    assert "frob" in capsys.readouterr().err


def test_the_launcher_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(_bench_host._native, "load", lambda wait=False: waited.append(wait))
    monkeypatch.setattr(_bench_host._native, "status", lambda: "native (/a/file.so)")
    _bench_host.settle()
    assert waited == [True] and _bench_host.launcher() == "native"


def test_import_cost() -> None:
    cost = _bench_host.import_cost(1)
    assert 0 < cost["ms"] < 60_000 and 0 < cost["mib"] < 2000


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        _bench_host._child("raise ValueError('broken')")


def test_very_first_call() -> None:
    """The child of ``--first-call``; on CPU tensors here, where nothing is compiled."""
    if backends.vendor.device_type != "cpu":
        pytest.skip("the benchmark itself runs it on an accelerator")
    row = _bench_host.first_call(_case("mm"))
    assert not row["error"] and row["bar_s"] == _bench_host.COLD_PRODUCT_S and 0 < row["cold_s"] < 60
    assert "| mm |" in _bench_host.markdown("first", [row])
