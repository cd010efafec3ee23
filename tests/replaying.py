"""Replays without a GPU: CPU tensors pass for the accelerator's, and launches are written down."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gemskit import _driver, _launch, _native, _replay
from gemskit._op import Op
from gemskit._tensor_map import Box, Descriptor


def kinds(v: Any, fixed: bool, kind: str | None) -> Any:
    """The type of a parameter as Triton would give it: constants for 1 and None, annotations where there are some."""
    if isinstance(v, tuple):
        return tuple(kinds(x, False, None) for x in v)
    if v is None:
        return "constexpr"
    if isinstance(v, Descriptor):
        rank = len(v.block)
        return (Box(3, v.block), *("i32",) * rank, *("i64",) * rank)
    if isinstance(v, (Tensor, _driver.Ref)) and getattr(v, "dtype", None) is not None:
        return f"*{v.dtype}"
    if kind:
        return kind
    if isinstance(v, float):
        return "fp32"
    if v == 1 and not fixed:
        return "constexpr"
    return "i32" if -(2**31) <= int(v) < 2**31 else "i64"


class Fake:
    """Loads nothing and launches nothing; notes what would be launched."""

    def __init__(self) -> None:
        #: What went through Python, prepared from the tensors themselves.
        self.slow: list[tuple[Any, ...]] = []
        #: What was replayed.
        self.replayed: list[tuple[Any, ...]] = []
        #: Raised by the next launches, if set.
        self.error: Exception | None = None
        #: The tensors of launches through Python while it is a list, so that no address is used twice.
        self.alive: list[Any] | None = None
        self._loaded: dict[Any, _driver.Loaded] = {}
        self._by_function: dict[int, _driver.Loaded] = {}

    def load(self, kernel: Any, spec: Any, args: Any, meta: Any, device: Any) -> _driver.Loaded:
        signature = tuple(kinds(a, p.do_not_specialize, p.annotation_type or None) for a, p in zip(args, kernel.params))
        key = (id(kernel), spec, signature, tuple(meta.items()))
        if key not in self._loaded:
            name, function = _driver.kernel_name(kernel), 1000 + len(self._loaded)
            follows = bool(meta.get("launch_pdl"))
            one = _driver.Loaded(name, function, 128, 0, tuple(_driver.flat(signature)), kernel, follows)
            self._loaded[key] = self._by_function[function] = one
        return self._loaded[key]

    def receive(self, kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        one = _driver.prepare(kernel, grid, args, meta, torch.device("cpu"))
        if self.alive is not None:
            self.alive.append(args)
        if self.error is not None:
            raise self.error
        self.slow.append((one.name, one.function, one.grid, one.parameters))

    def __call__(self, one: _driver.Launch, parameters: Any, where: Any, stream: int) -> None:
        self.native(one.name, one.function, one.grid, tuple(parameters))

    def native(self, name: str, function: int, grid: tuple[int, int, int], parameters: tuple[int, ...]) -> None:
        """What the native launcher calls."""
        if self.error is not None:
            raise self.error
        self.replayed.append((name, function, grid, parameters))

    def clear(self) -> None:
        """Forget what was noted."""
        self.slow.clear()
        self.replayed.clear()

    def numbers(self, launch: tuple[Any, ...]) -> list[tuple[str, int]]:
        """Type and bits of the parameters that are no pointers."""
        return [(kind, bits) for kind, bits in self._words(launch) if kind[0] != "*"]

    def comparable(self, launches: Sequence[tuple[Any, ...]], known: Sequence[Tensor]) -> list[Any]:
        """Launches with pointers as places in the ``known`` tensors' memory, others numbered as they appear."""
        spans = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for t in known for s in [t.untyped_storage()]]
        fresh: dict[int, int] = {}

        def place(address: int) -> Any:
            for n, (first, end) in enumerate(spans):
                if first <= address < end:
                    return "known", n, address - first
            return "fresh", fresh.setdefault(address, len(fresh))

        return [
            (*one[:3], [(kind, place(bits) if kind[0] == "*" else bits) for kind, bits in self._words(one)])
            for one in launches
        ]

    def _words(self, launch: tuple[Any, ...]) -> list[tuple[str, int]]:
        kinds: list[str] = []
        for k in self._by_function[launch[1]].kinds:
            # An encoded matrix is an address and 15 words about it.
            kinds += ["*", *["u64"] * 15] if isinstance(k, Box) else [k] if k != "constexpr" else []
        assert len(launch[3]) == len(kinds) + 2, "two words of scratch memory"
        # A kernel reads four bytes of these.
        return [
            (k, bits & 0xFFFFFFFF if k in ("i32", "fp32") else bits)
            for k, bits in zip([*kinds, "u64", "u64"], launch[3])
        ]


