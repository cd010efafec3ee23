"""Gluon in the interpreter: shared memory, barriers, copies of blocks, asynchronous products, groups of warps, but no layouts.

Groups of warps are threads of which one runs at a time, and which hand over at every barrier. What could come at any time comes
at the worst one: a copied block is NaN until all groups wait, and a product reads its operands when it is issued and again when
it is waited for: if they changed in between, that is an error.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime.jit import JITFunction

from . import _gluon, _interpret_ptx
from ._interpret_builder import BUILDER, decide, integer, np_dtype, quiet
from ._interpret_builder import _tensor as tensor_of
from ._tensor_map import ALIGNMENT
from .errors import InterpreterError

Array = Any
BARRIER = np.dtype([("phase", "i8"), ("pending", "i8"), ("count", "i8"), ("bytes", "i8")])


def _number(value: Any) -> int:
    value = value.value if isinstance(value, tl.constexpr) else value
    return integer(value) if isinstance(value, tl.tensor) else int(value)


class Matrix:
    """A matrix in global memory of which blocks are copied."""

    def __init__(self, descriptor: Any, layout: Any) -> None:
        self.load, self.add = descriptor.load, descriptor.atomic_add
        self.dtype, self.layout = descriptor.dtype, layout
        self.block_type = SimpleNamespace(shape=[_number(n) for n in descriptor.block_shape])


class Shared:
    """A part of shared memory: an array with an axis for the programs of the group, or barriers, which they have in common."""

    def __init__(self, dtype: Any, data: Array, layout: Any) -> None:
        self.dtype, self.data, self.layout = dtype, data, layout

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape[1:])

    def _view(self, data: Array) -> Shared:
        assert np.shares_memory(data, self.data), "the elements do not lie in this order"
        return Shared(self.dtype, data, self.layout)

    def index(self, index: Any) -> Shared:
        return self._view(self.data[:, _number(index)])

    def permute(self, order: Sequence[int]) -> Shared:
        return self._view(self.data.transpose(0, *(_number(axis) + 1 for axis in order)))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self._view(self.data.reshape(self.data.shape[0], *map(_number, shape)))

    def slice(self, start: Any, length: Any, dim: Any = 0) -> Shared:
        begin, axis = _number(start), _number(dim) + 1
        return self._view(self.data[(slice(None),) * axis + (slice(begin, begin + _number(length)),)])

    def reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        assert dtype == self.dtype, "the interpreter keeps the type of shared memory"
        return self.reshape(shape)

    _reinterpret = reinterpret  # its name until Triton 3.8

    def load(self, layout: Any = None) -> Any:
        return tensor_of(self.data.copy(), self.dtype)

    def store(self, value: Any) -> None:
        self.data[...] = value.handle.data


class _Stopped(BaseException):
    """Another group of warps failed."""


class Groups:
    """The groups of warps of a program; in their absence the one that all of it is."""

    def __init__(self) -> None:
        self.turn = 0
        self.failure: BaseException | None = None
        self.changed = threading.Condition()
        self.waiting: dict[int, Callable[[], bool]] = {}
        #: Blocks on their way: what delivers them.
        self.copies: list[Callable[[], None]] = []
        self.here = threading.local()

    def products(self) -> list[list[tuple[Shared, Array]]]:
        """Of each product of this group that was not waited for, its operands in shared memory and what they were."""
        found: list[list[tuple[Shared, Array]]] = self.here.__dict__.setdefault("products", [])
        return found

    def adding(self) -> list[tuple[Shared, Array]]:
        """Of each block that this group lets be added to global memory, its place and what it was."""
        found: list[tuple[Shared, Array]] = self.here.__dict__.setdefault("adding", [])
        return found

    def ahead(self) -> list[list[Callable[[], None]]]:
        """The copies of this group that are not waited for: what delivers each, and an empty entry after those of a group."""
        found: list[list[Callable[[], None]]] = self.here.__dict__.setdefault("ahead", [])
        return found

    def run(self, functions: Sequence[Callable[[], None]], running: set[int]) -> None:
        self.waiting = {n: lambda: True for n in range(len(functions))}
        self.turn, self.failure = 0, None
        threads = [threading.Thread(target=self._one, args=(n, f, running)) for n, f in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _one(self, n: int, function: Callable[[], None], running: set[int]) -> None:
        self.here.number = n
        running.add(threading.get_ident())
        try:
            self._await(n)
            with quiet():
                function()
            if self.adding():
                raise InterpreterError(f"shared memory ends before all is read from it: kernel {BUILDER.kernel}")
        except _Stopped:
            pass
        except BaseException as error:  # a Split, too: the launch goes on with it
            self.failure = self.failure or error
        finally:
            running.discard(threading.get_ident())
            with self.changed:
                self.waiting.pop(n, None)
                self._hand_over(n)

    def _await(self, n: int) -> None:
        with self.changed:
            while self.turn != n and self.failure is None:
                self.changed.wait()
        if self.failure is not None:
            raise _Stopped

    def _hand_over(self, n: int) -> None:
        """The next group that can go on has its turn; blocks arrive only where none can."""
        while self.waiting and self.failure is None:
            order = sorted(self.waiting, key=lambda m: (m <= n, m))
            able = [m for m in order if self.waiting[m]()]
            if able:
                self.turn = able[0]
                break
            if not self.copies:
                file, line = BUILDER.where()
                self.failure = InterpreterError(
                    f"every group of warps waits: kernel {BUILDER.kernel}, {file}:{line}, "
                    f"program {BUILDER.program(int(BUILDER.number[0]))}"
                )
            else:
                self.copies.pop(0)()
        self.changed.notify_all()

    def switch(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let the others run; come back when ``ready``."""
        n = getattr(self.here, "number", None)
        if n is None:
            while not ready():
                if not self.copies:
                    raise InterpreterError(f"waits for what never comes: kernel {BUILDER.kernel}")
                self.copies.pop(0)()
            return
        with self.changed:
            self.waiting[n] = ready
            self._hand_over(n)
        self._await(n)
        self.waiting[n] = lambda: True


