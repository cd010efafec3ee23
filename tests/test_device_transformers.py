"""Transformers models on the device: by gemskit.compat.transformers, and with the ATen adapter on, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_parallel
from transformers_models import EXPECTED, MODELS, compat, results, same, tiny

from gemskit import backends
from gemskit.compat import use_aten

DEVICE = backends.vendor.device_type
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu", reason="needs an accelerator"), pytest.mark.filterwarnings("ignore"),
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("door", ["optimize", "adapter"])
def test_family(name: str, door: str) -> None:
    model = tiny(name).to(DEVICE)
    expected = results(name, model)
    doors: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "optimize": lambda: compat.optimized(model),
        "adapter": lambda: use_aten("all"),
    }
    with doors[door]():
        found = results(name, model)
        rules = compat.report(model)
    same(found, expected)
    assert set(rules.applied) == (set(EXPECTED[name].split()) if door == "optimize" else set()), str(rules)


def test_compiled() -> None:
    """As `generate` compiles a model with a static cache."""
    model = compat.optimize(tiny("llama").to(DEVICE))
    ids = torch.randint(6, 128, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = torch.compile(model, fullgraph=True)(input_ids=ids, use_cache=False).logits
    same({"logits": found}, {"logits": expected})


def test_two_devices(tmp_path: Path) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two accelerators")
    for kind, (stock, ours) in transformers_parallel.trained(tmp_path, DEVICE).items():
        assert ours == pytest.approx(stock, rel=1e-4), kind
