"""Complex numbers where the derived checks do not look: lazy views, mixed arguments, refusals, infinite parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _launch
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, NoKernel


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with interpret():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.complex128, generator=generator).to(dtype)


def close(got: Tensor, want: Tensor) -> None:
    assert not got.is_conj() and not got.is_neg()
    torch.testing.assert_close(got, want.resolve_conj().resolve_neg(), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_lazy_views_are_resolved_by_kernels() -> None:
    z, w = draw(5, 33), draw(33)
    before = _launch.launches()["conj_physical_complex"]
    close(gemskit.mul(z.conj(), w.conj()), z.conj() * w.conj())
    assert _launch.launches()["conj_physical_complex"] == before + 2
    close(gemskit.add(z.conj().imag, w.real), z.conj().imag + w.real)
    close(gemskit.neg(torch._neg_view(z.conj())), z.conj())
    close(gemskit.resolve_conj(z.conj()), z.conj())
    close(gemskit.resolve_neg(z.conj().imag), z.conj().imag)
    assert gemskit.resolve_conj(z) is z and gemskit.resolve_neg(z) is z
    assert gemskit.conj(z).is_conj()
    assert gemskit.real(z).data_ptr() == z.data_ptr() and gemskit.imag(z).untyped_storage().data_ptr() == z.data_ptr()


def test_lazy_gradients_are_resolved() -> None:
    z, g = draw(5, 7), draw(5, 7)
    found = []
    for multiply in (gemskit.mul, torch.mul):
        leaf = z.clone().requires_grad_()
        out = multiply(leaf, 2 + 1j)
        out.backward(g.conj())
        assert leaf.grad is not None
        found.append(leaf.grad)
    close(found[0], found[1])
    leaf = z.clone().requires_grad_()
    # The gradient of imag(conj(z)) is a negated view.
    gemskit.mul(leaf.conj().imag, 3.0).sum().backward()
    assert leaf.grad is not None
    close(leaf.grad, torch.full_like(z, -3j))


def test_numbers_and_reals_take_part() -> None:
    x, z, d = torch.randn(9), draw(9), draw(9, dtype=torch.complex128)
    for args in ((x, 1j), (z, x), (x, z), (z, d), (torch.arange(9), z), (x.double(), z), (z, 2)):
        for name in ("add", "sub", "mul"):
            got, want = getattr(gemskit, name)(*args), getattr(torch, name)(*args)
            assert got.dtype == want.dtype
            close(got, want)
    close(gemskit.mul(2j, x), 2j * x)
    close(gemskit.mul(z, True), z)
    close(gemskit.clone(z.conj()), z.conj())
    close(gemskit.add(z, x, alpha=2 - 1j), torch.add(z, x, alpha=2 - 1j))
    close(gemskit.where(x > 0, 1j, z), torch.where(x > 0, 1j, z))
    assert torch.equal(gemskit.eq(z, z[3].item()), torch.eq(z, z[3].item()))
    out = torch.empty(9, dtype=torch.complex128)
    assert gemskit.mul(z, x, out=out) is out
    close(out.to(torch.complex64), z * x)


def test_real_operands_get_real_gradients() -> None:
    x, z = torch.randn(33), draw(5, 33)
    found = []
    for multiply in (gemskit.mul, torch.mul):
        leaf = x.clone().requires_grad_()
        multiply(leaf, z).real.sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        found.append(leaf.grad)
    close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_extreme_parts(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max / 4
    values = [0.0, -0.0, 1.0, -3.0, 1e-30, top, -top]
    z = torch.tensor([complex(a, b) for a in values for b in values], dtype=dtype)
    for name in ("sqrt", "log"):
        got, want = getattr(gemskit, name)(z), getattr(torch, name)(z)
        torch.testing.assert_close(torch.view_as_real(got), torch.view_as_real(want), rtol=1e-5, atol=1e-6)
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([complex(a, b) for a in (inf, -inf, nan, 2.0) for b in (0.0, -0.0, inf, nan, 1.0)], dtype=dtype)
    got, want = gemskit.sqrt(z), torch.sqrt(z)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    x = torch.tensor([-inf, -800.0, 100.0, inf], dtype=dtype)
    torch.testing.assert_close(gemskit.exp(x), torch.exp(x))


def test_refusals_name_the_operator() -> None:
    z = draw(3)
    with pytest.raises(NoKernel, match="silu: no kernel for input: complex64"):
        gemskit.silu(z)
    with pytest.raises(ArgumentError, match="add_: the target is a lazy"):
        gemskit.add_(z.conj(), 1)
    with pytest.raises(ArgumentError, match="add: out is a lazy"):
        gemskit.add(z, 1, out=torch.empty_like(z).conj())
    with pytest.raises(NoKernel, match=r"add: no kernel writes a result of torch\.float32 into complex64"):
        gemskit.add(torch.ones(3), 1, out=torch.empty(3, dtype=torch.complex64))
    with pytest.raises(NoKernel, match=r"add: no kernel for a result of torch\.complex32"):
        gemskit.add(torch.ones(3, dtype=torch.float16), 1j)
