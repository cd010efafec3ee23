"""Contractions against torch's: einsum patterns, tensordot, inner, and chains of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _launch
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError, NoKernel, ShapeError


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64).to(dtype)


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Results and gradients in float64."""
    mine, peers = ([t.detach().requires_grad_() for t in tensors] for _ in range(2))
    with interpret():
        found = ours(*mine)
    wanted = theirs(*peers)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = rand(*wanted.shape, seed=9)
    with interpret():
        got = torch.autograd.grad(found, mine, weights)
    for a, b in zip(got, torch.autograd.grad(wanted, peers, weights)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("ij,jk->ik", [(3, 4), (4, 5)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("bqhd,bkhd->bhqk", [(2, 4, 3, 5), (2, 6, 3, 5)]),
        ("bhqk,bkhd->bqhd", [(2, 3, 4, 6), (2, 6, 3, 5)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (5, 1, 4, 6)]),
        ("...i,ji->...j", [(2, 3, 4), (5, 4)]),
        ("i,i->", [(7,), (7,)]),
        ("i,j->ij", [(3,), (4,)]),
        ("i,j->ji", [(3,), (4,)]),
        ("ij,ij->ij", [(3, 4), (3, 4)]),
        ("ij,ij->i", [(3, 4), (3, 4)]),
        ("ij,j->i", [(3, 4), (4,)]),
        ("bi,bj->bij", [(5, 3), (5, 4)]),
        ("abcd,cdef->abef", [(2, 3, 4, 5), (4, 5, 2, 3)]),
        ("abcd,dcef->fabe", [(2, 3, 4, 5), (5, 4, 2, 3)]),
        ("ijk->kji", [(2, 3, 4)]),
        ("ijk->j", [(2, 3, 4)]),
        ("ijk->", [(2, 3, 4)]),
        ("ii->i", [(4, 4)]),
        ("ii->", [(4, 4)]),
        ("iij,jk->ik", [(4, 4, 3), (3, 5)]),
        ("ba", [(2, 3)]),
        ("ij,kl->i", [(2, 3), (4, 5)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
        ("ij,jk,ki->", [(2, 3), (3, 4), (4, 2)]),
        ("bn,anm,bm->ba", [(2, 3), (4, 3, 5), (2, 5)]),
        ("ij,jk->ik", [(3, 1), (4, 5)]),
        ("bij,bjk->bik", [(1, 3, 4), (2, 4, 5)]),
        ("i...,j...->ij...", [(2, 3), (4, 3)]),
        ("ij, jk -> ik", [(3, 0), (0, 5)]),
        ("nchw,ocij->nohwij", [(1, 2, 3, 2), (2, 2, 2, 1)]),
    ],
)  # fmt: skip
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    tensors = [rand(*s, seed=k) for k, s in enumerate(shapes)]
    agree(lambda *t: gemskit.einsum(equation, *t), lambda *t: torch.einsum(equation, *t), *tensors)


def test_einsum_of_attention_copies_nothing() -> None:
    q, k = rand(2, 17, 3, 8), rand(2, 19, 3, 8)
    with interpret(), _launch.record() as calls:
        scores = gemskit.einsum("bqhd,bkhd->bhqk", q, k)
        gemskit.einsum("bhqk,bkhd->bqhd", scores, k)
    assert [c.kernel for c in calls] == ["contraction"] * 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_einsum_of_integers_is_exact(dtype: torch.dtype) -> None:
    a, b = (torch.randint(-99, 99, s, generator=torch.Generator().manual_seed(1)).to(dtype) for s in ((5, 9), (9, 4)))
    with interpret():
        assert torch.equal(gemskit.einsum("ij,jk->ik", a, b), torch.einsum("ij,jk->ik", a, b))
        assert gemskit.einsum("ij,j->i", a, b[:, 0]).dtype == dtype


def test_what_einsum_refuses() -> None:
    x = rand(3, 4)
    with interpret():
        for equation, error in (
            ("ij,jk->ik", ArgumentError),
            ("ijk->i", ShapeError),
            ("ij->ii", ArgumentError),
            ("ij->k", ArgumentError),
            ("i1->i", ArgumentError),
            ("ii->i", ShapeError),
            ("i.j->i", ArgumentError),
            ("ijk...->i", ShapeError),
        ):
            with pytest.raises(error, match="einsum"):
                gemskit.einsum(equation, x)
        with pytest.raises(ShapeError, match="einsum: 'j' is 3"):
            gemskit.einsum("ij,jk->ik", x, x)
        with pytest.raises(DtypeError, match="einsum"):
            gemskit.einsum("ij,kj->ik", x, x.float())
        with pytest.raises(NoKernel, match="not complex numbers"):
            gemskit.einsum("ij,kj->ik", x.to(torch.complex64), x.to(torch.complex64))


@pytest.mark.parametrize(
    "a, b, dims",
    [
        ((2, 3, 4), (3, 4, 5), 2),
        ((2, 3), (4,), 0),
        ((2, 3, 4), (5, 4, 2), ([0, 2], [2, 1])),
        ((2, 3), (3, 2), ([-1, 0], [0, 1])),
        ((2, 3, 4), (3, 4, 5), ((1, 2), (0, 1))),
    ],
)
def test_tensordot(a: tuple[int, ...], b: tuple[int, ...], dims: Any) -> None:
    agree(lambda x, y: gemskit.tensordot(x, y, dims), lambda x, y: torch.tensordot(x, y, dims), rand(*a), rand(*b))
    with interpret():
        wanted = torch.tensordot(rand(*a), rand(*b), dims)
        out = torch.empty(0, dtype=torch.float64)
        assert gemskit.tensordot(rand(*a), rand(*b), dims, out) is out
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a, b", [((4,), (4,)), ((2, 3, 4), (5, 4)), ((4,), (2, 4)), ((), (3, 4)), ((3,), ())])
def test_inner(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    agree(gemskit.inner, torch.inner, rand(*a), rand(*b))


@pytest.mark.parametrize("b", [0, 1, 3])
def test_addbmm(b: int) -> None:
    x, y, z = rand(5, 6), rand(b, 5, 4), rand(b, 4, 6)
    agree(lambda *t: gemskit.addbmm(*t, beta=0.5, alpha=2), lambda *t: torch.addbmm(*t, beta=0.5, alpha=2), x, y, z)
    with interpret():
        wanted = torch.addbmm(x, y, z, beta=2)
        assert gemskit.addbmm_(x, y, z, beta=2) is x
        torch.testing.assert_close(x, wanted, rtol=1e-12, atol=1e-12)
        with pytest.raises(ShapeError, match="addbmm"):
            gemskit.addbmm(x, y, x)


def test_a_chain_takes_the_cheapest_order() -> None:
    tensors = [rand(2, 30), rand(30, 4), rand(4, 50), rand(50)]
    agree(lambda *t: gemskit.linalg_multi_dot(t), lambda *t: torch.linalg.multi_dot(t), *tensors)
    agree(lambda *t: gemskit.chain_matmul(*t), lambda *t: torch.linalg.multi_dot(t), *tensors[:3])
    with interpret(), _launch.record() as calls:
        gemskit.linalg_multi_dot(tensors)
    assert [c.op for c in calls] == ["matmul"] * 3
    assert calls[0].kernel == "inner", "the vector on the right makes every product one of a vector"


@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_outer_and_vdot(shape: tuple[int]) -> None:
    agree(gemskit.outer, torch.outer, rand(*shape), rand(4))
    agree(gemskit.vdot, torch.vdot, rand(*shape), rand(*shape, seed=3))
    with interpret():
        assert gemskit.outer(rand(3), torch.arange(4)).dtype == torch.float64
        with pytest.raises(ShapeError, match="outer"):
            gemskit.outer(rand(3, 3), rand(3))
