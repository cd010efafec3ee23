"""PyTorch's own samples (OpInfo) on the device, with the ATen adapter on and off: results, gradients and errors.

A difference is none where the result with the adapter is as near to that of float64 as torch's own.
"""

from __future__ import annotations

from typing import Any

import aten_samples
import pytest
import torch
from torch import Tensor
from walks import FULL

from gemskit import backends
from gemskit.compat import use_aten

DEVICE = backends.vendor.device_type
pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs an accelerator")

UNWRITTEN = "memory that nobody wrote"
#: What differs, and why.
EXPLAINED = {
    **dict.fromkeys(
        ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"), UNWRITTEN
    ),
}
#: Wrong calls that torch refuses and the adapter serves, and what it gives.
OVERLAP = "an out= that overlaps an operand, or has another dtype: as if it did not, converted as elsewhere"
SERVED = {
    **dict.fromkeys(("cat", "gather", "index_select", "masked_scatter", "masked_select", "take", "aminmax"), OVERLAP),
    "median": "more dimensions than torch's kernel has",
    "_softmax_backward_data": "gradients of a result of another dtype than the input's",
}
#: Operators that say where the value was found: which of equal ones they take is not defined, so these are compared by value.
TIES = {"kthvalue", "median", "nanmedian", "topk", "sort", "argsort"}
SAMPLES = 12 if FULL else 4


def infos() -> list[Any]:
    if DEVICE == "cpu":
        return []
    try:
        found = [op for op in aten_samples.database() if aten_samples.direct(op) and op.full_name not in EXPLAINED]
    except ImportError:
        return []
    return found


@pytest.mark.parametrize("op", infos(), ids=lambda op: op.full_name)
def test_opinfo_on_the_device(op: Any) -> None:
    supported = op.supported_dtypes(DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        if dtype in supported:
            for sample in aten_samples.samples(op, dtype, SAMPLES, DEVICE):
                same(op, sample, op.name in TIES and dtype != torch.float32)


def outcome(op: Any, sample: Any) -> Any:
    try:
        return aten_samples.run(op, sample)
    except Exception as e:
        return type(e)


def same(op: Any, sample: Any, first: bool) -> None:
    expected = outcome(op, sample)
    with use_aten("all"):
        found = outcome(op, sample)
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected or (isinstance(expected, type) and op.name in SERVED)
        return
    reference = None
    for part, (e, f) in enumerate(zip(expected, found, strict=True)):
        for i, (a, b) in enumerate(zip(e[:1] if first else e, f[:1] if first else f, strict=True)):
            if not isinstance(a, Tensor):
                assert a == b or a != a, (a, b)
                continue
            assert a.shape == b.shape and a.layout == b.layout and a.dtype == b.dtype and a.is_conj() == b.is_conj()
            try:
                torch.testing.assert_close(b, a, equal_nan=True, check_stride=False)
            except AssertionError:
                if not a.is_floating_point():
                    raise
                reference = reference or outcome(op, sample.transform(_wide))
                if isinstance(reference, type):
                    raise
                exact = reference[part][i]
                assert _distance(b, exact) <= 1.5 * _distance(a, exact) + 2 * torch.finfo(a.dtype).eps * _size(exact)


def _wide(t: Any) -> Any:
    if isinstance(t, Tensor) and t.is_floating_point():
        return t.detach().double().requires_grad_(t.requires_grad)
    return torch.float64 if t in (torch.float32, torch.bfloat16) else t


def _distance(a: Tensor, exact: Tensor) -> float:
    """The largest; infinite where one is NaN or infinite and the other is not."""
    a = a.double()
    alike = (a == exact) | (a.isnan() & exact.isnan())
    return float(torch.where(alike, 0, (a - exact).abs()).nan_to_num(torch.inf).max())


def _size(t: Tensor) -> float:
    return float(t[t.isfinite()].abs().max()) if t.isfinite().any() else 1.0


@pytest.mark.parametrize("op", [op for op in infos() if op.error_inputs_func], ids=lambda op: op.full_name)
def test_errors_on_the_device(op: Any) -> None:
    for error in op.error_inputs(DEVICE):
        s = error.sample_input
        raised = outcome(op, s)
        with use_aten("all"):
            found = outcome(op, s)
        if isinstance(raised, type) and (isinstance(found, type) or op.name not in SERVED):
            assert found is raised, s
