"""Replays without a GPU: CPU tensors pass for the accelerator's, and launches are written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
        self._loaded: dict[Any, _driver.Loaded] = {}

    def load(self, kernel: Any, spec: Any, args: Any, meta: Any, device: Any) -> _driver.Loaded:
        signature = tuple(kinds(a, p.do_not_specialize, p.annotation_type or None) for a, p in zip(args, kernel.params))
        key = (id(kernel), signature, tuple(meta.items()))
        if key not in self._loaded:
            name = _driver.kernel_name(kernel)
            self._loaded[key] = _driver.Loaded(name, 1000 + len(self._loaded), 128, 0, tuple(_driver.flat(signature)), kernel)
        return self._loaded[key]

    def receive(self, kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        one = _driver.prepare(kernel, grid, args, meta, torch.device("cpu"))
        self.slow.append((one.name, one.function, one.grid, one.parameters))

    def __call__(self, one: _driver.Launch, parameters: Any, where: Any, stream: int) -> None:
        self.replayed.append((one.name, one.function, one.grid, tuple(parameters)))

    def native(self, name: str, function: int, grid: tuple[int, int, int], parameters: tuple[int, ...]) -> None:
        self.replayed.append((name, function, grid, parameters))


@contextlib.contextmanager
def faking(patch: Any) -> Iterator[Fake]:
    """``patch`` is pytest's monkeypatch."""
    fake = Fake()
    patch.setattr(_driver, "load", fake.load)
    patch.setattr(_driver, "entry", lambda: fake)
    patch.setattr(_driver, "stream", lambda index: 0)
    patch.setattr(_driver, "allocate", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    patch.setattr(_launch, "_capture", fake.receive)
    yield fake
