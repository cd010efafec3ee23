"""Folds that ask for tiles ahead, compiled for sm_90: which do, and that the tiles stay in registers. No GPU is needed."""

from __future__ import annotations

import pytest
import torch
from test_compile_targets import ROWS, Launches, _cross_compiling  # noqa: F401

from gemskit import _launch, backends
from gemskit._op import REGISTRY


@pytest.mark.parametrize(
    ("name", "shape", "dim", "ahead"),
    [
        ("sum", (8192, 8192), 0, 8),
        ("sum", (65536, 1024), 0, 4),
        ("_var", (8192, 8192), 0, 8),
        ("_var", (1024, 65536), 1, 8),
        ("_var", (65536, 1024), 0, 0),
        ("sum", (64, 256, 4096), 1, 0),
        ("argmax", (8192, 8192), 0, 0),
    ],
)
def test_tiles_asked_for_ahead_stay_in_registers(name: str, shape: tuple[int, ...], dim: int, ahead: int) -> None:
    row, launches = next(row for row in ROWS if row.name == "sm_90"), Launches()
    with _launch.capturing(launches), backends.use_arch(row):
        # A plan of its own: others hold numbers of the row they were made for.
        REGISTRY[name]._plans.clear()
        REGISTRY[name](torch.empty(shape, dtype=torch.bfloat16), dim=dim)
    REGISTRY[name]._plans.clear()
    first = next(iter(launches.values()))
    assert first.meta["AHEAD"] == ahead
    assert not ahead or not list(first.problems(row))
