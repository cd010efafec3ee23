"""The interpreter's arithmetic equals torch's: casts, integers, libdevice, random numbers, reductions, products."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

import gemskit._interpret as gi
from gemskit._interpret import run

pytest.importorskip("numpy")
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


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_float8_casts(name):
    dtype = getattr(torch, f"float8_{name}")
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


ONE_ARGUMENT = {
    "tanh": torch.tanh, "erf": torch.erf, "erfinv": torch.erfinv, "lgamma": torch.lgamma, "log1p": torch.log1p,
    "expm1": torch.expm1, "rint": torch.round, "asin": torch.asin, "j0": torch.special.bessel_j0, "ceil": torch.ceil,
    "fast_expf": torch.exp, "sqrt_rn": torch.sqrt, "normcdf": torch.special.ndtr, "abs": torch.abs,
    "round": lambda x: torch.trunc(x + 0.5 * x.sign()), "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "tgamma": lambda x: torch.lgamma(x).exp() * x.sign(), "isnan": torch.isnan, "isinf": torch.isinf,
    "finitef": torch.isfinite,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ONE_ARGUMENT))
def test_libdevice(name, dtype):
    if not hasattr(libdevice, name) or (dtype == torch.float64 and name in ("fast_expf", "finitef")):
        pytest.skip(f"libdevice has no {name} for {dtype}")
    x = torch.rand(64, dtype=dtype) * 1.8 - 0.9
    x = x.abs() if name == "sqrt_rn" else x

    def call(v):
        return getattr(libdevice, name)(v)

    o = torch.empty_like(x)
    run(libdevice_kernel, (1,), (x, o, call, 64))
    close(o, ONE_ARGUMENT[name](x).to(dtype), rtol=1e-5, atol=1e-6)


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


REDUCTIONS = {
    "sum": lambda x: x.sum(1), "max": lambda x: x.max(1).values, "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1), "reverse": lambda x: x.flip(1).cumsum(1).flip(1),
    "cumprod": lambda x: x.cumprod(1),
    "sort": lambda x: x.sort(1, descending=True).values, "permute": torch.clone, "gather": torch.clone,
}  # fmt: skip


@pytest.mark.parametrize("op", list(REDUCTIONS))
def testREDUCTIONS_and_scans(op):
    x = torch.randn(30, 100)
    want = REDUCTIONS[op](x)
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
