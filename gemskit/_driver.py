"""Compiled kernels on the device: found by what they are specialised on, loaded once, launched by the driver itself.

Triton's own launch binds arguments, builds a key of strings and asks the driver about every pointer: 16 us. Here a launch is
prepared once (`prepare`): a buffer of parameters in which only pointers and run-time numbers are written at each call.
Where no entry point of the driver is known (``Vendor.launcher``), Triton launches.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemskit import _layout, _tensor_map, backends
from gemskit._tensor_map import Box, Descriptor
from gemskit.errors import ArgumentError, CaptureError, NoKernel


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
    #: The types of the parameters, in the order of the leaves of the arguments.
    kinds: tuple[str | Box, ...]
    #: Holds the binary.
    compiled: Any
    #: Whether it waits itself for the launch before it, and so may be set up earlier.
    follows: bool = False


class Launch(NamedTuple):
    """A launch, ready but for what is known at the call."""

    name: str
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    #: Words of eight bytes, as integers.
    parameters: tuple[int, ...]
    #: (word, type, slot, byte offset) of what is written at the call; type is one of ``p f d i l``.
    patches: tuple[tuple[int, str, int, int], ...]
    #: The words at which parameters begin: each is one, but for descriptors.
    starts: tuple[int, ...]
    follows: bool = False


#: Drivers differ in what they have.
_triton: Any = triton

_loaded: dict[Any, Loaded] = {}
#: No compilation at call time: a guard for production.
_jit_error = os.environ.get("GEMSKIT_JIT", "") == "error"


def tf32() -> bool:
    """Whether torch's settings let float32 products run in TensorFloat-32. (The older getter raises where both are used.)"""
    return _precision("cuda", "matmul") == "tf32"  # type: ignore[no-any-return]


_precision: Any = torch._C._get_fp32_precision_getter


def dot_precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of ``tl.dot`` for factors of ``dtype``: ``"tf32"`` where those of float32 may be rounded to it."""
    return "tf32" if dtype == torch.float32 and tf32() and backends.arch().config("dot")["tf32"] else "ieee"


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: torch.device
) -> None:
    """Launch on ``device``, which is current, and its current stream."""
    enter = entry()
    if enter is None:
        kernel[grid](*args, **meta)
        return
    one = prepare(kernel, grid, args, meta, device)
    values = array("Q", one.parameters)
    start, _ = values.buffer_info()
    where = array("Q", [start + 8 * n for n in one.starts])
    enter(one, values, where.buffer_info()[0], stream(device.index))


def prepare(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: torch.device
) -> Launch:
    """The launch of ``args``, which hold tensors (whose addresses become constants) or references."""
    key, leaves = specialisation(kernel, args)
    loaded = load(kernel, key, args, meta, device)
    parameters: list[int] = []
    patches: list[tuple[int, str, int, int]] = []
    starts: list[int] = []
    for value, kind in zip(leaves, loaded.kinds):
        if kind == "constexpr":
            continue
        starts.append(len(parameters))
        if isinstance(kind, Box):
            parameters += _tensor_map.encode(value, kind, value.base.data_ptr(), _library())
            if isinstance(value.base, Ref):
                patches.append((starts[-1], "p", value.base.slot, value.base.offset))
        elif type(value) is int and kind in _INTEGERS and -(2**63) <= value < 2**63:
            parameters.append(value & _MASK)
        elif isinstance(value, Ref):
            letter = "p" if value.dtype is not None else _LETTERS[kind]
            patches.append((len(parameters), letter, value.slot, value.offset))
            parameters.append(0)
        elif isinstance(value, Tensor):
            parameters.append(value.data_ptr())
        else:
            parameters.append(_bits(value, kind))
    # Scratch memory for profilers and for descriptors made on the device, which no kernel here asks for.
    starts += [len(parameters), len(parameters) + 1]
    parameters += [0, 0]
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(
        loaded.name, loaded.function, (x, y, z), loaded.threads, loaded.shared, tuple(parameters), tuple(patches),
        tuple(starts), loaded.follows,
    )  # fmt: skip


_MASK = 2**64 - 1
_LETTERS = {"fp32": "f", "fp64": "d", "i32": "i", "i64": "l"}
_INTEGERS = frozenset(("i32", "i64", "u32", "u64"))
_PACK = {"fp32": "<f4x", "fp64": "<d"}


def fits(value: float, letter: str) -> bool:
    """Whether a number can be passed as this type; torch refuses others too."""
    if isinstance(value, int):
        limit = 2**31 if letter == "i" else 2**63
        return -limit <= value < limit
    return letter != "f" or abs(value) < _LARGEST or math.isinf(value) or math.isnan(value)


#: What rounds to infinity as a float32.
_LARGEST: float = 2.0**128 - 2.0**103


def _bits(value: float, kind: str) -> int:
    if not fits(value, _LETTERS.get(kind, "l")):
        raise ArgumentError(f"the number {value!r} cannot be converted to {kind} without overflow")
    if kind in _PACK:
        return int.from_bytes(struct.pack(_PACK[kind], value), "little")
    return int(value) & _MASK


def specialisation(kernel: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """What of the arguments Triton compiles another kernel for, and the arguments without their nesting."""
    key: list[Any] = []
    leaves: list[Any] = []
    numbers = kernel.__dict__.get("_numbers")
    if numbers is None:
        numbers = kernel._numbers = tuple(p.do_not_specialize for p in kernel.params)
    for v, number in zip(args, numbers):
        if number and v is not None:
            # A run-time number: its type is the parameter's annotation.
            key.append("n")
            leaves.append(v)
        elif type(v) is int and -(2**31) <= v < 2**31:
            key.append(1 if v == 1 else 2 if v & 15 else 3)
            leaves.append(v)
        else:
            _specialise(v, key, leaves)
    return tuple(key), leaves


def _specialise(v: Any, key: list[Any], leaves: list[Any]) -> None:
    kind = type(v)
    if kind is tuple:
        key.append(~len(v))
        for x in v:
            if type(x) is int and -(2**31) <= x < 2**31:
                key.append(1 if x == 1 else 2 if x & 15 else 3)
                leaves.append(x)
            else:
                _specialise(x, key, leaves)
        return
    leaves.append(v)
    if kind is int:
        key.append(4 if v & 15 else 5)  # over 31 bits
    elif kind is Ref:
        key.append((v.dtype, v.aligned, v.near))
    elif kind is Descriptor:
        key.append((v.base.dtype, v.block, v.layout))
        leaves += (*v.shape, *v.strides)
    elif isinstance(v, Tensor):
        key.append((v.dtype, v.data_ptr() % 16 == 0, near(v.shape, v.stride(), v.dtype)))
    else:
        key.append(kind if kind is float else v)


def near(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a tensor ends within 2^31 bytes of its beginning; always, where that makes no other kernel."""
    if not backends.vendor.near_memory:
        return True
    return (_layout.reaches(shape, tuple(stride)) + 1) * dtype.itemsize < 2**31


