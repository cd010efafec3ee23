"""Calls that have been made before: traced once, then replayed without the code that planned them.

A function of tensors that only allocates, takes views and launches kernels is the same sequence of launches for the same
layouts. `trace` runs it on ``meta`` tensors and writes that sequence down; anything else it does ends the trace, and such a
call goes through Python for ever. A `Table` finds the sequence by what the call depends on: layouts, alignments, devices,
settings, and the values that are no tensors. It keeps no tensor.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gemskit import _driver, _launch, _native, backends
from gemskit._driver import Launch, Ref
from gemskit._tensor_map import Descriptor
from gemskit.errors import GradientError

#: Calls that a table remembers; when full it forgets all, which costs traces, no compilation.
CALLS = 2048


class NotReplayable(Exception):
    """The traced function did something that a replay would miss."""


@dataclass(frozen=True)
class Program:
    """What a call does. Slots count the values given, then the allocations."""

    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    launches: tuple[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], ...]
    #: For each result None, or its slot; with shape, stride and offset in elements where it is a view of that.
    results: tuple[tuple[int, tuple[tuple[int, ...], tuple[int, ...], int] | None] | None, ...]


# -- tracing ---------------------------------------------------------------------------------------------------------------


def _refuse(*args: Any) -> Any:
    raise NotReplayable("a number that is passed at run time was used to decide something")


_USES = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow neg pos abs invert and or "
    "xor rand ror rxor lshift rshift eq ne lt le gt ge bool hash int float index round trunc floor ceil complex"
).split()


class _Float(float):
    """A number that goes into a launch as it is: any other use ends the trace."""

    slot: int
    locals().update({f"__{use}__": _refuse for use in _USES})


class _Int(int):
    slot: int
    locals().update({f"__{use}__": _refuse for use in _USES})


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets allocations and views pass, and notes the former."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATES:
            self.made.append(out)
        # What neither takes nor gives a tensor (promote_types) computes nothing.
        elif not func.is_view and _holds_tensor((args, out)):
            raise NotReplayable(f"it calls {func}")
        return out


def _holds_tensor(v: Any) -> bool:
    return isinstance(v, Tensor) or (isinstance(v, (tuple, list)) and any(map(_holds_tensor, v)))


_aten = torch.ops.aten
_ALLOCATES = frozenset(
    (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default)
)


def trace(fn: Callable[..., Sequence[Tensor | None]], values: Sequence[Any], linked: Sequence[int]) -> Program:
    """The program of ``fn(*values)``. Numbers that are ``linked`` may differ in later calls.

    Raises:
        NotReplayable: ``fn`` does more than allocate, view and launch.
    """
    given: list[Any] = []
    for slot, (v, link) in enumerate(zip(values, linked)):
        if isinstance(v, Tensor):
            v = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
        elif links(link, v):
            v = _Float(v) if type(v) is float else _Int(v)
            v.slot = slot
        given.append(v)
    launches: list[Any] = []
    with torch.no_grad(), _Watch() as watch, _launch.tracing(lambda *one: launches.append(one)):
        results = fn(*given)
    # The tensors are alive until here, so a storage has one address.
    slots = {t.untyped_storage()._cdata: n for n, t in enumerate(given) if isinstance(t, Tensor)}
    slots.update({t.untyped_storage()._cdata: n for n, t in enumerate(watch.made, len(given))})

    def reference(v: Any) -> Any:
        if isinstance(v, Tensor):
            return Ref(slots[v.untyped_storage()._cdata], int(v.storage_offset()) * v.element_size(), v.dtype)
        if isinstance(v, (_Float, _Int)):
            return Ref(v.slot)
        if isinstance(v, Descriptor):
            return dataclasses.replace(v, base=reference(v.base))
        return tuple(map(reference, v)) if isinstance(v, tuple) else v

    def result(t: Tensor | None) -> Any:
        if t is None:
            return None
        slot = slots[t.untyped_storage()._cdata]
        base = given[slot] if slot < len(given) else watch.made[slot - len(given)]
        same = t.shape == base.shape and t.stride() == base.stride()
        return slot, None if same else (tuple(t.shape), t.stride(), t.storage_offset())

    return _shared(
        Program(
            tuple((tuple(t.shape), t.stride(), t.dtype) for t in watch.made),
            tuple((kernel, grid, reference(args), meta) for kernel, grid, args, meta in launches),
            tuple(map(result, results)),
        ),
        len(given),
    )


def _shared(program: Program, given: int) -> Program:
    """The program whose temporary memory is used again for others of the same layout, after the last launch that names it.

    All is allocated at once, so that what products of many parts put together would otherwise be there for every part.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for k, (_, _, args, _) in enumerate(program.launches):
        for slot in _slots(args):
            first.setdefault(slot, k)
            last[slot] = k
    last.update(dict.fromkeys([r[0] for r in program.results if r is not None], len(program.launches)))
    made: list[Any] = []
    #: What was the last launch of each of them, and where slots went.
    until: list[int] = []
    moved = {n: n for n in range(given)}
    for n in sorted(range(given, given + len(program.allocations)), key=lambda n: (first.get(n, -1), n)):
        spec, begins, ends = program.allocations[n - given], first.get(n, -1), last.get(n, -1)
        free = [m for m, (other, end) in enumerate(zip(made, until)) if other == spec and end < begins]
        if free:
            until[free[0]] = ends
        else:
            free = [len(made)]
            made.append(spec)
            until.append(ends)
        moved[n] = given + free[0]

    def move(v: Any) -> Any:
        if isinstance(v, Ref):
            return dataclasses.replace(v, slot=moved[v.slot])
        if isinstance(v, Descriptor):
            return dataclasses.replace(v, base=move(v.base))
        return tuple(map(move, v)) if isinstance(v, tuple) else v

    return Program(
        tuple(made),
        tuple((kernel, grid, move(args), meta) for kernel, grid, args, meta in program.launches),
        tuple(None if r is None else (moved[r[0]], r[1]) for r in program.results),
    )


