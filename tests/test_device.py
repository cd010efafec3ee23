"""Safe in a real process: devices, streams, captured graphs, threads, processes and memory, on an accelerator.

Every test stands alone, and calls an operator often enough that what is remembered of its calls serves the last ones.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from device_calls import (
    WARM,
    change,
    close,
    each_way,
    forward,
    in_order,
    needs_device,
    repeat,
    same,
    sample_of,
    step,
    tensors,
    warmed,
)  # fmt: skip
from torch import Tensor

import gemskit
from gemskit import errors
from gemskit._op import REGISTRY
from gemskit.pointwise import pointwise

__all__ = ["warmed"]  # a fixture

pytestmark = [needs_device, pytest.mark.usefixtures("warmed")]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two accelerators")

ROOT = Path(__file__).parents[1]


# -- devices and streams -----------------------------------------------------------------------------------------------


@two_devices
@each_way("tensors_on_another_device")
def test_tensors_on_another_device(name: str, backward: bool) -> None:
    """Compiled and remembered for the current device first; then the tensors are elsewhere."""
    with torch.cuda.device(0):
        want = repeat(step(name, backward, sample_of(name, "cuda:0")))
        call = step(name, backward, sample_of(name, "cuda:1"))
        for _ in range(WARM):
            got = call()
            assert torch.cuda.current_device() == 0
        assert {g.device for g in got} == {torch.device("cuda:1")}
        close([g.to("cuda:0") for g in got], want)


@each_way("launches_are_on_the_current_stream")
def test_launches_are_on_the_current_stream(name: str, backward: bool) -> None:
    """Where other values arrive late: on any other stream the call would see the old ones."""
    sample, other = sample_of(name), sample_of(name, seed=1)
    call = step(name, backward, sample)
    want = repeat(step(name, backward, other))
    repeat(call)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(40_000_000)  # some 20 ms
        change(sample, other)
        got = call()
    assert not stream.query(), "the call waited for the device, or the delay is too short"
    stream.synchronize()
    same(got, want)


def test_two_streams_do_not_share_scratch() -> None:
    def calls(x: Tensor) -> list[Tensor]:
        m = x.view(512, 512)
        found = [gemskit.sum(x), gemskit.cumsum(x, 0), gemskit.softmax(x.view(4, -1), 1), gemskit.mm(m, m)]
        return [*found, gemskit.sum(m, 0), gemskit.argmax(x)]

    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.randn(1 << 18, device="cuda") * (k + 1) for k in range(2)]
    want = [calls(x) for x in inputs]
    torch.cuda.synchronize()
    for _ in range(100):
        got: list[list[Tensor]] = [[], []]
        for k, (stream, x) in enumerate(zip(streams, inputs)):
            with torch.cuda.stream(stream):
                got[k] = calls(x)
        torch.cuda.synchronize()
        same(got[0] + got[1], want[0] + want[1])


# -- captured graphs -----------------------------------------------------------------------------------------------------


@each_way("graph")
def test_graph(name: str, backward: bool) -> None:
    sample, other = sample_of(name), sample_of(name, seed=1)
    call, side, graph = step(name, backward, sample), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        repeat(call)
    with torch.cuda.graph(graph, stream=side):
        got = call()
    change(sample, other)
    graph.replay()
    same(got, step(name, backward, other)())
    if not backward and not REGISTRY[name].random:
        with in_order(name):
            close(got, forward(REGISTRY[name].meaning, other))


@pointwise()
def cold_probe(input: Tensor) -> Tensor:
    """``input * 3 + 1``, which one test alone calls."""
    return input * 3 + 1


@cold_probe.formula
@triton.jit
def _(input):
    return input * 3 + 1


def test_a_cold_call_in_a_capture_is_refused_and_harmless() -> None:
    x = torch.ones(64, device="cuda")
    for _ in range(WARM):
        gemskit.exp(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(errors.CaptureError, match="cold_probe"):
            cold_probe(x)
        got = gemskit.exp(x)
    x.fill_(2)
    graph.replay()
    close([got], [torch.exp(x)])

    same([cold_probe(x)], [x * 3 + 1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cold_probe(x)
    x.fill_(5)
    graph.replay()
    assert got.eq(16).all()


@each_way("no_call_waits_for_the_device")
def test_no_call_waits_for_the_device(name: str, backward: bool) -> None:
    call = step(name, backward, sample_of(name))
    repeat(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- threads and processes -----------------------------------------------------------------------------------------------

#: What a process does: calls of several families, each checked against torch; ``run(k)`` starts with the k-th.
CALLS = """
import os, sys, threading
import torch, gemskit

