"""Cross entropy of a linear layer, what the registry walk cannot see: memory, how many products, which gradients are made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import _launch, _replay, backends
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.nn import linear_loss
from gemskit.nn.linear_loss import CLASSES, EIGHT, FIFTEEN, ROWS, fused_linear_cross_entropy, parts

N, C, H = 8192, 128256, 4096


@pytest.mark.parametrize("size", [0, 1, 127, 129, 1023, 2049, 8191, 8192, 10007, 32000, 50257, 128256, 1 << 20])
@pytest.mark.parametrize(("least", "most"), [(CLASSES, FIFTEEN), (ROWS, EIGHT)])
def test_parts(size: int, least: int, most: int) -> None:
    found = parts(size, least, most)
    edges = [start for start, _ in found] + [size]
    assert edges[0] == 0 and [n for _, n in found] == [b - a for a, b in itertools.pairwise(edges)]
    assert len(found) == max(1, min(most, size // least))
    # No part is a remainder that all of a factor would be read for.
    assert max(n for _, n in found) - min(n for _, n in found) < 2 * linear_loss.TILE


def arguments(dtype: torch.dtype = torch.bfloat16, rows: int = N, **more: Any) -> tuple[Any, ...]:
    """Those of a language model's head, without memory."""
    x, w = torch.empty(rows, H, dtype=dtype, device="meta"), torch.empty(C, H, dtype=dtype, device="meta")
    bias, target = torch.empty(C, dtype=dtype, device="meta"), torch.empty(rows, dtype=torch.int64, device="meta")
    bound = fused_linear_cross_entropy.signature.bind(x, w, target, bias, **more)
    bound.apply_defaults()
    return bound.args


def allocated(fn: Callable[[], Any]) -> int:
    """Bytes that ``fn`` allocates of meta tensors, which kernels would run on."""
    with torch.no_grad(), _replay._Watch() as watch, _launch.tracing(lambda *launch: None):
        fn()
    return sum(t.numel() * t.element_size() for t in watch.made)


EVERY = "input linear_weight linear_bias"