def _slots(v: Any) -> set[int]:
    """The slots that an argument of a launch refers to."""
    if isinstance(v, Ref):
        return {v.slot}
    if isinstance(v, Descriptor):
        return _slots(v.base)
    return set().union(*map(_slots, v)) if isinstance(v, tuple) else set()


def links(link: int, v: Any) -> bool:
    """Whether ``v`` is a number whose value does not matter: any for 2, a float for 1."""
    kind = type(v)
    return (kind is float and link > 0) or (kind is int and link > 1)


def aside() -> Any:
    """What is done in this context is no part of a trace: plans are made there."""
    return _launch.NOTHING if _launch.tracing_receiver() is None else _disable_current_modes()


# -- replaying -------------------------------------------------------------------------------------------------------------


#: Counts replays in Python: now and then one looks whether the native launcher is there.
_ticks = itertools.count(1)


class Replay:
    """A program on a device, for values of one alignment."""

    def __init__(self, program: Program, values: Sequence[Any], device: torch.device) -> None:
        self.program, self.device, self.index, self.results = program, device, device.index, program.results
        self.launches = tuple(
            _driver.prepare(kernel, grid, _checked(kernel, _placed(args, values, program)), meta, device)
            for kernel, grid, args, meta in program.launches
        )
        #: The types and slots of the numbers that launches take.
        self.numbers = tuple({(c, slot) for one in self.launches for _, c, slot, _ in one.patches if c != "p"})
        self._buffers: list[list[Any]] = [[] for _ in self.launches]

    def __call__(self, values: Sequence[Any]) -> Sequence[Tensor | None]:
        """The results for ``values``, which have the layouts that the table says; the device is current."""
        if not next(_ticks) & 255:
            upgrade()
        memory = list(values)
        allocate = _driver.allocate
        for shape, stride, dtype in self.program.allocations:
            memory.append(allocate(shape, stride, dtype))
        if self.launches:
            stream = _driver.stream(self.index)
            enter: Any = _driver.entry()
            for one, buffers in zip(self.launches, self._buffers):
                try:
                    # A buffer is in use by one thread at a time; lists are safe to share.
                    buffer = buffers.pop()
                except IndexError:
                    buffer = _buffer(one)
                parameters, where, pointers, numbers = buffer
                for n, slot, offset in pointers:
                    parameters[n] = memory[slot].data_ptr() + offset
                for target, slot in numbers:
                    target.value = memory[slot]
                _launch.LAUNCHES[one.name] += 1
                enter(one, parameters, where, stream)
                buffers.append(buffer)
        return [
            None if r is None else memory[r[0]] if r[1] is None else _view(memory[r[0]], r[1]) for r in self.results
        ]

    def takes(self, values: Sequence[Any]) -> bool:
        """Whether the numbers among ``values`` can be passed as the types of their parameters."""
        return all(_driver.fits(values[slot], letter) for letter, slot in self.numbers)

    def native(self, single: bool, wrap: Any, autograd: Any) -> tuple[Any, ...]:
        """The same for the native launcher."""
        results = tuple(None if r is None else (r[0], *(r[1] or ())) for r in self.program.results)
        return self.index, self.program.allocations, tuple(map(tuple, self.launches)), results, single, wrap, autograd


