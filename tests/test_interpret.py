"""The interpreter runs the same kernels as the compiler, with the same values, and finds what is wrong with them."""

from __future__ import annotations

import collections
import math
import os
import subprocess
import sys
import threading
import types
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

import gemskit._interpret as gi
from gemskit._interpret import active, interpret, run
from gemskit.errors import DeclarationError, DeviceError, InterpreterError

np = pytest.importorskip("numpy")
close = torch.testing.assert_close
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fill(n: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(n) > 0.5
    return torch.randn(n).to(dtype) if dtype.is_floating_point else torch.randint(0, 100, (n,)).to(dtype)


# ---- values --------------------------------------------------------------------------------------------------------


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_addition_is_bit_equal_to_torch(dtype):
    x, y = fill(1000, dtype), fill(1000, dtype)
    o = torch.empty_like(x)
    run(add_kernel, (8,), (x, y, o, 1000, 128), {"num_warps": 4, "num_stages": 2})
    assert torch.equal(o, x + y)


@triton.jit
def cast_kernel(x, o, n, T: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n).to(T), mask=i < n)


SPECIAL = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 1e-40, 0.0, -0.0, 1.00390625, 1.01171875, -1.7])


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float_casts_round_to_nearest_even(source, dtype):
    x = torch.cat([torch.randn(20000, dtype=source), SPECIAL.to(source)])
    o = torch.empty(x.numel(), dtype=dtype)
    run(cast_kernel, (20,), (x, o, x.numel(), gi._engine().TYPES[dtype], 1024))
    assert torch.equal(o.nan_to_num(7), x.to(dtype).nan_to_num(7))


