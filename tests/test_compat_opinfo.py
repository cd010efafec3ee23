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


#: What differs, and why: of an operator, or of one dtype of it.
EXPLAINED = {
    "native_layer_norm-bfloat16": "mean and rstd are float32, as on GPUs; torch rounds them on CPUs",
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
#: Operators that say where the value was found: which of equal ones they take is not defined, so integers are compared by value.
TIES = {"kthvalue", "median", "nanmedian", "topk", "sort", "argsort"}


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
            if f"{op.full_name}-{str(dtype)[6:]}" in EXPLAINED:
                continue
            if dtype in op.dtypes and (FULL or i == 0 or draw % 12 == i):
                cases.append(pytest.param(op, dtype, id=f"{op.full_name}-{str(dtype)[6:]}"))
    return cases


@pytest.mark.parametrize(("op", "dtype"), infos())
def test_opinfo(op: Any, dtype: torch.dtype) -> None:
    with no_aten():
        found = list(aten_samples.samples(op, dtype, 10_000 if FULL else 1))
    for sample in found:
        aten_samples.compare(op, sample, first=op.name in TIES and dtype == torch.int64)


def writing() -> list[Any]:
    """In-place and ``out=`` forms of one operator of four."""
    cases = []
    for op in {case.values[0].full_name: case.values[0] for case in infos()}.values():
        for kind, has in (("inplace", op.inplace_variant is not None), ("out", op.supports_out)):
            if has and torch.float32 in op.dtypes and (FULL or zlib.crc32(f"{op.full_name} {kind}".encode()) % 4 == 0):
                cases.append(pytest.param(op, kind, id=f"{op.full_name}-{kind}"))
    return cases


@pytest.mark.parametrize(("op", "kind"), writing())
def test_opinfo_writes(op: Any, kind: str) -> None:
    with no_aten():
        found = list(aten_samples.samples(op, torch.float32, 10_000 if FULL else 1))
    for sample in found:
        aten_samples.same_written(op, sample, kind)


@pytest.mark.skipif(not FULL, reason="what is refused goes to torch, see test_compat_aten.py")
@pytest.mark.parametrize("op", [op for op in aten_samples.database() if op.error_inputs_func] if FULL else [])
def test_opinfo_errors(op: Any) -> None:
    with no_aten():
        errors = list(op.error_inputs("cpu"))
    for e in errors:
        s = e.sample_input
        with gemskit.interpret(), pytest.raises(e.error_type, match=e.error_regex):
            op(s.input, *s.args, **s.kwargs)
