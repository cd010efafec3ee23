"""gemskit's kernels under torch's own operators: the door for model code that cannot be changed.

``enable_aten`` registers Python kernels for the dispatch key of the resolved vendor, below autograd, so that torch's own
derivative formulas run (and call further operators that may be ours). What no kernel of ours serves goes to the kernel that torch
had before, once, and is counted. The registration is for the whole process; :func:`no_aten` is for its thread.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.autograd import forward_ad

import gemskit
from gemskit import _launch, backends
from gemskit._checks import describe
from gemskit.compat import _aten_table
from gemskit.compat._aten_match import Target, targets, wrapper
from gemskit.errors import ArgumentError, CaptureError, GradientError, NoKernel

#: What an operator says before it has launched or written anything; any other error is one.
REFUSALS = (ArgumentError, NoKernel, GradientError, CaptureError)

Names = str | Iterable[str]


class _Here(threading.local):
    """The state of a thread."""

    #: Above 0 everything goes to torch: inside of `no_aten`, and of our own kernels' host code.
    off = 0
    #: Whether the call in progress is being recorded, and why torch served it.
    noting = False
    why: str | None = None


_here = _Here()
_lock = threading.RLock()
#: The handles in force, and those of them that record.
_handles: list[Aten] = []
_recorders: list[Aten] = []

# `off` keeps what our kernels' host code calls (copies, views) from coming back here. Gradient mode is off because autograd has
# taken its part above; modes of torch functions see what users call, not what is below.
_TEMPLATE = """
def run({params}):
    if not here.off:
        if recorders and not here.noting:
            return recorded(run, {given})
        if cpu is not None and not has_kernels(cpu):
            why__ = "no kernel runs on the CPU outside of gemskit.interpret()"
        elif forward_ad._current_level >= 0:
            why__ = "forward-mode derivatives are torch's"
        elif {refuse}:
            why__ = "no kernel for an argument of this type"
        else:
            here.off = 1
            mode__ = grad_enabled()
            if mode__:
                set_grad(False)
            try:
                return {ours}
            except refusals as error__:
                why__ = error__
            finally:
                if mode__:
                    set_grad(True)
                here.off = 0
        refused(why__)
    if {any_number}:
        {tensors} = wrapped({tensors})
    return original({given})
