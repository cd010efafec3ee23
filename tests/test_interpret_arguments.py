"""Kernel arguments reach an interpreted kernel as the compiler gives them: types, constants, tuples, descriptors."""

from __future__ import annotations

import collections
import sys
import types
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

import gemskit._interpret as gi
from gemskit._interpret import run
from gemskit.errors import ArgumentError, DeclarationError, DeviceError, MissingExtra

pytest.importorskip("numpy")
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@triton.jit
def typed_kernel(
    o,
    kinds,
    s: tl.float64,
    n: tl.int64,
    d: fp64,  # noqa: F821
    h: tl.float16,
    f,
    b,
    small,
    big,
    huge,
    one,
    none,
):
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
def quoted_kernel(o, s: "fp64"):  # noqa: F821, UP037
    tl.store(o, s)


def test_annotations_that_the_compiler_would_ignore_are_refused():
    with pytest.raises(DeclarationError, match=r"parameter s.*without quotes"):
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


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_compiler_takes_the_same_kernel_after_it_was_interpreted(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {
        "ins": ("*fp64", "*fp32", "*fp32"), "outs": ("*fp64", "*fp32"), "sizes": ("i32", "i32"),
        "w": "fp64", "n": "i32",
        "strides": (("constexpr", "i32"), ("constexpr", "constexpr"), ("i32", "constexpr")), "F": "constexpr",
        "B": "constexpr",
    }  # fmt: skip
    names = tuple_kernel.arg_names
    strides = names.index("strides")
    constants = {(strides, 0, 0): 1, (strides, 1, 0): 1, (strides, 1, 1): None, (strides, 2, 1): 1}
    constants |= {(names.index("F"),): weighted, (names.index("B"),): 8}
    ordered = {name: signature[name] for name in names}
    source = ASTSource(fn=tuple_kernel, signature=ordered, constexprs=constants, attrs={})
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


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
    with pytest.raises(DeviceError, match=r"argument p is on meta"):
        run(namedtuple_kernel, (1,), (Pair(torch.empty(4, device="meta"), torch.ones(4)), None, 4))


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


def test_what_is_no_kernel_is_refused():
    with pytest.raises(ArgumentError, match=r"accepted is a @triton.jit function"):
        run(len, (1,), ())


def test_numpy_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(MissingExtra, match=r"pip install \"gemskit\[interpret\]\""):
        gi._engine()
