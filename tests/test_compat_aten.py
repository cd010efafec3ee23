"""torch's operators over gemskit's kernels: what is served, what goes back to torch, and that nothing else changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import backends
from gemskit.compat import _aten_table, disable_aten, enable_aten, no_aten, registered_keys, registered_ops, use_aten
from gemskit.compat._aten_match import targets, wrapped
from gemskit.compat.aten import select
from gemskit.errors import ArgumentError

pytestmark = pytest.mark.skipif(backends.vendor.dispatch_key != "CPU", reason="kernels run under the interpreter here")

CPU = targets("CPU")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    disable_aten()


def kernels(calls: list[gemskit.Call]) -> list[str]:
    return [c.kernel for c in calls if c.kernel != "meaning"]


def dump(*names: str) -> list[str]:
    return [torch._C._dispatch_dump(f"aten::{n}") for n in names]


# -- which overloads ------------------------------------------------------------------------------------------------------


def test_the_table_of_overloads() -> None:
    """A sentence each on what a schema comparison found; the samples below show that it found right."""
    assert len(CPU) > 600
    for name in (
        "add.Tensor",
        "add_.Scalar",
        "add.out",
        "sum.dim_IntList",
        "sum.IntList_out",
        "max.dim_max",
        "cat.out",
    ):
        assert name in CPU
    for name in (
        "_softmax",
        "native_layer_norm",
        "native_layer_norm_backward",
        "embedding_dense_backward",
        "index.Tensor",
    ):
        assert name in CPU
    assert CPU["where.self"].arguments == ("condition", "self", "other")
    assert CPU["max.dim_max"].arguments[-1] == "out=(max, max_values)"
    assert "_fused_rms_norm" not in CPU, "the CPU has none: torch composes it"


def test_composites_views_and_random_numbers_stay_torchs() -> None:
    for name in ("softmax.int", "matmul", "linear", "layer_norm", "rms_norm", "square", "dropout", "max.other"):
        assert name not in CPU, name
    for name in (
        "view",
        "transpose_",
        "squeeze_.dim",
        "as_strided",
        "normal_",
        "native_dropout",
        "bernoulli",
        "empty_like",
    ):
        assert name not in CPU, name
    for name, target in CPU.items():
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(f"aten::{name}", "CPU") or not has(f"aten::{name}", "CompositeImplicitAutograd"), name
        assert not any(str(a.real_type) == "Optional[Generator]" for a in target.schema.arguments), name


def test_the_registration_for_a_gpu_can_be_made_here() -> None:
    table = targets("CUDA")
    # torch's build for CPUs has no kernels of that key, so only what it has for any device is listed.
    assert {"add.Tensor", "_softmax", "embedding", "sum.dim_IntList"} <= set(table)
    library = torch.library.Library("aten", "IMPL")
    library.impl("add.Tensor", lambda keyset, a, b, *, alpha=1: a, "CUDA", with_keyset=True)
    library._destroy()


# -- names ----------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert select("add.Tensor") == ("add.Tensor",)
    assert select(["aten::mm", "mm.default"], "mm.out") == ("mm",)
    assert set(select("add_")) == {"add_.Tensor", "add_.Scalar"}
    assert {"add.Tensor", "add_.Tensor", "add.out"} <= set(select("add"))
    assert {"_softmax", "_softmax.out"} <= set(select("softmax"))
    assert {"native_layer_norm", "native_layer_norm_backward"} <= set(select("layer_norm"))
    assert set(select("all", "add")) == set(CPU) - set(select("add"))
    assert select(()) == ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ad.Tensor", "add.Tensor"),
        ("sofmax", "near are .*softmax"),
        ("matmul", "composes it of others"),
        ("zqxj", "'all' takes"),
        (3, "names are strings"),
    ],
)
def test_unknown_names(name: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        enable_aten([name])
    with pytest.raises(ArgumentError, match=says):
        enable_aten("add", exclude=[name])
    assert registered_keys() == ()


def test_the_default_is_what_the_benchmark_says() -> None:
    with pytest.raises(ArgumentError, match="no benchmark of reference"):
        enable_aten()
    with backends.use_arch("sm_90"):
        chosen = select()
        measured = _aten_table.RATIOS["sm_90"]
        assert {"elu", "elu_", "var.correction", "_to_copy"} & set(chosen) == {"elu", "elu_", "var.correction"}
        assert "sort.stable" in chosen and measured["sort"] < 1
        assert "add.Tensor" not in chosen and measured["add"] > 1
        assert "elu_" not in select(exclude="elu_")


def test_the_benchmark_table_is_that_of_the_report() -> None:
    report = Path(__file__).parents[1] / "docs" / "reports" / "bench-h200.json"
    found = _aten_table.ratios(json.loads(report.read_text())["rows"])
    assert found == _aten_table.RATIOS["sm_90"], (
        f"python gemskit/compat/_aten_table.py {report.relative_to(report.parents[2])}"
    )


# -- on and off -----------------------------------------------------------------------------------------------------------


def test_our_kernel_runs_and_autograd_is_torchs() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = (F.layer_norm(F.silu(x), (8,), w) * 2).softmax(-1).square().sum()
        return loss, *torch.autograd.grad(loss, (x, w))

    expected = step()
    with use_aten("all") as handle, gemskit.interpret(), gemskit.record() as calls:
        found = step()
        y = torch.add(x, w)
    assert "AddBackward0" in type(y.grad_fn).__name__
    names = set(kernels(calls))
    assert {"silu", "layer_norm", "softmax", "softmax_grad", "silu_backward"} <= names
    assert any(n.startswith("layer_norm_") for n in names), "its gradient"
    assert not handle.fallbacks
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


def test_dispatch_tables_are_restored() -> None:
    before = dump(*CPU)
    with use_aten("all"):
        assert dump("add.Tensor") != before[list(CPU).index("add.Tensor") : list(CPU).index("add.Tensor") + 1]
        assert set(registered_keys()) == set(CPU) and {"add", "softmax", "layer_norm"} <= set(registered_ops())
    assert dump(*CPU) == before and registered_keys() == registered_ops() == ()


def test_a_thousand_times_without_growth() -> None:
    before, known, tables = dump("silu", "add.Tensor"), len(torch.library._impls), threading.active_count()
    for _ in range(1000):
        enable_aten(["silu", "add.Tensor"]).disable()
    assert dump("silu", "add.Tensor") == before
    assert len(torch.library._impls) == known and threading.active_count() == tables


def test_handles_nest_and_end_in_any_order() -> None:
    before = dump("silu", "exp")
    first, second = enable_aten("silu"), enable_aten(["silu", "exp"])
    first.disable()
    first.disable()
    assert "silu" in registered_keys() and "exp" in registered_keys() and "disabled" in repr(first)
    with use_aten("abs"):
        assert "abs" in registered_ops()
    assert "abs" not in registered_ops()
    second.disable()
    assert dump("silu", "exp") == before


def test_an_exception_ends_the_scope() -> None:
    with pytest.raises(ZeroDivisionError), use_aten("silu"):
        raise ZeroDivisionError
    assert registered_keys() == ()


def test_no_aten() -> None:
    x = torch.randn(4)
    with use_aten("silu"), gemskit.interpret(), gemskit.record() as calls:
        with no_aten(), no_aten():
            F.silu(x)
        assert kernels(calls) == []
        F.silu(x)
    assert kernels(calls) == ["silu"]


def test_no_aten_is_for_its_thread() -> None:
    x, found = torch.randn(4), []

    def other() -> None:
        with gemskit.interpret(), gemskit.record() as calls:
            F.silu(x)
        found.append(kernels(calls))

    with use_aten("silu"), no_aten():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [["silu"]]


def test_the_switch_costs_little() -> None:
    x = torch.randn(4)

    def best() -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(100):
                torch.neg(x)
            times.append((time.perf_counter() - start) / 100)
        return min(times)

    plain = best()
    with use_aten("neg"), no_aten():
        through = best()
    # A Python kernel that calls torch's costs 2 to 3 us; the switch itself is one attribute of it.
    assert through - plain < 20e-6, (plain, through)


# -- what torch serves -----------------------------------------------------------------------------------------------------


def test_fallback_is_counted_and_does_not_recurse() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    with use_aten("all") as handle, gemskit.interpret(), gemskit.record() as calls:
        torch.testing.assert_close(torch.sinh(z).real, torch.sinh(z.real) * torch.cos(z.imag))
        assert handle.fallbacks["sinh"] == 1
        assert torch.ones(3, dtype=torch.uint16).eq(1).all()
        assert handle.fallbacks["eq.Scalar"] + handle.fallbacks["eq.Tensor"] >= 1
    assert kernels(calls).count("sinh") == 1, "of the real part"
    assert handle.fallbacks["sinh"] == 1, "what was counted stays"


def test_outside_of_the_interpreter_the_cpu_is_torchs() -> None:
    x = torch.randn(5)
    with use_aten("exp") as handle, gemskit.record() as calls:
        torch.testing.assert_close(torch.exp(x), x.double().exp().float())
    assert handle.fallbacks["exp"] == 2 and calls == []


def test_errors_are_torchs() -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    for call, error, text in (
        (lambda: torch.mm(a, b), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (lambda: a.sum(5), IndexError, "Dimension out of range"),
        (lambda: a.add_(torch.randn(4, 2, 3)), RuntimeError, "output with shape"),
        (lambda: torch.exp(a, out=torch.empty(2, 3, dtype=torch.int64)), RuntimeError, "can't be cast"),
        (lambda: torch.bitwise_not(a), RuntimeError, "not implemented for 'Float'"),
    ):
        with use_aten("all"), gemskit.interpret(), pytest.raises(error, match=re.escape(text)) as caught:
            call()
        assert type(caught.value).__module__ == "builtins"


def test_numbers_in_the_place_of_tensors() -> None:
    """C++ hands numbers on as tensors that are marked; a Python kernel gets numbers, and torch's kernels take none."""
    cases = [
        (torch.ones(2, dtype=torch.int32), 2.5),
        (torch.ones(2, dtype=torch.float16), 2.5),
        (torch.ones((), dtype=torch.float16), 2.5),
        (torch.ones(2, dtype=torch.bool), 2),
        (torch.ones(2, dtype=torch.int8), 300),
        (torch.ones((), dtype=torch.int8), True),
        (torch.ones(2), 1j),
    ]
    for x, n in cases:
        expected = x + n
        for scope in (gemskit.interpret(), no_aten()):
            with use_aten("add"), scope:
                found = x + n, n + x
            for f in found:
                torch.testing.assert_close(f, expected)
    assert wrapped(torch.ones(2), 3)[1].dtype == torch.int64 and wrapped(2.0)[0].dtype == torch.float64


