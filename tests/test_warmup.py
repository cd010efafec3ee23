"""`warmup` without a GPU: what it collects, what its workers compile, what ``GEMSKIT_JIT=error`` lets pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gemskit
from gemskit import _driver, _launch, _warmup, backends
from gemskit._warmup import warmup
from gemskit.errors import NoKernel
from gemskit.pointwise._drive import pointwise


@pointwise()
def twice(input: Tensor) -> Tensor:
    """An operator of a user, in a module that workers can import."""
    return input * 2


@twice.formula
@triton.jit
def _(input):
    return input * 2


class Device:
    """What Triton and the driver are asked about a device, answered for sm_90; binaries are counted, not loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: {"max_shared_mem": 232448}, load_binary=self._load_binary
        )

    def _load_binary(self, name: str, *rest: Any) -> tuple[None, int, int, int, int]:
        self.loaded.append(name)
        return None, len(self.loaded), 0, 0, 0

    def get_current_device(self) -> int:
        # Of one test alone: Triton keeps its compiled kernels per device.
        return id(self)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    found = Device()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(_driver, "entry", lambda: lambda *one: None)
    monkeypatch.setattr(_driver, "stream", lambda index: 0)
    monkeypatch.setattr(_driver, "_loaded", {})
    with backends.use_arch("sm_90"):
        yield found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _gated(x: Tensor, y: Tensor) -> Tensor:
    return gemskit.mul(gemskit.sigmoid(x), y)


INT = torch.int64
CALLS: dict[str, tuple[Any, ...]] = {
    "mm": (gemskit.mm, (meta(64, 48), meta(48, 20))),
    "transposed": (gemskit.mm, (meta(48, 64).t(), meta(48, 20))),
    "unaligned": (gemskit.add, (meta(65)[1:], meta(64))),
    "broadcast": (gemskit.mul, (meta(8, 1, 33), meta(5, 1))),
    "in place": (gemskit.add_, (meta(64, 64), meta(64)), {"alpha": 0.5}),
    "in place, product": (gemskit.addmm_, (meta(16, 16), meta(16, 32), meta(32, 16))),
    "out": (gemskit.add, (meta(4, 4), meta(4)), {"out": meta(4, 4)}),
    "outs": (gemskit.max, (meta(8, 33), 1), {"out": (meta(8), meta(8, dtype=INT))}),
    "max": (gemskit.max, (meta(8, 33), 1)),
    "softmax": (gemskit.softmax, (meta(8, 1000), -1)),
    "rms_norm": (gemskit.rms_norm, (meta(8, 256), (256,), meta(256))),
    "embedding": (gemskit.embedding, (meta(10, dtype=INT), meta(100, 64))),
    "cross_entropy": (gemskit.cross_entropy, (meta(16, 100), meta(16, dtype=INT))),
    "dropout": (gemskit.dropout, (meta(4096), 0.25)),
    "dropout in place": (gemskit.dropout_, (meta(4096), 0.25)),
    "attention": (gemskit.scaled_dot_product_attention, (meta(1, 2, 64, 64),) * 3, {"is_causal": True}),
    "attention, dropped": (gemskit.scaled_dot_product_attention, (meta(1, 2, 64, 64),) * 3, {"dropout_p": 0.1}),
    "one of two": (gemskit.mul, (meta(8, 33), meta(8, 33, grad=True))),
    "composed": (_gated, (meta(8, 33), meta(8, 33))),
    "bool": (gemskit.eq, (meta(33), meta(33))),
}