def test_float64_to_bfloat16_rounds_once():
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    o = torch.empty(2, dtype=torch.bfloat16)
    run(cast_kernel, (1,), (x, o, 2, tl.bfloat16, 2))
    assert o.tolist() == [1 + 2.0**-7, 1.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_float8_casts(dtype):
    kind = gi._engine().TYPES[dtype]
    x = torch.randn(4096) * 4
    o, back = torch.empty(4096, dtype=dtype), torch.empty(4096)
    run(cast_kernel, (4,), (x, o, 4096, kind, 1024))
    assert torch.equal(o.float(), x.to(dtype).float())
    run(cast_kernel, (4,), (o, back, 4096, tl.float32, 1024))
    assert torch.equal(back, o.float())
    huge = torch.tensor([1e30, -1e30, math.inf, 1.0])
    run(cast_kernel, (1,), (huge, o, 4, kind, 4))
    limit = torch.finfo(dtype).max
    assert o[:4].float().tolist() == [limit, -limit, limit, 1.0]


@triton.jit
def toward_zero_kernel(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_bfloat16_rounding_toward_zero():
    x = torch.randn(64)
    o = torch.empty(64, dtype=torch.bfloat16)
    run(toward_zero_kernel, (1,), (x, o, 64))
    assert (o.float().abs() <= x.abs()).all()
    assert torch.equal(o.view(torch.int16).int(), x.view(torch.int32) >> 16)


@triton.jit
def integer_kernel(o, a, b):
    tl.store(o, (a % b).to(tl.int64))
    tl.store(o + 1, (a // b).to(tl.int64))
    tl.store(o + 2, (a.to(tl.uint32) * 2654435761).to(tl.int64))
    tl.store(o + 3, tl.umulhi(b.to(tl.uint32) * 1431655764, 2147483647 + b.to(tl.uint32)).to(tl.int64))
    tl.store(o + 4, tl.umulhi(a.to(tl.uint64), a.to(tl.uint64)).to(tl.int64))
    tl.store(o + 5, (a >> 1).to(tl.int64))


def test_integers_as_in_c():
    o = torch.zeros(6, dtype=torch.int64)
    run(integer_kernel, (1,), (o, -7, 3))
    unsigned = (-7) % 2**64
    high = ((3 * 1431655764 % 2**32) * (2147483650)) >> 32
    fifth = (unsigned * unsigned >> 64) - 2**64
    assert o.tolist() == [-1, -2, (-7 % 2**32) * 2654435761 % 2**32, high, fifth, -4]


@triton.jit
def boolean_kernel(x, y, o, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(o + i, (a ^ b) | (a and not b))
    tl.store(o + B + i, (a.to(tl.int1) + b.to(tl.int1)).to(tl.int1))


def test_booleans():
    x, y = fill(64, torch.bool), fill(64, torch.bool)
    o = torch.empty(128, dtype=torch.bool)
    run(boolean_kernel, (1,), (x, y, o, 64))
    assert torch.equal(o[:64], x ^ y)
    assert torch.equal(o[64:], x ^ y)


@triton.jit
def compare_kernel(x, y, o, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(o + i, (a > b).to(tl.float32) + tl.maximum(a, b).to(tl.float32))


def test_bfloat16_comparison_gives_int1():
    x, y = fill(64, torch.bfloat16), fill(64, torch.bfloat16)
    o = torch.empty(64)
    run(compare_kernel, (1,), (x, y, o, 64))
    assert torch.equal(o, (x > y).float() + torch.maximum(x, y).float())


@triton.jit
def fma_kernel(x, y, z, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


def test_fma_rounds_once():
    x, y = torch.randn(1024), torch.randn(1024)
    z = -(x * y)
    o = torch.empty(1024)
    run(fma_kernel, (1,), (x, y, z, o, 1024))
    assert torch.equal(o, (x.double() * y.double() + z.double()).float())
    assert o.abs().max() > 0


@triton.jit
def clamp_abs_kernel(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, tl.clamp(tl.abs(v), 0.25, 1.0) + tl.sigmoid(v) + tl.exp(v) + tl.rsqrt(tl.abs(v)) + tl.floor(v))


def test_math():
    x = torch.randn(64)
    o = torch.empty(64)
    run(clamp_abs_kernel, (1,), (x, o, 64))
    close(o, x.abs().clamp(0.25, 1) + x.sigmoid() + x.exp() + x.abs().rsqrt() + x.floor())


@triton.jit
def libdevice_kernel(x, o, F: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, F(tl.load(x + i)))


_one = {
    "tanh": torch.tanh, "erf": torch.erf, "erfinv": torch.erfinv, "lgamma": torch.lgamma, "log1p": torch.log1p,
    "expm1": torch.expm1, "rint": torch.round, "isnan": lambda x: x.isnan().to(x.dtype), "asin": torch.asin,
    "round": lambda x: torch.trunc(x + 0.5 * x.sign()), "j0": torch.special.bessel_j0, "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "fast_expf": torch.exp, "sqrt_rn": torch.sqrt, "normcdf": torch.special.ndtr, "tgamma": lambda x: torch.lgamma(x).exp() * x.sign(),
    "ceil": torch.ceil, "abs": torch.abs, "isinf": lambda x: x.isinf().to(x.dtype), "finitef": lambda x: x.isfinite().to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(_one))
def test_libdevice(name, dtype):
    if not hasattr(libdevice, name) or (dtype == torch.float64 and name in ("fast_expf", "finitef")):
        pytest.skip(f"libdevice has no {name} for {dtype}")
    x = torch.rand(64, dtype=dtype) * 1.8 - 0.9
    x = x.abs() if name == "sqrt_rn" else x

    def call(v):
        return getattr(libdevice, name)(v)

    o = torch.empty_like(x)
    with interpret():
        run(libdevice_kernel, (1,), (x, o, call, 64))
    close(o, _one[name](x), rtol=1e-5, atol=1e-6)


@triton.jit
def libdevice_two_kernel(x, y, o, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(o + i, libdevice.pow(a, b) + libdevice.atan2(a, b) + libdevice.fmod(a, b) + libdevice.div_rn(a, b))


def test_libdevice_of_two():
    x, y = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    o = torch.empty(64)
    run(libdevice_two_kernel, (1,), (x, y, o, 64))
    close(o, x**y + torch.atan2(x, y) + torch.fmod(x, y) + x / y)


@triton.jit
def philox_kernel(o, seed, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    a, b, c, d = tl.philox(seed, i, i * 0, i * 0, i * 0)
    tl.store(o + i * 4, a, mask=i < n)
    tl.store(o + i * 4 + 1, b, mask=i < n)
    tl.store(o + i * 4 + 2, c, mask=i < n)
    tl.store(o + i * 4 + 3, d, mask=i < n)


def _philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        low, high = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (high >> 32) ^ counter[1] ^ key[0],
            high & 0xFFFFFFFF,
            (low >> 32) ^ counter[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("seed", [7, 2**40 + 7])
def test_philox_bits(seed):
    o = torch.zeros(400, dtype=torch.int32)
    run(philox_kernel, (4,), (o, seed, 100, 32))
    want = [_philox([i, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]) for i in range(100)]
    assert (o.long() & 0xFFFFFFFF).view(100, 4).tolist() == want


# ---- reductions, products, atomics ---------------------------------------------------------------------------------


@triton.jit
def reduce_kernel(x, o, arg, M, N, BM: tl.constexpr, BN: tl.constexpr, OP: tl.constexpr):
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BN)
    m = (r[:, None] < M) & (c[None, :] < N)
    p = r[:, None] * N + c[None, :]
    v = tl.load(x + p, mask=m, other=0.0)
    low = tl.where(m, v, float("-inf"))
    if OP == "sum":
        tl.store(o + r, tl.sum(v, 1), mask=r < M)
    elif OP == "max":
        a, b = tl.max(low, 1, return_indices=True)
        tl.store(o + r, a, mask=r < M)
        tl.store(arg + r, b, mask=r < M)
    elif OP == "softmax":
        e = tl.exp(low - tl.max(low, 1)[:, None])
        tl.store(o + p, e / tl.sum(e, 1)[:, None], mask=m)
    elif OP == "cumsum":
        tl.store(o + p, tl.cumsum(v, 1), mask=m)
    elif OP == "reverse":
        tl.store(o + p, tl.cumsum(v, 1, reverse=True), mask=m)
    elif OP == "cumprod":
        tl.store(o + p, tl.cumprod(v, 1), mask=m)
    elif OP == "sort":
        tl.store(o + p, tl.sort(low, 1, descending=True), mask=m)
    elif OP == "permute":
        a, b = tl.split(tl.reshape(tl.permute(tl.trans(v), (1, 0)), (BM, BN // 2, 2)))
        tl.store(o + p, tl.reshape(tl.join(a, b), (BM, BN)), mask=m)
    else:
        k = tl.broadcast_to((BN - 1 - c)[None, :], (BM, BN))
        tl.store(o + p, tl.gather(tl.gather(v, k, 1), k, 1), mask=m)


_reductions = {
    "sum": lambda x: x.sum(1), "max": lambda x: x.max(1).values, "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1), "reverse": lambda x: x.flip(1).cumsum(1).flip(1), "cumprod": lambda x: x.cumprod(1),
    "sort": lambda x: x.sort(1, descending=True).values, "permute": torch.clone, "gather": torch.clone,
}  # fmt: skip


@pytest.mark.parametrize("op", list(_reductions))
def test_reductions_and_scans(op):
    x = torch.randn(30, 100)
    want = _reductions[op](x)
    o, arg = torch.full_like(want, math.nan), torch.zeros(30, dtype=torch.int32)
    run(reduce_kernel, (4,), (x, o, arg, 30, 100, 8, 128, op))
    close(o, want, rtol=1e-4, atol=1e-4)
    if op == "max":
        assert torch.equal(arg.long(), x.argmax(1))


@triton.jit
def welford(m0, s0, n0, m1, s1, n1):
    n = n0 + n1
    d = m1 - m0
    w = tl.where(n == 0, 0.0, n1 / n)
    return m0 + d * w, s0 + s1 + d * d * n0 * w, n


@triton.jit
def larger(a0, i0, a1, i1):
    first = (a0 > a1) | ((a0 == a1) & (i0 < i1))
    return tl.where(first, a0, a1), tl.where(first, i0, i1)


@triton.jit
def tuple_reduce_kernel(x, o, arg, N, B: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, B)
    v = tl.load(x + row * N + c, mask=c < N, other=0.0)
    mean, m2, _ = tl.reduce((v, v * 0, (c < N).to(tl.float32)), 0, welford)
    tl.store(o + row * 2, mean)
    tl.store(o + row * 2 + 1, m2 / N)
    best, where = tl.associative_scan((tl.where(c < N, v, float("-inf")), c), 0, larger)
    tl.store(x + row * N + c, best, mask=c < N)
    tl.store(arg + row * N + c, where, mask=c < N)


def test_tuple_reduce_and_scan():
    x = torch.randn(20, 100)
    given = x.clone()
    o, arg = torch.zeros(20, 2), torch.zeros(20, 100, dtype=torch.int32)
    run(tuple_reduce_kernel, (20,), (x, o, arg, 100, 128))
    close(o, torch.stack([given.mean(1), given.var(1, unbiased=False)], 1))
    assert torch.equal(x, given.cummax(1).values)
    assert torch.equal(arg.long(), given.cummax(1).indices)


@triton.jit
def one_sum_kernel(x, o, B: tl.constexpr):
    tl.store(o, tl.sum(tl.load(x + tl.arange(0, B))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64])
def test_sum_of_ones(dtype):
    o = torch.zeros(1, dtype=dtype)
    run(one_sum_kernel, (1,), (torch.ones(64, dtype=dtype), o, 64))
    assert o.item() == 64


@triton.jit
def dot_kernel(a, b, c, B: tl.constexpr, ACC: tl.constexpr, P: tl.constexpr):
    r = tl.arange(0, B)[:, None]
    k = tl.arange(0, B)[None, :]
    p = r * B + k
    acc = tl.zeros((B, B), ACC)
    acc = tl.dot(tl.load(a + p), tl.load(b + p), acc, input_precision=P, out_dtype=ACC)
    tl.store(c + p, acc)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot(dtype):
    a, b = ((torch.randn(32, 32) * 3).to(dtype) for _ in range(2))
    acc = {torch.float64: torch.float64, torch.int8: torch.int32}.get(dtype, torch.float32)
    c = torch.empty(32, 32, dtype=acc)
    run(dot_kernel, (1,), (a, b, c, 32, gi._engine().TYPES[acc], "ieee"))
    want = a.double() @ b.double()
    close(c.double(), want, rtol=0 if acc == torch.int32 else 1e-5, atol=0 if acc == torch.int32 else 1e-4)


@triton.jit
def atomic_kernel(x, o, n, K: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n)
    tl.atomic_add(o + i % K, v, mask=i < n, sem="relaxed")
    if v.dtype == tl.bfloat16:  # the compiler has no atomic_max of bfloat16
        return
    tl.atomic_max(o + K + i * 0, v, mask=i < n)
    tl.atomic_min(o + K + 1 + i * 0, v, mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64])
def test_atomics(dtype):
    x = torch.randint(-5, 5, (1000,)).to(dtype)
    o = torch.zeros(9, dtype=dtype)
    run(atomic_kernel, (8,), (x, o, 1000, 7, 128))
    want = torch.zeros(7).index_add(0, torch.arange(1000) % 7, x.float())
    extremes = [0.0, 0.0] if dtype == torch.bfloat16 else [x.max().item(), x.min().item()]
    assert o.float().tolist() == [*want.tolist(), *extremes]


@triton.jit
def lock_kernel(lock, o):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(o, tl.load(o) + 1.0)
    tl.atomic_xchg(lock, 0)


def test_compare_and_swap_lock_is_no_race():
    lock, o = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    run(lock_kernel, (20,), (lock, o))
    assert o.item() == 20


@triton.jit
def last_block_kernel(x, partial, counter, o, n, B: tl.constexpr, G: tl.constexpr):
    p = tl.program_id(0)
    i = p * B + tl.arange(0, B)
    tl.store(partial + p, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))
    if tl.atomic_add(counter, 1) == tl.num_programs(0) - 1:
        k = tl.arange(0, G)
        tl.store(o, tl.sum(tl.load(partial + k, mask=k < tl.num_programs(0), other=0.0)))


def test_last_program_reads_what_the_others_wrote():
    x, o = torch.arange(1000.0), torch.zeros(1)
    run(last_block_kernel, (40,), (x, torch.zeros(40), torch.zeros(1, dtype=torch.int32), o, 1000, 32, 64))
    assert o.item() == x.sum().item()


@triton.jit
def histogram_kernel(x, o, n, B: tl.constexpr, K: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    h = tl.histogram(tl.load(x + i, mask=i < n, other=0), K, mask=i < n)
    tl.atomic_add(o + tl.arange(0, K), h)


def test_histogram():
    x = torch.randint(0, 64, (1000,), dtype=torch.int32)
    o = torch.zeros(64, dtype=torch.int32)
    run(histogram_kernel, (8,), (x, o, 1000, 128, 64))
    assert torch.equal(o, torch.bincount(x, minlength=64).int())


# ---- arguments -----------------------------------------------------------------------------------------------------


@triton.jit
def typed_kernel(o, kinds, s: tl.float64, n: tl.int64, d: fp64, h: tl.float16, f, b, small, big, huge, one, none):  # noqa: F821
    tl.store(o, s * n * d)
    tl.store(o + 1, h)
    tl.store(o + 2, f)
    tl.store(kinds, s.dtype == tl.float64 and n.dtype == tl.int64 and d.dtype == tl.float64 and h.dtype == tl.float16)
    tl.store(kinds + 1, f.dtype == tl.float32 and b.dtype == tl.int1)
    tl.store(kinds + 2, small.dtype == tl.int32 and big.dtype == tl.int64 and huge.dtype == tl.uint64)
    tl.store(kinds + 3, one == 1 and none is None)
    tl.static_assert(one == 1)


def test_scalars_take_the_declared_or_the_compilers_type():
    o, kinds = torch.zeros(3, dtype=torch.float64), torch.zeros(4, dtype=torch.bool)
    run(typed_kernel, (1,), (o, kinds, 0.1, 1, 1e-300, 0.1, 0.1, True, 7, 2**31, 2**63, 1, None))
    assert kinds.all()
    assert o.tolist() == [0.1 * 1e-300, torch.tensor(0.1).half().item(), torch.tensor(0.1).item()]


@triton.jit
def quoted_kernel(o, s: "fp64"):  # noqa: F821
    tl.store(o, s)


def test_annotations_that_the_compiler_would_ignore_are_refused():
    with pytest.raises(DeclarationError, match="parameter s.*without quotes"):
        run(quoted_kernel, (1,), (torch.zeros(1), 1.0))


@triton.jit(do_not_specialize=["n"])
def unspecialised_kernel(o, n):
    tl.store(o, n.to(tl.int64))


@triton.jit
def specialised_kernel(o, n):
    tl.store(o, n.to(tl.int64))


def test_an_integer_equal_to_one_is_a_constant_unless_not_specialised():
    o = torch.zeros(1, dtype=torch.int64)
    run(unspecialised_kernel, (1,), (o, 1))
    assert o.item() == 1
    run(specialised_kernel, (1,), (o, 16))
    with pytest.raises(AttributeError):
        run(specialised_kernel, (1,), (o, 1))


ORDER = tl.constexpr((1, 0, 2))


@triton.jit
def weighted(a, b, c, w):
    return a + 2 * b + 3 * c + w


@triton.jit
def tuple_kernel(ins, outs, strides, sizes, w: tl.float64, n, F: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B).to(tl.int64)
    values = ()
    for k in tl.static_range(len(ins)):
        off = i * 0
        rest = i
        for d in tl.static_range(len(sizes)):
            if strides[ORDER[k]][d] is not None:
                off += (rest % sizes[d]) * strides[ORDER[k]][d]
            rest = rest // sizes[d]
        values = values + (tl.load(ins[ORDER[k]] + off, mask=i < n),)
    values += (w,)
    result = F(*values)
    for k in tl.static_range(len(outs)):
        tl.store(outs[k] + i, result * (k + 1), mask=i < n)


def test_nested_tuples_star_calls_and_constexpr_indices():
    a, b, c = torch.randn(6, 5, dtype=torch.float64), torch.randn(5), torch.randn(5, 6).t()
    outs = (torch.empty(6, 5, dtype=torch.float64), torch.empty(6, 5))
    strides = ((1, 5), (1, None), (c.stride(1), c.stride(0)))
    run(tuple_kernel, (4,), ((a, b, c), outs, strides, (5, 6), 1e-9, 30, weighted, 8))
    want = b.double() + 2 * a + (3 * c).double() + 1e-9
    close(outs[0], want, rtol=1e-14, atol=0)
    close(outs[1], (2 * want).float())


Pair = collections.namedtuple("Pair", "x o")


@triton.jit
def namedtuple_kernel(p, bias, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(p.x + i)
    if bias is not None:
        v += tl.load(bias + i)
    tl.store(p.o + i, v)


def test_namedtuple_and_none():
    x, o = torch.randn(8), torch.empty(8)
    run(namedtuple_kernel, (1,), (Pair(x, o), None, 8))
    assert torch.equal(o, x)
    run(namedtuple_kernel, (1,), (Pair(x, o), x, 8))
    assert torch.equal(o, x + x)


@triton.jit
def square(x):
    return x * x


@triton.jit
def negate(x):
    return -x


@triton.jit
def driver(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, FORMULA(tl.load(x + i)))  # noqa: F821


def bind(**names: Any) -> Any:
    fn = driver.fn
    copy = types.FunctionType(fn.__code__, {**fn.__globals__, **names}, fn.__name__, fn.__defaults__)
    copy.__annotations__ = fn.__annotations__
    return triton.jit(copy)


def test_free_names_come_from_the_globals_of_the_copy():
    x = torch.randn(8)
    for fn, want in ((square, x * x), (negate, -x), (square, x * x)):
        o = torch.empty(8)
        run(bind(FORMULA=fn), (1,), (x, o, 8))
        assert torch.equal(o, want)


def test_rewritten_code_is_shared_by_copies():
    before = gi._rewritten.cache_info()
    for _ in range(20):
        run(bind(FORMULA=square), (1,), (torch.ones(8), torch.ones(8), 8))
    assert gi._rewritten.cache_info().misses - before.misses <= 2
    assert before.maxsize is not None


@triton.autotune(configs=[triton.Config({"B": 64}), triton.Config({"B": 128})], key=["n"])
@triton.heuristics({"EVEN": lambda a: a["n"] % a["B"] == 0})
@triton.jit
def tuned_kernel(x, o, n, B: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if EVEN:
        v = tl.load(x + i)
    else:
        v = tl.load(x + i, mask=i < n)
    tl.store(o + i, v * 2, mask=i < n)


@pytest.mark.parametrize("n", [100, 128])
def test_autotune_heuristics_and_callable_grid(n):
    x, o = torch.randn(n), torch.empty(n)
    run(tuned_kernel, lambda meta: (triton.cdiv(meta["n"], meta["B"]),), (x, o, n), {})
    assert torch.equal(o, x * 2)


@triton.jit
def grid_kernel(o):
    at = tl.program_id(0) * 6 + tl.program_id(1) * 3 + tl.program_id(2)
    tl.store(o + at, tl.num_programs(0) * 100 + tl.num_programs(1) * 10 + tl.num_programs(2))


def test_three_dimensional_and_empty_grids():
    o = torch.zeros(24, dtype=torch.int32)
    run(grid_kernel, (4, 0, 3), (o,), {})
    assert (o == 0).all()
    run(grid_kernel, (4, 2, 3), (o,), {})
    assert (o == 423).all()


def test_other_devices_are_refused():
    with pytest.raises(DeviceError, match=r"argument x is on meta"):
        run(add_kernel, (1,), (torch.empty(4, device="meta"), torch.ones(4), torch.ones(4), 4, 4))


@triton.jit
def host_descriptor_kernel(d, e, BM: tl.constexpr):
    row = tl.program_id(0) * BM
    e.store([row, 0], d.load([row, 0]) * 2)


@triton.jit
def device_descriptor_kernel(x, o, M, N, BM: tl.constexpr, BN: tl.constexpr):
    d = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
    e = tl.make_tensor_descriptor(o, [M, N], [N, 1], [BM, BN])
    row = tl.program_id(0) * BM
    e.store([row, 0], d.load([row, 0]) * 2)


def test_tensor_descriptors():
    x, o = torch.randn(30, 32), torch.empty(30, 32)
    run(host_descriptor_kernel, (2,), (*(TensorDescriptor.from_tensor(t, [16, 32]) for t in (x, o)), 16))
    assert torch.equal(o, x * 2)
    o.zero_()
    run(device_descriptor_kernel, (2,), (x, o, 30, 32, 16, 32))
    assert torch.equal(o, x * 2)


# ---- control flow --------------------------------------------------------------------------------------------------


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
    if 0 < n and n < 10 or n == 40:
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
    with pytest.raises(InterpreterError, match=r"race: store.*program \(0, 0, 0\).*argument o.*program \([12], 0, 0\)") as e:
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
    with pytest.raises(InterpreterError, match="race: load.*argument x") as error:
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
    assert decorated_kernel.fn.__name__ == "decorated_kernel"


def language() -> list[dict[str, Any]]:
    owners = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, libdevice, triton.jit, triton.JITFunction]
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


def test_threads():
    errors = []

    def work(k: int) -> None:
        try:
            for n in range(5):
                x, o = torch.full((100,), float(k)), torch.empty(100)
                run(add_kernel, (4,), (x, x, o, 100, 32))
                assert (o == 2 * k).all()
                run(reduce_kernel, (1,), (x.view(2, 50), o, x, 2, 50, 2, 64, "sum"))
                assert o[:2].tolist() == [50.0 * k, 50.0 * k], n
        except BaseException as error:
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
    for value, want in (("1", "True False False"), ("0", "False False False")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "GEMSKIT_INTERPRET": value}, capture_output=True, text=True
        )
        assert done.stdout.strip() == want, done.stderr


def test_ten_thousand_programs_a_second():
    import time

    x, o = torch.randn(4096 * 64), torch.empty(4096 * 64)
    run(add_kernel, (4096,), (x, x, o, x.numel(), 64))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        run(add_kernel, (4096,), (x, x, o, x.numel(), 64))
        best = min(best, time.perf_counter() - start)
    assert 4096 / best > 10_000
