"""Every operator, every variant, every dtype and layout, on the kernels themselves. Nothing per operator is written here."""

from __future__ import annotations

import pytest

import gemskit  # noqa: F401
from gemskit import _conformance
from gemskit._interpret import interpret
from gemskit._op import REGISTRY

ALL = [pytest.param(case, id=case.name) for op in REGISTRY.values() if not op.random for case in _conformance.cases(op)]


@pytest.mark.parametrize("case", ALL)
def test_conforms(case: _conformance.Case) -> None:
    reason = _conformance.EXPECTED.get(case.name)
    with interpret():
        if reason is None:
            _conformance.run(case)
        else:
            with pytest.raises(AssertionError):
                _conformance.run(case)
