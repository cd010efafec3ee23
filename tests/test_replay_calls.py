"""Replays of calls that differ in their numbers, in how arguments are given and in what they write; and what tables hold."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from replaying import Fake, fake, faking, flat, forget, leaf, looks, native, ones, size, warm  # noqa: F401
from torch import Tensor

import gemskit
from gemskit import _launch, _replay
from gemskit._op import REGISTRY, operator
from gemskit.errors import ArgumentError, GemskitError, GradientError
from gemskit.testing import SAMPLES, Make, load

load()
add, mul = REGISTRY["add"], REGISTRY["mul"]


# -- numbers that are passed on -----------------------------------------------------------------------------------------


def word(kind: str, number: Any) -> int:
    return int.from_bytes(struct.pack({"fp32": "<f", "fp64": "<d", "i64": "<q"}[kind], number), "little")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32, torch.bfloat16])
def test_numbers_are_written_where_they_belong(dtype: torch.dtype, fake: Fake) -> None:
    x = ones(4, 8, dtype=dtype)
    values: list[Any] = [3, -3, 0, 2**31 + 1, -(2**31) - 1, 2**40] if dtype != torch.int32 else [3, -3, 0, 2**31 - 1]
    if dtype.is_floating_point:
        warm(lambda: add(x, x, alpha=0.5), fake)
        values = [2.5, -3.0, 0.0, -0.0, 0.1, 1e-45, float("inf"), float("nan"), *[float(v) for v in values]]
    else:
        warm(lambda: add(x, x, alpha=2), fake)
    for alpha in values:
        fake.clear()
        add(x, x, alpha=alpha)
        assert fake.replayed and not fake.slow, alpha
        (got,) = fake.replayed
        with _launch.paused():
            add(x, x, alpha=alpha)
        assert fake.numbers(got) == fake.numbers(fake.slow[0]), alpha
        kind = "i64" if not dtype.is_floating_point else "fp64" if dtype == torch.float64 else "fp32"
        assert (kind, word(kind, alpha)) in fake.numbers(got), alpha
    if dtype.is_floating_point:
        # An int is not a float: it has an entry of its own.
        fake.clear()
        add(x, x, alpha=2)
        assert fake.slow and not fake.replayed
        warm(lambda: add(x, x, alpha=4), fake)


@pytest.mark.parametrize(
    "alpha", [2**63, 2**70, -(2**63) - 1, 10**400, 1e300], ids=["2^63", "2^70", "-2^63-1", "10^400", "1e300"]
)
def test_numbers_that_do_not_fit(alpha: Any, fake: Fake) -> None:
    """The same outcome whether or not such a call was made before."""
    for dtype in (torch.float32,) if isinstance(alpha, float) else (torch.float32, torch.int64, torch.int32):
        outcomes = []
        for before in (0, 3):
            for known_results in (add._plans, add._kinds):
                known_results.clear()
            x = ones(4, 8 + before, dtype=dtype)
            for _ in range(before):
                add(x, x, alpha=type(alpha)(2))
            known = size(add)
            fake.clear()
            try:
                add(x, x, alpha=alpha)
                (one,) = fake.slow + fake.replayed
                outcomes.append([w for w in fake.numbers(one) if w[1] not in (32, 44)])
            except Exception:
                outcomes.append(["error"])
            for _ in range(5 * (before > 0)):
                with contextlib.suppress(Exception):
                    add(x, x, alpha=alpha)
            assert size(add) <= known + 1, "such a call is learnt again and again"
        assert outcomes[0] == outcomes[1], dtype


def test_gradients_get_the_number_of_their_call(fake: Fake) -> None:
    x, y = leaf(4, 8), leaf(4, 8)
    warm(lambda: add(x, y, alpha=0.5), fake)
    outs = [add(x, y, alpha=a) for a in (2.5, -3.0)]
    assert len(fake.replayed) == 2
    for out, alpha in zip(outs, (2.5, -3.0)):
        for _ in range(3):
            fake.clear()
            torch.autograd.grad(out.sum(), (x, y), retain_graph=True)
        (got,) = fake.replayed
        assert ("fp32", word("fp32", alpha)) in fake.numbers(got)


# -- what is written ----------------------------------------------------------------------------------------------------


def test_writing_in_place(fake: Fake) -> None:
    x, y = ones(4, 8), ones(4, 8)
    warm(lambda: mul.inplace(x, y), fake)
    before = x._version
    assert mul.inplace(x, y) is x and x._version == before + 1 and y._version == 0
    memory = ones(64)
    for target, other in ((memory[:32], memory[32:]), (x, x), (memory[:32], memory[:32])):
        target, other = target.view(4, 8), other.view(4, 8)
        known = size(mul._overwrites)
        for _ in range(5):
            fake.clear()
            mul.inplace(target, other)
            assert fake.slow and not fake.replayed
        assert size(mul._overwrites) <= known + 1, "such a call is learnt again and again"
    with pytest.raises(ArgumentError, match="overlaps"):
        mul.inplace(memory[:32].view(4, 8), memory[4:36].view(4, 8))
    grad = leaf(4, 8)
    with pytest.raises(GradientError):
        mul.inplace(grad, y)
    with torch.no_grad():
        version = grad._version
        warm(lambda: mul.inplace(grad, y), fake, 1)
        assert grad._version == version + 1
    inner = mul.inplace(grad * 1, grad)
    assert inner.grad_fn is not None and inner.requires_grad


def test_writing_into_out(fake: Fake) -> None:
    x, y, out = ones(4, 8), ones(4, 8), ones(4, 8)
    for _ in range(3):
        fake.clear()
        version = out._version
        assert add(x, y, out=out) is out and out._version == version + 1
        (one,) = fake.comparable(fake.slow + fake.replayed, [x, y, out])
        assert {v[1] for k, v in one[3] if k[0] == "*"} == {0, 1, 2}
    for other in (ones(8, 4).mT, x, ones(33)[1:].view(4, 8), ones(4, 8, dtype=torch.float64)):
        fake.clear()
        version = other._version
        assert add(x, y, out=other) is other
        assert fake.slow and not fake.replayed and other._version == version + 1
    with pytest.warns(UserWarning, match="resized"):
        assert add(x, y, out=ones(2)).shape == (4, 8)
    for bad in (ones(4, 8, dtype=torch.int32), ones(1, 8).expand(4, 8), leaf(4, 8), 3, (out, out)):
        with pytest.raises(GemskitError):
            add(x, y, out=bad)
    with pytest.raises(GradientError):
        add(leaf(4, 8), y, out=out)


# -- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add", "clamp", "softmax", "layer_norm", "sum", "cross_entropy", "where"])
def test_arguments_bind_as_the_signature_says(name: str, fake: Fake) -> None:
    op, draw = REGISTRY[name], random.Random(0)
    sample = next(iter(SAMPLES[name](Make())))
    bound = op.signature.bind(*sample.args, **sample.kwargs)
    warm(lambda: op(*sample.args, **sample.kwargs), fake)
    have, names = dict(bound.arguments), list(op.signature.parameters)
    outcomes = set()
    for _ in range(300):
        cut = draw.randrange(len(have) + 1) if draw.random() < 0.8 else draw.randrange(len(names) + 3)
        args = [have.get(n) for n in names[:cut]] + [None] * max(0, cut - len(names))
        rest = [n for n in have if draw.random() < 0.9 and (n not in names[:cut] or draw.random() < 0.1)]
        draw.shuffle(rest)
        # Spelled anew: a name need not be interned.
        kwargs = {"".join(list(n)): have[n] for n in rest}
        if draw.random() < 0.1:
            kwargs["unknown"] = 1
        if draw.random() < 0.2:
            kwargs["".join(["o", "ut"])] = None
        fake.clear()
        try:
            want = op.signature.bind(*args, **kwargs)
        except TypeError:
            outcomes.add("error")
            with pytest.raises(TypeError) as expected:
                op.meaning(*args, **kwargs)
            with pytest.raises(TypeError, match=f"^{re.escape(str(expected.value))}$"):
                op(*args, **kwargs)
            assert not fake.slow and not fake.replayed
            continue
        want.apply_defaults()
        whole = {n: v for n, v in want.arguments.items() if n != "out"}
        positional = [
            whole[n] for n, p in op.signature.parameters.items() if n in whole and p.kind is not p.KEYWORD_ONLY
        ]
        named = {n: whole[n] for n, p in op.signature.parameters.items() if n in whole and p.kind is p.KEYWORD_ONLY}
        known = [v for v in have.values() if isinstance(v, Tensor)]

        def outcome(call: Callable[[], Any], known: list[Tensor] = known) -> Any:
            fake.clear()
            try:
                outs = flat(call())
            except GemskitError as e:
                return type(e)
            return [looks(o) for o in outs], fake.comparable(fake.slow + fake.replayed, known + outs)

        got = outcome(lambda a=args, k=kwargs: op(*a, **k))
        with _launch.paused():
            assert got == outcome(lambda a=positional, k=named: op(*a, **k))
        outcomes.add("served")
    assert outcomes == {"error", "served"}


def test_calls_whose_results_have_a_size_of_their_own(fake: Fake) -> None:
    """A small one is replayed whole; of a large one the flags are, as the size of what follows differs."""
    few, many = ones(100), ones(300, 1000)
    for call in (lambda x: gemskit.nonzero(x), lambda x: gemskit.masked_select(x, x.bool())):
        warm(lambda call=call: call(few), fake)
        for _ in range(3):
            fake.clear()
            call(many)
        assert len(fake.replayed) == len(fake.slow) == 1


def test_names_need_not_be_interned(fake: Fake) -> None:
    x = ones(4, 8)
    warm(lambda: add(x, x, alpha=2.5), fake)
    warm(lambda: add(x, x, **{"".join(["al", "pha"]): 2.5}), fake, 1)


# -- what tables hold ---------------------------------------------------------------------------------------------------


def test_tables_are_bounded_and_hold_no_tensor(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "CALLS", 8)
    gone = []
    for n in range(1, 40):
        for call in (add, add.inplace, lambda a, b: torch.autograd.grad(mul(a.requires_grad_(), b).sum(), a)):
            x, y = ones(n, 2), ones(n, 2)
            for _ in range(3):
                call(x, y)
            gone += [weakref.ref(x), weakref.ref(y)]
    del x, y
    fake.clear()
    assert not any(r() is not None for r in gone)
    for table in (add._calls, add._overwrites, mul._trainings, mul._gradients):
        assert 0 < size(table) <= 8 and len(table._seen) <= 16 and len(table.refused) <= 8


def test_threads_replay_while_tables_are_cleared(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "CALLS", 4)
    interval = sys.getswitchinterval()
    errors: list[BaseException] = []
    done = threading.Event()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(2000):
                n = draw.randrange(1, 4) if draw.random() < 0.98 else draw.randrange(4, 12)
                x = torch.ones(n, 4, requires_grad=n == 1)
                out = add(x, x, alpha=float(n))
                assert out.shape == (n, 4) and out.requires_grad is (n == 1)
                if n == 1:
                    assert torch.autograd.grad(out.sum(), x)[0].shape == (1, 4)
        except BaseException as e:
            errors.append(e)

    def sweep() -> None:
        while not done.wait(0.02):
            for table in (add._calls, add._trainings, add._gradients):
                (table._replays if table._native is None else table._native).clear()

    try:
        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        sweeper = threading.Thread(target=sweep)
        for thread in (*threads, sweeper):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        sys.setswitchinterval(interval)
    sweeper.join()
    assert not errors, errors[0]
    assert len(fake.replayed) > 1000


def test_errors_of_the_device_arrive(fake: Fake) -> None:
    x = ones(4, 8)
    error = OSError("the device is gone")
    counts = []
    for call in (lambda: add(x, x, alpha=1.5), lambda: mul(leaf(4, 8), x), lambda: mul.inplace(x, 2.0)):
        warm(call, fake)
        for _ in range(3):
            fake.error = error
            for _ in range(100):
                version = x._version
                with pytest.raises(OSError, match="the device is gone"):
                    call()
                error.__traceback__ = None
                assert x._version == version, "nothing was written"
            fake.error = None
            counts.append((sys.getrefcount(x), sys.getrefcount(error)))
        warm(call, fake, 1)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("what", ["call", "gradient", "inplace", "tuple"])
def test_replays_leave_nothing_behind(what: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    x, alpha, grad = ones(4, 8), 1234.5, leaf(4, 8)
    seed, counter = ones(4, 8), [0]

    def count(*_: Any) -> None:
        counter[0] += 1

    call = {
        "call": lambda: add(x, x, alpha=alpha),
        "gradient": lambda: torch.autograd.grad(add(grad, x, alpha=alpha), grad, seed),
        "inplace": lambda: add.inplace(x, seed, alpha=alpha),
        "tuple": lambda: REGISTRY["max_dim"](x, 1),
    }[what]
    watched = [x, alpha, grad, seed, None, True, False, 1, "alpha", (), Tensor, torch.float32, NotImplemented, add]
    warm(call, fake, 4)
    monkeypatch.setattr(Fake, "native", count)
    if _replay._module is not None:
        _replay._module.configure("cpu", 0, 0, 0, _replay.no_second_derivative, count)

    def state() -> tuple[list[int], int, int]:
        gc.collect()
        counts = [sys.getrefcount(v) for v in watched]
        # A sanitizer keeps what is freed.
        measured = sys.platform == "linux" and "asan" not in os.environ.get("LD_PRELOAD", "")
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if measured else 0
        return counts, sys.getallocatedblocks(), pages

    for _ in range(500):
        call()
    before = state()
    for _ in range(10_000):
        call()
    after = state()
    assert counter[0] >= 10_500
    # A leak of one per call would be 10,000.
    assert all(abs(b - a) < 100 for a, b in zip(before[0], after[0])), list(zip(watched, before[0], after[0]))
    assert after[1] - before[1] < 1000
    assert after[2] - before[2] < 500, "pages of 4096 bytes"


def test_operators_of_users_can_be_forgotten(fake: Fake) -> None:
    def declare() -> weakref.ref[Any]:
        @operator()
        def twice(input: Tensor) -> tuple[Tensor, Tensor]:
            """Two results."""
            return input * 2, input * 3

        @twice.kernel
        def _(outs: Any, keep: Any, input: Tensor) -> None:
            for out in outs:
                mul.forward((input, input), (out,))

        warm(lambda: twice(ones(8)), fake)
        assert size(twice) == 1
        return weakref.ref(twice)

    gone = declare()
    fake.clear()
    gc.collect()
    assert gone() is None


def test_switching_back_and_forth(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = ones(4, 8), leaf(4, 8)
    with faking(monkeypatch) as fake:
        forget()
        pending: list[Tensor] = []
        for turn in range(6):
            if turn % 2:
                _replay.install(native, "cpu", 0, 0, 0, fake.native)
            else:
                _replay.uninstall()
            assert (add._calls.call is add._calls._native) is bool(turn % 2)
            before = _launch.launches()["add"]
            warm(lambda: add(x, x), fake)
            pending.append(warm(lambda: mul(grad, x), fake))
            assert _launch.launches()["add"] == before + 3
            with gemskit.record() as calls:
                _replay.install(native, "cpu", 0, 0, 0, fake.native)
                add(x, x)
                _replay.uninstall()
                add(x, x)
            assert len(calls) == 2, "recording goes on across a switch"
        # Graphs of either kind outlive the switch.
        for out in pending:
            torch.autograd.grad(out.sum(), grad)
        fake.clear()
        add(x, x)


def test_what_the_native_launcher_refuses(native: ModuleType) -> None:
    table = native.Table(lambda *a: "slow", (), (), (), (), 0, -1)
    x = ones(2)
    launch = lambda slot, start: (("k", 1, (1, 1, 1), 1, 0, (0,), ((0, "p", slot, 0),), (start,), False),)
    spec = (None, (), launch(0, 0), ((0,),), True, None, None)
    assert table.add((x,), spec) is True and len(table) == 1
    assert table.add((object(),), spec) is False and table.add((1,), spec) is False
    assert table.add(tuple([1] * 60), spec) is False and table.add((x, (1,) * 600), spec) is False
    for n, bad in ((2, launch(9, 0)), (2, launch(0, 1)), (2, (("k",),)), (3, ((7,),)), (1, (1,))):
        with pytest.raises((TypeError, ValueError, SystemError)):
            table.add((x,), (*spec[:n], bad, *spec[n + 1 :]))
    with pytest.raises(TypeError):
        table.add((x,), ())
    with pytest.raises(TypeError):
        table.link(1, 2)
    assert table() == "slow" == table("anything")
    assert len(table) == 1 and table.clear() is None and len(table) == 0
