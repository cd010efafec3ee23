"""Compiled kernels on the device: found by what they are specialised on, loaded once, launched by the driver itself.

Triton's own launch binds arguments, builds a key of strings and asks the driver about every pointer: 16 us. Here a launch is
prepared once (`prepare`): a buffer of parameters in which only pointers and run-time numbers are written at each call.
Where no entry point of the driver is known (``Vendor.launcher``), Triton launches.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemskit import backends
from gemskit.errors import CaptureError, NoKernel


@dataclass(frozen=True)
class Ref:
    """Stands for what is known at the call only: a tensor (at a byte offset), or a number if ``dtype`` is None."""

    slot: int
    offset: int = 0
    dtype: torch.dtype | None = None
    #: Whether the address is a multiple of 16.
    aligned: bool = True
    #: Whether every byte of its memory is within 2^31 of the first (AMD's buffer instructions).
    near: bool = True

    def data_ptr(self) -> int:
        """An address of this alignment: what Triton asks of a tensor."""
        return 16 if self.aligned else 1

    def ptr_range(self) -> int:
        """What Triton's AMD backend asks of a tensor."""
        return 0 if self.near else 2**31


@dataclass(frozen=True, eq=False)
class Loaded:
    """A compiled kernel on one device."""

    name: str
    function: int
    threads: int
    shared: int
    #: The types of the parameters by name, nested as the arguments are.
    signature: tuple[Any, ...]
    #: Holds the binary.
    compiled: Any


class Launch(NamedTuple):
    """A launch, ready but for what is known at the call."""

    name: str
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    #: Eight bytes a parameter, as integers.
    parameters: tuple[int, ...]
    #: (parameter, type, slot, byte offset) of what is written at the call; type is one of ``p f d i l``.
    patches: tuple[tuple[int, str, int, int], ...]


_loaded: dict[Any, Loaded] = {}
#: No compilation at call time: a guard for production.
_jit_error = os.environ.get("GEMSKIT_JIT", "") == "error"


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: torch.device) -> None:
    """Launch on ``device``, which is current, and its current stream."""
    enter = entry()
    if enter is None:
        kernel[grid](*args, **meta)
        return
    one = prepare(kernel, grid, args, meta, device)
    values = (ctypes.c_uint64 * len(one.parameters))(*one.parameters)
    enter(one, values, addresses(values), stream(device))


def prepare(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: torch.device) -> Launch:
    """The launch of ``args``, which hold tensors (whose addresses become constants) or references."""
    loaded = load(kernel, args, meta, device)
    parameters: list[int] = []
    patches: list[tuple[int, str, int, int]] = []
    for value, kind in _leaves(args, loaded.signature):
        if isinstance(value, Ref):
            letter = "p" if value.dtype is not None else _LETTERS[kind]
            patches.append((len(parameters), letter, value.slot, value.offset))
            parameters.append(0)
        elif isinstance(value, Tensor):
            parameters.append(value.data_ptr())
        else:
            parameters.append(_bits(value, kind))
    # Scratch memory for profilers and for descriptors made on the device, which no kernel here asks for.
    parameters += [0, 0]
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(
        loaded.name, loaded.function, (x, y, z), loaded.threads, loaded.shared, tuple(parameters), tuple(patches)
    )


_LETTERS = {"fp32": "f", "fp64": "d", "i32": "i", "i64": "l"}
_PACK = {"fp32": "<f4x", "fp64": "<d"}


def _bits(value: float, kind: str) -> int:
    if kind in _PACK:
        return int.from_bytes(struct.pack(_PACK[kind], value), "little")
    return int(value) & (2**64 - 1)


def _leaves(args: tuple[Any, ...], kinds: tuple[Any, ...]) -> Iterator[tuple[Any, str]]:
    for value, kind in zip(args, kinds):
        if isinstance(kind, tuple):
            yield from _leaves(value, kind)
        elif kind != "constexpr":
            yield value, kind


def load(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], device: torch.device) -> Loaded:
    """The compiled kernel for these arguments on ``device``, which is current; compiled where there is none.

    Raises:
        CaptureError: it would have to be compiled inside a graph capture.
        NoKernel: ``GEMSKIT_JIT=error`` is set, or it needs more shared memory than the device has.
    """
    key = (id(kernel), device.index, *map(_specialisation, args), *meta.items())
    found = _loaded.get(key)
    if found is None:
        _permitted(kernel, device)
        found = _loaded[key] = _load(kernel, args, meta, device)
    return found


def _specialisation(v: Any) -> Any:
    """What of an argument Triton compiles another kernel for."""
    if isinstance(v, Ref):
        return (v.dtype, v.aligned, v.near)
    if isinstance(v, Tensor):
        return (v.dtype, v.data_ptr() % 16 == 0, v.untyped_storage().nbytes() < 2**31)
    if isinstance(v, tuple):
        return tuple(map(_specialisation, v))
    if type(v) is int:
        return (v == 1, v % 16 == 0, -(2**31) <= v < 2**31)
    return type(v) if type(v) is float else v