def calls(device):
    g = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(s, generator=g).to(device) for s in ((33, 64), (64, 48), (64,)))
    F = torch.nn.functional
    return [
        lambda: (gemskit.softmax(x, 1), torch.softmax(x, 1)),
        lambda: (gemskit.mm(x, y), torch.mm(x, y)),
        lambda: (gemskit.silu(x), F.silu(x)),
        lambda: (gemskit.sum(x, 0), torch.sum(x, 0)),
        lambda: (gemskit.add(x, w), torch.add(x, w)),
        lambda: (gemskit.rms_norm(x, (64,), w, 1e-5), F.rms_norm(x, (64,), w, 1e-5)),
        lambda: (gemskit.where(x > 0, x, 0), torch.where(x > 0, x, 0)),
    ]

def run(k, device="cuda", count=8):
    todo = calls(device)
    for i in range(count):
        call = todo[(i + k) % len(todo)]
        for _ in range(4):
            got, want = call()
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

def threads(same):
    failed, barrier = [], threading.Barrier(8)
    def start(k):
        barrier.wait()
        try:
            run(0 if same else k)
        except BaseException as e:
            failed.append(repr(e))
    started = [threading.Thread(target=start, args=(k,)) for k in range(8)]
    for t in started: t.start()
    for t in started: t.join()
    assert not failed, failed

def forks():
    assert not torch.cuda.is_initialized(), "the import has initialised CUDA"
    children = []
    for k in range(2):
        if not (pid := os.fork()):
            try:
                run(k, count=3)
            except BaseException as e:
                print(repr(e), flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert not torch.cuda.is_initialized()
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]

