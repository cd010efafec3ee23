"""Every operator, every variant, every dtype and layout, on the kernels themselves. Nothing per operator is written here."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import pytest
import torch
from walks import FULL

import gemskit  # noqa: F401
from gemskit import _conformance
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit.testing import Sample

#: What every operator is checked for in every run. Of the other combinations of dtype and layout each run has the same draw, one
#: of six (of the elementwise operators, which share a driver, one of twelve); GEMSKIT_TESTS=full has all, and so has
#: ``python -m gemskit check`` on an accelerator.
BASE = {
    ("forward", torch.float32, "contiguous"),
    ("forward", torch.int64, "contiguous"),
    ("forward", torch.bfloat16, "mixed"),
    ("special", torch.float32, "contiguous"),
    ("gradient", torch.float32, "contiguous"),
    ("out", torch.float32, "contiguous"),
    ("inplace", torch.float32, "contiguous"),
    ("errors", torch.float32, "contiguous"),
}


def runs(case: _conformance.Case) -> bool:
    if FULL or (case.kind, case.dtype, case.layout) in BASE:
        return True
    return zlib.crc32(case.name.encode()) % (12 if REGISTRY[case.op].family == "pointwise" else 6) == 0


CASES = [case for op in REGISTRY.values() if not op.random for case in _conformance.cases(op) if runs(case)]
ALL = [pytest.param(case, id=case.name) for case in CASES]


@pytest.mark.parametrize("case", ALL)
def test_conforms(case: _conformance.Case) -> None:
    reason = _conformance.EXPECTED.get(case.name)
    with interpret():
        if reason is None:
            _conformance.run(case)
        else:
            with pytest.raises(AssertionError):
                _conformance.run(case)


def test_the_cpu_says_what_is_right_where_a_device_of_torch_has_no_kernel() -> None:
    tried: list[torch.Tensor] = []

    def meaning(input: torch.Tensor) -> torch.Tensor:
        tried.append(input)
        if len(tried) == 1:
            raise NotImplementedError("\"addmm_cuda\" not implemented for 'Int'")
        return input + 1

    found = _conformance._wanted(SimpleNamespace(meaning=meaning), Sample((torch.ones(3),)))  # type: ignore[arg-type]
    assert torch.equal(found, torch.full((3,), 2.0))
