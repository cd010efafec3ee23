"""`warmup`: every kernel that given calls need, compiled in parallel and loaded before the first of them is made.

The host code of a call runs on ``meta`` stand-ins, as replays are traced, and its launches are written down: nothing runs on
the device. What is not in Triton's cache on disk is compiled there by worker processes, which make the same stand-ins and the
same launches for the same target and touch no device. The parent then loads the kernels under the keys that calls look up.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from gemskit import _driver, _launch, backends
from gemskit._checks import describe
from gemskit._op import REGISTRY, Op

_triton: Any = triton
#: Fewer kernels than this are compiled in this process: others first import torch and make the calls, which takes as long.
FEW = 16


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did; ``print`` it."""

    #: Distinct kernels that the calls need, loaded now.
    kernels: int
    #: Those of them that were in no cache.
    compiled: int
    #: Processes that compiled them; 1 is this one alone.
    jobs: int
    seconds: float
    #: Calls that may still compile, and why.
    not_warmed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        text = f"{self.kernels} kernels, {self.compiled} compiled by {self.jobs} processes in {self.seconds:.1f} s"
        return "\n".join((text, *(f"not warmed: {call}: {why}" for call, why in self.not_warmed)))


def warmup(calls: Iterable[Sequence[Any]], *, jobs: int | None = None, gradients: bool = True) -> Warmup:
    """Compile and load every kernel that ``calls`` need, so that they compile nothing later.

    A call is ``(function, args)`` or ``(function, args, kwargs)``: an operator, its in-place variant, or any function that
    calls operators on the tensors in its arguments. Nothing is computed and no tensor is changed. Tensors on ``"meta"`` stand
    for tensors of the current device that begin at a multiple of 16 bytes, as allocations do.

    Example::

        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        report = gemskit.warmup([
            (gemskit.linear, (meta(tokens, 4096), meta(11008, 4096))) for tokens in (1, 7, 16, 512)
        ])
        assert not report.not_warmed, report

    With ``GEMSKIT_JIT=error`` in the environment a later call that would compile or load a kernel raises `NoKernel`, and
    calls that were warmed pass, on devices whose driver is called directly (NVIDIA, AMD).

    Guaranteed are calls with the same shapes, strides, dtypes, alignment, devices, numbers and torch settings. Others are
    served too where they come to the same tiles and to sizes and strides of the same class: 1, multiples of 16, the rest, and
    over 31 bits. Give one call of each class that occurs, such as the token counts above; numbers such as ``alpha`` need only
    one. Where an argument requires a gradient, the kernels for exactly those arguments are made as well; with ``gradients``
    and where none does, those for all differentiable arguments. The gradient that comes in is taken to be laid out as the
    result.

    Args:
        jobs: processes that compile, by default the number of CPUs, at most 16 and fewer for few kernels; 1 is this
            process. Functions that no other process can import (those of ``__main__``, lambdas) are compiled here.
        gradients: whether gradients are made ready for calls in which no argument requires one.
    """
    start = time.perf_counter()
    failed: list[tuple[str, str]] = []
    needed: dict[Any, _Need] = {}
    for fn, args, *rest in calls:
        kwargs: dict[str, Any] = rest[0] if rest else {}
        name = _named(fn, args, kwargs)
        try:
            device = _device((*args, *kwargs.values()))
            with _launch.guard(device):
                for call in _descriptions(fn, args, kwargs, gradients):
                    for n, (kernel, given, meta) in enumerate(launches(call, fn)):
                        key = (device, id(kernel), _driver.specialisation(kernel, given)[0], tuple(meta.items()))
                        if key not in needed:
                            needed[key] = _Need(kernel, given, meta, device, call, n, fn, name)
        except Exception as e:
            failed.append((name, f"{type(e).__name__}: {e}"))
    missing = [need for need in needed.values() if not need.is_cached()]
    told: dict[_Call, tuple[bytes | None, list[int]]] = {}
    for need in missing:
        if need.call not in told:
            told[need.call] = need.described(), []
        told[need.call][1].append(need.number)
    elsewhere = [(data, numbers) for data, numbers in told.values() if data is not None]
    count = sum(len(numbers) for _, numbers in elsewhere)
    jobs = min(os.cpu_count() or 1, 16 if count >= FEW else 1) if jobs is None else jobs
    jobs = max(1, min(jobs, count))
    if jobs > 1 and sys.executable:
        _compile_in_workers(elsewhere, jobs)
    before, _driver._jit_error = _driver._jit_error, False
    try:
        for need in needed.values():
            try:
                need.load()
            except Exception as e:
                failed.append((need.name, f"{type(e).__name__}: {e}"))
    finally:
        _driver._jit_error = before
    return Warmup(len(needed), len(missing), jobs, time.perf_counter() - start, tuple(dict.fromkeys(failed)))