eval(sys.argv[1])
"""


def finish(cache: Path, triton_cache: Path, *calls: str) -> None:
    """Evaluate each call in a process of its own, all at once; none may fail."""
    env = {**os.environ, "GEMSKIT_NATIVE": "", "GEMSKIT_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(triton_cache)}
    with contextlib.ExitStack() as stack:
        # Files, not pipes: what a child builds in the background would hold a pipe open.
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in calls]
        started = []
        for call, log in zip(calls, logs):
            command = [sys.executable, "-c", CALLS, call]
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
            stack.callback(started[-1].kill)
        codes = [p.wait(timeout=150) for p in started]
        bad = [log for code, log in zip(codes, logs) if code]
        if bad:
            bad[0].seek(0)
            pytest.fail(f"{len(bad)} of {len(calls)} processes failed, the first: {bad[0].read()[-1500:]}")


@pytest.mark.parametrize("alike", [True, False])
def test_threads_with_cold_caches(alike: bool, tmp_path: Path) -> None:
    finish(tmp_path / "g", tmp_path / "t", f"threads({alike})")


def test_forks_compute(tmp_path: Path) -> None:
    finish(tmp_path / "g", tmp_path / "t", "forks()")


def test_processes_share_cold_then_corrupt_caches(tmp_path: Path) -> None:
    """Sixteen at once on empty caches; then four on a gemskit cache whose every file is cut short."""
    caches = tmp_path / "g", tmp_path / "t"
    finish(*caches, *(f"run({k}, count=3)" for k in range(16)))
    for file in (f for f in caches[0].rglob("*") if f.is_file()):
        with contextlib.suppress(FileNotFoundError):
            file.chmod(0o644)
            file.write_bytes(file.read_bytes()[:7])
    finish(*caches, *(f"run({k}, count=3)" for k in range(4)))


def test_processes_with_read_only_caches(tmp_path: Path) -> None:
    """The gemskit cache cannot be made (not even by root); then both are there and cannot be written."""
    (tmp_path / "file").write_text("")
    caches = tmp_path / "g", tmp_path / "t"
    finish(tmp_path / "file" / "g", caches[1], "run(0, count=3)")
    finish(*caches, "run(0, count=3)")
    folders = [d for c in caches if c.exists() for d in (c, *(p for p in c.rglob("*") if p.is_dir()))]
    try:
        for d in folders:
            d.chmod(0o500)
        finish(*caches, *["run(0, count=3)"] * 4)
    finally:
        for d in folders:
            d.chmod(0o700)


def test_a_fresh_thread() -> None:
    """One that has no context of the device yet: the first thing it does is a call, remembered or not."""
    x = torch.randn(37, 64, device="cuda")
    for _ in range(WARM):
        gemskit.softmax(x, 1)
    torch.cuda.synchronize()
    got: list[Tensor] = []
    todo = (lambda: gemskit.softmax(x, 1), lambda: gemskit.log_softmax(x, 1), lambda: gemskit.add_(x.clone(), 1.0))
    for call in todo:
        thread = threading.Thread(target=lambda call=call: got.append(call()))
        thread.start()
        thread.join()
    close(got, [torch.softmax(x, 1), torch.log_softmax(x, 1), x + 1.0])


# -- repeats and memory ------------------------------------------------------------------------------------------------


@each_way("repeats_are_bitwise_equal")
def test_repeats_are_bitwise_equal(name: str, backward: bool) -> None:
    call = step(name, backward, sample_of(name))
    first = call()
    for _ in range(50):
        same(call(), first)


LARGE: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "sum all": lambda make: gemskit.sum(make(1 << 22)),
    "argmax": lambda make: gemskit.argmax(make(4, 300_001), 1),
    "cumsum": lambda make: gemskit.cumsum(make(3, 300_001), 1),
    "softmax": lambda make: gemskit.softmax(make(64, 131_072), 1),
    "mm": lambda make: gemskit.mm(make(1000, 1100), make(1100, 900)),
    "mm of one row": lambda make: gemskit.mm(make(1, 8192), make(8192, 512)),
    "attention": lambda make: gemskit.scaled_dot_product_attention(*(make(1, 4, 1000, 64) for _ in range(3))),
}


@pytest.mark.parametrize("what", LARGE)
def test_large_repeats_are_bitwise_equal(what: str) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(3))

    first = LARGE[what](make)
    for _ in range(50):
        same([LARGE[what](make)], [first])


def test_ordered_gradients_where_torch_is_told_so() -> None:
    index = torch.randint(0, 5, (4000,), device="cuda")
    weight = torch.randn(5, 64, device="cuda", requires_grad=True)
    grad = torch.randn(4000, 64, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        found = [torch.autograd.grad(gemskit.embedding(index, weight), weight, grad)[0] for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    same(found, found[:1] * 20)


@each_way("no_tensor_is_kept_alive")
def test_no_tensor_is_kept_alive(name: str, backward: bool) -> None:
    def call() -> list[weakref.ref[Tensor]]:
        sample = sample_of(name)
        return [weakref.ref(t) for t in (*step(name, backward, sample)(), *tensors(sample))]

    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    refs = call()
    torch.cuda.synchronize()
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)
    assert torch.cuda.memory_allocated() <= before


def resident() -> float:
    """MiB of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_ten_thousand_shapes_cost_no_memory() -> None:
    x, sizes = torch.ones(10_001, device="cuda"), []
    for half in (range(1, 5001), range(5001, 10_001)):
        for n in half:
            gemskit.add(x[:n], 1.0)
            gemskit.sum(x[:n])
        torch.cuda.synchronize()
        gc.collect()
        sizes.append(resident())
    assert sizes[1] - sizes[0] < 100


