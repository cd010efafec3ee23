"""The benchmark of kernels: its rows are calls that torch takes too, and its verification tells right from wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import (
    _bench,
    _bench_attention,
    _bench_cases,
    _bench_clock,
    _bench_elementwise,
    _bench_liger,
    _bench_reasons,
    _bench_reduce,
    _bench_report,
    _bench_rows,
    _bench_run,
    backends,
)
from gemskit._bench_cases import BenchCase, call
from gemskit._bench_run import Roof
from gemskit._op import REGISTRY
from gemskit._workers import share
from gemskit.errors import ArgumentError
from gemskit.testing import Make, Sample

CASES = list(_bench_cases.cases())


def label(case: BenchCase) -> str:
    return f"{case.op} {case.label} {case.dtype}"


#: Rows that were promised: operators, labels.
PROMISED: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (_bench_elementwise.UNARY + _bench_elementwise.BINARY + ("where", "clamp", "addcmul", "lerp"), ("64M",)),
    (("add",), ("a and b.T 8192²", "8192² and 8192x1", "8192² and 1x8192", "64M f32", "1M")),
    (
        ("sum", "mean", "_var", "amax", "argmax", "_vector_norm", "any", "all"),
        (
            "8192² dim=0", "8192² dim=1", "65536x1024 dim=0", "65536x1024 dim=1", "1024x65536 dim=0", "1024x65536 dim=1",
            "64x256x4096 dim=1", "64M all",
        ),
    ),
    (
        ("softmax", "log_softmax"),
        tuple(
            f"{size}{backward}" for backward in ("", " backward")
            for size in ("8192x1024", "8192x4096", "8192x16384", "8192x32768", "1024x65536", "256x131072")
        ),
    ),
    (
        ("mm",),
        (
            *(f"{m}x{w}" for w in ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
              for m in (1, 16, 64, 128, 512, 2048, 8192)),
            *(f"{m}x{w}" for w in ("10240x5120", "5120x8192", "51200x5120", "5120x25600") for m in (1, 16, 128, 2048)),
            *("x".join(3 * [str(n)]) for n in (512, 1024, 2048, 4096, 8192, 16384)),
            "2048x4096x14336 f16", "4097x4095x1023", "1000x1000x1000", "2048x4096x6144 grad of input",
            "6144x4096x2048 grad of weight",
        ),
    ),
    (("gated_linear",), tuple(f"{m}x14336x4096" for m in (16, 2048, 8192))),
    (("cumsum",), ("4096x16384 dim=1 f32", "8192² dim=0 f32", "64M f32")),
    (("sort",), ("64x128256", "64x128256 f32", "8192x4096", "8192x4096 f32", "1x16M", "1x16M f32")),
    (("topk",), tuple(f"{k} of {n}{f}" for k in (1, 8, 50, 1024) for n in ("64x128256", "8192x4096") for f in ("", " f32"))),
)  # fmt: skip


def test_promised_rows_are_there() -> None:
    rows = {(c.op, c.label): c for c in CASES}
    assert not [(op, label) for ops, labels in PROMISED for op in ops for label in labels if (op, label) not in rows]
    assert all((" backward" in c.label) == c.backward for c in CASES)
    assert {c.peer for c in CASES if c.op == "topk"} == {torch.topk}
    dense = [c for c in CASES if c.op == "scaled_dot_product_attention" and "decode" not in c.label]
    assert sum(c.backward for c in dense) * 2 == len(dense) >= 48 and all(len(c.ways) == 3 for c in dense)
    assert not [c.label for c in CASES if c.ways and c.compiled and c.op != "gated_linear"]


def test_rows_have_names_of_their_own() -> None:
    assert max(Counter((c.op, c.label, c.dtype, c.backward) for c in CASES).values()) == 1
    assert {"pointwise", "reduce", "nn", "blas"} == {_bench_run.package(REGISTRY[c.op]) for c in CASES}
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
    meant = _bench_run._flat(op.meaning(*bound.args, **bound.kwargs))
    for way in case.ways:
        if way.backend is None:
            found = _bench_run._flat(way.call(*sample.args, **sample.kwargs))
            assert [(t.shape, t.dtype) for t in found] == [
                (t.shape, t.dtype) for t in meant[: 1 if case.first else None]
            ]
    if case.backward:
        assert op.differentiable and any(o.is_floating_point() for o in meant)
    if case.peer is not None:
        peers = _bench_run._flat(case.peer(*sample.args, **sample.kwargs))
        meant = meant[:1] if case.first else meant
        assert [(t.shape, t.dtype) for t in peers] == [(t.shape, t.dtype) for t in meant]
    assert sum(map(_bench_run._bytes, meant)) > 0 or not meant


# -- the clock --------------------------------------------------------------------------------------------------------------


def test_a_call_finds_the_cache_full_of_what_was_read_and_of_as_much_as_it_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            seen.append(("event", 0))

        def elapsed_time(self, other: Any) -> float:
            return 10.0

    class Module:
        @staticmethod
        def synchronize() -> None: ...

    Module.Event = Event  # type: ignore[attr-defined]

    class Filler(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.amax, torch.Tensor.fill_):
                seen.append((func.__name__, args[0].nbytes))
            return super().__torch_function__(func, types, args, kwargs or {})

    now = iter([0.0, 1e-3] * 3 + [0.0, 7e-3] * 3)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: Module)
    monkeypatch.setattr(_bench_clock, "FILL", 4096)
    monkeypatch.setattr(_bench_clock, "_filler", lambda: torch.ones(1024, dtype=torch.int32).as_subclass(Filler))
    for written, left, fills in ((0, 0, 1), (1 << 20, 4096, 2)):
        seen.clear()
        assert _bench_clock.milliseconds(lambda: seen.append(("call", 0)), written) == 10.0
        filled = ("amax", 4096)
        timed = [("fill_", left), ("event", 0), ("call", 0), ("event", 0)]
        # One call, five that are timed together, 15 and 50 that take 2 ms each with the cache; the host needs 0.2 or 1.4 of them.
        first = [("call", 0), ("event", 0), *[filled, *timed] * 5, ("event", 0)]
        assert seen == first + [*[filled] * fills, *timed] * (15 + 50)


# -- one row, without an accelerator --------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are interpreted, and take a millisecond each."""

    class Module:
        @staticmethod
        def empty_cache() -> None: ...

    monkeypatch.setattr(backends, "device", "cpu")
    monkeypatch.setattr(_bench_run, "milliseconds", lambda fn, written: (fn(), 1.0)[1])
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
        row = _bench_run.time_case(case, Roof(1e12, 1e12), compiled=False)
    assert row["ok"] and not {"gemskit_error"} & set(row), row
    assert set(row["times"]) == {"gemskit", "eager"} and row["floor"] > 0
    assert row["op"] == case.op.lstrip("_") in _bench_report.line(row)