def _named(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    parts = [*map(describe, args), *(f"{n}={describe(v)}" for n, v in kwargs.items())]
    return f"{getattr(fn, '__name__', fn)}({', '.join(parts)})"


def _device(given: Sequence[Any]) -> torch.device:
    """The device whose kernels a call needs."""
    kind = backends.vendor.device_type
    if kind == "cpu":
        if backends.forced() is None:
            raise RuntimeError(
                "there is no accelerator; CPU tensors run the meaning in plain torch, which compiles nothing"
            )
        return torch.device("cpu")
    tensors = list(_tensors(given))
    for t in tensors:
        if t.device.type == kind:
            return t.device
    if all(t.device.type != "meta" for t in tensors):
        raise RuntimeError(f"its tensors are neither on {kind!r} nor on 'meta', so no kernel runs")
    return torch.device(kind, _launch.current_device())


def _tensors(v: Any) -> Iterator[Tensor]:
    if isinstance(v, Tensor):
        yield v
    elif isinstance(v, (tuple, list, dict)):
        for x in v.values() if isinstance(v, dict) else v:
            yield from _tensors(x)


# -- calls as data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Like:
    """A tensor as far as kernels depend on it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    #: Its memory: a number within the call, bytes, and the address modulo 16.
    memory: tuple[int, int, int]
    grad: bool


@dataclass(frozen=True, eq=False)
class _Call:
    """A call that any process can make on stand-ins."""

    args: Any
    kwargs: Any
    training: bool
    row: backends.Arch = field(default_factory=backends.arch)
    tf32: bool = field(default_factory=_driver.tf32)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)


def _descriptions(fn: Any, args: Sequence[Any], kwargs: dict[str, Any], gradients: bool) -> Iterator[_Call]:
    """The call without gradients, and with those that it can have."""
    wanted = {id(t) for t in _tensors((args, kwargs)) if t.requires_grad}
    if not wanted and gradients and kwargs.get("out") is None:
        op, chosen = _operator(fn), _tensors((args, kwargs))
        if op is not None:
            bound = op.signature.bind(*args, **kwargs).arguments
            chosen = _tensors([bound.get(n) for n in op.differentiable])
        wanted = {id(t) for t in chosen if t.dtype.is_floating_point}
    for training in (False, True) if wanted else (False,):
        seen: dict[Any, Any] = {}
        yield _Call(_like(tuple(args), wanted, seen), _like(kwargs, wanted, seen), training)


def _operator(fn: Any) -> Op[..., Any] | None:
    """The operator that ``fn`` is, or whose in-place variant it is."""
    if isinstance(fn, Op):
        return fn
    module, name = sys.modules.get(getattr(fn, "__module__", "")), getattr(fn, "__name__", "")
    for op in (*REGISTRY.values(), getattr(module, name[:-1], None)):
        if isinstance(op, Op) and vars(op).get("inplace") is fn:
            return op
    return None


def _like(v: Any, wanted: set[int], seen: dict[Any, Any]) -> Any:
    if isinstance(v, Tensor):
        if id(v) not in seen:
            memory = v.untyped_storage()
            number = seen.setdefault(("memory", memory._cdata), len(seen))
            where = number, memory.nbytes(), 0 if v.is_meta else memory.data_ptr() % 16
            shape, stride = tuple(v.shape), tuple(v.stride())
            seen[id(v)] = _Like(v.dtype, shape, stride, int(v.storage_offset()), where, id(v) in wanted)
        return seen[id(v)]
    if isinstance(v, dict):
        return {n: _like(x, wanted, seen) for n, x in v.items()}
    if isinstance(v, (tuple, list)) and next(_tensors(v), None) is not None:
        return (list if isinstance(v, list) else tuple)(_like(x, wanted, seen) for x in v)
    return v


class _StandIns:
    """Tensors on ``meta`` for one call: what shares memory there shares it here."""

    def __init__(self, training: bool) -> None:
        self.training = training
        #: Addresses modulo 16, by storage.
        self.addresses: dict[int, int] = {}
        self._memory: dict[int, Any] = {}
        self._made: dict[int, Tensor] = {}

    def __call__(self, v: Any) -> Any:
        if isinstance(v, _Like):
            if id(v) not in self._made:
                self._made[id(v)] = self._make(v)
            return self._made[id(v)]
        if isinstance(v, dict):
            return {n: self(x) for n, x in v.items()}
        return type(v)(map(self, v)) if type(v) in (tuple, list) else v

    def _make(self, like: _Like) -> Tensor:
        number, size, address = like.memory
        if number not in self._memory:
            self._memory[number] = torch.UntypedStorage(size, device="meta")  # type: ignore[no-untyped-call]
        memory = self._memory[number]
        self.addresses[memory._cdata] = address
        t = torch.empty(0, dtype=like.dtype, device="meta").set_(memory, like.offset, like.shape, like.stride)
        if self.training and like.grad:
            if any(n > 1 and s == 0 for n, s in zip(like.shape, like.stride)):
                return t.requires_grad_()
            # No leaf, so that it may be overwritten.
            t.add_(torch.empty((), dtype=like.dtype, device="meta", requires_grad=True))
        return t

    def reference(self, v: Any) -> Any:
        """What `_driver` specialises on and Triton compiles for."""
        if isinstance(v, Tensor):
            address = self.addresses.get(v.untyped_storage()._cdata, 0) + v.storage_offset() * v.element_size()
            return _driver.Ref(0, 0, v.dtype, address % 16 == 0, _driver.near(v.shape, v.stride(), v.dtype))
        return tuple(map(self.reference, v)) if isinstance(v, tuple) else v


def launches(call: _Call, fn: Callable[..., Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What ``fn`` launches in ``call``: kernels, arguments with references, options."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    stand = _StandIns(call.training)

    def receive(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        found.append((kernel, tuple(map(stand.reference, args)), meta))

    with torch.inference_mode(False), torch.set_grad_enabled(call.training):
        args, kwargs = stand(call.args), stand(call.kwargs)
        with _launch.paused(), _launch.tracing(receive):
            result = fn(*args, **kwargs)
            outs = [t for t in _tensors(result) if t.requires_grad]
            if outs:
                torch.autograd.backward(outs, [torch.empty_like(t) for t in outs])
    return found


# -- compiling and loading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Need:
    """A kernel that is needed: launch ``number`` of ``call``."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]
    device: torch.device
    call: _Call
    number: int
    fn: Any
    name: str

    def load(self) -> None:
        with _launch.guard(self.device):
            if _driver.entry() is None:
                _driver.compile(self.kernel, self.args, self.meta)
            else:
                key, _ = _driver.specialisation(self.kernel, self.args)
                _driver.load(self.kernel, key, self.args, self.meta, self.device)

    def is_cached(self) -> bool:
        """Whether Triton has it, in memory or on disk. A wrong no costs time only."""
        probe: Any = _Probe()
        try:
            from triton.runtime import _async_compile, cache

            before = _async_compile.active_mode.set(probe)
        except Exception:
            return False
        try:
            with _launch.guard(self.device):
                _driver.compile(self.kernel, self.args, self.meta)
            return True
        except _Stop:
            manager = cache.get_cache_manager(hashlib.sha256(probe.key.encode()).hexdigest())
            return manager.get_group(f"{self.kernel.fn.__name__[:150]}.json") is not None
        except Exception:
            return False
        finally:
            _async_compile.active_mode.reset(before)

    def described(self) -> bytes | None:
        """The call and its target for a worker; None if no other process can make it."""
        where = _importable(self.fn)
        if where is None:
            return None
        with _launch.guard(self.device):
            target: Any = triton.runtime.driver.active.get_current_target()
        try:
            return pickle.dumps((where, self.call, (target.backend, target.arch, target.warp_size)))
        except Exception:
            return None


class _Stop(Exception):
    """Raised where Triton would compile."""


class _Probe:
    """In the place of Triton's mode for compiling in the background: learns the key in the cache on disk."""

    key = ""

    def submit(self, key: str, *rest: Any) -> Any:
        self.key = key
        raise _Stop


def _importable(fn: Any) -> tuple[str, str, bool] | None:
    """Module, name, and whether it is the in-place variant of what has that name."""
    op = _operator(fn)
    module, name = getattr(op or fn, "__module__", None), getattr(op or fn, "__name__", None)
    if not module or not name or module == "__main__" or getattr(sys.modules.get(module), name, None) is not (op or fn):
        return None
    return module, name, op is not None and op is not fn


def _compile_in_workers(calls: Sequence[tuple[bytes, list[int]]], jobs: int) -> None:
    """Fill Triton's cache on disk. What a worker fails at is left to the parent, which meets the same error."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from gemskit import _warmup; _warmup.work()"
    settings = {
        "TRITON_CACHE_DIR": str(_triton.knobs.cache.dir),
        "GEMSKIT_VENDOR": backends.vendor.name,
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
    }
    told, environment = pickle.dumps((jobs, calls)), {**os.environ, **settings}
    done = subprocess.run([sys.executable, "-c", code], input=told, env=environment, capture_output=True, check=False)
    if done.returncode:
        tail = done.stderr.decode(errors="replace")[-500:]
        warnings.warn(f"warmup: no worker could start, this process compiles alone: {tail}", stacklevel=3)


class _Target:
    """In the place of Triton's driver: knows the target, touches no device."""

    def __init__(self, target: Sequence[Any]) -> None:
        self.target = GPUTarget(*target)

    def get_current_device(self) -> Any:
        # Triton keeps its compiled kernels per device.
        return self.target

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def work() -> None:
    """Make the calls on standard input and compile their launches in forked processes, which need not import torch again."""
    jobs, calls = pickle.load(sys.stdin.buffer)
    todo: list[Any] = []
    for data, numbers in calls:
        with contextlib.suppress(Exception):
            (module, name, inplace), call, target = pickle.loads(data)
            fn = getattr(importlib.import_module(module), name)
            torch.set_float32_matmul_precision("high" if call.tf32 else "highest")
            torch.use_deterministic_algorithms(call.deterministic)
            with backends.use_arch(call.row):
                made = launches(call, fn.inplace if inplace else fn)
            todo += [(_Target(target), *made[n]) for n in numbers]
    with contextlib.suppress(Exception):
        # Part of every key, from reading all of Triton: 2 s, once.
        triton.runtime.cache.triton_key()
    take, give = os.pipe()
    workers = []
    for _ in range(jobs):
        worker = os.fork()
        if not worker:
            os.close(give)
            while number := os.read(take, 4):
                target, kernel, args, meta = todo[int.from_bytes(number, "little")]
                with contextlib.suppress(Exception):
                    triton.runtime.driver.set_active(target)
                    _driver.compile(kernel, args, meta)
            os._exit(0)
        workers.append(worker)
    os.close(take)
    for n in range(len(todo)):
        os.write(give, n.to_bytes(4, "little"))
    os.close(give)
    for worker in workers:
        os.waitpid(worker, 0)