def _placed(args: Any, values: Sequence[Any], program: Program) -> Any:
    """``args`` with the alignment and reach of each reference."""
    if isinstance(args, Ref):
        if args.dtype is None:
            return args
        if args.slot < len(values):
            v: Tensor = values[args.slot]
            shape, stride, dtype, address = tuple(v.shape), v.stride(), v.dtype, v.data_ptr()
        else:
            (shape, stride, dtype), address = program.allocations[args.slot - len(values)], 0
        aligned = (address + args.offset) % 16 == 0
        return dataclasses.replace(args, aligned=aligned, near=_driver.near(shape, stride, dtype))
    if isinstance(args, Descriptor):
        base = _placed(args.base, values, program)
        if not base.aligned:
            raise NotReplayable("a descriptor of an address that is no multiple of 16")
        return dataclasses.replace(args, base=base)
    return tuple(_placed(a, values, program) for a in args) if isinstance(args, tuple) else args


def _checked(kernel: Any, args: Any) -> Any:
    """``args``, unless ``kernel`` is for aligned tensors only: traced ones have no address by which it could be chosen."""
    if getattr(kernel, "aligned_only", False) and not _aligned(args):
        raise NotReplayable("a kernel for aligned tensors, and an address that is no multiple of 16")
    return args


def _aligned(args: Any) -> bool:
    if isinstance(args, tuple):
        return all(map(_aligned, args))
    return not isinstance(args, Ref) or args.dtype is None or args.aligned


_TYPES = {"f": ctypes.c_float, "d": ctypes.c_double, "i": ctypes.c_int32, "l": ctypes.c_int64}


def _buffer(one: Launch) -> Any:
    parameters = (ctypes.c_uint64 * len(one.parameters))(*one.parameters)
    pointers = [(n, slot, offset) for n, c, slot, offset in one.patches if c == "p"]
    numbers = [(_TYPES[c].from_buffer(parameters, 8 * n), slot) for n, c, slot, _ in one.patches if c != "p"]
    return parameters, _driver.addresses(parameters, one.starts), pointers, numbers


def _view(t: Tensor, view: tuple[tuple[int, ...], tuple[int, ...], int]) -> Tensor:
    shape, stride, offset = view
    return t.as_strided(shape, stride, t.storage_offset() + offset)


class Parameters(NamedTuple):
    """What the native launcher needs to bind arguments. ``NotImplemented`` is the default of parameters without one."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    positional: int
    #: The place of ``out``, which is the last parameter where there is one, else -1.
    out: int


_tables: weakref.WeakSet[Table] = weakref.WeakSet()
_module: Any = None
_upgrading = threading.Lock()


def upgrade() -> None:
    """Load the native launcher if it has been built by now; start to build it where it has not."""
    global _module
    if _module is not None or backends.vendor.launcher is None:
        return
    module = _native.load()
    if module is None or not _upgrading.acquire(blocking=False):
        return
    try:
        where = _driver.addresses_of_launch()
        if where is not None:
            install(module, backends.vendor.device_type, *where)
    finally:
        _upgrading.release()


def no_second_derivative(name: str) -> None:
    """Kernels are no part of autograd: a second derivative would silently miss this operator's share."""
    raise GradientError(f"{name}: has no second derivative; take the first one without create_graph=True")