def _permitted(kernel: Any, device: torch.device) -> None:
    name = kernel_name(kernel)
    if _jit_error:
        raise NoKernel(
            f"{name}: a kernel would be compiled or loaded at call time, which GEMSKIT_JIT=error forbids; "
            "call gemskit.warmup with these arguments first"
        )
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"{name}: a kernel would be compiled or loaded inside a graph capture; run the call once before the capture, "
            "or call gemskit.warmup"
        )


def _load(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], device: torch.device) -> Loaded:
    compiled = compile(kernel, args, meta)
    utils = triton.runtime.driver.active.utils
    metadata = compiled.metadata
    most = utils.get_device_properties(device.index)["max_shared_mem"]
    if metadata.shared > most:
        raise NoKernel(
            f"{kernel_name(kernel)}: needs {metadata.shared} bytes of shared memory, {device} has {most} "
            f"(row {backends.arch(device).name} of the vendor's table gives the tile)"
        )
    # Not through CompiledKernel.run, which builds a launcher in C for every signature first (0.3 s).
    _, function, _, _, _ = utils.load_binary(compiled.name, compiled.kernel, metadata.shared, device.index)
    signature = compiled.src.signature
    names = [p.name for p in kernel.params][: len(args)]
    threads = metadata.num_warps * metadata.target.warp_size
    return Loaded(
        kernel_name(kernel), function, threads, metadata.shared, tuple(signature[n] for n in names), (compiled, kernel)
    )


def compile(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
    """Triton's compiled kernel for these arguments, from its caches if it is there."""
    compiled = kernel.run(*args, grid=(1,), warmup=True, **meta)
    return compiled.result() if hasattr(compiled, "result") else compiled


def kernel_name(kernel: Any) -> str:
    """What profilers and :func:`gemskit.record` call it."""
    return str(kernel.repr(None)).rpartition(".")[2]


# -- the driver's entry point ----------------------------------------------------------------------------------------------


class Entry:
    """The driver's launch function through ctypes: 2.5 us, where Triton's takes 16."""

    def __init__(self, library: ctypes.CDLL, symbol: str) -> None:
        self.library = library
        self._launch = getattr(library, symbol)
        number, pointer = ctypes.c_uint, ctypes.c_void_p
        self._launch.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        self._launch.restype = ctypes.c_int

    def address(self) -> int:
        """Of the function, for the native launcher."""
        return int(ctypes.cast(self._launch, ctypes.c_void_p).value or 0)

    def __call__(self, one: Launch, values: Any, where: Any, stream: int) -> None:
        code = self._launch(one.function, *one.grid, one.threads, 1, 1, one.shared, stream, where, None)
        if code:
            # A thread that has not touched the device yet has no context (201), or another's (400).
            bind_thread()
            code = self._launch(one.function, *one.grid, one.threads, 1, 1, one.shared, stream, where, None)
        if code:
            raise RuntimeError(
                f"{one.name}: the driver refused the launch with error {code} (grid {one.grid}, {one.threads} threads, "
                f"{one.shared} bytes of shared memory)"
            )


def bind_thread() -> None:
    """Make the device's context current in this thread, by the cheapest call of the runtime that needs one."""
    torch.get_device_module(backends.vendor.device_type).current_stream().query()


@functools.cache
def entry() -> Entry | None:
    """The vendor's driver, or None where Triton launches."""
    if backends.vendor.launcher is None:
        return None
    library, symbol = backends.vendor.launcher
    try:
        return Entry(ctypes.CDLL(_mapped(library) or library), symbol)
    except (OSError, AttributeError):
        return None


def addresses_of_launch() -> tuple[int, int] | None:
    """The driver's launch function and torch's function for the current stream, for the native launcher."""
    enter, path = entry(), _mapped("libtorch_cuda.so") or _mapped("libtorch_hip.so")
    if enter is None or path is None:
        return None
    try:
        stream = ctypes.CDLL(path).aoti_torch_get_current_cuda_stream
    except (OSError, AttributeError):
        return None
    return enter.address(), int(ctypes.cast(stream, ctypes.c_void_p).value or 0)


def _mapped(library: str) -> str | None:
    """The path of ``library``, of whatever version, as this process has loaded it: torch may bring its own."""
    stem = f"/{library.partition('.so')[0]}.so"
    try:
        with open("/proc/self/maps") as maps:
            return next((p for line in maps if stem in (p := line.split(maxsplit=5)[-1].strip())), None)
    except OSError:
        return None


def addresses(values: Any) -> Any:
    """The addresses of the parameters, which the driver wants."""
    start = ctypes.addressof(values)
    return (ctypes.c_void_p * len(values))(*range(start, start + 8 * len(values), 8))


def stream(device: torch.device) -> int:
    """The handle of the current stream."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))
