"""Attention with functions of the user's against a dense float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import gemskit
from gemskit import errors
from gemskit.nn import flexible

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENTS = torch.tensor([0] * 20 + [1] * 41 + [2] * 39, dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@triton.jit
def squared(score, batch, head, q_index, kv_index):
    return score * score * (head + 1) + batch


@triton.jit
def squared_grad(score, batch, head, q_index, kv_index):
    return 2 * score * (head + 1)


@triton.jit
def nothing(batch, head, q_index, kv_index):
    return (kv_index < 0) & (q_index < 0)


@triton.jit
def by_head(batch, head, q_index, kv_index):
    return (q_index + kv_index) % (head + 2) == 0


def _rows(s: Tensor) -> tuple[Tensor, ...]:
    b, h, m, n = s.shape
    sizes = (b, 1, 1, 1), (1, h, 1, 1), (1, 1, m, 1), (1, 1, 1, n)
    return tuple(torch.arange(k).view(shape) for k, shape in zip((b, h, m, n), sizes))


def _alibi(s: Tensor) -> Tensor:
    _, h, q, k = _rows(s)
    return s - SLOPES.double()[h] * (q - k).abs()


def _squared(s: Tensor) -> Tensor:
    b, h, _, _ = _rows(s)
    return s * s * (h + 1) + b


Change = Callable[[Tensor], Tensor]
CASES: dict[str, tuple[dict[str, Any], Change | None, Change | None]] = {
    "alibi": (dict(score_mod=flexible.alibi, score_grad=1, aux=(SLOPES,)), _alibi, None),
    "soft-cap": (
        dict(score_mod=flexible.soft_cap, score_grad=flexible.soft_cap_grad, aux=(1.5,)),
        lambda s: 1.5 * torch.tanh(s / 1.5),
        None,
    ),
    "own": (dict(score_mod=squared, score_grad=squared_grad), _squared, None),
    "window": (
        dict(mask_mod=flexible.sliding_window, aux=(17,), mask_shared=True),
        None,
        lambda s: (_rows(s)[3] <= _rows(s)[2]) & (_rows(s)[2] - _rows(s)[3] < 17),
    ),
    "documents, causal": (
        dict(mask_mod=flexible.same_document, aux=(DOCUMENTS,), is_causal=True),
        None,
        lambda s: (DOCUMENTS[_rows(s)[2]] == DOCUMENTS[_rows(s)[3]]) & (_rows(s)[3] <= _rows(s)[2]),
    ),
    "by head, own": (
        dict(mask_mod=by_head, score_mod=squared, score_grad=squared_grad),
        _squared,
        lambda s: (_rows(s)[2] + _rows(s)[3]) % (_rows(s)[1] + 2) == 0,
    ),
    "causal, bottom-right": (
        dict(is_causal=True, bottom_right=True, score_mod=squared, score_grad=squared_grad),
        _squared,
        lambda s: _rows(s)[3] <= _rows(s)[2] + s.shape[3] - s.shape[2],
    ),
}


def reference(q: Tensor, k: Tensor, v: Tensor, change: Change | None, visible: Change | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT / math.sqrt(q.shape[-1])
    if change is not None:
        s = change(s)
    if visible is not None:
        s = s.masked_fill(~visible(s), -math.inf)
    return torch._safe_softmax(s, -1) @ v, torch.logsumexp(s, -1)


@pytest.mark.parametrize("name", CASES)
def test_examples(name: str) -> None:
    options, change, visible = CASES[name]
    length = 70 if "bottom" in name else 100
    q, k, v = random(2, 4, length, 16), random(2, 2, 100, 16, seed=1), random(2, 2, 100, 24, seed=2)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = gemskit.attention(*leaves, **options, return_lse=True)
    grads = random(*out.shape, seed=3), random(*lse.shape, seed=4)
    got = torch.autograd.grad((out, lse), leaves, grads)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want, want_lse = reference(*wide, change, visible)
    wanted = torch.autograd.grad((want, want_lse), wide, [g.double() for g in grads])
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-5)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * max(1, b.abs().max().item()))


def test_nothing_is_visible() -> None:
    leaves = [random(1, 2, 40, 16, seed=n).requires_grad_() for n in range(3)]
    out, lse = gemskit.attention(*leaves, mask_mod=nothing, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_errors() -> None:
    q = random(1, 2, 8, 16).requires_grad_()
    with pytest.raises(errors.GradientError, match="score_grad"):
        gemskit.attention(q, q, q, score_mod=squared).sum().backward()
    with pytest.raises(errors.ArgumentError, match="expected are 6"):
        gemskit.attention(q, q, q, score_mod=squared, aux=(1.0,))
    with pytest.raises(errors.ArgumentError, match=r"triton\.jit"):
        gemskit.attention(q, q, q, mask_mod=lambda b, h, i, j: i >= j)
    with pytest.raises(errors.ShapeError, match="do not fit"):
        gemskit.attention(q, q[:, :, :, :8], q)
