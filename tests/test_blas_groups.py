"""Grouped and quantised products beyond what the registry walk covers: any groups, scales of every form, refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _launch, backends
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError, NoKernel, ShapeError

F8, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64).to(dtype)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_group(a: Tensor, b: Tensor, stops: list[int]) -> Tensor:
    """What groups mean, in the plainest form; rows of no group are zero."""
    starts = [0, *stops]
    if a.ndim == b.ndim == 2:
        return torch.stack([a[:, s:e] @ b[s:e] for s, e in zip(starts, stops)])
    if a.ndim == 3:
        return by_group(b.mT, a.mT, stops).mT
    out = a.new_zeros(a.shape[0], b.shape[2])
    for g, (s, e) in enumerate(zip(starts, stops)):
        out[s:e] = a[s:e] @ b[g]
    return out


@pytest.mark.parametrize("seed", range(6))
def test_any_groups_and_their_gradients(seed: int) -> None:
    draw = random.Random(seed)
    groups, total = draw.choice((1, 2, 5, 9)), draw.choice((1, 40, 150))
    stops = sorted(draw.randint(0, total) for _ in range(groups))
    # The weight's gradient is the form of steps, that of columns the form of rows.
    for a, b in (
        (rand(total, 24), rand(groups, 24, 20)),
        (rand(groups, 20, 24), rand(24, total)),
        (rand(20, total), rand(total, 24)),
    ):
        mine, peers = ([t.detach().requires_grad_() for t in (a, b)] for _ in range(2))
        wanted = by_group(*peers, stops)
        weights = rand(*wanted.shape, seed=3)
        with interpret():
            found = gemskit.grouped_mm(*mine, ends(*stops))
            grads = torch.autograd.grad(found, mine, weights)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for g, w in zip(grads, torch.autograd.grad(wanted, peers, weights)):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gemskit.grouped_mm(a, b, ends(*stops)), wanted.detach(), rtol=1e-12, atol=1e-12)


def test_groups_take_one_launch_whatever_they_are() -> None:
    grids = set()
    for stops in ((10, 20, 64), (0, 0, 0), (64, 64, 64)):
        with interpret(), _launch.record() as calls:
            gemskit.grouped_mm(rand(64, 24), rand(3, 24, 20), ends(*stops))
        assert len(calls) == 1
        grids.add(calls[0].grid)
    assert len(grids) == 1, "the host does not know the groups"


def test_ends_out_of_range_stay_inside() -> None:
    a, b = rand(16, 24), rand(3, 24, 20)
    with interpret():
        found = gemskit.grouped_mm(a, b, ends(-5, 8, 1000))
    torch.testing.assert_close(found, by_group(a, b, [0, 8, 16]), rtol=1e-12, atol=1e-12)


def test_transposed_experts_and_halves() -> None:
    a, b = rand(40, 64, dtype=torch.bfloat16), rand(4, 48, 64, dtype=torch.bfloat16).mT
    with interpret():
        found = gemskit.grouped_mm(a, b, ends(7, 7, 30, 40))
        wide = gemskit.grouped_mm(a, b, ends(7, 7, 30, 40), out_dtype=torch.float32)
    wanted = by_group(a.double(), b.double(), [7, 7, 30, 40])
    torch.testing.assert_close(found.double(), wanted, rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(wide.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("kernels", [True, False])
def test_what_grouped_mm_refuses(kernels: bool) -> None:
    a, b, offs = rand(8, 4), rand(2, 4, 3), ends(4, 8)
    wrong: list[tuple[type[Exception], tuple[Any, ...]]] = [
        (ShapeError, (a, b, ends(8))),
        (ShapeError, (a[:, :3], b, offs)),
        (DtypeError, (a, b, offs.long())),
        (DtypeError, (a, b.float(), offs)),
        (DtypeError, (a.long(), b.long(), offs)),
        (ArgumentError, (a, b)),
        (ArgumentError, (b, b.mT, offs)),
        (NoKernel, (a, b, offs, a[0])),
    ]
    for error, args in wrong:
        with pytest.raises(error, match="grouped_mm"):
            if kernels:
                with interpret():
                    gemskit.grouped_mm(*args)
            else:
                gemskit.grouped_mm(*args)


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(n) // side for n, side in zip(shape, block))
    return scale.double()[rows.clamp(max=scale.shape[0] - 1)][:, columns.clamp(max=scale.shape[1] - 1)]


@pytest.mark.parametrize("dtype", [F8, E5, torch.int8])
@pytest.mark.parametrize(
    "blocks",
    [((300, 300), (300, 150)), ((1, 300), (300, 1)), ((1, 128), (128, 128)), ((128, 128), (128, 1)), ((1, 128), (128, 1))],
)  # fmt: skip
def test_scales_of_every_form(dtype: torch.dtype, blocks: tuple[tuple[int, int], tuple[int, int]]) -> None:
    shapes = (140, 300), (300, 150)
    a, b = (rand(*s, seed=k).mul(3).to(dtype) for k, s in enumerate(shapes))
    scales = [
        torch.rand([-(-n // side) for n, side in zip(shape, block)], generator=torch.Generator().manual_seed(5)) + 0.5
        for shape, block in zip(shapes, blocks)
    ]
    x, y = (t.double() * spread(s, shape, block) for t, s, shape, block in zip((a, b), scales, shapes, blocks))
    with interpret():
        found = gemskit.scaled_mm(a, b, *scales, out_dtype=torch.float32)
    torch.testing.assert_close(found.double(), x @ y, rtol=1e-5, atol=2e-3)
    meant = gemskit.scaled_mm.meaning(a, b, *scales, out_dtype=torch.float32)
    torch.testing.assert_close(meant.double(), x @ y, rtol=1e-5, atol=2e-3)


def test_float8_results_saturate() -> None:
    a, b, one = torch.full((16, 32), 448.0).to(F8), torch.full((32, 16), 448.0).to(F8), torch.ones(())
    for scale, value in ((1.0, 448.0), (2.0**-15, 2.0**-15 * 32 * 448 * 448)):
        with interpret():
            found = gemskit.scaled_mm(a, b, one, one, None, torch.tensor(scale))
        assert found.dtype == F8
        assert torch.equal(found.float(), torch.tensor(value).to(F8).float().expand(16, 16))


def test_names_of_others() -> None:
    a, b = rand(20, 256, dtype=torch.float32).to(F8), rand(130, 256, seed=1).to(F8)
    a_s, b_s = torch.rand(20, 2) + 0.5, torch.rand(2, 2) + 0.5
    with interpret():
        found = gemskit.fp8_matmul(a, a_s, b, b_s)
        same = gemskit.cutlass_scaled_mm(a, b.mT, a_s, b_s.mT, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, same)
        with pytest.raises(NoKernel, match="fp8_matmul"):
            gemskit.fp8_matmul(a, a_s, b, b_s, torch.float8_e8m0fnu)


def test_what_quantised_products_refuse() -> None:
    a, b, one = rand(20, 96).to(F8), rand(96, 30).to(F8), torch.ones(())
    with interpret():
        with pytest.raises(ShapeError, match="scaled_mm"):
            gemskit.scaled_mm(a, b, torch.ones(7, 1), one)
        with pytest.raises(NoKernel, match="blocks of 40 along K"):
            gemskit.w8a8_block_fp8_matmul(a, b.mT, torch.ones(20, 3), torch.ones(1, 3), [64, 40])
        with pytest.raises(DtypeError, match="int_mm"):
            gemskit.int_mm(rand(4, 4), rand(4, 4))
        with pytest.raises(NoKernel, match="mm: no kernel for input: float8"):
            gemskit.mm(a, b)
    with _launch.capturing(lambda *_: None), backends.use_arch("sm_80"):
        with pytest.raises(NoKernel, match=r"sm_80 has no torch\.float8_e4m3fn"):
            gemskit.scaled_mm(a, b, one, one)


def test_a_sum_of_int8_is_exact() -> None:
    a, b = (torch.full(s, 127, dtype=torch.int8) for s in ((17, 4096), (4096, 5)))
    with interpret():
        assert torch.equal(gemskit.int_mm(a, b), torch.full((17, 5), 127 * 127 * 4096, dtype=torch.int32))
