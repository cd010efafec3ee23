"""Folds that ask for tiles ahead or take 32 warps, and long rows in shorter tiles, compiled for sm_90: which do, and without
a spill. No GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_compile_targets import ROWS, Launch, Launches, _cross_compiling  # noqa: F401

from gemskit import _launch, backends
from gemskit._op import REGISTRY

SM_90 = next(row for row in ROWS if row.name == "sm_90")


def launched(name: str, *args: Any, **more: Any) -> Launch:
    """The first launch of a call."""
    launches = Launches()
    with _launch.capturing(launches), backends.use_arch(SM_90):
        # A plan of its own: others hold numbers of the row they were made for.
        REGISTRY[name]._plans.clear()
        REGISTRY[name](*args, **more)
    REGISTRY[name]._plans.clear()
    return next(iter(launches.values()))


def first_of(name: str, shape: tuple[int, ...], dim: int, *args: str | float) -> Launch:
    return launched(name, torch.empty(shape, dtype=torch.bfloat16), *args, dim=dim)


def test_powers_ask_for_four_tiles_ahead() -> None:
    assert first_of("_vector_norm", (1024, 65536), 0, "p", 2.5).meta["AHEAD"] == 4
    assert first_of("_vector_norm", (1024, 65536), 0, "2", 2.0).meta["AHEAD"] == 8


@pytest.mark.parametrize(
    ("name", "shape", "dim", "ahead"),
    [
        ("sum", (8192, 8192), 0, 8),
        ("sum", (65536, 1024), 0, 4),
        ("sum", (1024, 65536), 0, 8),
        ("_var", (8192, 8192), 0, 8),
        ("_var", (1024, 65536), 1, 8),
        ("_var", (65536, 1024), 0, 0),
        ("sum", (64, 256, 4096), 1, 0),
        ("argmax", (8192, 8192), 0, 0),
    ],
)
def test_tiles_asked_for_ahead_stay_in_registers(name: str, shape: tuple[int, ...], dim: int, ahead: int) -> None:
    first = first_of(name, shape, dim)
    assert first.meta["AHEAD"] == ahead
    assert not ahead or not list(first.problems(SM_90))


@pytest.mark.parametrize(
    ("name", "args", "warps"),
    [
        ("sum", (), 32),
        ("amax", (), 32),
        ("_vector_norm", ("2", 2.0), 32),
        ("_vector_norm", ("p", 2.5), 16),
        ("any", (), 16),
        ("_var", (), 4),
        ("argmax", (), 4),
    ],
)
def test_one_long_row_stays_in_registers(name: str, args: tuple[str | float, ...], warps: int) -> None:
    first = first_of(name, (1 << 26,), 0, *args)
    assert first.meta["num_warps"] == warps
    assert warps < 32 or not list(first.problems(SM_90))
    assert first_of(name, (1 << 25,), 0, *args).meta["num_warps"] == warps
    assert first_of(name, (1 << 24,), 0, *args).meta["num_warps"] == min(warps, 16)


def cut(launch: Launch) -> tuple[int, int, int]:
    return launch.meta["BN"], launch.meta["HELD"], launch.meta["UNROLL"]


@pytest.mark.parametrize("shape", [(256, 131072), (1024, 65536), (300, 100000)])
@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_gradients_of_long_rows_come_in_shorter_tiles(name: str, shape: tuple[int, int]) -> None:
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(shape, dtype=dtype)
        found[dtype] = launched(name, x, x, 1, dtype)
    assert cut(found[torch.bfloat16]) == (4096, 8, 4)
    assert cut(found[torch.float32]) == (8192, 2, 2)
    # A few numbers of a row that ends inside of a tile.
    most = 0 if shape[1] % 16384 == 0 else 16
    problems = [int(p.split()[0]) for p in found[torch.bfloat16].problems(SM_90)]
    assert max(problems, default=0) <= most


def test_a_sum_that_is_stored_too_keeps_its_tiles() -> None:
    x = torch.empty(1024, 65536, dtype=torch.bfloat16)
    assert cut(launched("fused_add_rms_norm", x, x, (65536,), x[0])) == (8192, 4, 2)
