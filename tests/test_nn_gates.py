"""Gates that are other gates in other words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit._interpret import interpret
from gemskit.errors import ShapeError


@pytest.mark.parametrize(
    ("op", "meaning"),
    [
        (gemskit.swiglu, lambda a, b: F.silu(a) * b),
        (gemskit.geglu, lambda a, b: F.gelu(a, approximate="tanh") * b),
        (gemskit.gelu_tanh_and_mul, lambda a, b: F.gelu(a, approximate="tanh") * b),
        (gemskit.reglu, lambda a, b: F.relu(a) * b),
        (gemskit.mul_and_silu, lambda a, b: a * F.silu(b)),
    ],
)
def test_packed(op: Callable[[Tensor], Tensor], meaning: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(3, 34, requires_grad=True)
    grad = torch.randn(3, 17)
    with interpret():
        got = op(x)
        (dx,) = torch.autograd.grad(got, x, grad)
    want = meaning(*x.chunk(2, -1))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(dx, torch.autograd.grad(want, x, grad)[0])


def test_an_odd_last_dimension() -> None:
    with pytest.raises(ShapeError, match="mul_and_silu: packed x must have a last dimension of even size"):
        gemskit.mul_and_silu(torch.randn(3, 5))
