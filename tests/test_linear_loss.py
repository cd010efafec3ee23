"""Cross entropy of a linear layer, what the registry walk cannot see: memory, how many products, which gradients are made."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import _launch, _replay
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.nn import linear_loss
from gemskit.nn.linear_loss import LEAST, fused_linear_cross_entropy, parts

N, C, H = 8192, 128256, 4096


@pytest.mark.parametrize("rows", [0, 1, 5, 127, 128, 129, 256, 257, 700, 2303, 2304, 4096, 8192, 10007, 1 << 20])
def test_parts(rows: int) -> None:
    found = parts(rows)
    edges = [start for start, _ in found] + [rows]
    assert edges[0] == 0 and [size for _, size in found] == [b - a for a, b in itertools.pairwise(edges)]
    most = max(size for _, size in found)
    assert most <= max(rows // 9, LEAST) and (rows == 0 or all(size > 0 for _, size in found))
    # No part is a remainder for whose few rows all of the weight would be read.
    assert rows <= LEAST or min(size for _, size in found) > most - 2 * linear_loss.TILE


def arguments(dtype: torch.dtype = torch.bfloat16, **more: Any) -> tuple[Any, ...]:
    """Those of a language model's head, without memory."""
    x, w = torch.empty(N, H, dtype=dtype, device="meta"), torch.empty(C, H, dtype=dtype, device="meta")
    bias, target = torch.empty(C, dtype=dtype, device="meta"), torch.empty(N, dtype=torch.int64, device="meta")
    bound = fused_linear_cross_entropy.signature.bind(x, w, target, bias, **more)
    bound.apply_defaults()
    return bound.args


def allocated(fn: Callable[[], Any]) -> int:
    """Bytes that ``fn`` allocates of meta tensors, which kernels would run on."""
    with torch.no_grad(), _replay._Watch() as watch, _launch.tracing(lambda *launch: None):
        fn()
    return sum(t.numel() * t.element_size() for t in watch.made)


@pytest.mark.parametrize("prepare", ["", "input linear_weight linear_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory(prepare: str, reduction: str) -> None:
    """Of all that is allocated, what is no gradient is less than an eighth of the logits: forward, then backward."""
    op, values, kept = fused_linear_cross_entropy, arguments(prepare=prepare, reduction=reduction), {}
    eighth, sums = N * C * 2 // 8, 4 * C * H + 4 * C
    prepared = bool(prepare) and reduction == "mean"
    total = allocated(lambda: op.forward(values, None, kept))
    assert total - (sums + 2 * N * H if prepared else 0) < eighth, total / eighth

    named = dict(zip(op.params, values))
    needs = {"input", "linear_weight", "linear_bias"}
    have = {**named, **kept, "needs": needs, "like": {n: (named[n].shape, named[n].dtype) for n in needs}}
    have["grad"] = torch.empty((N,) if reduction == "none" else (), dtype=torch.bfloat16, device="meta")
    assert op._vjp is not None
    total = allocated(lambda: op._vjp(**{n: have.get(n) for n in op._saves}))
    total -= 2 * (C * H + N * H + C) + (0 if prepared else sums)
    assert total < eighth, total / eighth


def products(calls: list[_launch.Call]) -> int:
    return sum(c.kernel in ("mm", "addmm", "linear", "linear__capped") for c in calls)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of at most 16 rows: so many of 70."""
    monkeypatch.setattr(linear_loss, "LEAST", 16)
    monkeypatch.setattr(linear_loss, "TILE", 8)
    return len(parts(70))


def made(frozen: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(*s, generator=generator) for s in ((70, 24), (50, 24), (50,)))
    target = torch.randint(50, (70,), generator=generator)
    target[::7] = -100
    x[7] = float("nan")  # ignored
    return x.requires_grad_("x" not in frozen), w.requires_grad_("w" not in frozen), b.requires_grad_(), target


@pytest.mark.parametrize(("reduction", "count"), [("mean", 3), ("sum", 3), ("none", 4)])
def test_parts_add_up(small: int, reduction: str, count: int) -> None:
    """As many products as with stored logits, except where the gradients of the losses come too late."""
    x, w, b, target = made()
    x = x.detach().nan_to_num().requires_grad_()
    assert small == 5
    with interpret(), gemskit.record() as calls:
        loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, z_loss=0.01)
        loss.sum().mul(3).backward()
    assert products(calls) == count * small, [c.kernel for c in calls]
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    logits = F.linear(*wide)
    z = 0.01 * logits.logsumexp(1).square() * (target != -100)
    want = F.cross_entropy(logits, target, reduction="none") + z
    want = want if reduction == "none" else want.sum() if reduction == "sum" else want.sum() / (target != -100).sum()
    want.sum().mul(3).backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for got, exact in zip((x, w, b), wide):
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_needed(small: int) -> None:
    x, w, b, target = made(frozen="w")
    with interpret(), gemskit.record() as calls:
        loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b)
    assert products(calls) == 2 * small
    with interpret(), torch.no_grad(), gemskit.record() as calls:
        assert torch.equal(gemskit.linear_cross_entropy(x, w, target, linear_bias=b), loss)
    assert products(calls) == small


def test_ignored_rows_may_be_nan(small: int) -> None:
    x, w, b, target = made(frozen="w")
    with interpret():
        loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b)
        loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()
    assert b.grad is not None and b.grad.isfinite().all()


def test_twice(small: int) -> None:
    """The backward pass leaves what it needs as it was."""
    x, w, b, target = made()
    with interpret():
        loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b, softcap=3.0)
        first = torch.autograd.grad(loss, (w, b), retain_graph=True)
        second = torch.autograd.grad(loss, (w, b))
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(c)) for a, c in zip(first, second))


@pytest.mark.parametrize("acc_dtype", [None, torch.bfloat16])
def test_sums_of_halves(small: int, acc_dtype: torch.dtype | None) -> None:
    x, w, b, target = (t.detach() for t in made())
    x, w, b = (t.nan_to_num().bfloat16().requires_grad_() for t in (x, w, b))
    with interpret():
        loss = gemskit.linear_cross_entropy(
            x, w, target, linear_bias=b, out_dtype=torch.float32, acc_dtype=acc_dtype, reduction="sum"
        )
        loss.backward()
    assert loss.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = F.cross_entropy(F.linear(*wide), target, reduction="sum")
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0)
    assert w.grad is not None and wide[1].grad is not None
    error = (w.grad - wide[1].grad).abs().max() / wide[1].grad.abs().max()
    assert error < (0.006 if acc_dtype is None else 0.009), error


def test_refused() -> None:
    x, w, _, target = (t.detach() for t in made())
    with interpret():
        for kind, call in (
            (ShapeError, lambda: gemskit.linear_cross_entropy(x[None], w, target)),
            (ShapeError, lambda: gemskit.linear_cross_entropy(x, w[:, 1:], target)),
            (ShapeError, lambda: gemskit.linear_cross_entropy(x, w, target[1:])),
            (DtypeError, lambda: gemskit.linear_cross_entropy(x, w.double(), target)),
            (DtypeError, lambda: gemskit.linear_cross_entropy(x, w, target, out_dtype=torch.float16)),
            (ArgumentError, lambda: gemskit.linear_cross_entropy(x, w, target, softcap=0.0)),
            (ArgumentError, lambda: gemskit.linear_cross_entropy(x, w, target, label_smoothing=2.0)),
        ):
            with pytest.raises(kind):
                call()