def test_what_the_formatter_of_tensors_needs() -> None:
    with use_aten("all"), gemskit.interpret():
        assert repr(torch.tensor([1.5, float("inf")])) == "tensor([1.5000,    inf])"


# -- torch's modes ---------------------------------------------------------------------------------------------------------


def test_inplace_and_out() -> None:
    with use_aten("all"), gemskit.interpret(), gemskit.record() as calls:
        x = torch.full((4,), -1.0)
        assert x.relu_() is x and float(x[0]) == 0
        out = torch.empty(4)
        assert torch.add(x, 1, out=out) is out and float(out[0]) == 1
        values, indices = torch.empty(2), torch.empty(2, dtype=torch.int64)
        found = torch.topk(torch.tensor([3.0, 1.0, 2.0]), 2, out=(values, indices))
        assert found.values is values and values.tolist() == [3, 2] and indices.tolist() == [0, 2]
        leaf = torch.ones(3, requires_grad=True)
        y = leaf * 2
        y.mul_(3)
        y.sum().backward()
        assert leaf.grad is not None and leaf.grad.tolist() == [6, 6, 6]
        with pytest.raises(RuntimeError, match="leaf Variable"):
            leaf.add_(1)
    assert {"relu", "add", "mul"} <= set(kernels(calls))


