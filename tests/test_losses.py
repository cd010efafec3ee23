"""Losses by torch's names: every argument that the operators behind them do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError, GradientError, ShapeError

pytestmark = pytest.mark.filterwarnings("ignore")


def t(*shape: int, seed: int = 0, low: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) if low is None else torch.rand(shape, generator=generator) + low


def i(*shape: int, high: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


XY = (t(5, 7), t(5, 7, seed=1))
PROBABILITIES = (t(5, 7).log_softmax(1), t(5, 7, seed=1).softmax(1))
LEGACY: tuple[dict[str, Any], ...] = (
    {}, {"reduction": "none"}, {"reduction": "sum"}, {"size_average": False}, {"reduce": False}, {"size_average": True},
)  # fmt: skip
CASES: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
    *[(name, XY, how) for name in ("mse_loss", "l1_loss", "smooth_l1_loss") for how in LEGACY],
    *[("huber_loss", XY, {**how, "delta": 0.5}) for how in LEGACY[:3]],
    *[("smooth_l1_loss", XY, {"beta": beta}) for beta in (0.0, 0.3)],
    *[("binary_cross_entropy_with_logits", (XY[0], t(5, 7, low=0.0)), {**how, "pos_weight": t(7, low=0.5)}) for how in LEGACY],
    *[("kl_div", PROBABILITIES, how) for how in (*LEGACY, {"reduction": "batchmean"})],
    ("kl_div", (PROBABILITIES[0], PROBABILITIES[1].log()), {"log_target": True, "reduction": "batchmean"}),
    ("kl_div", (t(), t(low=0.5)), {"reduction": "batchmean"}),
    *[("nll_loss", (t(5, 7), i(5, high=7)), {**how, "weight": t(7, low=0.5), "ignore_index": 3}) for how in LEGACY],
    *[("nll_loss", (t(2, 5, 3, 4), i(2, 3, 4, high=5)), {**how, "ignore_index": 1}) for how in LEGACY[:3]],
    ("nll_loss", (t(7), i(high=7)), {}),
    ("nll_loss", (t(3, 7), i(3, high=7).to(torch.uint8)), {}),
    ("nll_loss", (t(3, 7), torch.full((3,), -100)), {}),
    *[
        (name, XY, {"reduction": how, "weight": t(5, 7, low=0.5)})
        for name in ("mse_loss", "l1_loss", "huber_loss") for how in ("none", "mean", "sum")
    ],
]  # fmt: skip


@pytest.mark.parametrize("interpreted", [False, True], ids=["meaning", "kernels"])
@pytest.mark.parametrize(("name", "args", "how"), CASES, ids=[f"{n}-{k}" for k, (n, *_) in enumerate(CASES)])
def test_as_torch(name: str, args: tuple[Tensor, ...], how: dict[str, Any], interpreted: bool) -> None:
    ours: Callable[..., Tensor] = getattr(gemskit, name)
    theirs: Callable[..., Tensor] = getattr(F, name)
    found = []
    for fn in (ours, theirs):
        leaves = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
        with interpret() if interpreted and fn is ours else torch.enable_grad():
            loss = fn(*leaves, **how)
            grads = torch.autograd.grad(loss.sum(), [x for x in leaves if x.requires_grad])
        found.append((loss.detach(), *grads))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-6, atol=2e-6)


def test_refused() -> None:
    x, y = XY
    with interpret():
        for kind, call in (
            (ArgumentError, lambda: gemskit.mse_loss(x, y, reduction="avg")),
            (ArgumentError, lambda: gemskit.mse_loss(x, y, reduction="avg", weight=y)),
            (ArgumentError, lambda: gemskit.smooth_l1_loss(x, y, beta=-1.0)),
            (ArgumentError, lambda: gemskit.huber_loss(x, y, delta=0.0)),
            (ShapeError, lambda: gemskit.mse_loss(x, y, weight=y[0])),
            (ShapeError, lambda: gemskit.mse_loss(x, y[:, :5])),
            (ArgumentError, lambda: gemskit.binary_cross_entropy_with_logits(x, y[0])),
            (ArgumentError, lambda: gemskit.kl_div(x, y, reduction="avg")),
            (ShapeError, lambda: gemskit.nll_loss(x, i(4, high=7))),
            (DtypeError, lambda: gemskit.nll_loss(x, i(5, high=7).int())),
            (ArgumentError, lambda: gemskit.nll_loss(x, i(5, high=7), reduction="avg")),
        ):
            with pytest.raises(kind):
                call()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_overwrites_only_by_name(reduction: str) -> None:
    x, target = t(5, 7), i(5, high=7)
    target[1] = -100
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(leaf, target, reduction=reduction)
    grad = torch.full_like(loss, 2)
    (want,) = torch.autograd.grad(loss, leaf, grad)
    with interpret():
        given = x.clone()
        torch.testing.assert_close(gemskit.cross_entropy_backward(grad, given, target, reduction=reduction), want)
        assert torch.equal(given, x)
        assert gemskit.cross_entropy_backward_(grad, given, target, reduction=reduction) is given
        torch.testing.assert_close(given, want)
        with pytest.raises(GradientError):
            gemskit.cross_entropy_backward_(grad, leaf, target, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_errors_of_ints_wrap_around_before_they_are_summed(
    dtype: torch.dtype, shape: tuple[int, ...], reduction: str
) -> None:
    input, target = (torch.full(shape, n, dtype=dtype) for n in (2, 105))
    with interpret():
        found = gemskit.l1_loss(input, target, reduction=reduction)
    torch.testing.assert_close(found, F.l1_loss(input, target, reduction=reduction), rtol=0, atol=0)
