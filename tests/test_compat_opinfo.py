"""PyTorch's own samples (OpInfo) under the ATen adapter, with the kernels under the interpreter."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import aten_samples
import pytest
import torch
from walks import FULL

import gemskit
from gemskit import backends
from gemskit.compat import no_aten, use_aten

pytestmark = pytest.mark.skipif(backends.vendor.dispatch_key != "CPU", reason="kernels run under the interpreter here")


@pytest.fixture(autouse=True, scope="module")
def _enabled() -> Iterator[None]:
    with use_aten("all"):
        yield


#: What differs, and why.
EXPLAINED = {
    "empty": "memory that nobody wrote",
    "empty_like": "memory that nobody wrote",
    "empty_permuted": "memory that nobody wrote",
    "empty_strided": "memory that nobody wrote",
    "new_empty": "memory that nobody wrote",
    "new_empty_strided": "memory that nobody wrote",
    "jiterator_2inputs_2outputs": "torch has it on GPUs only",
    "jiterator_4inputs_with_extra_args": "torch has it on GPUs only",
    "jiterator_binary": "torch has it on GPUs only",
    "jiterator_binary_return_by_ref": "torch has it on GPUs only",
    "jiterator_unary": "torch has it on GPUs only",
}


def infos() -> list[Any]:
    """Float32 for every operator that the adapter serves, one of the other dtypes for one of six."""
    try:
        found = aten_samples.database()
    except ImportError:
        return []
    cases = []
    for op in found:
        if op.full_name in EXPLAINED or not (FULL or aten_samples.direct(op)):
            continue
        draw = zlib.crc32(op.full_name.encode())
        for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.int64)):
            if dtype in op.dtypes and (FULL or i == 0 or draw % 12 == i):
                cases.append(pytest.param(op, dtype, id=f"{op.full_name}-{str(dtype)[6:]}"))
    return cases


@pytest.mark.parametrize(("op", "dtype"), infos())
def test_opinfo(op: Any, dtype: torch.dtype) -> None:
    with no_aten():
        found = list(aten_samples.samples(op, dtype, 10_000 if FULL else 1))
    for sample in found:
        aten_samples.compare(op, sample)


@pytest.mark.skipif(not FULL, reason="what is refused goes to torch, see test_compat_aten.py")
@pytest.mark.parametrize("op", [op for op in aten_samples.database() if op.error_inputs_func] if FULL else [])
def test_opinfo_errors(op: Any) -> None:
    with no_aten():
        errors = list(op.error_inputs("cpu"))
    for e in errors:
        s = e.sample_input
        with gemskit.interpret(), pytest.raises(e.error_type, match=e.error_regex):
            op(s.input, *s.args, **s.kwargs)