def install(module: Any, device_type: str, enter: int, follow: int, stream: int, fake: Any = None) -> None:
    """Put the native launcher in front of all tables. ``fake`` receives launches in tests."""
    global _module
    module.configure(device_type, enter, follow, stream, no_second_derivative, fake)
    _launch.paused.follow(module.pause)
    _launch.native_counts = module.counts
    _module = module
    tables = list(_tables)
    for table in tables:
        table.use(module)
    for table in tables:
        table._link()


def uninstall() -> None:
    """Go back to Python, which learns again."""
    global _module
    _module = None
    _launch.paused.follow(None)
    for table in list(_tables):
        table.use(None)


class Table:
    """Calls by what they depend on. ``slow(*values)`` serves those that are not there.

    ``call`` is what to call: ``entry``, which brings arguments into order and comes here, or the native launcher, which knows
    the parameters (``names``, ``defaults``, how many are ``positional``, where ``out`` is) and falls back to ``entry``.
    """

    def __init__(
        self, slow: Callable[..., Any], linked: Sequence[int] = (), writes: Sequence[int] = (),
        entry: Callable[..., Any] | None = None, parameters: Parameters | None = None,
    ) -> None:  # fmt: skip
        self.slow, self.writes = slow, tuple(writes)
        self.entry: Callable[..., Any] = entry or self.__call__
        self.parameters = parameters or Parameters((), (), 0, -1)
        #: By position: which numbers are passed on as they are (see `links`). What comes after has none.
        self.linked = (*linked, *(0,) * 32)
        self._replays: dict[Any, tuple[Replay, bool, Any]] = {}
        self._seen: set[Any] = set()
        #: What the native launcher was given.
        self._learnt: set[Any] = set()
        #: Why calls are not replayed.
        self.refused: dict[Any, str] = {}
        self.call: Callable[..., Any] = self.entry
        self._linked: tuple[Table, ...] = ()
        self._native: Any = None
        _tables.add(self)
        if _module is not None:
            self.use(_module)

    def use(self, module: Any) -> None:
        """Put the native launcher in front, or go back to Python if None. Either has to learn its calls."""
        self._replays.clear()
        self._learnt.clear()
        self.refused.clear()
        if module is None:
            self._native, self.call = None, self.entry
            return
        p = self.parameters
        self._native = module.Table(self.entry, self.linked, self.writes, p.names, p.defaults, p.positional, p.out)
        self.call = self._native

    def link(self, training: Table, into: Table) -> None:
        """The tables of the same calls where they need a gradient, and where they have ``out`` as last argument."""
        self._linked = training, into
        self._link()

    def _link(self) -> None:
        if self._native is not None and self._linked:
            self._native.link(*(table._native for table in self._linked))

    def __call__(self, *values: Any) -> Any:
        if self._replays and _replays_now():
            found = self._replays.get(self._key(values))
            if found is not None:
                replay, single, wrap = found
                if not (self.writes and _shares(values, self.writes)) and (not replay.numbers or replay.takes(values)):
                    if _launch.current_device() == replay.index:
                        results = replay(values)
                    else:
                        with _launch.guard(replay.device):
                            results = replay(values)
                    if self.writes:
                        torch.autograd.graph.increment_version([values[w] for w in self.writes])
                    return results[0] if single else wrap(tuple(results)) if wrap is not None else tuple(results)
        return self.slow(*values)

    def wants(self, values: Sequence[Any], again: bool = False) -> bool:
        """Whether this call should be learnt: it is made ``again``, so that single calls cost no trace."""
        if not _replays_now() or _driver.entry() is None:
            return False
        key = self._key(values)
        # What the native launcher knows and still left to Python (a target that shares memory) is not learnt again.
        if key is None or key in self._replays or key in self._learnt or key in self.refused:
            return False
        if again or key in self._seen:
            return True
        if len(self._seen) >= 2 * CALLS:
            self._seen.clear()
        self._seen.add(key)
        return False

    def learn(
        self, values: Sequence[Any], fn: Callable[..., Sequence[Tensor | None]], single: bool = False, wrap: Any = None,
        autograd: Any = None,
    ) -> None:  # fmt: skip
        """Trace ``fn(*values)`` and replay such calls from now on: its one result if ``single``, else ``wrap`` of them.

        ``autograd`` is what the native launcher needs to make the call part of autograd.
        """
        device = next(v.device for v in values if isinstance(v, Tensor))
        try:
            with _launch.guard(device):
                replay = Replay(trace(fn, values, self.linked), values, device)
        except NotReplayable as e:
            if len(self.refused) >= CALLS:
                self.refused.clear()
            self.refused[self._key(values)] = str(e)
            return
        if self._native is not None:
            if len(self._learnt) >= CALLS:
                self._native.clear()
                self._learnt.clear()
            self._native.add(tuple(values), replay.native(single, wrap, autograd))
            self._learnt.add(self._key(values))
        else:
            if len(self._replays) >= CALLS:
                self._replays.clear()
            self._replays[self._key(values)] = (replay, single, wrap)

    def _key(self, values: Sequence[Any]) -> Any:
        grad, native = torch.is_grad_enabled(), self._native is not None
        key: list[Any] = [_driver.tf32(), _deterministic()]
        try:
            for v, link in zip(values, self.linked):
                kind = type(v)
                if kind is Tensor or kind is Parameter:
                    if v.is_neg() or v.is_conj():
                        return None
                    key += v.shape, v.stride(), v.dtype, v.device, v.data_ptr() & 15, grad and v.requires_grad
                    if native:
                        # The native launcher compares dispatch keys: an inference tensor has others.
                        key.append(v.is_inference())
                else:
                    key.append(kind if link and links(link, v) else _part(v))
        except (_Unknown, RuntimeError):  # sparse tensors have no strides or no address
            return None
        return tuple(key)