"""


class Override:
    """An overload in force."""

    def __init__(self, target: Target, key: str) -> None:
        self.target = target
        #: How many handles want it.
        self.holders = 0
        self.fallbacks = 0
        # torch's, as nothing of ours is registered: a handle to it stays good whatever is registered above it.
        original = torch.library.get_kernel(f"aten::{target.key}", key)
        scope = dict(
            here=_here, original=original.call_boxed, recorders=_recorders, recorded=self._recorded, refused=self._refused,
            cpu=torch.device("cpu") if key == "CPU" else None, has_kernels=_launch.has_kernels, refusals=REFUSALS,
            forward_ad=forward_ad, grad_enabled=torch.is_grad_enabled, set_grad=torch._C._set_grad_enabled,
        )  # fmt: skip
        self.library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            # That a kernel is overridden is what was asked for.
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid.*")
            impl: Any = self.library.impl
            impl(target.key, wrapper(target, _TEMPLATE, scope), key, with_keyset=True)
        self._forget()

    def remove(self) -> None:
        """Give the overload back to torch."""
        self.library._destroy()
        self._forget()

    def _forget(self) -> None:
        """What torch.compile's Python dispatcher remembers of the overload: after a change its next call would crash."""
        packet, _, overload = self.target.key.partition(".")
        getattr(getattr(torch.ops.aten, packet), overload or "default")._dispatch_cache.clear()

    def _refused(self, why: object) -> None:
        with _lock:
            self.fallbacks += 1
        if _here.noting:
            _here.why = str(why)

    def _recorded(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _here.noting, _here.why = True, None
        calls: list[Any] = []
        try:
            with _launch.record() as calls:
                return run(*args, **kwargs)
        finally:
            _here.noting = False
            line: dict[str, Any] = {
                "operator": self.target.key,
                "arguments": [_describe(v) for v in args[1:]] + [f"{n}={_describe(v)}" for n, v in kwargs.items()],
            }
            if _here.why is None:
                line["kernels"] = [c.kernel for c in calls]
            else:
                line["fallback"] = _here.why
            with _lock:
                for handle in _recorders:
                    if self.target.key in handle.keys:
                        handle._write(line)


#: By overload.
_installed: dict[str, Override] = {}


class Aten:
    """What :func:`enable_aten` returns: ``disable()`` takes it back, and so does leaving a ``with`` of it."""

    def __init__(self, keys: Iterable[str], record: bool, path: str | PathLike[str] | None) -> None:
        #: The ATen overloads that were asked for.
        self.keys = tuple(keys)
        #: With ``record=True`` and no ``path``, one entry for each call.
        self.calls: list[dict[str, Any]] = []
        self._record = record
        self._held: list[str] = []
        self._counted: Counter[str] = Counter()
        self._file: TextIO | None = None
        if path is not None:
            self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._enable()

    def __repr__(self) -> str:
        return f"<gemskit over {len(self.keys)} ATen overloads{'' if self in _handles else ', disabled'}>"

    @property
    def fallbacks(self) -> Counter[str]:
        """How often torch's kernel served an overload, since that overload was first enabled."""
        with _lock:
            if self in _handles:
                counts = {k: _installed[k].fallbacks for k in self._held}
                self._counted = Counter({k: n for k, n in counts.items() if n})
            return self._counted

    def _enable(self) -> None:
        key = backends.vendor.dispatch_key
        table = targets(key)
        with _lock:
            _handles.append(self)
            try:
                for name in self.keys:
                    if name not in _installed:
                        _installed[name] = Override(table[name], key)
                    _installed[name].holders += 1
                    self._held.append(name)
            except BaseException:
                self.disable()
                raise
            if self._record:
                _recorders.append(self)

    def disable(self) -> None:
        """Give back to torch what no other handle wants. A second call does nothing."""
        with _lock:
            if self not in _handles:
                return
            self._counted = self.fallbacks
            _handles.remove(self)
            if self in _recorders:
                _recorders.remove(self)
            for name in self._held:
                held = _installed[name]
                held.holders -= 1
                if not held.holders:
                    del _installed[name]
                    held.remove()
            if self._file is not None:
                self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            self.calls.append(line)
        else:
            self._file.write(json.dumps(line) + "\n")

    def __enter__(self) -> Aten:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable_aten(
    include: Names | None = None, exclude: Names | None = None, *, record: bool = False,
    path: str | PathLike[str] | None = None,
) -> Aten:  # fmt: skip
    """Let gemskit's kernels serve torch's operators in this process, until the handle is disabled.

    Args:
        include: Names of functions (``"add"``: all of its overloads, in-place and ``out=`` too), of ATen operators (``"add_"``)
            or of overloads (``"add.Tensor"``). None is every operator whose benchmark on this architecture is not slower than
            torch's; ``"all"`` is every operator that there is.
        exclude: What of these to leave to torch.
        record: Note every call: operator, arguments, kernels, or why torch served it. It slows calls down.
        path: A file to append the notes to, as JSON lines; ``handle.calls`` has them otherwise.

    Raises:
        ArgumentError: a name is unknown or stands for nothing that torch dispatches to a device.
    """
    if path is not None and not record:
        raise ArgumentError(f"enable_aten: path={path!r} is where record=True writes; pass both or neither")
    return Aten(select(include, exclude), record, path)


def disable_aten() -> None:
    """Disable every handle in force."""
    with _lock:
        for handle in tuple(_handles):
            handle.disable()


@contextlib.contextmanager
def use_aten(
    include: Names | None = None, exclude: Names | None = None, *, record: bool = False,
    path: str | PathLike[str] | None = None,
) -> Iterator[Aten]:  # fmt: skip
    """:func:`enable_aten` for a scope. Meanwhile other threads are served too: backward runs in threads of torch's own."""
    with enable_aten(include, exclude, record=record, path=path) as handle:
        yield handle


@contextlib.contextmanager
def no_aten() -> Iterator[None]:
    """A region that runs plain torch, in this thread; a backward pass counts where it runs, not where it was recorded."""
    _here.off += 1
    try:
        yield
    finally:
        _here.off -= 1


def registered_ops() -> tuple[str, ...]:
    """The names of the gemskit functions that serve torch's operators now."""
    with _lock:
        return tuple(sorted({o.target.names[0] for o in _installed.values()}))


def registered_keys() -> tuple[str, ...]:
    """The ATen overloads that gemskit serves now."""
    with _lock:
        return tuple(sorted(_installed))


# -- names ----------------------------------------------------------------------------------------------------------------


def select(include: Names | None = None, exclude: Names | None = None) -> tuple[str, ...]:
    """The overloads that ``include`` without ``exclude`` stands for on the resolved vendor."""
    table = targets(backends.vendor.dispatch_key)
    if include is None:
        chosen = _fast(table)
    else:
        chosen = set(table) if include == "all" else _named(include, table)
    return tuple(sorted(chosen - (_named(exclude, table) if exclude is not None else set())))


def _fast(table: dict[str, Target]) -> set[str]:
    arch = backends.arch().name
    measured = _aten_table.RATIOS.get(arch)
    if measured is None:
        raise ArgumentError(
            f"enable_aten: no benchmark of {arch} says which operators are no slower than torch's; "
            f"there are those of {', '.join(_aten_table.RATIOS)}. Pass include= names or 'all'"
        )
    return {k for k, t in table.items() if _ratio(t, measured) <= 1}


def _ratio(target: Target, measured: dict[str, float]) -> float:
    rows = (target.row,) if " " in target.row else (target.row, *target.names)
    return next((measured[r] for r in rows if r in measured), float("inf"))


def _named(given: Names, table: dict[str, Target]) -> set[str]:
    index: dict[str, set[str]] = {}
    for k, t in table.items():
        for name in (k, t.packet, *t.names, *([f"{k}.default"] if "." not in k else [])):
            index.setdefault(name, set()).add(k)
    found: set[str] = set()
    for name in [given] if isinstance(given, str) else given:
        if not isinstance(name, str):
            raise ArgumentError(f"enable_aten: names are strings, given {name!r}")
        keys = index.get(name.removeprefix("aten::"))
        if keys is None:
            raise ArgumentError(_unknown(name, index))
        found |= keys
    return found


def _unknown(name: str, index: dict[str, set[str]]) -> str:
    near = difflib.get_close_matches(name, index, 4, 0.6)
    hint = f"near are {', '.join(near)}" if near else "'all' takes every operator"
    if callable(getattr(gemskit, name, None)):
        return (
            f"enable_aten: {name} is a function of gemskit that replaces no ATen operator of "
            f"{backends.vendor.dispatch_key}: torch has none, composes it of others, or draws random numbers; {hint}"
        )
    return f"enable_aten: no operator or overload is called {name!r}; {hint}"


def _describe(v: Any) -> str:
    if isinstance(v, (list, tuple)) and any(isinstance(x, Tensor) for x in v):
        return f"[{', '.join(map(_describe, v))}]"
    return describe(v)


__all__ = ["Aten", "disable_aten", "enable_aten", "no_aten", "registered_keys", "registered_ops", "use_aten"]