@pytest.mark.parametrize("prepare", ["", EVERY, "input"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory(prepare: str, reduction: str) -> None:
    """All that a pass allocates, as if nothing were freed: a part of the logits, gradients, and a sum of the input's."""
    op, values, kept = fused_linear_cross_entropy, arguments(prepare=prepare, reduction=reduction), {}
    early = prepare == "input" and reduction == "mean"
    total = allocated(lambda: op.forward(values, None, kept))
    assert total < (N * C * 2 // 8 + 2 * N * H + 2**20 if early else N * C * 2 // 13), total

    named = dict(zip(op.params, values))
    needs = {*(prepare or EVERY).split()}
    have = {**named, **kept, "needs": needs, "like": {n: (named[n].shape, named[n].dtype) for n in needs}}
    have["grad"] = torch.empty((N,) if reduction == "none" else (), dtype=torch.bfloat16, device="meta")
    assert op._vjp is not None
    total = allocated(lambda: op._vjp(**{n: have.get(n) for n in op._saves}))
    total += sum(t.numel() * t.element_size() for t in kept.values() if t is not None)
    assert total < (1.35 * 2**30 if "linear_weight" in needs else 2 * N * H * 3 + N * C * 2 // 13 * (not early)), total


def test_memory_of_a_replay_on_hopper() -> None:
    """A replay allocates all at once, so what products of parts put together has to be one memory."""
    op, values, kept = fused_linear_cross_entropy, arguments(prepare=EVERY), {}
    with backends.use_arch("sm_90"):
        allocated(lambda: op.forward(values, None, kept))
        named = dict(zip(op.params, values))
        like = {n: (named[n].shape, named[n].dtype) for n in EVERY.split()}
        have = {**named, **kept, "needs": {*like}, "like": like, "grad": torch.empty((), device="meta")}
        names = [n for n in op._saves if isinstance(have.get(n), Tensor)]

        def backward(*tensors: Tensor) -> list[Tensor]:
            assert op._vjp is not None
            given = {**have, **dict(zip(names, tensors))}
            return list(op._vjp(**{n: given.get(n) for n in op._saves}).values())

        program = _replay.trace(backward, [have[n] for n in names], [0] * len(names))
    assert sum(math.prod(size) * dtype.itemsize for size, _, dtype in program.allocations) < 1.35 * 2**30


def test_few_rows_keep_their_logits() -> None:
    kept: dict[str, Any] = {}
    allocated(lambda: fused_linear_cross_entropy.forward(arguments(rows=H // 4), None, kept))
    assert kept["logits"].shape == (H // 4, C)


def products(calls: list[_launch.Call]) -> int:
    return sum(c.kernel in ("mm", "addmm", "linear", "linear__capped") for c in calls)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of about 16 classes, or of 22 rows: so many of either."""
    for name, value in (("TILE", 2), ("CLASSES", 16), ("ROWS", 22)):
        monkeypatch.setattr(linear_loss, name, value)
    assert len(parts(50, 16, FIFTEEN)) == len(parts(70, 22, EIGHT)) == 3
    return 3


def made(frozen: str = "", features: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(*s, generator=generator) for s in ((70, features), (50, features), (50,)))
    target = torch.randint(50, (70,), generator=generator)
    target[::7] = -100
    x[7] = float("nan")  # ignored
    return (
        x.requires_grad_("x" not in frozen),
        w.requires_grad_("w" not in frozen),
        b.requires_grad_("b" not in frozen),
        target,
    )


@pytest.mark.parametrize(
    ("features", "reduction", "count"), [(24, "mean", 4), (24, "none", 4), (8, "sum", 3), (8, "none", 4)]
)
def test_parts_add_up(small: int, features: int, reduction: str, count: int) -> None:
    """A product more than with stored logits where they are computed again for the gradients."""
    x, w, b, target = made("", features)
    x = x.detach().nan_to_num().requires_grad_()
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


MORE: tuple[dict[str, Any], ...] = (
    {},
    {"weight": torch.linspace(0.1, 2, 50), "ignore_index": 3},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0, "weight": torch.linspace(0.1, 2, 50)},
    {"chances": True, "z_loss": 0.1},
    {"target": torch.uint8},
)


@pytest.mark.parametrize("features", [24, 8])
@pytest.mark.parametrize("frozen", ["", "wb"])
@pytest.mark.parametrize("more", MORE, ids=lambda more: "-".join(more) or "plain")
def test_parts_are_as_one(
    small: int, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], frozen: str, features: int
) -> None:
    """Of the classes; or of the rows, where they are many beside the features or where only the input needs a gradient."""
    more = dict(more)
    x, w, b, target = made(frozen, features)
    if more.pop("chances", False):
        target = torch.rand(70, 50, generator=torch.Generator().manual_seed(4)) / 50
        x = x.detach().nan_to_num().requires_grad_()
    target = target.remainder(50).to(more.pop("target", target.dtype)) if "target" in more else target
    wanted = [t for t in (x, w, b) if t.requires_grad]
    found = []
    for least in (16, 1000):
        monkeypatch.setattr(linear_loss, "CLASSES", least)
        monkeypatch.setattr(linear_loss, "ROWS", least)
        with interpret():
            loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b, **more)
            found.append((loss, *torch.autograd.grad(loss, wanted)))
    for several, one in zip(*found):
        torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_only_the_gradients_that_are_needed(small: int) -> None:
    for frozen, count in (("wb", 2), ("w", 3), ("xb", 3)):
        x, w, b, target = made(frozen)
        with interpret(), gemskit.record() as calls:
            loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b)
            loss.backward()
        assert products(calls) == count * small, frozen
    with interpret(), torch.no_grad(), gemskit.record() as calls:
        assert torch.equal(gemskit.linear_cross_entropy(x, w, target, linear_bias=b), loss)
    assert products(calls) == small
    x, w, b, target = made()
    with interpret(), gemskit.record() as calls:
        gemskit.linear_cross_entropy(x[:6], w, target[:6], linear_bias=b).backward()
    assert products(calls) == 3


@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1}], ids=["hard", "soft"])
def test_infinite_logits(small: int, more: dict[str, Any]) -> None:
    """A part all of whose classes are masked out; rows with +inf, with nothing but -inf, with NaN."""
    x, w, b, target = (t.detach() for t in made())
    x, target = x.nan_to_num(), torch.arange(70) % 50
    b[:20] = -torch.inf
    x[30:33] = 0
    x[30, 0], x[31, 1], x[32, 2] = 1e30, 1e30, torch.nan
    w[40, 0], w[:, 1] = 1e30, -1e30
    with interpret():
        got = gemskit.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none", **more)
    want = fused_linear_cross_entropy.meaning(x, w, target, b, reduction="none", **more)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want[30:33].isnan().all() and want[:20].isposinf().all() and want[33:50].isfinite().all() == (not more)


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


def test_sums_of_halves(small: int) -> None:
    """Not above the error of stored logits: nothing is rounded between the parts."""
    x, w, b, target = (t.detach() for t in made())
    x, w, b = (t.nan_to_num().bfloat16().requires_grad_() for t in (x, w, b))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    want = F.cross_entropy(F.linear(*wide), target, reduction="sum")
    exact = torch.autograd.grad(want, wide)
    stored = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target, reduction="sum"), (x, w, b))
    with interpret():
        loss = gemskit.linear_cross_entropy(x, w, target, linear_bias=b, out_dtype=torch.float32, reduction="sum")
        found = torch.autograd.grad(loss, (x, w, b))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0)
    for got, theirs, right in zip(found, stored, exact):
        assert (got - right).square().mean() < 1.1 * (theirs - right).square().mean()


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
