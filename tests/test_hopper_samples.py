"""The contract's checks in bfloat16 of the operators that have kernels for Hopper, which are interpreted."""

from __future__ import annotations

import pytest
import torch

import gemskit
from gemskit import _conformance, backends
from gemskit._interpret import interpret
from gemskit._op import REGISTRY

OPERATORS = (
    "mm", "addmm", "linear", "matmul", "fused_linear_cross_entropy", "gated_linear", "grouped_mm",
    "scaled_dot_product_attention",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_bfloat16(name: str) -> None:
    """Samples are small and odd: tiles begin in others, and only where the copy engine can begin in a line of memory."""
    checks = [c for c in _conformance.cases(REGISTRY[name]) if c.dtype == torch.bfloat16 and c.layout == "contiguous"]
    assert {"forward", "gradient"} <= {c.kind for c in checks}
    with interpret(), backends.use_arch("sm_90"), gemskit.record() as calls:
        for check in checks:
            _conformance.run(check, "cpu")
    assert any("wgmma" in call.kernel or "hopper" in call.kernel for call in calls)
