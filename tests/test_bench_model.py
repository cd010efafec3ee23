"""The benchmark of a model: all ways to run it agree, what does not is not timed, and the report says so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _bench, _bench_model, backends
from gemskit._bench_llama import Gemskit, Llama, Sizes, Torch

SMALL = Sizes(layers=2, hidden=32, inner=48, heads=4, key_heads=2, vocab=80)
TINY = ["--model", "--no-compile", "--rounds", "1", "--prompt", "9", "--batch", "1", "2"]
TINY += ["--layers", "2", "--hidden", "32", "--inner", "48", "--heads", "4", "--key-heads", "2", "--vocab", "80"]


def small(dtype: torch.dtype = torch.float32) -> Llama:
    return Llama(SMALL, Torch(), 9 + _bench_model.ROOM).to(dtype).draw()


PROMPT = torch.randint(80, (1, 9), generator=torch.Generator().manual_seed(0))


def test_explicit_calls_are_the_model_of_torch() -> None:
    """The kernels, interpreted; weights are shared."""
    model = small()
    expected = _bench_model.observed(_bench_model.own("torch", model), PROMPT)
    other = model.like(Gemskit())
    assert other.head.data_ptr() == model.head.data_ptr()
    with gemskit.interpret(), gemskit.record() as calls:
        found = _bench_model.observed(_bench_model.own("explicit", other), PROMPT)
    assert max(_bench_model.distances(found, expected).values()) < 1e-5
    names = {c.kernel for c in calls}
    assert {"fused_add_rms_norm", "gated_linear", "apply_rotary_pos_emb"} <= names, names


def test_a_decoded_token_is_that_of_a_longer_prompt() -> None:
    model = small()
    again = torch.cat((PROMPT, PROMPT[:, -1:]), 1)
    for calls in (Torch(), Gemskit()):
        v = _bench_model.own("x", model.like(calls))
        with torch.no_grad():
            step, back = v.decoder(PROMPT.expand(3, -1))
            for _ in range(2):
                back()
                torch.testing.assert_close(step(), v.prefill(again).expand(3, -1))


def test_transformers_compute_the_same() -> None:
    pytest.importorskip("transformers", reason='pip install "gemskit[transformers]"')
    model = small()
    expected = _bench_model.observed(_bench_model.own("torch", model), PROMPT)
    for optimized in (False, True):
        v = _bench_model.transformers("x", model, optimized)
        with v.scope():
            assert max(_bench_model.distances(_bench_model.observed(v, PROMPT), expected).values()) < 1e-4


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On CPU tensors all run the meaning."""
    if backends.vendor.device_type != "cpu":
        pytest.skip("the benchmark itself runs it on an accelerator")
    report = tmp_path / "model.json"
    assert _bench.main([*TINY, "--report", str(report)]) == 0, capsys.readouterr().out
    found, page = json.loads(report.read_text()), report.with_suffix(".md").read_text()
    names = ["torch eager", "gemskit, explicit", "gemskit, ATen adapter"]
    if importlib.util.find_spec("transformers"):
        names += ["Transformers", "Transformers, compat"]
    assert list(found["checks"]) == names and not any(c["wrong"] for c in found["checks"].values())
    tasks = ["prefill of 9", "decode, batch 1", "decode, batch 2", "gradients of 9"]
    assert [(r["variant"], r["task"]) for r in found["rows"]] == [(n, t) for n in names for t in tasks]
    assert all(f"## {t.capitalize()}" in page for t in tasks) and "| torch eager | " in page
    assert found["sizes"]["hidden"] == 32 and all(r["ms"] > 0 and r["tokens_per_s"] > 0 for r in found["rows"])


def test_what_is_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if backends.vendor.device_type != "cpu":
        pytest.skip("the benchmark itself runs it on an accelerator")

    class Wrong(Gemskit):
        def gated(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
            return super().gated(x, up, gate)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(_bench_model, "Gemskit", Wrong)
    monkeypatch.setattr(_bench_model, "training_step", fails)
    monkeypatch.setattr(_bench_model, "transformers", fails)
    report = tmp_path / "model.json"
    assert _bench.main([*TINY, "--tasks", "training", "--report", str(report)]) == 1
    found, page = json.loads(report.read_text()), report.with_suffix(".md").read_text()
    assert {r["variant"] for r in found["rows"]} == {"torch eager", "gemskit, ATen adapter"}
    assert "is off by" in found["checks"]["gemskit, explicit"]["wrong"][0]
    assert "failed: RuntimeError: no room" in page and "is off by" in page and "FAILED" in capsys.readouterr().out
