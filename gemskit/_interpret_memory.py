"""Memory of the interpreter: groups of programs, undoing, bounds and races.

The data of every value carries a leading program axis (length 1 when all programs agree). A Python decision on a value
that differs between programs (`if`, `while`, the length of a loop) raises `Split`: what the group wrote is undone and
its parts are run again, each on its own.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import numpy as np
from triton.runtime import interpreter as stock

from .errors import InterpreterError

Array = Any
Handle = stock.TensorHandle
np_dtype = stock._get_np_dtype

# A group holds as many programs as fit this many elements of their widest access (at least 64, at most 1024): enough to
# amortise Python's cost per operation, few enough to stay in the cache.
GROUP_ELEMENTS = 1 << 17
# Addresses remembered for the search for racing reads; beyond it they are looked at early (32 MiB of indices).
REMEMBERED = 1 << 22


class Split(BaseException):
    """Programs of a group disagree on a Python decision; ``labels`` says which belong together."""

    def __init__(self, labels: Array) -> None:
        self.labels = labels


def same_length(*arrays: Array) -> list[Array]:
    """Broadcast the program axes to one length."""
    n = max(a.shape[0] for a in arrays)
    return [a if a.shape[0] == n else np.broadcast_to(a, (n, *a.shape[1:])) for a in arrays]


def uniform(data: Array) -> Any:
    """The one value of a scalar in all programs of the group."""
    values = data.reshape(data.shape[0], -1)[:, 0]
    if values.shape[0] > 1 and not (values == values[0]).all():
        raise Split(np.unique(values, return_inverse=True)[1].reshape(-1))
    return values[0]


class Storage:
    """Memory of one torch storage, with the program that last wrote each element."""

    def __init__(self, storage: Any) -> None:
        self.start = storage.data_ptr()
        self.end = self.start + storage.nbytes()
        self.names: list[str] = []
        memory = (ctypes.c_uint8 * storage.nbytes()).from_address(self.start) if storage.nbytes() else b""
        self.bytes = np.frombuffer(memoryview(memory), np.uint8)
        self.unit = 0
        self.writer: Array = None

    def view(self, size: int) -> Array:
        return self.bytes[: len(self.bytes) // size * size].view(f"u{size}")

    def marks(self, size: int, index: Array) -> tuple[Array, Array]:
        """The last writers of all elements, in units of the first access, and ``index`` in these units."""
        if self.writer is None:
            self.unit = size
            self.writer = np.zeros(len(self.bytes) // size + 1, np.int32)
        return self.writer, index if size == self.unit else index * size // self.unit


class Origin:
    """Where a pointer came from: an argument and its storage."""

    def __init__(self, name: str, storage: Storage) -> None:
        self.name, self.storage = name, storage


def origin_of(handle: Any) -> Origin | None:
    return getattr(handle, "origin", None)


def keep_origin(handle: Any, source: Any) -> Any:
    """``handle``, known to point where ``source`` points."""
    origin = getattr(source, "origin", None)
    if origin is not None:
        handle.origin = origin
    return handle


class Memory:
    """The memory of one launch, and the group of programs that is running."""

    def __init__(self) -> None:
        self.check = True
        self.kernel = ""
        self.storages: list[Storage] = []
        self.log: list[tuple[Array, Array, Array]] = []
        self.reads: list[tuple[Any, ...]] = []
        self.synchronised: Array = None
        self.ordered = False
        self.widest = 0
        self.settled = False
        self.grid_dim: tuple[int, ...] = (1, 1, 1)

    def open(self, kernel: str, grid: tuple[int, int, int], check: bool) -> None:
        self.kernel, self.check, self.storages, self.widest = kernel, check, [], 0
        self.settled = False
        self.grid_dim = grid
        self.synchronised = np.zeros(math.prod(grid), bool)
        self._begin(np.zeros(1, np.int64))

    def close(self) -> None:
        self.storages, self.log, self.reads = [], [], []

    def run(self, program: Callable[[], Any]) -> None:
        """Run ``program`` for the whole grid in groups, splitting those whose programs decide differently."""
        total = math.prod(self.grid_dim)
        pending: list[tuple[Any, ...]] = []
        remembered = 0
        first = 0
        while first < total:
            stop = min(total, first + min(1024, max(64, GROUP_ELEMENTS // (self.widest or 1024))))
            work, splits = [np.arange(first, stop)], 0
            first = stop
            while work:
                numbers = work.pop()
                self._begin(numbers)
                try:
                    program()
                except Split as split:
                    splits += 1
                    for target, index, old in reversed(self.log):
                        target[index] = old
                    work += reversed(self._parts(numbers, split.labels, splits))
                else:
                    pending += self.reads
                    remembered += sum(read[2].size for read in self.reads)
            self.settled = True
            if remembered > REMEMBERED:
                self.racing_reads(pending)
                pending, remembered = [], 0
        self.racing_reads(pending)

    def _parts(self, numbers: Array, labels: Array, splits: int) -> list[Array]:
        """The parts of a group in the order they run: the one with the lowest program first, others may wait for it."""
        if self.ordered and splits > 8:  # programs that wait for each other: one by one, not one split for each
            return list(numbers[:, None])
        if self.ordered:  # after an atomic the order of the programs is visible: cut only into runs of equal labels
            return np.split(numbers, np.flatnonzero(np.diff(labels)) + 1)
        return sorted((numbers[labels == label] for label in np.unique(labels)), key=lambda part: int(part[0]))

    def _begin(self, number: Array) -> None:
        pid = np.stack(np.unravel_index(number, self.grid_dim)).astype(np.int32)
        self.pid, self.number = pid, number
        self.grid_idx = tuple(int(i) for i in pid[:, 0])
        self.log, self.reads, self.ordered = [], [], False
        self.shared: Array = np.empty((len(number), 0), np.uint8)
        self.synchronised[number] = False

    def program(self, number: int) -> tuple[int, ...]:
        """The program id of a linear number."""
        return tuple(int(i) for i in np.unravel_index(number, self.grid_dim))

    def _one_by_one(self) -> None:
        """Go on only with a single program; a larger group starts again, one program after the other."""
        if len(self.number) > 1:
            raise Split(np.arange(len(self.number)))

    def fail(self, what: str, argument: str, number: int, where: tuple[str, int] | None = None) -> NoReturn:
        file, line = where or self.where()
        raise InterpreterError(
            f"{what}: kernel {self.kernel}, argument {argument}, {file}:{line}, program {self.program(number)}"
        )

    def where(self) -> tuple[str, int]:
        """File and line of the innermost user function that is being interpreted."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            names = frame.f_globals
            if "__gemskit__" in names and not names.get("__name__", "").startswith("triton.language"):
                return frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back
        return "?", 0

    def _outside(self, what: str, p: Array, mask: Array, size: int, name: str, allowed: list[Storage]) -> None:
        """Raise for the first lane that is in none of ``allowed``."""
        inside = np.zeros(p.shape, bool)
        for s in allowed:
            if s.end - s.start >= size:
                inside |= (p >= np.uint64(s.start)) & (p <= np.uint64(s.end - size))
        wanted = np.ones(p.shape, bool) if mask is None else mask
        bad = wanted & ~inside
        if not bad.any():
            return
        lane = int(bad.reshape(-1).argmax())
        address, row = int(p.reshape(-1)[lane]), lane // math.prod(p.shape[1:])
        if not name:
            place = "at an address in no tensor argument"
        elif address >= allowed[0].start:
            place = f"{address + size - allowed[0].end} bytes past the end of its storage"
        else:
            place = f"{allowed[0].start - address} bytes before the start of its storage"
        lanes = f"{int(bad.sum())} of {int(wanted.sum())} lanes"
        self.fail(f"out-of-bounds {what} {place} ({lanes})", name or "unknown", int(self.number[row]))

    def locate(self, ptr: Any, mask: Array, size: int, what: str) -> tuple[Origin | None, Array, Array]:
        """``(origin, addresses, element index)``; the index is None where no single storage holds all lanes."""
        p, origin = ptr.data, origin_of(ptr)
        if mask is not None:
            p, mask = np.broadcast_arrays(p, mask)
        self.widest = max(self.widest, p[0].size)
        active = p if mask is None else p[mask]
        if active.size == 0:
            return None, p, np.zeros(p.shape, np.int64)
        low, high = int(active.min()), int(active.max()) + size
        aligned = origin is not None
        if origin is None or not self.check:
            storage = next((s for s in self.storages if s.start <= low and high <= s.end), None)
            if storage is None:
                if self.check:
                    self._outside(what, p, mask, size, "", self.storages)
                return None, p, None
            origin = Origin(", ".join(storage.names), storage)
        storage = origin.storage
        if low < storage.start or high > storage.end:
            self._outside(what, p, mask, size, origin.name, [storage])
        start = np.uint64(storage.start)
        if (low - storage.start) % size or (not aligned and ((active - start) & np.uint64(size - 1)).any()):
            return None, p, None
        index = ((p - start) >> np.uint64(size.bit_length() - 1)).view(np.int64)
        return origin, p, index if mask is None else np.where(mask, index, 0)

    def _load(self, ptr: Any, mask: Array, other: Array) -> Any:
        dtype = ptr.get_element_ty()
        storage_type = np_dtype(dtype)
        size = storage_type.itemsize
        if mask is not None and mask.all():
            mask = None
        origin, p, index = self.locate(ptr, mask, size, "load")
        if index is None:
            m = np.ascontiguousarray(np.broadcast_to(True if mask is None else mask, p.shape))
            o = np.ascontiguousarray(np.broadcast_to(storage_type.type(0) if other is None else other, p.shape))
            return Handle(stock._interpreter.load(np.ascontiguousarray(p), m, o, storage_type), dtype)
        if origin is None:  # no lane is active
            out = np.zeros(p.shape, storage_type)
        else:
            # Arguments that the first group only reads are taken for read-only: remembering all reads doubles the time.
            if self.check and not (self.settled and origin.storage.writer is None):
                self.reads.append((origin, size, index, mask, self._identity(), self.where()))
            out = origin.storage.view(size).take(index).view(storage_type)
        if mask is not None:
            out = np.where(mask, out, storage_type.type(0) if other is None else other)
        return Handle(out, dtype)

    def _store(self, ptr: Any, value: Array, mask: Array) -> None:
        if mask is not None and mask.all():
            mask = None
        origin, p, index = self.locate(ptr, mask, value.dtype.itemsize, "store")
        size = value.dtype.itemsize
        if index is None:
            self._one_by_one()
            m = np.broadcast_to(True if mask is None else mask, p.shape)
            stock._interpreter.store(*(np.ascontiguousarray(np.broadcast_to(a, p.shape)) for a in (p, value, m)))
            return
        if origin is None:
            return
        writers = self._identity().reshape(-1, *(1,) * (index.ndim - 1))
        if mask is None:
            index, value, writers = np.broadcast_arrays(index, value, writers)
        else:
            index, value, writers, mask = np.broadcast_arrays(index, value, writers, mask)
            index, value, writers = index[mask], value[mask], writers[mask]
        target = origin.storage.view(size)
        if len(self.number) > 1:
            self.log.append((target, index, target[index]))
        target[index] = np.ascontiguousarray(value).view(target.dtype)
        if self.check:
            self._claim(origin, size, index, writers)

    def _identity(self) -> Array:
        """What the programs of the group leave where they write: number + 1, or -1 once they are synchronised."""
        return np.where(self.synchronised[self.number], -1, self.number + 1).astype(np.int32)

    def _claim(self, origin: Origin, size: int, index: Array, mine: Array) -> None:
        """Mark elements as written by their programs; two programs that nothing orders on one element are a race."""
        marks, unit = origin.storage.marks(size, index)
        old = marks[unit]
        marks[unit] = mine
        if len(self.number) > 1:
            self.log.append((marks, unit, old))
        for other in (old, marks[unit]):
            clash = (other != mine) & (other > 0) & (mine > 0)
            if clash.any():
                one, two = sorted(int(a[clash][0]) - 1 for a in (other, mine))
                what = f"race: store to an element that program {self.program(one)} also stores to"
                self.fail(what, origin.name, two)

    def racing_reads(self, reads: list[tuple[Any, ...]]) -> None:
        """Raise for a read of an element that another program of the launch stored to."""
        for origin, size, index, mask, readers, where in reads:
            if origin.storage.writer is None:
                continue
            marks, unit = origin.storage.marks(size, index)
            mine = readers.reshape(-1, *(1,) * (index.ndim - 1))
            writer = marks[unit]
            bad = (writer != mine) & (writer > 0) & (mine > 0) & (True if mask is None else mask)
            if bad.any():
                other, reader = (int(np.broadcast_to(a, bad.shape)[bad][0]) - 1 for a in (writer, mine))
                what = f"race: load of an element that program {self.program(other)} stores to"
                self.fail(what, origin.name, reader, where)
