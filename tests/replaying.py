"""Replays without a GPU: CPU tensors pass for the accelerator's, and launches are written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit import _driver, _launch, _replay


def kinds(v: Any, fixed: bool, kind: str | None) -> Any:
    """The type of a parameter as Triton would give it: constants for 1 and None, annotations where there are some."""
    if isinstance(v, tuple):
        return tuple(kinds(x, False, None) for x in v)
    if v is None:
        return "constexpr"
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
            one = _driver.Loaded(name, function, 128, 0, tuple(_driver.flat(signature)), kernel)
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
        kinds = [k for k in self._by_function[launch[1]].kinds if k != "constexpr"]
        assert len(launch[3]) == len(kinds) + 2, "two words of scratch memory"
        # A kernel reads four bytes of these.
        return [
            (k, bits & 0xFFFFFFFF if k in ("i32", "fp32") else bits) for k, bits in zip([*kinds, "u64", "u64"], launch[3])
        ]


@contextlib.contextmanager
def faking(patch: Any) -> Iterator[Fake]:
    """``patch`` is pytest's monkeypatch."""
    fake = Fake()
    patch.setattr(_driver, "load", fake.load)
    patch.setattr(_driver, "entry", lambda: fake)
    patch.setattr(_driver, "stream", lambda index: 0)
    patch.setattr(_driver, "allocate", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    patch.setattr(_launch, "_capture", fake.receive)
    patch.setattr(_launch, "native_counts", _launch.native_counts)
    # No build in the background: who wants the native launcher installs it.
    patch.setattr(_replay, "_upgrade", lambda: None)
    yield fake
    _replay.uninstall()


def forget() -> None:
    """Make all tables new."""
    for table in list(_replay._tables):
        table._seen.clear()
    _replay.uninstall()