ATTENTION = [
    *_bench_attention._dense(2, 6, 3, 40, 16, True),
    *_bench_attention._packed(6, 3, 16, True, (17, 5, 1)),
    _bench_attention._decode(3, 64),
    _bench_attention._paged(2, 64, 16),
]


@pytest.mark.parametrize("case", ATTENTION, ids=label)
def test_attention_is_held_against_the_fastest_way(
    case: BenchCase, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the batches and heads is verified, a part of the rows at a time; backends that refuse cost nothing."""
    monkeypatch.setattr(_bench_attention, "SCORES", 1 << 10)
    with gemskit.interpret():
        row = _bench_run.time_case(case, Roof(1e12, 1e12), compiled=False)
    assert row["ok"] and row["family"] == "attention", row
    assert row["peer"] in row["peers"] and row["peers"][row["peer"]] == row["times"]["eager"] == 1.0
    # The error of each way that served, that of the fastest among them.
    assert row["errors"][row["peer"]] == row["eager_error"]
    assert {*row["errors"]} == {n for n, found in row["peers"].items() if not isinstance(found, str)}
    assert any("Error" in str(found) for found in row["peers"].values()), "not all backends serve CPU tensors"
    assert f"({row['peer']})" in _bench_report._table([row])[2]
    if case.cut is not None and not case.backward:
        sample = case.build(Make(torch.bfloat16))
        ours = REGISTRY[case.op].meaning(*sample.args, **sample.kwargs)
        whole, part = (ours[0] if case.first else ours), case.cut
        assert 0 < part(whole).numel() < whole.numel()
        wrong = part(whole).clone()
        wrong[-1, ..., -1] += 1
        assert _bench_run._error([wrong], [part(whole)]) > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_is_attention(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_attention, "SCORES", 200)
    make = Make(torch.float64)
    given = [make(2, n, 24, 8).requires_grad_() for n in (6, 2, 2)]
    named = dict(is_causal=causal, enable_gqa=True)
    outs = [fn(*given, **named) for fn in (_bench_attention.exact_attention, F.scaled_dot_product_attention)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), given) for o in outs))


def test_forward_and_backward_as_one(on_cpu: None) -> None:
    def build(make: Make) -> Sample:
        return Sample((make(20, 16), make(50, 16), make(20, dtype=torch.int64, low=0, high=50)), {"prepare": "input"})

    case = BenchCase("fused_linear_cross_entropy", "forward and backward", build, F32, backward=True, whole=True)
    with gemskit.interpret():
        row = _bench_run.time_case(case, Roof(1e12, 1e12), compiled=False)
    assert row["ok"] and row["family"] == "rows", row


class Liger:
    """Stands for ``liger_kernel.transformers.functional``, with plain torch; as the original it may overwrite inputs."""

    @staticmethod
    def liger_rms_norm(x: Tensor, w: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        assert not in_place
        return F.rms_norm(x, (x.shape[-1],), w, eps)

    @staticmethod
    def liger_fused_add_rms_norm(x: Tensor, r: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x + r, (x.shape[-1],), w, eps), x + r

    @staticmethod
    def liger_layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), w, b, eps)

    @staticmethod
    def liger_softmax(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    @staticmethod
    def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
        return F.silu(a) * b

    @staticmethod
    def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        assert cos.shape == (1, q.shape[2], q.shape[3])
        half = cos.shape[-1] // 2
        found = _bench_rows.rotate(q.transpose(1, 2), k.transpose(1, 2), cos[0, :, :half], sin[0, :, :half])
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    @staticmethod
    def liger_cross_entropy(x: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(x, target)
        x.data.zero_()
        return loss

    @staticmethod
    def liger_fused_linear_cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)


def test_liger_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", cast(ModuleType, Liger))
    served = {c.op: c for c in CASES if _bench_liger.serves(c)}
    assert set(served) == set(_bench_liger.PEERS)
    for op, case in served.items():
        sample = case.build(Make(case.dtype, device="meta", empty=True))
        found = _bench_liger.peer(case, sample)
        assert found is not None
        fn, own = found
        if op != "cross_entropy":
            meant, theirs = (
                _bench_run._flat(f) for f in (REGISTRY[op].meaning(*sample.args, **sample.kwargs), fn(*own.args))
            )
            assert [t.numel() for t in meant] == [t.numel() for t in theirs]
    for backward in (False, True):
        rows = lambda make: Sample((make(6, 50), make(6, dtype=torch.int64, low=0, high=50)))
        case = BenchCase("cross_entropy", f"{backward}", rows, F32, backward=backward, whole=backward)
        with gemskit.interpret():
            row = _bench_run.time_case(case, Roof(1e12, 1e12), compiled=False)
        assert row["ok"] and row["times"]["liger"] == 1.0, row
    assert "Liger ms" in _bench_report._table([row])[0]
    assert "Liger" not in _bench_report._table([row_of("add", "pointwise", 1.0)])[0]
    assert "| rows backward | Liger | 1 | 1.00 | 1.00 | 0 |" in _bench_report.page(facts() | {"rows": [row]}, "r")


@pytest.mark.parametrize("compare", [_bench_elementwise._percent_nonzero, _bench_elementwise._percentiles])
def test_drawn_values_are_compared_by_their_distribution(compare: Callable[..., list[Tensor]]) -> None:
    n, sample = 1 << 22, Sample(())
    first, second = (torch.randn(n, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    keep = torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.75
    assert _bench_run._error(compare(sample, [first * keep]), compare(sample, [second * keep])) == 0
    assert _bench_run._error(compare(sample, [first * keep]), compare(sample, [second * (second < 2.0) * keep])) > 0


def test_errors_tell_right_from_wrong() -> None:
    nan, inf = math.nan, math.inf
    e = torch.tensor([1.0, nan, inf, -2.0, 1e300], dtype=torch.float64)
    good = torch.tensor([1.0, nan, inf, -2.0, inf])
    assert _bench_run._error([good], [e]) == 0
    for i, wrong in ((0, nan), (1, 1.0), (2, -inf), (3, inf)):
        bad = good.clone()
        bad[i] = wrong
        assert _bench_run._error([bad], [e]) == inf
    assert 0.3 < _bench_run._error([good * torch.tensor([1.0, 1, 1, 2.0, 1])], [e]) < inf
    assert _bench_run._error([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 0.5
    assert _bench_run._error([torch.ones(3)], [torch.ones(4)]) == inf
    assert _bench_run._error([], []) == 0


def test_a_wrong_operator_fails_its_row(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BenchCase("sort", "wrong", call((6, 50), dim=1), compare=_bench_reduce._found)
    right = REGISTRY["sort"].meaning
    monkeypatch.setitem(REGISTRY, "sort", _Wrong(right, lambda v, i: (v, i.flip(1))))
    assert not _bench_run.time_case(case, Roof(1e12, 1e12), compiled=False)["ok"]
    monkeypatch.setitem(REGISTRY, "sort", _Wrong(right, lambda v, i: 1 // 0))
    row = _bench_run.time_case(case, Roof(1e12, 1e12), compiled=False)
    assert not row["ok"] and "ZeroDivisionError" in row["gemskit_error"] and "WRONG" in _bench_report.line(row)


class _Wrong:
    """``sort`` with its result changed."""

    __module__ = "gemskit.reduce.sorting"
    family, name = "free", "sort"

    def __init__(self, meaning: Any, change: Any) -> None:
        self.meaning, self.change = meaning, change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(*self.meaning(*args, **kwargs))


# -- the report ------------------------------------------------------------------------------------------------------------


def row_of(op: str, package: str, ratio: float, label: str = "x") -> dict[str, Any]:
    times = {"gemskit": 1.0, "eager": ratio, "compile": 2.0}
    return dict(op=op, package=package, label=label, dtype="bfloat16", backward=False, times=times, floor=0.85, ok=True)


def facts() -> dict[str, Any]:
    named = ("machine", "date", "gemskit", "commit", "torch", "triton", "python", "command")
    return {**dict.fromkeys(named, "x"), "bandwidth": 1e12, "flops": 1e12}


def test_summary() -> None:
    rows = [row_of("add", "pointwise", 1.0), row_of("mul", "pointwise", 4.0), row_of("sum", "reduce", 0.5)]
    assert _bench_report.summary(rows).splitlines()[0] == (
        "geometric mean against torch eager: 1.26x over 3 rows, 1 under 0.95x (pointwise 2.00x of 2, reduce 0.50x of 1)"
    )
    assert "(" not in _bench_report.summary([{k: v for k, v in r.items() if k != "package"} for r in rows]), "older"
    assert "1 rows FAILED or are WRONG: sum x" in _bench_report.summary([*rows[:2], rows[2] | {"ok": False}])


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_reasons, "REASONS", (("floor_divide", "*", "exact division"),))
    rows = [row_of("add", "pointwise", 1.0), row_of("floor_divide", "pointwise", 0.9), row_of("sum", "reduce", 0.5)]
    page = _bench_report.page(
        facts() | dict(rows=rows, planned=5, devices=4, roofs=[(4e12, 8e14), (4.2e12, 8e14)]), "r"
    )
    assert "- devices: 4" in page and "copy 4.00 to 4.20 TB/s, bf16 product 800 TFLOP/s" in page
    assert "- rows: 3 of 5, the run was cut short" in page
    under = page[page.index("## Rows under") : page.index("## pointwise")].splitlines()
    assert [r.split(" | ")[0] for r in under if "`" in r] == ["| `sum`", "| `floor_divide`"]
    assert "unexplained" in under[4] and "exact division" in under[5]
    assert page.index("## pointwise") < page.index("`add`") < page.index("## reduce") < page.rindex("`sum`")
    assert "0 of 1 rows are at least as fast as the fastest peer; of the roof reach 0 at 90%, 1 at 80%" in page


def test_a_row_without_times_and_an_old_report_are_shown(tmp_path: Path) -> None:
    died = row_of("topk", "reduce", 1.0) | dict(times={}, ok=False, gemskit_error="its process ended")
    del died["floor"]
    assert "its process ended" in _bench_report.line(died)
    old = {k: v for k, v in row_of("add", "pointwise", 1.0).items() if k != "package"}
    assert "failed" in _bench_report.page(facts() | {"rows": [died]}, "r")
    pytest.importorskip("matplotlib", reason='pip install "gemskit[bench]"')
    report = tmp_path / "bench.json"
    report.write_text(json.dumps(facts() | {"rows": [old]}))
    _bench_report.render(report)
    assert "## rows" in report.with_suffix(".md").read_text() and report.with_suffix(".svg").exists()


def test_reasons_name_rows() -> None:
    for op, labels, why in _bench_reasons.REASONS:
        some = [c for c in CASES if fnmatchcase(_bench_run.public(c.op), op) and fnmatchcase(c.label, labels)]
        assert some and why, f"{op} {labels}: no such row"


# -- a run -----------------------------------------------------------------------------------------------------------------


def test_a_cut_run_leaves_its_rows_and_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, timed = tmp_path / "bench.json", []
    every = [c for c in CASES if c.op in ("neg", "abs", "sqrt")]

    def share(work: Any, tasks: Any, devices: Any) -> Iterator[tuple[Any, Any, str]]:
        assert devices == [0, 1][: len(tasks)]
        for task in tasks:
            if len(timed) == 2:
                timed.clear()
                raise KeyboardInterrupt
            timed.append(task)
            case = CASES[task[0]]
            times = {"gemskit": 1.0, "eager": 2.0}
            row = dict(**_bench._known(case), times=times, floor=0.5, ok=True, device=len(timed) % 2, roof=(1e12, 1e14))
            yield (task, None, "died") if case.op == "sqrt" else (task, row, "")

    device = SimpleNamespace(get_device_name=lambda *_: "Fake")
    monkeypatch.setattr(_bench, "backends", SimpleNamespace(vendor=SimpleNamespace(device_type="fake"), device="cpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(_bench, "share", share)
    monkeypatch.setattr(_bench_report, "plot", lambda *_: None)
    command = [
        "neg",
        "abs",
        "sqrt",
        "--jobs",
        "1",
        "--devices",
        "all",
        "--no-compile",
        "pointwise",
        "--report",
        str(report),
    ]
    assert _bench.main(command) == 1
    found = json.loads(report.read_text())
    assert len(found["rows"]) == 2 and found["planned"] == len(every) == 3 and found["devices"] == 2
    assert "2 of 3, the run was cut short" in report.with_suffix(".md").read_text()
    assert _bench.main(["--render", str(report)]) == 0
    assert _bench.main([*command, "--resume"]) == 1, "a row whose process died"
    found = json.loads(report.read_text())
    assert len(timed) == 1 and [r["ok"] for r in found["rows"]] == [True, True, False] and found["bandwidth"] == 1e12
    with pytest.raises(SystemExit):
        _bench.main(["nothing"])
    monkeypatch.setenv("GEMSKIT_COMMIT", "another")
    with pytest.raises(ArgumentError, match="another"):
        _bench.main([*command, "--resume"])


def work(task: int) -> int:
    """What a process does with a task, in another process."""
    if task == 3:
        os._exit(7)
    return 10 // task


def test_processes_that_die_cost_one_task() -> None:
    found = {task: (result, error) for task, result, error in share(work, [0, 1, 2, 3, 4, 5], [0, 0])}
    assert found[1] == (10, "") and found[2] == (5, "") and found[4] == (2, "") and found[5] == (2, "")
    assert found[0][0] is None and "ZeroDivisionError" in found[0][1]
    assert found[3] == (None, "its process ended with status 7")


def slow(task: int) -> None:
    """Ends the run, as ``timeout`` does, and is at work then."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(900)


def test_what_ends_a_run_ends_its_processes() -> None:
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        list(share(slow, [1, 2], [0]))
    assert time.perf_counter() - start < 600 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_warmed_calls_are_those_of_the_rows() -> None:
    some = [c for c in CASES if c.op in ("silu", "sort")]
    calls = list(_bench._calls(iter(some)))
    assert [op for op, _, _ in calls] == [REGISTRY[c.op] for c in some]
    assert [any(t.requires_grad for t in args if isinstance(t, Tensor)) for _, args, _ in calls] == [
        c.backward for c in some
    ]
