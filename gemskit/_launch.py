"""Where every kernel launch passes: device guard, interpreter, recording."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemskit import _driver, _interpret, backends

#: Launches from Python; `launches` has all.
LAUNCHES: Counter[str] = Counter()


@dataclass(frozen=True)
class Call:
    """One entry of :func:`record`."""

    op: str
    #: The kernel's name, or ``"meaning"`` where the plain-torch meaning ran (CPU tensors).
    kernel: str
    grid: tuple[int, ...] = ()
    config: tuple[tuple[str, Any], ...] = ()


#: The native launcher's own count.
native_counts: Callable[[], dict[str, int]] = dict


def launches() -> Counter[str]:
    """How often each kernel was launched in this process, by kernel name."""
    return LAUNCHES + Counter(native_counts())


_recording: list[list[Call]] = []
_op: list[str] = []

Receive = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

#: Set by :func:`capturing`: receives launches instead of running them.
_capture: Receive | None = None


class _Tracing(threading.local):
    """What this thread traces: the launches of functions of ``meta`` tensors."""

    receive: Receive | None = None


_tracing = _Tracing()


class Paused:
    """Whether calls must pass through Python, where they can be recorded or redirected: a count of who asks for it."""

    def __init__(self) -> None:
        self.count = 0
        self._follower: Callable[[int], None] | None = None
        self._lock = threading.Lock()

    def follow(self, pause: Callable[[int], None] | None) -> None:
        """The native launcher keeps a count of its own: tell it by how much this one changes."""
        with self._lock:
            if self._follower is not None:
                self._follower(-self.count)
            self._follower = pause
            if pause is not None:
                pause(self.count)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.change(1)
        try:
            yield
        finally:
            self.change(-1)

    def change(self, by: int) -> None:
        with self._lock:
            self.count += by
            if self._follower is not None:
                self._follower(by)


#: While paused no call is replayed.
paused = Paused()
backends.on_force.append(paused.change)


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Collect the operators called in this scope and the kernels that they launched."""
    calls: list[Call] = []
    with paused():
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
def capturing(receive: Receive) -> Iterator[None]:
    """Hand every launch to ``receive`` (the cross-compilation tests) and treat CPU tensors as the accelerator's."""
    global _capture
    with paused():
        before, _capture = _capture, receive
        try:
            yield
        finally:
            _capture = before


@contextlib.contextmanager
def tracing(receive: Receive) -> Iterator[None]:
    """Hand the launches of ``meta`` tensors in this thread to ``receive``, and treat them as the accelerator's."""
    before, _tracing.receive = _tracing.receive, receive
    try:
        yield
    finally:
        _tracing.receive = before


def tracing_receiver() -> Receive | None:
    """What gets this thread's traced launches."""
    return _tracing.receive


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to kernels now."""
    kind = device.type
    if kind == "cpu":
        return _capture is not None or _interpret.active()
    if kind == "meta":
        return _tracing.receive is not None
    return kind == backends.vendor.device_type


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launch ``kernel`` on the device and current stream of its first tensor argument."""
    device = _device(args)
    if _tracing.receive is not None and device.type == "meta":
        return _tracing.receive(kernel, grid, args, meta)
    name = _driver.kernel_name(kernel)
    LAUNCHES[name] += 1
    if _recording:
        note(_op[-1] if _op else "", name, grid, tuple(meta.items()))
    if _capture is not None:
        _capture(kernel, grid, args, meta)
    elif device.type == "cpu":
        _interpret.run(kernel, grid, args, meta, check=_interpret.checking())
    else:
        with guard(device):
            _driver.launch(kernel, grid, args, meta, device)


NOTHING = contextlib.nullcontext()
#: 0.06 us on CUDA, where the general form takes 0.4.
current_device: Callable[[], int] = torch.accelerator.current_device_index
if backends.vendor.device_type == "cuda":
    current_device = getattr(torch._C, "_cuda_getDevice", current_device)


def guard(device: torch.device) -> Any:
    """A context in which ``device`` is current; entering one costs 3 us where it is another."""
    if device.type in ("cpu", "meta") or current_device() == device.index:
        return NOTHING
    return torch.get_device_module(device).device(device)


def _device(args: tuple[Any, ...]) -> torch.device:
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, tuple) and a and isinstance(a[0], Tensor):
            return a[0].device
    raise AssertionError("a launch has at least one tensor argument")
