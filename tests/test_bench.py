"""The benchmark of kernels: its rows are calls that torch takes too, and its verification tells right from wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _bench, _bench_cases, _bench_elementwise, _bench_reduce, backends
from gemskit._bench import Roof
from gemskit._bench_cases import BenchCase, call
from gemskit._op import REGISTRY
from gemskit.testing import Make, Sample

CASES = list(_bench_cases.cases())


def label(case: BenchCase) -> str:
    return f"{case.op} {case.label} {case.dtype}"


def test_rows_have_names_of_their_own() -> None:
    assert max(Counter((c.op, c.label, c.dtype, c.backward) for c in CASES).values()) == 1
    assert {"pointwise", "reduce", "nn", "blas"} == {_bench._package(REGISTRY[c.op]) for c in CASES}
    for case in CASES:
        wide = case.dtype == torch.float32
        assert wide == ("f32" in case.label), f"{label(case)}: a row that is not in bfloat16 says so, but for ints"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_both_sides_take_the_arguments(case: BenchCase) -> None:
    """On ``meta`` tensors: shapes and dtypes of the meaning are those of what a torch user writes."""
    op = REGISTRY[case.op]
    if op.family == "sized":
        pytest.skip("how many results there are depends on the values")
    sample = case.build(Make(case.dtype, device="meta", empty=True))
    bound = op.signature.bind(*sample.args, **sample.kwargs)
    meant = _bench._flat(op.meaning(*bound.args, **bound.kwargs))
    if case.backward:
        assert op.differentiable and any(o.is_floating_point() for o in meant)
    if case.peer is not None:
        peers = _bench._flat(case.peer(*sample.args, **sample.kwargs))
        assert [(t.shape, t.dtype) for t in peers] == [(t.shape, t.dtype) for t in meant]
    assert sum(map(_bench._bytes, meant)) > 0 or not meant


# -- one row, without an accelerator --------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are interpreted, and take a millisecond each."""

    class Module:
        @staticmethod
        def empty_cache() -> None: ...

    monkeypatch.setattr(backends, "device", "cpu")
    monkeypatch.setattr(_bench, "_milliseconds", lambda fn: (fn(), 1.0)[1])
    monkeypatch.setattr(torch, "get_device_module", lambda *_: Module)


def bools(make: Make) -> Sample:
    return Sample((make(60, 50, dtype=torch.bool),), {"dim": 1})


F32 = torch.float32
SMALL = [
    BenchCase("log", "NaN for half of it", call((3000,))),
    BenchCase("bitwise_and", "ints", call((3000,), (3000,)), torch.int32),
    BenchCase("any", "bools", bools),
    BenchCase("argmax", "positions", call((60, 50), dim=1), compare=_bench_reduce._found),
    BenchCase("argmax", "a position", call((60, 50)), compare=_bench_reduce._found),
    BenchCase("max_dim", "both", call((60, 50), dim=1), compare=_bench_reduce._found),
    BenchCase("sort", "both", call((6, 50), dim=1), compare=_bench_reduce._found),
    BenchCase("topk", "both", call((6, 50), k=8, dim=1), compare=_bench_reduce._found),
    BenchCase("cummax", "both", call((6, 50), dim=1), compare=_bench_reduce._found),
    BenchCase("_std_mean", "two", call((60, 50), dim=1)),
    BenchCase("nonzero", "some", lambda make: Sample((make(500, dtype=torch.bool),))),
    BenchCase("masked_select", "some", lambda make: Sample((make(500), make(500, dtype=torch.bool)))),
    BenchCase("unique", "some", lambda make: Sample((make(500, dtype=torch.int64, low=0, high=99),))),
    BenchCase("softmax", "backward", call((6, 50), dim=1), backward=True),
    BenchCase(
        "_multinomial",
        "sizes",
        lambda make: Sample((make(6, 50, low=0.0, high=1.0), 1, True, _bench_elementwise._seed(make))),
        F32,
        compare=_bench_elementwise._size,
    ),
]