# -- compilation and modes of torch ------------------------------------------------------------------------------------


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles, or loads from its cache, in this scope."""
    seen: list[str] = []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **facts: seen.append(facts["src"].name)
    try:
        yield seen
    finally:
        triton.knobs.compilation.listener = before


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


#: Calls by an int that batches and sequences change.
SIZED: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "softmax rows": lambda n: ((x := _randn(n, 64)).softmax(1), gemskit.softmax(x, 1)),
    "softmax columns": lambda n: ((x := _randn(8, n)).softmax(1), gemskit.softmax(x, 1)),
    "silu": lambda n: (torch.nn.functional.silu(x := _randn(n, 33)), gemskit.silu(x)),
    "sum": lambda n: ((x := _randn(n, 64)).sum(1), gemskit.sum(x, 1)),
    "rms_norm": lambda n: (
        torch.nn.functional.rms_norm(x := _randn(2, n, 64), (64,), None, 1e-5), gemskit.rms_norm(x, (64,), None, 1e-5)
    ),
    "mm": lambda n: (torch.mm(x := _randn(n, 64), y := _randn(64, 64)), gemskit.mm(x, y)),
    "attention": lambda n: (
        torch.nn.functional.scaled_dot_product_attention(x := _randn(2, 2, n, 64), x, x, is_causal=True),
        gemskit.scaled_dot_product_attention(x, x, x, is_causal=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SIZED)
def test_sizes_do_not_recompile(what: str) -> None:
    """Within one power of two: a size may choose a tile, and 16 may divide it, but nothing else of it matters."""
    for n in (65, 72, 80, 81, 96, 97, 104, 112, 113, 128):
        SIZED[what](n)
    with compilations() as compiled:
        for n in (66, 70, 77, 82, 90, 95, 96, 100, 106, 111, 112, 115, 120, 127):
            want, got = SIZED[what](n)
            close([got], [want])
    assert not compiled


def test_the_counter_of_compilations_counts() -> None:
    with compilations() as compiled:
        gemskit.softmax(_randn(3, 5, 7).double().transpose(0, 2), 1)
    assert compiled


def test_numbers_neither_recompile_nor_are_remembered() -> None:
    x, w = _randn(33, 64), _randn(64)
    F = torch.nn.functional

    def pairs(v: float) -> Iterator[tuple[Tensor, Tensor]]:
        yield gemskit.add(x, v), torch.add(x, v)
        yield gemskit.mul(x, v), torch.mul(x, v)
        yield gemskit.clamp(x, -v, v), torch.clamp(x, -v, v)
        yield gemskit.rms_norm(x, (64,), w, v), F.rms_norm(x, (64,), w, v)
        yield gemskit.addmm(x, x, x.T @ x, beta=v, alpha=0.5), torch.addmm(x, x, x.T @ x, beta=v, alpha=0.5)

    for _ in range(WARM):
        list(pairs(0.75))
    with compilations() as compiled:
        for v in (0.1, 0.3, 1.5, 2.5, 1e-3):
            for got, want in pairs(v):
                close([got], [want])
    assert not compiled


def test_alignment_is_not_remembered() -> None:
    """An address that 16 does not divide needs another kernel than one that it does."""
    memory = _randn(64 * 33 + 4)
    for offset in (0, 1, 4, 2, 0, 3, 1):
        x = memory[offset : offset + 64 * 33].view(33, 64)
        for _ in range(WARM):
            close([gemskit.add(x, 1.0), gemskit.softmax(x, 1)], [x + 1.0, x.softmax(1)])


def test_autocast_changes_nothing() -> None:
    """A call computes in the dtypes that it is given."""
    x, w = _randn(33, 64).requires_grad_(), _randn(48, 64).requires_grad_()

    def call() -> list[Tensor]:
        y = gemskit.linear(x, w)
        found = [y, gemskit.softmax(x.detach().half(), 1), gemskit.silu(x), gemskit.layer_norm(x, (64,))]
        return [*found, *torch.autograd.grad(y.square().sum(), (x, w))]

    want = call()
    with torch.autocast("cuda", torch.bfloat16):
        got = [call() for _ in range(WARM)]
    for g in got:
        assert [t.dtype for t in g] == [torch.float32, torch.float16, *[torch.float32] * 4]
        same(g, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    """Before and after calls with a gradient, which remember something else."""
    x = _randn(33, 64).requires_grad_()
    want = torch.softmax(x, 1).detach()
    for _ in range(WARM):
        with mode():
            y = gemskit.softmax(x, 1)
            z = gemskit.add_(torch.ones_like(x), 1.0)
        assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
        close([y, z], [want, torch.full_like(want, 2.0)])
        tracked = gemskit.softmax(x, 1)
        assert tracked.requires_grad and not tracked.is_inference()
        torch.autograd.grad(tracked, x, want)