def test_a_saved_tensor_that_is_overwritten_is_still_noticed() -> None:
    with use_aten("all"), gemskit.interpret():
        x = torch.randn(3, requires_grad=True)
        y = x.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_inference_mode_and_no_grad() -> None:
    x = torch.randn(4, requires_grad=True)
    with use_aten("all"), gemskit.interpret():
        with torch.inference_mode():
            y = torch.sigmoid(x).add_(1)
            assert y.is_inference() and not y.requires_grad
        with torch.no_grad():
            assert not torch.sigmoid(x).requires_grad
        assert torch.is_grad_enabled() and torch.sigmoid(x).requires_grad


def test_autocast() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = a @ b
        wide = torch.softmax(expected, -1)
        with use_aten("all"), gemskit.interpret():
            found = a @ b
            assert torch.softmax(expected, -1).dtype == wide.dtype
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_subclasses() -> None:
    class Logged(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(4).as_subclass(Logged)
    with use_aten("all") as handle, gemskit.interpret():
        y = torch.exp(x)
    assert type(y) is Logged and Logged.seen.count("exp") == 1
    assert handle.fallbacks["exp"] == 1, "its kind is kept by torch's own kernel"
    with use_aten("all"), gemskit.interpret(), gemskit.record() as calls:
        torch.exp(torch.nn.Parameter(torch.randn(4)))
    assert kernels(calls) == ["exp"]


def test_fake_tensors_meet_no_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with use_aten("all"), gemskit.interpret(), gemskit.record() as calls, FakeTensorMode():
        assert torch.exp(torch.empty(3)).shape == (3,)
        assert F.layer_norm(torch.empty(2, 3), (3,)).shape == (2, 3)
    assert calls == []


def test_function_transforms() -> None:
    x = torch.randn(3, 4)
    expected = torch.func.vmap(torch.func.grad(lambda v: torch.sin(v).sum()))(x)
    tangent = torch.func.jvp(torch.exp, (x,), (x,))
    with use_aten("all"), gemskit.interpret():
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda v: torch.sin(v).sum()))(x), expected)
        for e, f in zip(tangent, torch.func.jvp(torch.exp, (x,), (x,)), strict=True):
            torch.testing.assert_close(f, e)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions(backend: str) -> None:
    x = torch.randn(4, 8, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return torch.softmax(F.silu(x) + 1, -1)

    expected = f(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch._dynamo.reset()
    with use_aten("all"), gemskit.interpret(), gemskit.record() as calls:
        found = torch.compile(f, backend=backend, fullgraph=True)(x)
        (ours,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, grad)
    assert {"silu", "softmax"} <= set(kernels(calls))


def test_compiling_after_the_scope() -> None:
    """What torch.compile remembered of an overload does not outlive it: in a process of its own, as that was a crash."""
    code = """
import torch
from gemskit.compat import use_aten
for _ in range(2):
    with use_aten("all"):
        torch.compile(lambda t: t + 1, backend="aot_eager")(torch.ones(3))
    torch.compile(lambda t: t + 2, backend="aot_eager")(torch.ones(3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_dispatch_modes_see_one_call() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3)
    with use_aten("all"), gemskit.interpret(), gemskit.record() as calls, Count() as mode:
        torch.exp(x)
    assert mode.seen == ["aten.exp.default"] and kernels(calls) == ["exp"]


def test_threads() -> None:
    x = torch.randn(64)
    expected, wrong = torch.exp(x), []

    def work() -> None:
        for _ in range(50):
            with no_aten():
                if not torch.equal(torch.exp(x), expected):
                    wrong.append("no_aten")
            if not torch.equal(torch.exp(x), expected):
                wrong.append("on")

    threads = [threading.Thread(target=work) for _ in range(4)]
    with use_aten("exp") as handle:
        for t in threads:
            t.start()
        for _ in range(20):
            enable_aten(["exp", "sin"]).disable()
        for t in threads:
            t.join()
        assert handle.fallbacks["exp"] == 200
    assert not wrong


# -- notes ----------------------------------------------------------------------------------------------------------------


def test_record(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with use_aten(["silu", "sinh"], record=True, path=path) as handle, gemskit.interpret():
        F.silu(torch.randn(2, 3))
        torch.sinh(torch.randn(2, dtype=torch.complex64))
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"operator": "silu", "arguments": ["float32[2, 3] on cpu"], "kernels": ["silu"]}
    assert second["operator"] == "sinh" and "no kernel" in second["fallback"]
    assert handle.calls == []
    with use_aten("silu", record=True) as handle, gemskit.interpret():
        F.silu(torch.randn(2))
    assert handle.calls[0]["kernels"] == ["silu"]
    with pytest.raises(ArgumentError, match="path="):
        enable_aten("silu", path=path)