def described(v: Any) -> Any:
    """What the compiler is told of an argument."""
    if isinstance(v, Tensor):
        return Ref(0, 0, v.dtype, v.data_ptr() % 16 == 0, near(v.shape, v.stride(), v.dtype))
    if isinstance(v, Descriptor):
        return v.triton(described(v.base))
    return tuple(map(described, v)) if isinstance(v, tuple) else v


def load(
    kernel: Any, key: tuple[Any, ...], args: tuple[Any, ...], meta: dict[str, Any], device: torch.device
) -> Loaded:
    """The compiled kernel for arguments of this specialisation on ``device``, which is current.

    Raises:
        CaptureError: it would have to be compiled inside a graph capture.
        NoKernel: ``GEMSKIT_JIT=error`` is set, or it needs more shared memory than the device has.
    """
    whole = (id(kernel), device.index, key, tuple(meta.items()))
    found = _loaded.get(whole)
    if found is None:
        _permitted(kernel, device)
        found = _loaded[whole] = _load(kernel, args, meta, device)
    return found


def capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` records a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _permitted(kernel: Any, device: torch.device) -> None:
    name = kernel_name(kernel)
    if _jit_error:
        raise NoKernel(
            f"{name}: a kernel would be compiled or loaded at call time, which GEMSKIT_JIT=error forbids; "
            "call gemskit.warmup with these arguments first"
        )
    if capturing(device):
        raise CaptureError(
            f"{name}: a kernel would be compiled or loaded inside a graph capture; run the call once before the capture, "
            "or call gemskit.warmup"
        )


def _load(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], device: torch.device) -> Loaded:
    compiled = compile(kernel, tuple(map(described, args)), meta)
    utils = _triton.runtime.driver.active.utils
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
    kinds = tuple(_expanded(flat(tuple(signature[n] for n in names)), getattr(metadata, "tensordesc_meta", None) or ()))
    follows = bool(getattr(metadata, "launch_pdl", False))
    return Loaded(kernel_name(kernel), function, threads, metadata.shared, kinds, (compiled, kernel), follows)


def _expanded(kinds: Iterator[str], boxes: Sequence[Mapping[str, Any]]) -> Iterator[str | Box]:
    """With the parameters that a descriptor becomes: itself, its sizes and its strides."""
    found = iter(boxes)
    for kind in kinds:
        if kind.startswith("tensordesc"):
            box = next(found)
            sizes = tuple(box["block_size"])
            yield Box(box["swizzle"], sizes)
            yield from ("i32",) * len(sizes)
            yield from ("i64",) * len(sizes)
        else:
            yield kind


def flat(kinds: tuple[Any, ...]) -> Iterator[str]:
    """The leaves of nested tuples."""
    for kind in kinds:
        if isinstance(kind, tuple):
            yield from flat(kind)
        else:
            yield kind


def compile(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
    """Triton's compiled kernel for these arguments, from its caches if it is there."""
    compiled = kernel.run(*args, grid=(1,), warmup=True, **meta)
    return compiled.result() if hasattr(compiled, "result") else compiled


def kernel_name(kernel: Any) -> str:
    """What profilers and :func:`gemskit.record` call it."""
    return str(kernel.repr(None)).rpartition(".")[2]


# -- the driver's entry point ----------------------------------------------------------------------------------------------


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: 72 bytes."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


#: ``CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION``
_FOLLOWS = _Attribute(6, 0, 1)


class Entry:
    """The driver's launch function through ctypes: 2.5 us, where Triton's takes 16.

    ``follow`` launches what waits itself for the launch before it.
    """

    def __init__(self, library: ctypes.CDLL, symbol: str, follow: str | None = None) -> None:
        self.library = library
        self._launch = getattr(library, symbol)
        number, pointer = ctypes.c_uint, ctypes.c_void_p
        self._launch.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        self._launch.restype = ctypes.c_int
        self._follow = getattr(library, follow, None) if follow else None
        if self._follow is not None:
            self._follow.argtypes, self._follow.restype = [ctypes.POINTER(_Config), *[pointer] * 3], ctypes.c_int

    def addresses(self) -> tuple[int, int]:
        """Of the two functions, for the native launcher; 0 where there is none."""
        launch, follow = (ctypes.cast(f, ctypes.c_void_p).value if f else 0 for f in (self._launch, self._follow))
        return launch or 0, follow or 0

    def _enter(self, one: Launch, where: Any, stream: int) -> int:
        x, y, z = one.grid
        if one.follows and self._follow is not None:
            config = _Config((x, y, z), (one.threads, 1, 1), one.shared, stream, ctypes.pointer(_FOLLOWS), 1)
            return int(self._follow(ctypes.byref(config), one.function, where, None))
        return int(self._launch(one.function, x, y, z, one.threads, 1, 1, one.shared, stream, where, None))

    def __call__(self, one: Launch, values: Any, where: Any, stream: int) -> None:
        code = self._enter(one, where, stream)
        if code:
            # A thread that has not touched the device yet has no context (201), or another's (400).
            bind_thread()
            code = self._enter(one, where, stream)
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
        return Entry(ctypes.CDLL(_mapped(library) or library), symbol, backends.vendor.follower)
    except (OSError, AttributeError):
        return None


def addresses_of_launch() -> tuple[int, int, int] | None:
    """The driver's two launch functions and torch's function for the current stream, for the native launcher."""
    enter, path = entry(), _mapped("libtorch_cuda.so") or _mapped("libtorch_hip.so")
    if enter is None or path is None:
        return None
    try:
        stream = ctypes.CDLL(path).aoti_torch_get_current_cuda_stream
    except (OSError, AttributeError):
        return None
    return *enter.addresses(), int(ctypes.cast(stream, ctypes.c_void_p).value or 0)


def _mapped(library: str) -> str | None:
    """The path of ``library``, of whatever version, as this process has loaded it: torch may bring its own."""
    stem = f"/{library.partition('.so')[0]}.so"
    try:
        with open("/proc/self/maps") as maps:
            return next((p for line in maps if stem in (p := line.split(maxsplit=5)[-1].strip())), None)
    except OSError:
        return None


def addresses(values: Any, starts: Sequence[int]) -> Any:
    """The addresses of the parameters, which the driver wants."""
    start = ctypes.addressof(values)
    return (ctypes.c_void_p * len(starts))(*[start + 8 * n for n in starts])


def _library() -> ctypes.CDLL:
    """The vendor's driver."""
    enter = entry()
    assert enter is not None, "rows whose kernels take descriptors have a launcher"
    return enter.library


def stream(index: int) -> int:
    """The handle of the current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(index)


def _python_allocate(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=backends.vendor.device_type)


#: A tensor on the current device; what torch's compiler uses takes 0.9 us where ``torch.empty_strided`` takes 2.
allocate: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = _python_allocate
if backends.vendor.device_type == "cuda":
    guards: Any = getattr(torch._C, "_dynamo").guards  # noqa: B009
    allocate = getattr(guards, "_empty_strided_cuda", _python_allocate)
