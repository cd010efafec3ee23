"""What a walk over samples cannot see: errors in the words of the user, second derivatives, memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

import gemskit
from gemskit import errors
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit._plan import PLANS


@pytest.fixture(params=["meaning", "kernels"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The plain-torch path of CPU tensors, and the kernels."""
    if request.param == "meaning":
        yield "meaning"
    else:
        with interpret():
            yield "kernels"


def test_wrong_shapes(path: str) -> None:
    with pytest.raises(
        errors.ShapeError, match=r"mm: .*float32\[2, 3\] on cpu.*float32\[4, 5\] on cpu.*; accepted: mm\("
    ):
        gemskit.mm(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(errors.ShapeError, match="add: "):
        gemskit.add(torch.ones(3), torch.ones(4))


def test_wrong_dims(path: str) -> None:
    for wrong in (2, -3):
        with pytest.raises(errors.DimError, match=f"softmax: .*{wrong}"):
            gemskit.softmax(torch.ones(2, 3), wrong)
    with pytest.raises(errors.DimError, match="sum: "):
        gemskit.sum(torch.ones(2, 3), (0, 0))


def test_wrong_dtypes(path: str) -> None:
    with pytest.raises(errors.DtypeError, match=r"silu: .*int32\[3\] on cpu"):
        gemskit.silu(torch.ones(3, dtype=torch.int32))
    with pytest.raises(errors.DtypeError, match=r"exp: (out|result)"):
        gemskit.exp(torch.ones(3), out=torch.ones(3, dtype=torch.int32))


def test_errors_are_those_of_torch_too() -> None:
    """Code that catches what torch raises keeps working."""
    with pytest.raises(RuntimeError):
        gemskit.mm(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(IndexError):
        gemskit.softmax(torch.ones(2, 3), 7)


def test_a_second_derivative_is_refused() -> None:
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    with interpret(), pytest.raises(errors.GradientError, match="silu: has no second derivative"):
        torch.autograd.grad(gemskit.silu(x).sum(), x, create_graph=True)


def test_subclasses_are_refused() -> None:
    class Mine(torch.Tensor):
        pass

    with pytest.raises(errors.ArgumentError, match="silu: input is a Mine"):
        gemskit.silu(torch.ones(3).as_subclass(Mine))


def test_in_place_product_with_itself(path: str) -> None:
    x = torch.arange(36.0).reshape(6, 6) / 36
    want = torch.addmm(x, x, x)
    assert gemskit.addmm_(x, x, x) is x
    torch.testing.assert_close(x, want)


def test_no_tensor_is_kept_alive(path: str) -> None:
    x = torch.ones(7, 5, requires_grad=True)
    y = gemskit.softmax(gemskit.silu(x), 1)
    y.sum().backward()
    refs = [weakref.ref(t) for t in (x, y)]
    del x, y
    gc.collect()
    assert [r() for r in refs] == [None, None]


def test_plans_are_bounded() -> None:
    op = REGISTRY["neg"]
    with interpret():
        for n in range(1, 40):
            gemskit.neg(torch.ones(n))
        before = len(op._plans)
        op._plans.update({("filler", k): next(iter(op._plans.values())) for k in range(PLANS)})
        gemskit.neg(torch.ones(1234))
    assert before >= 39
    assert len(op._plans) == 1


def test_numbers_make_no_new_plan() -> None:
    with interpret():
        x = torch.ones(3, 8)
        gemskit.rms_norm(x, (8,), None, 0.5)
        plans = len(REGISTRY["rms_norm"]._plans)
        for k in range(5):
            gemskit.rms_norm(x, (8,), None, 0.1 * (k + 1))
        assert len(REGISTRY["rms_norm"]._plans) == plans


def test_record_lists_operators_and_kernels(path: str) -> None:
    with gemskit.record() as calls:
        gemskit.silu(torch.ones(3))
    assert [(c.op, c.kernel) for c in calls] == [("silu", "meaning" if path == "meaning" else "silu")]
