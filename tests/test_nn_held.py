"""Rows that stay in registers as they are stored, and sums over rows in the pass of the elements: kernels of other numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit import _launch
from gemskit._interpret import interpret
from gemskit.backends import Arch
from gemskit.nn.loss import cross_entropy
from gemskit.nn.norm import LAYER_NORM_GRAD, RMS_NORM_GRAD, fused_add_rms_norm, layer_norm, rms_norm
from gemskit.nn.softmax import log_softmax, softmax

#: Small, so that rows of hundreds take every path: tiles of 256 and 512, and of 4,096 bytes half is held.
NUMBERS = dict(warps=2, short=64, hold=2048, hold_most=4096, unroll=2, fold_warps=1)
#: Held whole, held with an end that is no tile, read again whole and with an end, held in part and read again.
LENGTHS = (512, 700, 2048, 1100, 4096, 4500)


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    config = Arch.config
    monkeypatch.setattr(Arch, "config", lambda self, d: config(self, d) | (NUMBERS if d == "rowwise" else {}))
    torch.manual_seed(0)
    for op in (softmax, log_softmax, rms_norm, layer_norm, fused_add_rms_norm, cross_entropy):
        op._plans.clear()
    with interpret():
        yield
    for op in (softmax, log_softmax, rms_norm, layer_norm, fused_add_rms_norm, cross_entropy):
        op._plans.clear()


def check(op: Callable[..., Tensor], meaning: Callable[..., Tensor], *tensors: Tensor, tolerance: float) -> None:
    mine = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    got, want = op(*mine), meaning(*exact)
    grad = torch.randn(want.shape).to(got.dtype)
    results = [got, *torch.autograd.grad(got, mine, grad)]
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    for g, w in zip(results, wanted):
        scale = w.abs() + w.square().mean().sqrt()
        assert float(((g.double() - w).abs() / scale).max()) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", LENGTHS)
def test_softmax(n: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, n) * 3).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    check(lambda x: softmax(x, 1), lambda x: torch.softmax(x, 1), x, tolerance=tolerance)
    check(lambda x: log_softmax(x, 1), lambda x: torch.log_softmax(x, 1), x, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", LENGTHS)
def test_norms(n: int, dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(*s).to(dtype) for s in ((5, n), (n,), (n,)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    check(
        lambda x, w, b: layer_norm(x, (n,), w, b),
        lambda x, w, b: F.layer_norm(x, (n,), w, b),
        x,
        w,
        b,
        tolerance=tolerance,
    )
    check(lambda x, w: rms_norm(x, (n,), w, 1e-5), lambda x, w: F.rms_norm(x, (n,), w, 1e-5), x, w, tolerance=tolerance)
    y = torch.randn(5, n).to(dtype)
    check(
        lambda x, y, w: fused_add_rms_norm(x, y, (n,), w)[0],
        lambda x, y, w: F.rms_norm(x + y, (n,), w, 1e-5),
        x, y, w, tolerance=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("n", LENGTHS)
def test_special_values(n: int) -> None:
    x = torch.randn(6, n, dtype=torch.bfloat16)
    x[0], x[1, 3], x[2, -1], x[3] = -torch.inf, torch.inf, torch.nan, -torch.inf
    x[3, -1] = 2.0
    x[4] = x[4].float().add(1e4).to(torch.bfloat16)
    for op, meaning in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        torch.testing.assert_close(op(x, 1), meaning(x.double(), 1).bfloat16(), rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("n", LENGTHS)
def test_cross_entropy(n: int) -> None:
    x, t = torch.randn(5, n), torch.tensor([0, n - 1, 7, -100, 255])
    check(lambda x: cross_entropy(x, t), lambda x: F.cross_entropy(x, t), x, tolerance=1e-5)
    assert cross_entropy(x, torch.full((5,), n), reduction="none").isnan().all()


#: Rows of several tiles copied ahead by plain Triton, and by Gluon in a ring: one warp a row, or two side by side.
AHEAD = (
    dict(sums_max=64, sums_hold=1 << 20, sums_warps=1, long_stages=3),
    dict(sums_max=64, sums_hold=1 << 20, sums_warps=1, long_stages=3, ring=3, ring_warps=1),
    dict(sums_max=64, sums_hold=1 << 20, sums_warps=1, long_stages=3, ring=2, ring_warps=2),
    dict(sums_stages=3),
)


@pytest.mark.parametrize("numbers", AHEAD, ids=("tiles", "ring", "wide", "stages"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "n"), [(7, 1024), (8, 720), (19, 272), (3, 333)])
def test_rows_copied_ahead(
    rows: int, n: int, dtype: torch.dtype, numbers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Arch.config
    more = numbers | dict(programs=4)
    monkeypatch.setattr(Arch, "config", lambda self, d: config(self, d) | (more if d == "rowwise" else {}))
    for gradient in (LAYER_NORM_GRAD, RMS_NORM_GRAD):
        for kernel in gradient.together.values():
            kernel._plans.clear()
    x, y, w, b = (torch.randn(*s).to(dtype) for s in ((rows, n), (rows, n), (n,), (n,)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with _launch.record() as calls:
        check(
            lambda x, w, b: layer_norm(x, (n,), w, b),
            lambda x, w, b: F.layer_norm(x, (n,), w, b),
            x, w, b, tolerance=tolerance,
        )  # fmt: skip
        # The residual's gradient is one more operand, which the weight's does not see.
        check(
            lambda x, y, w: torch.cat(fused_add_rms_norm(x, y, (n,), w)),
            lambda x, y, w: torch.cat((F.rms_norm(x + y, (n,), w, 1e-5), x + y)),
            x, y, w, tolerance=2 * tolerance,
        )  # fmt: skip
    found = [dict(call.config) for call in calls if "STAGES" in dict(call.config)]
    assert len(found) == 2
    # Copies of a ring are of 16 bytes.
    assert all(("ACROSS" in meta) == ("ring" in numbers and n % 16 == 0) for meta in found)
