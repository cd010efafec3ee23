"""Choices for products that were timed: which are kept, and that products obey them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_hopper import PROCESSORS, close, halves, hopper

import gemskit
from gemskit import _tune
from gemskit.blas import _rule
from gemskit.errors import ArgumentError

__all__ = ["hopper"]


def test_tuned_products_are_obeyed(
    hopper: list[_rule.Choice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is kept is faster than the rule's choice by the timer, and taken from then on, for these sizes alone."""
    monkeypatch.setenv("GEMSKIT_CACHE_DIR", str(tmp_path))
    times = iter(range(100, 0, -1))
    timed = _tune.time_shape(
        (1, 200, 264, 512), torch.bfloat16, torch.device("cpu"), lambda run, *_, **__: float(next(times))
    )
    assert timed[0][0] == _rule.best(200, 264, 512, 1, PROCESSORS) and len(timed) > 10
    better = _tune.improvements(timed)
    assert better is not None and better == timed[-1][0] != timed[0][0]
    assert not _tune.improvements([(choice, 1.0) for choice, _ in timed])
    _tune.keep(_rule.user_table(), "sm_90", {_rule.name_of(1, 200, 264, 512): list(_rule.pick_of(better))})
    _rule.choose.cache_clear()
    try:
        hopper.clear()
        for rows in (200, 201):
            a, w = halves(rows, 512), halves(264, 512)
            close(gemskit.linear(a, w), a.double() @ w.double().t())
        assert hopper == [better, _rule.best(201, 264, 512, 1, PROCESSORS)]
        assert _rule.choose(200, 264, 512, 1, PROCESSORS, arch="sm_100") == timed[0][0]
        assert any(line.endswith("kept") for line in _tune._lines((1, 200, 264, 512), timed, better))
    finally:
        _rule.tuned.cache_clear()
        _rule.choose.cache_clear()


@pytest.mark.parametrize("text", ["4096x4096", "axbxc", "1x2x3x4x5", "0x8x8"])
def test_shapes_to_tune(text: str) -> None:
    assert _tune.shape("8x16x32") == (1, 8, 16, 32) and _tune.shape("4x8x16x32") == (4, 8, 16, 32)
    with pytest.raises(ArgumentError, match=f"'{text}' is no shape"):
        _tune.shape(text)