GROUPS = Groups()


# ---- the language --------------------------------------------------------------------------------------------------


def _allocate(dtype: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Shared:
    sizes = [_number(n) for n in shape]
    if type(layout).__name__ == "MBarrierLayout":
        return Shared(dtype, np.zeros((1, *sizes), BARRIER), layout)
    made = Shared(dtype, np.empty((len(BUILDER.number), *sizes), np_dtype(dtype)), layout)
    _spoil(made)
    if value is not None:
        made.store(value)
    return made


def _bits(data: Array) -> Array:
    return data.view(f"u{data.itemsize}")


def _spoil(place: Shared) -> None:
    """All bits set: NaN."""
    bits = _bits(place.data)
    bits[...] = np.iinfo(bits.dtype).max


def _init(barrier: Shared, count: Any) -> None:
    barrier.data["phase"], barrier.data["bytes"] = 0, 0
    barrier.data["count"] = barrier.data["pending"] = _number(count)


def _count(barrier: Shared, arrivals: int, size: int) -> None:
    """Arrivals at a barrier, and bytes that it is to wait for or, negative, that came."""
    state = barrier.data
    state["pending"] -= arrivals
    state["bytes"] += size
    if (state["pending"] < 0).any():
        raise InterpreterError(f"more arrivals at a barrier than its count: kernel {BUILDER.kernel}")
    if (state["pending"] == 0).all() and (state["bytes"] == 0).all():
        state["phase"] += 1
        state["pending"] = state["count"]


def _wait(barrier: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    parity = _number(phase)
    GROUPS.switch(lambda: bool((barrier.data["phase"] % 2 != parity).all()))


def _expect(barrier: Shared, bytes_per_cta: Any, pred: Any = True) -> None:
    if _number(pred):
        _count(barrier, 1, _number(bytes_per_cta))
    GROUPS.switch()


def _arrive(barrier: Shared, *, count: Any = 1, pred: Any = True) -> None:
    if _number(pred):
        _count(barrier, _number(count), 0)
    GROUPS.switch()


def _copy(
    descriptor: Any, coord: Sequence[Any], barrier: Shared, result: Shared, pred: Any = True, *_: Any, **__: Any
) -> None:
    if not _number(pred):
        return
    if _number(coord[-1]) * result.data.itemsize % ALIGNMENT:
        raise InterpreterError("a block that begins between multiples of 16 bytes of a line is an illegal instruction")
    block = descriptor.load(list(coord)).handle.data
    _spoil(result)

    def deliver() -> None:
        result.data[...] = block.reshape(block.shape[0], *result.shape)
        _count(barrier, 0, -math.prod(result.shape) * result.data.itemsize)

    GROUPS.copies.append(deliver)


def _product(a: Any, b: Any, acc: Any, *, use_acc: Any = True, is_async: Any = False, **_: Any) -> Any:
    use = use_acc.value if isinstance(use_acc, tl.constexpr) else use_acc
    if isinstance(use, tl.tensor):
        use = decide(use)
    x, y = (v.load() if isinstance(v, Shared) else v for v in (a, b))
    out = tl.dot(x, y, acc if use else None, out_dtype=acc.dtype)
    GROUPS.products().append([(v, v.data.copy()) for v in (a, b) if isinstance(v, Shared)])
    if not (is_async.value if isinstance(is_async, tl.constexpr) else is_async):
        _product_wait(0)
    return out


def _product_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    products = GROUPS.products()
    while len(products) > _number(num_outstanding):
        for place, before in products.pop(0):
            if not np.array_equal(_bits(place.data), _bits(before)):
                raise InterpreterError(
                    f"an operand of a product changed before the product was waited for: kernel {BUILDER.kernel}"
                )
    if deps is None:
        return None
    return deps[0] if len(deps) == 1 else tuple(deps)


def _add(descriptor: Any, coord: Sequence[Any], src: Shared) -> None:
    block = src.load().handle.data
    shape = descriptor.block_type.shape
    descriptor.add(list(coord), tensor_of(block.reshape(block.shape[0], *shape), src.dtype))
    GROUPS.adding().append((src, src.data.copy()))


def _add_wait(pendings: Any, read_only: Any = True) -> None:
    adding = GROUPS.adding()
    while len(adding) > _number(pendings):
        place, before = adding.pop(0)
        if not np.array_equal(_bits(place.data), _bits(before)):
            raise InterpreterError(f"a block changed before it was read to be added: kernel {BUILDER.kernel}")


def _copy_ahead(smem: Shared, pointer: Any, mask: Any = None, *_: Any, **__: Any) -> None:
    """What is masked stays NaN."""
    value = tl.load(pointer, mask).handle.data.reshape(-1, *smem.shape)
    live = np.True_ if mask is None else tl.broadcast_to(mask, pointer.shape).handle.data.reshape(-1, *smem.shape)
    _spoil(smem)

    def deliver() -> None:
        smem.data[...] = np.where(live, value, smem.data)

    GROUPS.ahead().append([deliver])


def _commit_group() -> None:
    """One list holds all groups: of one that was committed the end is marked by an empty entry."""
    GROUPS.ahead().append([])


def _wait_group(num_outstanding: Any = 0) -> None:
    ahead = GROUPS.ahead()
    while sum(not entry for entry in ahead) > _number(num_outstanding):
        entry = ahead.pop(0)
        while entry:
            entry[0]()
            entry = ahead.pop(0)


def _asm(asm: Any, constraints: Any, args: Sequence[Any], dtype: Any, is_pure: Any, pack: Any) -> Any:
    code, kinds = (v.value if isinstance(v, tl.constexpr) else v for v in (asm, constraints))
    programs = len(BUILDER.number)
    arrays = [np.broadcast_to(a.handle.data, (programs, *a.handle.data.shape[1:])) for a in args]
    found, BUILDER.shared = _interpret_ptx.elementwise(code, kinds, arrays, _number(pack), BUILDER.shared)
    return tensor_of(found.view(np_dtype(dtype)), dtype)


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _of_triton(name: str) -> Callable[..., Any]:
    """What has the same name and meaning in Triton."""
    return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)


def patches(running: set[int]) -> Iterator[tuple[Any, str, Any]]:
    """What stands in the place of Gluon while a kernel runs; ``running`` has the threads of the interpreter."""

    def warp_specialize(functions: Sequence[tuple[Any, Sequence[Any]]], *_: Any) -> None:
        GROUPS.copies.clear()
        GROUPS.run([lambda f=f, given=given: f(*given) for f, given in functions], running)  # type: ignore[misc]

    for name in dir(gl):
        member = getattr(gl, name)
        if (tl.core.is_builtin(member) or isinstance(member, JITFunction)) and hasattr(tl, name):
            yield gl, name, _of_triton(name)
    own = {
        "arange": lambda start, end, layout=None: tl.arange(start, end),
        "zeros": lambda shape, dtype, layout=None: tl.zeros(shape, dtype),
        "full": lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
        "convert_layout": _same,
        "allocate_shared_memory": _allocate,
        "warp_specialize": warp_specialize,
        "inline_asm_elementwise": _asm,
        "barrier": _nothing,
        "thread_barrier": _nothing,
        **{name: _of_triton(name) for name in ("static_range", "static_assert", "static_print")},
    }
    for name, function in own.items():
        if hasattr(gl, name):
            yield gl, name, function
    for name, function in {
        "init": _init,
        "wait": _wait,
        "expect": _expect,
        "arrive": _arrive,
        "invalidate": _nothing,
    }.items():
        yield hopper.mbarrier, name, function
    for name in ("async_load", "async_copy_global_to_shared"):
        if hasattr(hopper.tma, name):
            yield hopper.tma, name, _copy
    for name in ("async_load", "async_copy_global_to_shared"):
        if hasattr(async_copy, name):
            yield async_copy, name, _copy_ahead
    yield async_copy, "commit_group", _commit_group
    yield async_copy, "wait_group", _wait_group
    yield _gluon, "add_block", _add
    yield hopper.tma, "store_wait", _add_wait
    yield hopper, "fence_async_shared", _nothing
    yield hopper, "warpgroup_mma", _product
    yield hopper, "warpgroup_mma_init", _same
    yield hopper, "warpgroup_mma_wait", _product_wait
