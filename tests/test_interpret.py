"""The interpreter finds out-of-bounds accesses and races, follows divergent control flow, and leaves no trace."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

import gemskit._interpret as gi
from gemskit._interpret import active, interpret, run
from gemskit.errors import InterpreterError

pytest.importorskip("numpy")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def square(x):
    return x * x


# ---- control flow ----------------------------------------------------------------------------------------------------


@triton.jit
def divergent_kernel(x, n, B: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * B + tl.arange(0, B)
    m = i < n
    tl.store(x + i, tl.load(x + i, mask=m) + 1, mask=m)
    if pid % 2 == 1:
        tl.store(x + i, tl.load(x + i, mask=m) * 2, mask=m)
    if pid >= 6:
        return
    tl.store(x + i, tl.load(x + i, mask=m) + (100 if pid > 2 else 200), mask=m)


def test_divergent_programs_undo_and_redo_their_writes():
    x = torch.arange(1000.0)
    want = x.clone()
    for p in range(8):
        part = want[p * 128 : p * 128 + 128]
        part += 1
        part *= 1 + p % 2
        part += (100 if p > 2 else 200) * (p < 6)
    run(divergent_kernel, (8,), (x, 1000, 128))
    assert torch.equal(x, want)


@triton.jit
def collatz_kernel(o, x):
    pid = tl.program_id(0)
    v = tl.load(x + pid)
    count = v * 0
    while v > 1 and count < 1000:
        v = tl.where(v % 2 == 0, v // 2, 3 * v + 1)
        count += 1
    tl.store(o + pid, count)


def test_divergent_while():
    def steps(n: int) -> int:
        return 0 if n <= 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    x = torch.randint(1, 60, (40,), dtype=torch.int32)
    o = torch.zeros(40, dtype=torch.int32)
    run(collatz_kernel, (40,), (o, x))
    assert o.tolist() == [steps(int(n)) for n in x]


@triton.jit
def ragged_kernel(x, off, o, total, B: tl.constexpr):
    pid = tl.program_id(0)
    acc = tl.zeros((B,), tl.float32)
    stop = tl.load(off + pid + 1)
    for s in range(tl.load(off + pid), stop, B):
        i = s + tl.arange(0, B)
        acc += tl.load(x + i, mask=i < stop, other=0.0)
    tl.store(o + pid, tl.sum(acc))
    tl.atomic_add(total, tl.sum(acc))


def test_ragged_loops_with_atomics():
    lengths = torch.randint(0, 300, (50,))
    off = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    x = torch.randint(-9, 9, (int(off[-1]),)).float()
    o, total = torch.zeros(50), torch.zeros(1)
    run(ragged_kernel, (50,), (x, off, o, total, 64))
    assert o.tolist() == [x[off[i] : off[i + 1]].sum().item() for i in range(50)]
    assert total.item() == x.sum().item()


@triton.jit
def persistent_kernel(x, o, n, B: tl.constexpr):
    for tile in range(tl.program_id(0), tl.cdiv(n, B), tl.num_programs(0)):
        i = tile.to(tl.int64) * B + tl.arange(0, B)
        tl.store(o + i, tl.load(x + i, mask=i < n) * min(tile, 3), mask=i < n)
    for _ in tl.range(0, max(0, n - 2000), num_stages=2):
        tl.store(o, 0.0)


def test_loops_over_start_and_step_of_each_program():
    x, o = torch.randn(1000), torch.zeros(1000)
    run(persistent_kernel, (7,), (x, o, 1000, 16))
    assert torch.equal(o, x * (torch.arange(1000) // 16).clamp(max=3))


@triton.jit
def chained_kernel(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, (not (v < 0) and v < 5) or v == 9)
    if 0 < n < 10 or n == 40:
        tl.store(o, True)


def test_boolean_operators_on_blocks():
    x, o = torch.arange(-4, 12), torch.zeros(16, dtype=torch.bool)
    run(chained_kernel, (1,), (x, o, 5, 16))
    want = ((x >= 0) & (x < 5)) | (x == 9)
    want[0] = True
    assert torch.equal(o, want)


@triton.jit
def block_decision_kernel(x, B: tl.constexpr):
    if tl.load(x + tl.arange(0, B)) > 0:
        tl.store(x, 1.0)


def test_a_block_decides_nothing():
    with pytest.raises(ValueError, match="reduce it first"):
        run(block_decision_kernel, (1,), (torch.ones(8), 8))


@triton.jit
def waiting_kernel(flag, o):
    p = tl.program_id(0)
    if p > 0:
        while tl.atomic_add(flag + p - 1, 0) == 0:
            pass
        tl.store(o + p, tl.load(o + p - 1) + 1)
    else:
        tl.store(o, 1.0)
    tl.atomic_add(flag + p, 1)


def test_programs_may_wait_for_lower_ones():
    o = torch.zeros(200)
    run(waiting_kernel, (200,), (torch.zeros(200, dtype=torch.int32), o))
    assert torch.equal(o, torch.arange(1.0, 201.0))


@triton.jit
def nan_kernel(x, o):
    v = tl.load(x + tl.program_id(0))
    if v:
        tl.store(o + tl.program_id(0), 1.0)
    while v * 0 != 0.0:
        v = tl.zeros_like(v)


def test_nan_decides():
    o = torch.zeros(4)
    run(nan_kernel, (4,), (torch.tensor([math.nan, math.nan, 0.0, 1.0]), o))
    assert o.tolist() == [1, 1, 0, 1]


@triton.jit
def print_kernel():
    tl.device_print("at", tl.program_id(0))


def test_device_print(capsys):
    run(print_kernel, (3,), ())
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["[0]", "[1]", "[2]"]


# ---- checks --------------------------------------------------------------------------------------------------------


def line_of(kernel: Any, text: str) -> str:
    lines = kernel.raw_src
    return f"test_interpret.py:{kernel.starting_line_number + next(k for k, line in enumerate(lines) if text in line)}"


@triton.jit
def shifted_kernel(x, o, shift, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i + shift)
    tl.store(o + i, v)


@pytest.mark.parametrize(
    ("shift", "program", "place"),
    [
        (3, "(1, 0, 0)", "4 bytes past the end"),
        (-2, "(0, 0, 0)", "8 bytes before the start"),
        (10**9, "(0, 0, 0)", "past"),
    ],
)
def test_load_out_of_bounds(shift, program, place):
    with pytest.raises(InterpreterError) as error:
        run(shifted_kernel, (2,), (torch.ones(16), torch.ones(16), shift, 8))
    text = str(error.value)
    for part in ("load", place, "kernel shifted_kernel", "argument x", line_of(shifted_kernel, "tl.load"), program):
        assert part in text


@triton.jit
def store_helper(p, v):
    tl.store(p, v)


@triton.jit
def store_past_kernel(outs, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    store_helper(outs[1] + i, 1.0)


def test_store_out_of_bounds_names_tuple_element_and_helper_line():
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match=r"store.*argument outs\[1\].*program \(2, 0, 0\)") as error:
        run(store_past_kernel, (4,), ((memory, torch.zeros(20)), 8))
    assert line_of(store_helper, "tl.store(p") in str(error.value)
    assert (memory == 0).all()


def test_a_jump_into_another_argument_is_out_of_bounds():
    memory = [torch.zeros(64) for _ in range(2)]
    distance = (memory[1].data_ptr() - memory[0].data_ptr()) // 4
    with pytest.raises(InterpreterError, match="argument x"):
        run(shifted_kernel, (1,), (memory[0], memory[1], distance, 8))


@triton.jit
def address_kernel(table, o):
    tl.store(o, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


def test_addresses_from_tables():
    x, o = torch.tensor([3.5]), torch.zeros(1)
    table = torch.tensor([x.data_ptr()])
    with pytest.raises(InterpreterError, match="address in no tensor argument"):
        run(address_kernel, (1,), (table, o))
    run(address_kernel, (1,), (table, o), check=False)
    assert o.item() == 3.5


@triton.jit
def same_store_kernel(o, B: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(o + (pid // 3) * B + tl.arange(0, B), pid.to(tl.float32))


@pytest.mark.parametrize("programs", [4, 2000])
def test_two_programs_store_to_one_element(programs):
    with pytest.raises(InterpreterError, match=r"race: store.*program \(0, 0, 0\).*argument o.*\([12], 0, 0\)") as e:
        run(same_store_kernel, (programs,), (torch.zeros(8000), 8))
    assert line_of(same_store_kernel, "tl.store") in str(e.value)
    run(same_store_kernel, (programs,), (torch.zeros(8000), 8), check=False)


@triton.jit
def shift_in_place_kernel(x, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i + 1, mask=i + 1 < n)
    tl.store(x + i, v, mask=i + 1 < n)


@pytest.mark.parametrize("programs", [2, 1500])
def test_reading_what_another_program_writes(programs):
    n = programs * 8
    with pytest.raises(InterpreterError, match=r"race: load.*argument x") as error:
        run(shift_in_place_kernel, (programs,), (torch.zeros(n), n, 8))
    assert line_of(shift_in_place_kernel, "tl.load") in str(error.value)
    run(shift_in_place_kernel, (1,), (torch.zeros(8), 8, 8))


@triton.jit
def halves_kernel(x, B: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * B + tl.arange(0, B)
    v = tl.load(x + i)
    if pid % 2 == 0:
        v += 1
    tl.store(x + i, v)
    tl.store(x + i, tl.load(x + i) * 2)


def test_a_program_may_read_and_rewrite_its_own_elements():
    x = torch.zeros(64)
    run(halves_kernel, (8,), (x, 8))
    assert torch.equal(x.view(8, 8)[:, 0], torch.tensor([2.0, 0.0] * 4))


@triton.jit
def assert_kernel(x, n):
    tl.device_assert(tl.program_id(0) < n, "too many programs")


def test_device_assert():
    run(assert_kernel, (3,), (torch.zeros(1), 3))
    with pytest.raises(AssertionError, match=r"too many programs.*assert_kernel.*program \(3, 0, 0\)"):
        run(assert_kernel, (5,), (torch.zeros(1), 3))


# ---- scopes, restoration, threads ----------------------------------------------------------------------------------


def test_scopes_nest():
    assert not active()
    with interpret():
        assert active() and gi.checking()
        with interpret(check=False):
            assert active() and not gi.checking()
        assert active() and gi.checking()
    assert not active()
    with pytest.raises(KeyError), interpret():
        raise KeyError
    assert not active()


def test_scope_is_of_its_own_thread():
    seen = []
    with interpret():
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
    assert seen == [False]


@interpret
@triton.jit
def decorated_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) * 3, mask=i < n)


def test_launchable():
    x, o = torch.randn(100), torch.empty(100)
    decorated_kernel[lambda meta: (triton.cdiv(100, meta["B"]),)](x, o, 100, B=32, num_warps=4)
    assert torch.equal(o, x * 3)
    interpret(add_kernel)[(4,)](x, x, o, 100, B=32)
    assert torch.equal(o, x + x)
    with pytest.raises(InterpreterError):
        interpret(same_store_kernel)[(4,)](o, 8)
    interpret(check=False)(same_store_kernel)[(4,)](o, 8)
    interpret(same_store_kernel, check=False)[(4,)](o, 8)
    assert decorated_kernel.fn.__name__ == "decorated_kernel"


def language() -> list[dict[str, Any]]:
    gi._engine()  # importing triton.language.semantic gives triton.language this attribute
    owners = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, libdevice, triton.JITFunction]
    return [dict(vars(owner)) for owner in owners]


def test_the_language_is_as_before_after_a_run_and_after_an_error():
    before = language()
    run(decorated_kernel.kernel, (1,), (torch.ones(4), torch.ones(4), 4, 4))
    assert language() == before
    with pytest.raises(InterpreterError):
        run(shifted_kernel, (1,), (torch.ones(4), torch.ones(4), 4, 4))
    assert language() == before
    with pytest.raises(RuntimeError, match="outside of the scope"):
        square(1)


@triton.jit
def sum_kernel(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + tl.program_id(0), tl.sum(tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=0.0)))


def test_threads():
    errors = []

    def work(k: int) -> None:
        try:
            for _ in range(5):
                x, o = torch.full((100,), float(k)), torch.empty(100)
                run(add_kernel, (4,), (x, x, o, 100, 32))
                assert (o == 2 * k).all()
                run(sum_kernel, (2,), (x, o, 50, 64))
                assert o[:2].tolist() == [50.0 * k, 50.0 * k]
        except Exception as error:
            errors.append(error)

    before = language()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert language() == before


def test_import_is_light_and_the_environment_switches_it_on():
    code = (
        "import sys, gemskit._interpret as gi; print(gi.active(), "
        "*(m in sys.modules for m in ('triton.runtime.interpreter', 'gemskit._interpret_builder')))"
    )
    env = {**os.environ, "GEMSKIT_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True False False", done.stderr


def test_ten_thousand_programs_a_second_of_processor_time():
    x, o = torch.randn(4096 * 64), torch.empty(4096 * 64)
    run(add_kernel, (4096,), (x, x, o, x.numel(), 64))
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        run(add_kernel, (4096,), (x, x, o, x.numel(), 64))
        best = min(best, time.process_time() - start)
    assert 4096 / best > 10_000