@pytest.mark.parametrize("case", SMALL, ids=label)
def test_a_row(case: BenchCase, on_cpu: None) -> None:
    with gemskit.interpret():
        row = _bench.time_case(case, Roof(1e12, 1e12), compiled=False)
    assert row["ok"] and not {"gemskit_error"} & set(row), row
    assert set(row["times"]) == {"gemskit", "eager"} and row["floor"] > 0
    assert row["op"] == case.op.lstrip("_") in _bench._row(row)


@pytest.mark.parametrize("compare", [_bench_elementwise._percent_nonzero, _bench_elementwise._percentiles])
def test_drawn_values_are_compared_by_their_distribution(compare: Callable[..., list[Tensor]]) -> None:
    n, sample = 1 << 22, Sample(())
    first, second = (torch.randn(n, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    keep = torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.75
    assert _bench._error(compare(sample, [first * keep]), compare(sample, [second * keep])) == 0
    assert _bench._error(compare(sample, [first * keep]), compare(sample, [second * (second < 2.0) * keep])) > 0


def test_errors_tell_right_from_wrong() -> None:
    nan, inf = math.nan, math.inf
    e = torch.tensor([1.0, nan, inf, -2.0, 1e300], dtype=torch.float64)
    good = torch.tensor([1.0, nan, inf, -2.0, inf])
    assert _bench._error([good], [e]) == 0
    for i, wrong in ((0, nan), (1, 1.0), (2, -inf), (3, inf)):
        bad = good.clone()
        bad[i] = wrong
        assert _bench._error([bad], [e]) == inf
    assert 0.3 < _bench._error([good * torch.tensor([1.0, 1, 1, 2.0, 1])], [e]) < inf
    assert _bench._error([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 0.5
    assert _bench._error([torch.ones(3)], [torch.ones(4)]) == inf
    assert _bench._error([], []) == 0


def test_a_wrong_operator_fails_its_row(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BenchCase("sort", "wrong", call((6, 50), dim=1), compare=_bench_reduce._found)
    right = REGISTRY["sort"].meaning
    monkeypatch.setitem(REGISTRY, "sort", _Wrong(right, lambda v, i: (v, i.flip(1))))
    assert not _bench.time_case(case, Roof(1e12, 1e12), compiled=False)["ok"]
    monkeypatch.setitem(REGISTRY, "sort", _Wrong(right, lambda v, i: 1 // 0))
    row = _bench.time_case(case, Roof(1e12, 1e12), compiled=False)
    assert not row["ok"] and "ZeroDivisionError" in row["gemskit_error"] and "WRONG" in _bench._row(row)


class _Wrong:
    """``sort`` with its result changed."""

    __module__ = "gemskit.reduce.sorting"
    family, name = "free", "sort"

    def __init__(self, meaning: Any, change: Any) -> None:
        self.meaning, self.change = meaning, change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(*self.meaning(*args, **kwargs))


def test_summary_and_page(tmp_path: Path) -> None:
    def row(op: str, package: str, ratio: float) -> dict[str, Any]:
        times = {"gemskit": 1.0, "eager": ratio}
        return dict(op=op, package=package, label="x", dtype="bfloat16", times=times, floor=0.5, ok=True)

    rows = [row("add", "pointwise", 1.0), row("mul", "pointwise", 4.0), row("sum", "reduce", 0.5)]
    line = _bench._summary(rows)
    assert line == (
        "geometric mean against torch eager: 1.26x over 3 rows, 1 under 0.95x (pointwise 2.00x of 2, reduce 0.50x of 1)"
    )
    assert "(" not in _bench._summary([{k: v for k, v in r.items() if k != "package"} for r in rows]), "older reports"
    pytest.importorskip("matplotlib", reason='pip install "gemskit[bench]"')
    facts = dict.fromkeys(("machine", "date", "gemskit", "commit", "torch", "triton", "python", "command"), "x")
    report = tmp_path / "bench.json"
    report.write_text(json.dumps({**facts, "bandwidth": 1e12, "flops": 1e12, "rows": rows}))
    _bench.render(report)
    assert "pointwise 2.00x of 2" in report.with_suffix(".md").read_text() and report.with_suffix(".svg").exists()