def _real(v: Any) -> Any:
    """A CPU tensor for each of ``meta``, at the same place in memory of its own."""
    if isinstance(v, Tensor):
        memory = torch.empty(v.untyped_storage().nbytes() // v.element_size(), dtype=v.dtype)
        return memory.as_strided(v.shape, v.stride(), v.storage_offset())
    return tuple(map(_real, v)) if isinstance(v, tuple) else v


def _launched(fn: Callable[..., Any], args: Any, kwargs: Any = {}) -> set[Any]:  # noqa: B006
    """What the call itself launches, and its gradient where it has one."""
    found: set[Any] = set()

    def receive(kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
        found.add((kernel, _driver.specialisation(kernel, args)[0], tuple(meta.items())))

    wanted = [isinstance(t, Tensor) and t.requires_grad for t in args]
    with _launch.capturing(receive):
        fn(*_real(args), **{n: _real(v) for n, v in kwargs.items()})
        if "out" not in kwargs:
            given = _real(tuple(args))
            op = _warmup._operator(fn)
            for n, v in enumerate(given):
                taken = wanted[n] if any(wanted) else op is None or op.params[n] in op.differentiable
                if isinstance(v, Tensor) and v.dtype.is_floating_point and taken:
                    # No leaf, as it may be overwritten.
                    v.add_(torch.zeros((), dtype=v.dtype, requires_grad=True))
            result = fn(*given, **kwargs)
            outs = [t for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad]
            if outs:
                torch.autograd.backward(outs, [torch.empty_like(t) for t in outs])
    return found


@pytest.mark.parametrize("name", list(CALLS))
def test_what_is_warmed_is_what_is_launched(name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name]
    warmed: set[Any] = set()

    def load(kernel: Any, key: Any, args: Any, meta: dict[str, Any], device: torch.device) -> None:
        warmed.add((kernel, key, tuple(meta.items())))

    monkeypatch.setattr(_driver, "load", load)
    monkeypatch.setattr(_warmup._Need, "is_cached", lambda self: True)
    report = warmup([call])
    assert not report.not_warmed and report.kernels == len(warmed)
    assert warmed and warmed == _launched(*call)
    real = warmed.copy()
    warmup([(call[0], _real(call[1]), *[{n: _real(v) for n, v in kwargs.items()} for kwargs in call[2:]])])
    if not any(isinstance(t, Tensor) and t.requires_grad for t in call[1]):
        assert warmed == real, "tensors of the device need other kernels than those on meta"


def test_gradients_are_warmed_where_asked_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_driver, "load", lambda *given: None)
    monkeypatch.setattr(_warmup._Need, "is_cached", lambda self: True)
    x, y = meta(64, 64), meta(64, 64, grad=True)
    assert warmup([(gemskit.mul, (x, x))], gradients=False).kernels == 1
    assert warmup([(gemskit.mul, (x, x))]).kernels == 2
    assert warmup([(gemskit.mul, (x, y))], gradients=False).kernels == 2
    assert y.grad is None


def test_workers_fill_the_cache(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = meta(64)
    calls = [(twice, (x,)), (gemskit.neg_, (x,)), (gemskit.dropout, (x,))]
    hits: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: hits.append(what["cache_hit"]))
    report = warmup(calls, jobs=2)
    assert not report.not_warmed and report.jobs == 2
    # Those of the calls and the gradient of neg: the gradient of a dropout is its kernel again.
    assert report.kernels == report.compiled == len(hits) == len(device.loaded) == 4
    assert all(hits), "the parent compiled what the workers had compiled: their keys differ"
    again = warmup([*calls, (lambda x: gemskit.neg_(x), (x,))], jobs=2)
    assert (again.kernels, again.compiled) == (report.kernels, 0) and len(device.loaded) == report.kernels


def test_workers_that_do_not_start_are_told_of(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.warns(UserWarning, match="no worker could start"):
        report = warmup([(gemskit.neg, (meta(64),))], jobs=2)
    assert report.kernels == len(device.loaded) == 2 and not report.not_warmed


def test_the_cache_on_disk_is_looked_at(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [(gemskit.neg, (meta(64),))]
    assert warmup(calls, jobs=1, gradients=False).compiled == 1
    # Another process: nothing in memory.
    monkeypatch.setattr(driver, "_active", Device())
    monkeypatch.setattr(_driver, "_loaded", {})
    again = warmup(calls, jobs=1, gradients=False)
    assert (again.kernels, again.compiled) == (1, 0)


def test_the_guard_lets_pass_what_was_warmed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_driver, "_jit_error", True)
    assert not warmup([(gemskit.mul, (meta(64, dtype=torch.float32), 2.5))], jobs=1, gradients=False).not_warmed
    assert _driver._jit_error, "the guard is up again"

    def receive(kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
        _driver.prepare(kernel, grid, args, meta, torch.device("cpu"))

    # Not capturing(), which replays nothing: the second call is learnt, the third replayed.
    monkeypatch.setattr(_launch, "_capture", receive)
    for factor in (2.5, 3.5, 1.0, -2.0):
        gemskit.mul(torch.ones(64), factor)
    gemskit.mul(torch.ones(48), 3.5)
    with pytest.raises(NoKernel, match=r"mul: .*GEMSKIT_JIT=error.*warmup"):
        gemskit.mul(torch.ones(64, dtype=torch.float64), 2.5)
    with pytest.raises(NoKernel, match="neg: "):
        gemskit.neg(torch.ones(64))


def test_reasons(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(x: Tensor) -> Tensor:
        return gemskit.neg(x) if x.sum().item() else x

    x = meta(64)
    calls = [(reads, (x,)), (gemskit.mm, (x, x)), (gemskit.softmax, (meta(4, 2**20), -1)), (gemskit.neg, (x,))]
    device.utils.get_device_properties = lambda index: {"max_shared_mem": 8}
    report = warmup(calls, jobs=1, gradients=False)
    first, second, *rest = report.not_warmed
    assert first[0] == "reads(bfloat16[64] on meta)" and "item" in first[1]
    assert second[0].startswith("mm(") and second[1].startswith("ArgumentError: mm: ")
    assert any("shared memory" in why for _, why in rest)
    assert "not warmed: reads(" in str(report)


def test_without_an_accelerator_nothing_is_warmed() -> None:
    if backends.vendor.device_type != "cpu":
        pytest.skip("there is an accelerator")
    report = warmup([(gemskit.neg, (torch.ones(3),))])
    assert report.kernels == 0 and "no accelerator" in report.not_warmed[0][1]
