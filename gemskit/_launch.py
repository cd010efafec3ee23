"""Where every kernel launch passes: device guard, interpreter, recording."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemskit import _interpret, backends

#: How often each kernel was launched in this process, by kernel name.
LAUNCHES: Counter[str] = Counter()


@dataclass(frozen=True)
class Call:
    """One entry of :func:`record`."""

    op: str
    #: The kernel's name, or ``"meaning"`` where the plain-torch meaning ran (CPU tensors).
    kernel: str
    grid: tuple[int, ...] = ()
    config: tuple[tuple[str, Any], ...] = ()


_recording: list[list[Call]] = []
_op: list[str] = []

#: Set by :func:`capturing`: receives launches instead of running them.
_capture: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Collect the operators called in this scope and the kernels that they launched."""
    calls: list[Call] = []
    _recording.append(calls)
    try:
        yield calls
    finally:
        # By identity: two empty lists are equal.
        _recording[:] = [c for c in _recording if c is not calls]


def note(op: str, kernel: str, grid: tuple[int, ...] = (), config: tuple[tuple[str, Any], ...] = ()) -> None:
    """Add a call to every open :func:`record`."""
    for calls in _recording:
        calls.append(Call(op, kernel, grid, config))


@contextlib.contextmanager
def capturing(receive: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Hand every launch to ``receive`` (the cross-compilation tests) and treat CPU tensors as the accelerator's."""
    global _capture
    before, _capture = _capture, receive
    try:
        yield
    finally:
        _capture = before


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to kernels now."""
    kind = device.type
    if kind == "cpu":
        return _capture is not None or _interpret.active()
    return kind == backends.vendor.device_type


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launch ``kernel`` on the device and current stream of its first tensor argument."""
    device = _device(args)
    name = kernel.repr(None).rpartition(".")[2]
    LAUNCHES[name] += 1
    if _recording:
        note(_op[-1] if _op else "", name, grid, tuple(meta.items()))
    if _capture is not None:
        _capture(kernel, grid, args, meta)
    elif device.type == "cpu":
        _interpret.run(kernel, grid, args, meta, check=_interpret.checking())
    elif torch.accelerator.current_device_index() == device.index:
        kernel[grid](*args, **meta)
    else:
        with torch.get_device_module(device).device(device):
            kernel[grid](*args, **meta)


def _device(args: tuple[Any, ...]) -> torch.device:
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, tuple) and a and isinstance(a[0], Tensor):
            return a[0].device
    raise AssertionError("a launch has at least one tensor argument")
