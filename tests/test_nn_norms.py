"""Norms of channels beyond what the registry walk covers: running statistics, modules, launches and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemskit
from gemskit import _launch
from gemskit._interpret import interpret
from gemskit.errors import GemskitError


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(a: Tensor | None, b: Tensor | None) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def pair(*arguments: Any) -> tuple[list[Any], list[Any]]:
    """Two copies; what has a gradient in both."""
    first, second = (
        [
            v.clone().detach().requires_grad_(n != 1 and n != 2) if isinstance(v, Tensor) else v
            for n, v in enumerate(arguments)
        ]
        for _ in range(2)
    )
    return first, second


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (3, 5, 7)])
def test_running_statistics_and_gradients_are_torchs(name: str, training: bool, shape: tuple[int, ...]) -> None:
    c = shape[1]
    vectors = [rand(c, seed=k) for k in range(4)]
    mine, theirs = pair(rand(*shape), vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[3], training, 0.3, 1e-3)
    versions = [t._version for t in mine[1:3]]
    grad = rand(*shape, seed=9)
    with interpret():
        out = getattr(gemskit, name)(*mine)
        out.backward(grad)
    wanted = getattr(F, name)(*theirs)
    wanted.backward(grad)
    close(out, wanted)
    for a, b in zip(mine, theirs):
        if isinstance(a, Tensor):
            close(a.detach(), b.detach())
            close(a.grad, b.grad)
    assert all((t._version > v) == training for t, v in zip(mine[1:3], versions))


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_without_running_statistics(name: str) -> None:
    x = rand(3, 4, 5, dtype=torch.bfloat16)
    more = {"training": True} if name == "batch_norm" else {}
    with interpret():
        out = getattr(gemskit, name)(x, None, None, **more)
    # torch rounds in between on the CPU.
    torch.testing.assert_close(out, getattr(F, name)(x.float(), None, None, **more).bfloat16())


def test_halves_with_float32_vectors() -> None:
    x, w = rand(4, 6, 5, dtype=torch.bfloat16), rand(6)
    mean, var = torch.zeros(6), torch.ones(6)
    with interpret():
        out = gemskit.batch_norm(x, mean, var, w, w, True)
        group = gemskit.group_norm(x, 3, w, w)
    torch.testing.assert_close(out, F.batch_norm(x.float(), None, None, w, w, True).bfloat16())
    torch.testing.assert_close(group, F.group_norm(x.float(), 3, w, w).bfloat16())
    close(mean, x.float().mean((0, 2)) * 0.1)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_refusals(name: str) -> None:
    f, x, v = getattr(gemskit, name), rand(3, 4, 5), torch.ones(4)
    for bad in (
        lambda: f(x, v, None),
        lambda: f(x, torch.ones(3), torch.ones(3)),
        lambda: f(x, None, None, None, None, False),
        lambda: f(x, v.clone(), v.clone(), torch.ones(3), None, True),
        lambda: f(rand(1, 4), None, None, None, None, True),
        lambda: f(rand(1, 4, 1), None, None, None, None, True),
    ):
        with interpret(), pytest.raises(GemskitError):
            bad()


def test_nothing_to_learn_from_leaves_running_statistics() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with interpret():
        assert gemskit.batch_norm(torch.empty(0, 3, 4), mean, var, None, None, True).shape == (0, 3, 4)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


def test_a_row_that_fits_is_read_once() -> None:
    x = rand(2, 6, 5, 4).requires_grad_()
    w, b = rand(6).requires_grad_(), rand(6, seed=1).requires_grad_()
    with interpret():
        with _launch.record() as forward:
            y = gemskit.group_norm(x, 3, w, b)
        with _launch.record() as backward:
            y.backward(rand(2, 6, 5, 4))
    assert [c.kernel for c in forward] == ["group_norm"]
    assert [c.kernel for c in backward] == ["group_norm_grad", "norm_vector_sums"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_from_saved_statistics_are_atens(channels_last: bool) -> None:
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (rand(4, 6, 5, 3, seed=k).to(memory_format=form) for k in range(2))
    w, A = rand(6), torch.ops.aten
    _, mean, rstd = torch.native_group_norm(x, w, w, 4, 6, 15, 3, 1e-5)
    _, center, scale = torch.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)
    var = rand(6).abs()
    with interpret():
        group = gemskit.group_norm_backward(grad, x, mean, rstd, w, 4, 6, 15, 3, [True, True, False])
        batch = gemskit.batch_norm_backward(grad, x, w, None, None, center, scale, True)
        fixed = gemskit.batch_norm_backward(grad, x, w, center, var, None, None, False, 0.1)
    assert group[2] is None
    wanted = A.native_group_norm_backward(
        grad.contiguous(), x.contiguous(), mean, rstd, w, 4, 6, 15, 3, [True, True, False]
    )
    others = A.native_batch_norm_backward(grad, x, w, None, None, center, scale, True, 1e-5, [True] * 3)
    fixeds = A.native_batch_norm_backward(grad, x, w, center, var, None, None, False, 0.1, [True] * 3)
    for a, b in zip((*group[:2], *batch, *fixed), (*wanted[:2], *others, *fixeds)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_refuse_what_is_missing() -> None:
    x, v = rand(4, 6, 5), rand(6)
    for bad in (
        lambda: gemskit.batch_norm_backward(x, x, v, train=True),
        lambda: gemskit.batch_norm_backward(x, x, v, v, None),
        lambda: gemskit.group_norm_backward(x, x, rand(4, 3), rand(4, 3), v, 4, 5, 5, 3),
    ):
        with pytest.raises(GemskitError):
            bad()


@pytest.mark.parametrize("p, dim", [(2.0, 1), (2.0, -1), (1.0, 0), (2.0, (0, 2)), (3.0, 2)])
def test_normalize(p: float, dim: Any) -> None:
    x, y = (rand(4, 6, 5).requires_grad_() for _ in range(2))
    grad = rand(4, 6, 5, seed=3)
    with interpret():
        found = gemskit.normalize(x, p, dim, 0.5)
        found.backward(grad)
    wanted = F.normalize(y, p, dim, 0.5)
    wanted.backward(grad)
    close(found, wanted)
    close(x.grad, y.grad)


CASES = [
    (nn.GroupNorm, gemskit.GroupNorm, (3, 6), (2, 6, 5)),
    (nn.BatchNorm1d, gemskit.BatchNorm1d, (6,), (4, 6)),
    (nn.BatchNorm2d, gemskit.BatchNorm2d, (6, 1e-3, None), (4, 6, 3, 5)),
    (nn.BatchNorm3d, gemskit.BatchNorm3d, (6, 1e-3, 0.2, True, False), (4, 6, 3, 2, 2)),
    (nn.InstanceNorm1d, gemskit.InstanceNorm1d, (6,), (6, 9)),
    (nn.InstanceNorm2d, gemskit.InstanceNorm2d, (6, 1e-3, 0.2, True, True), (4, 6, 3, 5)),
    (nn.InstanceNorm3d, gemskit.InstanceNorm3d, (6, 1e-3, 0.2, True), (4, 6, 3, 2, 2)),
]


@pytest.mark.parametrize("theirs, mine, arguments, shape", CASES, ids=lambda v: getattr(v, "__name__", None))
def test_modules_are_torchs(theirs: Any, mine: Any, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    a, b = theirs(*arguments), mine(*arguments)
    b.load_state_dict(a.state_dict())
    for training in (True, True, False):
        a.train(training)
        b.train(training)
        x = rand(*shape, seed=training)
        with interpret():
            found = b(x)
        close(found, a(x))
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("count", [33, 41, 107])
def test_the_mean_of_equal_gradients_is_theirs(count: int) -> None:
    """Times ``1 / count`` it would not be, and equal inputs multiply what is left by ``eps ** -0.5``."""
    input = torch.full((count, 3), 0.5).requires_grad_()
    with interpret():
        (by_batch,) = torch.autograd.grad(gemskit.batch_norm(input, None, None, training=True).sum(), [input])
        grouped = gemskit.group_norm(input.mT[None], 3)
        (by_group,) = torch.autograd.grad(grouped.sum(), [input])
    assert not by_batch.any() and not by_group.any()