class Library:
    """A driver that encodes matrices: the address, then what it was told of them."""

    def __init__(self) -> None:
        number, pointer = ctypes.c_uint, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(ctypes.c_int, pointer, number, number, *[pointer] * 5, *[number] * 4)
        self.cuTensorMapEncodeTiled: Any = kind(self._encode)

    def _encode(
        self, into: int, dtype: int, rank: int, address: int, sizes: int, strides: int, box: int, steps: int, *how: int
    ) -> int:
        assert into % 64 == 0 and address % 16 == 0
        words = (ctypes.c_uint64 * 16).from_address(into)
        given = [
            *(ctypes.c_uint64 * rank).from_address(sizes), *(ctypes.c_uint64 * (rank - 1)).from_address(strides),
            *(ctypes.c_uint32 * rank).from_address(box), *(ctypes.c_uint32 * rank).from_address(steps), *how,
        ]  # fmt: skip
        assert all(s % 16 == 0 for s in given[rank : 2 * rank - 1])
        for n, word in enumerate([address, dtype, *given]):
            words[n] = word
        return 0


@contextlib.contextmanager
def faking(patch: Any) -> Iterator[Fake]:
    """``patch`` is pytest's monkeypatch."""
    fake = Fake()
    patch.setattr(_driver, "load", fake.load)
    patch.setattr(_driver, "entry", lambda: fake)
    library = Library()
    patch.setattr(_driver, "_library", lambda: library)
    patch.setattr(_driver, "stream", lambda index: 0)
    patch.setattr(_launch, "current_device", lambda: None)
    patch.setattr(_driver, "allocate", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    patch.setattr(_launch, "_capture", fake.receive)
    patch.setattr(_launch, "native_counts", _launch.native_counts)
    # No build in the background: who wants the native launcher installs it.
    patch.setattr(_replay, "upgrade", lambda: None)
    yield fake
    _replay.uninstall()


def forget() -> None:
    """Make all tables new."""
    for table in list(_replay._tables):
        table._seen.clear()
    _replay.uninstall()


@pytest.fixture(scope="session")
def native() -> ModuleType:
    if sys.platform != "linux" or not _native.compiler():
        pytest.skip("no C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("no Python.h")
    module = _native.load(wait=True)
    if module is None and _native.status().startswith("off"):
        pytest.skip(_native.status())
    assert module is not None, _native.status()
    return module


@pytest.fixture(params=["python", "native"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with faking(monkeypatch) as device:
        forget()
        if request.param == "native":
            _replay.install(request.getfixturevalue("native"), "cpu", 0, 0, 0, device.native)
        yield device


def ones(*shape: int, **how: Any) -> Tensor:
    return torch.ones(shape, **how)


def warm(call: Callable[[], Any], fake: Fake, times: int = 3) -> Any:
    """The last of ``times`` results; by then it is replayed."""
    for _ in range(times):
        fake.clear()
        result = call()
    assert fake.replayed and not fake.slow, "the third call was not replayed"
    fake.clear()
    return result


def size(op: Op[..., Any] | _replay.Table) -> int:
    """How many calls a table knows."""
    table = op._calls if isinstance(op, Op) else op
    return len(table._replays) if table._native is None else len(table._native)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def looks(t: Tensor | None) -> Any:
    if t is None:
        return None
    # The stride of no or a single element means nothing, and empty_like on meta tensors gives another one.
    stride = tuple(s for n, s in zip(t.shape, t.stride()) if n != 1) if t.numel() else ()
    return tuple(t.shape), stride, t.dtype, t.device, t.requires_grad, t.is_leaf, type(t), t._is_view()


def leaf(*shape: int) -> Tensor:
    return torch.ones(*shape, requires_grad=True)