class Replayed:
    """``fn(*values)``, which is no operator but only allocates and launches: a small ``nonzero`` takes 43 us for 85."""

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]]) -> None:
        self._fn, self._calls = fn, Table(self._slow)

    def __call__(self, *values: Any) -> tuple[Tensor, ...]:
        return self._calls.call(*values)  # type: ignore[no-any-return]

    def _slow(self, *values: Any) -> tuple[Tensor, ...]:
        if self._calls.wants(values):
            self._calls.learn(values, self._fn)
        return self._fn(*values)


def _replays_now() -> bool:
    """Whether nothing wants to see the call: no recording, no dispatch mode, no forward-mode derivative."""
    return not (_launch.paused.count or _modes() or forward_ad._current_level >= 0)


class _Unknown(Exception):
    """A value that no table remembers."""


#: What of torch's settings changes kernels.
_deterministic = torch._C._get_deterministic_algorithms
_modes = torch._C._len_torch_dispatch_stack


def _part(v: Any) -> Any:
    kind = type(v)
    if kind is float:
        # 0.0 and -0.0 are equal, NaN is not equal to itself.
        return v.hex()
    if kind is tuple or kind is list or kind is torch.Size:
        return (tuple, *map(_part, v))
    if v is None or kind in (bool, int, str, torch.dtype):
        return kind, v
    raise _Unknown


def _shares(values: Sequence[Any], writes: Sequence[int]) -> bool:
    """Whether a tensor that is written shares memory with another one, or cannot be written in this mode."""
    for w in writes:
        target: Tensor = values[w]
        if target.is_inference() and not torch.is_inference_mode_enabled():
            return True
        memory = target.untyped_storage().data_ptr()
        for n, v in enumerate(values):
            if n != w and isinstance(v, Tensor) and v.untyped_storage().data_ptr() == memory:
                return True
    return False
