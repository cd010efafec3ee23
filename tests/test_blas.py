"""Products beyond what the registry walk covers: raggedness, operand layouts, empty sides, epilogues, precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import _launch, backends, language
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit.blas import addmm, addmm_, baddbmm, bmm, linear, matmul, mm
from gemskit.blas._drive import Gemm, Product, gemm, tiles
from gemskit.blas.matmul import plain
from gemskit.errors import ArgumentError, DtypeError, NoKernel, ShapeError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(found: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale)


def both(op: Callable[..., Tensor], torch_op: Callable[..., Tensor], *tensors: Tensor, **kwargs: Any) -> None:
    """Forward and every gradient, against float64 torch."""
    ours = [t.detach().requires_grad_() for t in tensors]
    theirs = [t.detach().double().requires_grad_() for t in tensors]
    with interpret():
        found = op(*ours, **kwargs)
    wanted = torch_op(*theirs, **kwargs)
    assert found.shape == wanted.shape
    assert found.dtype == tensors[0].dtype
    close(found, wanted, scale=8)
    seed = rand(*found.shape, dtype=found.dtype, seed=7)
    with interpret():
        found.backward(seed)
    wanted.backward(seed.double())
    for a, b in zip(ours, theirs):
        assert a.grad is not None and b.grad is not None
        assert a.grad.dtype == a.dtype
        close(a.grad, b.grad, scale=8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 17, 1), (1, 33, 130), (17, 64, 3), (65, 96, 70), (130, 5, 129)])
def test_mm_is_exact_for_ragged_sides(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    both(mm, torch.mm, rand(m, k, dtype=dtype), rand(k, n, dtype=dtype, seed=1))


def layouts(t: Tensor) -> Iterator[Tensor]:
    yield t
    yield t.mT.contiguous().mT
    yield torch.stack((t, t), -1)[..., 0]
    yield torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


@pytest.mark.parametrize("a, b", list(itertools.product(range(4), repeat=2)))
def test_mm_takes_every_layout_of_both_operands(a: int, b: int) -> None:
    x, y = list(layouts(rand(33, 64)))[a], list(layouts(rand(64, 18)))[b]
    both(mm, torch.mm, x, y)


def test_mm_of_expanded_operands() -> None:
    both(mm, torch.mm, rand(1, 20).expand(30, 20), rand(20, 1).expand(20, 40))


@pytest.mark.parametrize("m, k, n", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_sides(m: int, k: int, n: int) -> None:
    both(mm, torch.mm, rand(m, k), rand(k, n))
    both(addmm, torch.addmm, rand(m, n), rand(m, k), rand(k, n), beta=0.5)
    both(bmm, torch.bmm, rand(2, m, k), rand(2, k, n))
    both(linear, F.linear, rand(2, m, k), rand(n, k), rand(n))


def test_an_empty_batch() -> None:
    both(bmm, torch.bmm, rand(0, 3, 4), rand(0, 4, 5))


@pytest.mark.parametrize("shape", [(9, 12), (12,), (1, 12), (9, 1), (1,), ()])
@pytest.mark.parametrize("beta, alpha", [(1, 1), (2, 0.25), (0, -1.5), (0.5, 0)])
def test_addmm_broadcasts_its_input(shape: tuple[int, ...], beta: float, alpha: float) -> None:
    both(addmm, torch.addmm, rand(*shape), rand(9, 7), rand(7, 12), beta=beta, alpha=alpha)


def test_addmm_ignores_an_input_that_does_not_count() -> None:
    bad = torch.full((3, 5), torch.nan)
    bad[0] = torch.inf
    with interpret():
        found = addmm(bad, rand(3, 4), rand(4, 5), beta=0)
    close(found, rand(3, 4).double() @ rand(4, 5).double(), scale=8)


def test_addmm_keeps_double_scalars() -> None:
    a, b, c = (rand(4, 4, dtype=torch.float64, seed=s) for s in range(3))
    with interpret():
        found = addmm(a, b, c, beta=1 + 2**-40, alpha=1 / 3)
    torch.testing.assert_close(found, torch.addmm(a, b, c, beta=1 + 2**-40, alpha=1 / 3), rtol=1e-14, atol=1e-14)


def test_addmm_in_place_writes_its_input_only() -> None:
    x, a, b = rand(6, 8), rand(6, 5), rand(5, 8)
    wanted, version = torch.addmm(x, a, b, beta=2), x._version
    before = a.clone(), b.clone()
    with interpret():
        assert addmm_(x, a, b, beta=2) is x
    close(x, wanted, scale=8)
    assert x._version == version + 1
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    with interpret(), pytest.raises(ShapeError, match=r"addmm_: the result has shape \[6, 8\]"):
        addmm_(rand(8), a, b)


def test_out_may_be_a_factor() -> None:
    x, y = rand(20, 20), rand(20, 20, seed=1)
    wanted = x.double() @ y.double()
    with interpret():
        assert mm(x, y, out=x) is x
    close(x, wanted, scale=8)


def test_bmm_broadcast_and_transposed_batches() -> None:
    x, y = rand(3, 17, 20), rand(20, 33)
    both(bmm, torch.bmm, x, y.expand(3, 20, 33))
    both(bmm, torch.bmm, x[:1].expand(5, 17, 20), rand(5, 33, 20).mT)
    both(bmm, torch.bmm, rand(17, 3, 20).transpose(0, 1), rand(3, 20, 1))
    both(bmm, torch.bmm, rand(4, 1, 20), rand(4, 20, 3))


def test_a_batch_that_shares_its_second_factor_becomes_rows() -> None:
    with interpret(), _launch.record() as calls:
        linear(rand(64, 4, 8), rand(16, 8))
    assert [c.grid for c in calls] == [(4,)]


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 4), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_rank(lead: tuple[int, ...], bias: bool) -> None:
    tensors = [rand(*lead, 19), rand(21, 19), *([rand(21)] if bias else [])]
    both(linear, F.linear, *tensors)


def test_linear_of_rows_that_are_no_single_stride_apart() -> None:
    weight, bias = rand(16, 12), rand(16)
    both(linear, F.linear, rand(4, 3, 12).transpose(0, 1), weight, bias)
    both(linear, F.linear, rand(4, 6, 24)[:, ::2, ::2], weight, bias)
    both(linear, F.linear, rand(4, 1, 12).expand(4, 5, 12), rand(12, 16).mT, bias)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, w, b = rand(8, 6), rand(7, 6), rand(7).requires_grad_()
    with interpret():
        y = linear(x, w, b)
        with _launch.record() as calls:
            y.sum().backward()
    assert [c.kernel for c in calls] == ["row_sum"]
    assert b.grad is not None
    close(b.grad, torch.full((7,), 8.0))


def test_half_sums_accumulate_in_float32() -> None:
    x, y = torch.full((1, 4096), 1.0, dtype=torch.float16), torch.full((4096, 1), 1.0, dtype=torch.float16)
    with interpret():
        assert mm(x, y).item() == 4096
        assert mm(x * 0.001, y).item() == pytest.approx(4.1, rel=2e-3)


def test_nan_stays_in_its_row() -> None:
    x, y = rand(20, 20), rand(20, 20)
    x[3, 4] = torch.nan
    with interpret():
        found = mm(x, y)
    assert torch.isnan(found).any(1).nonzero().flatten().tolist() == [3]


@pytest.fixture
def bias_silu() -> Iterator[Gemm[..., Tensor]]:
    @gemm(factors=("x", "w"))
    def product_silu(x: Tensor, w: Tensor, bias: Tensor, factor: float = 1.0) -> Tensor:
        """``silu(x @ w + factor * bias)``."""
        return F.silu(x @ w + factor * bias)

    @product_silu.epilogue
    @triton.jit
    def _(acc: Any, bias: Any, factor: Any) -> Any:
        acc = acc + bias * factor
        return acc * language.sigmoid(acc)

    yield product_silu
    assert "product_silu" not in REGISTRY


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_declared_epilogue_runs_in_the_same_kernel(bias_silu: Gemm[..., Tensor], dtype: torch.dtype) -> None:
    x, w, bias = rand(40, 30, dtype=dtype), rand(30, 70, dtype=dtype), rand(70, dtype=dtype)
    with interpret(), _launch.record() as calls:
        found = bias_silu(x, w, bias, 0.5)
        batched = bias_silu(x.expand(2, 40, 30), w, bias, 0.5)
    wanted = bias_silu.meaning(x.double(), w.double(), bias.double(), 0.5)
    close(found, wanted, scale=8)
    close(batched, wanted.expand(2, 40, 70), scale=8)
    assert [c.kernel for c in calls] == ["product_silu", "product_silu"]


def test_float32_obeys_torchs_precision() -> None:
    seen: list[str] = []

    def receive(kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
        seen.append(meta["PRECISION"])

    for n, arch in enumerate(("sm_90", "gfx942"), 4):
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with _launch.capturing(receive), backends.use_arch(arch):
                # Another shape for each architecture: a plan is made once.
                mm(rand(n, n), rand(n, n))
                mm(rand(n, n).bfloat16(), rand(n, n).bfloat16())
    torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee", "ieee", "tf32", "ieee", "ieee", "ieee", "ieee", "ieee"]


def test_few_rows_take_a_low_tile() -> None:
    row = backends.find_arch("sm_90")

    def tile(*sizes: int) -> tuple[int, int, int]:
        found = tiles(row.config("gemm"), row.config("gemm_few"), *sizes, torch.bfloat16)
        return found["BM"], found["BN"], found["BK"]

    assert tile(1, 4096, 4096) == (16, 64, 128)
    assert tile(128, 4096, 14336) == (64, 64, 128)
    assert tile(4097, 4096, 4096) == (128, 128, 64)
    assert tile(4097, 4096, 0)[2] == 16


@pytest.mark.parametrize("kernels", [True, False])
def test_wrong_shapes_name_the_operator_and_the_shapes(kernels: bool) -> None:
    calls: list[tuple[str, Callable[[], Tensor]]] = [
        (r"mm: .*float32\[3, 4\].*float32\[5, 6\]", lambda: mm(rand(3, 4), rand(5, 6))),
        (r"addmm: .*float32\[7\].*", lambda: addmm(rand(7), rand(3, 4), rand(4, 6))),
        (r"bmm: .*float32\[2, 3, 4\].*float32\[3, 4, 6\]", lambda: bmm(rand(2, 3, 4), rand(3, 4, 6))),
        (r"linear: .*float32\[3, 4\].*float32\[5, 6\]", lambda: linear(rand(3, 4), rand(5, 6))),
    ]
    for pattern, call in calls:
        with pytest.raises(ArgumentError, match=pattern):
            if kernels:
                with interpret():
                    call()
            else:
                call()


def test_dtypes_that_are_refused() -> None:
    x = rand(4, 4)
    with interpret():
        with pytest.raises(NoKernel, match="mm: no kernel for products of bools"):
            mm(x.bool(), x.bool())
        with pytest.raises(NoKernel, match=r"mm: no kernel for input: complex64.*; not complex numbers"):
            mm(x.to(torch.complex64), x.to(torch.complex64))
        with pytest.raises(DtypeError, match=r"mm: out_dtype must be torch\.float32, the dtype of the factors"):
            mm(x, x, torch.bfloat16)
        with pytest.raises(DtypeError, match="addmm: all tensors must have one dtype"):
            addmm(x, x.bfloat16(), x.bfloat16())
        with pytest.raises(DtypeError, match="mm: all tensors must have one dtype"):
            mm(x, x.bfloat16())
        with pytest.raises(DtypeError, match="linear: all tensors must have one dtype"):
            linear(x, x, x[0].double())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_products_of_integers_wrap_around_as_torchs(dtype: torch.dtype) -> None:
    big = torch.iinfo(dtype).max
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(0, big, s, generator=generator, dtype=torch.int64).to(dtype) for s in ((5, 70), (70, 9)))
    c = torch.randint(0, 9, (5, 9), generator=generator).to(dtype)
    with interpret():
        assert torch.equal(mm(a, b), torch.mm(a, b))
        assert torch.equal(mm(a[:, ::2], b[::2]), torch.mm(a[:, ::2], b[::2]))
        assert torch.equal(bmm(a.expand(2, 5, 70), b.expand(2, 70, 9)), torch.mm(a, b).expand(2, 5, 9))
        assert torch.equal(matmul(a, b[:, 0]), torch.mv(a, b[:, 0]))
        # The integral part of a number counts.
        assert torch.equal(addmm(c, a, b, beta=2.5, alpha=3), torch.addmm(c, a, b, beta=2.5, alpha=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_of_halves_may_stay_float32(dtype: torch.dtype) -> None:
    x, y, z = rand(20, 70, dtype=dtype), rand(70, 9, dtype=dtype), rand(20, 9)
    calls: list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = [
        (mm, torch.mm, [x, y]),
        (bmm, torch.bmm, [x[None], y[None]]),
        (addmm, torch.addmm, [z, x, y]),
        (addmm, torch.addmm, [z.to(dtype), x, y]),
        (baddbmm, torch.baddbmm, [z, x[None], y[None]]),
    ]
    for ours, theirs, tensors in calls:
        mine, peers = [t.detach().requires_grad_() for t in tensors], [t.detach().double() for t in tensors]
        with interpret():
            found = ours(*mine, torch.float32)
        assert found.dtype == torch.float32
        close(found, theirs(*peers), scale=8)
        with interpret():
            found.sum().backward()
        for t in mine:
            assert t.grad is not None and t.grad.dtype == t.dtype
        close(mine[-1].grad, peers[-2].mT @ torch.ones_like(found).double(), scale=8)


def test_strides_beyond_int32_take_the_wide_kernel() -> None:
    far, wide = 2**31 + 8, list[bool]()
    x = torch.empty(0).as_strided((0, 4), (far, 1))
    with _launch.capturing(lambda kernel, grid, args, meta: wide.append(meta["WIDE"])):
        mm(rand(4, 0), x)
        far_rows = torch.empty(4, device="meta").as_strided((4, 4), (far, 1))
        plan = Product("wide", plain).plan(far_rows, far_rows, {}, torch.empty(4, 4, device="meta"))
        plan(rand(4, 4), rand(4, 4), rand(4, 4), {})
    assert wide == [False, True]


def test_products_of_bools_are_those_of_torch_which_has_none_of_terms() -> None:
    """Where there is nothing to add torch has no kernel to lack."""

    def bools(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool)

    calls: list[Callable[[Any, Any], Tensor]] = [
        lambda mine, _: mine.mm(bools(0, 3), bools(3, 4)),
        lambda mine, _: mine.mm(bools(3, 0), bools(0, 4)),
        lambda mine, _: mine.mm(bools(3, 1), bools(1, 4)),
        lambda mine, _: mine.addmm(bools(0, 4), bools(0, 3), bools(3, 4)),
        lambda mine, _: mine.addmm(bools(3, 4), bools(3, 0), bools(0, 4)),
        lambda mine, _: mine.bmm(bools(2, 0, 3), bools(2, 3, 4)),
        lambda mine, _: mine.mv(bools(3, 0), bools(0)),
        lambda mine, _: mine.mv(bools(3, 2), bools(2)),
        lambda mine, _: mine.matmul(bools(0), bools(0)),
        lambda mine, _: mine.einsum("a,b->ba", bools(5), bools(7)),
        lambda mine, _: mine.einsum("ab,b->a", bools(3, 2), bools(2)),
        lambda _, linear: linear(bools(0, 3), bools(4, 3), bools(4)),
    ]
    for call in calls:
        try:
            wanted = call(torch, F.linear)
        except RuntimeError:
            with interpret(), pytest.raises(NoKernel, match="no kernel for products of bools"):
                call(gemskit, linear)
        else:
            with interpret():
                assert torch.equal(call(gemskit, linear), wanted)
