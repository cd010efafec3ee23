"""Every operator, forward and backward, compiled for every architecture whose status claims so. No GPU is needed.

The host code runs once with CPU tensors; every launch is handed to Triton's compiler for the row's target with the argument
types, constants and options that the hardware would get. A launch fails if it does not compile, spills registers, or needs
more shared memory than the row has. ``GEMSKIT_COMPILE=full`` also compiles what differs only in the divisibility of integers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gemskit  # noqa: F401
from gemskit import _bench_cases, _launch, backends
from gemskit._op import REGISTRY, Op
from gemskit.backends import Arch
from gemskit.errors import ArgumentError, GradientError, NoKernel
from gemskit.testing import SAMPLES, Make, Sample

#: Longest that one kernel may compile; attention takes 0.8 s.
SECONDS = 90
FULL = os.environ.get("GEMSKIT_COMPILE") == "full"

ROWS = [row for vendor in backends.vendors.values() for row in vendor.archs if row.status != "declared"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
#: The main dtype on every row; the others, and the tiles of transposed tensors, on one row of each vendor.
COLUMNS = [(row, BF16, "contiguous") for row in ROWS]
COLUMNS += [
    (row, dtype, layout)
    for row in ROWS
    if row.name in ("sm_90", "gfx942")
    for dtype, layout in ((FP32, "transposed"), (FP64, "contiguous"))
]

#: (operator, row, dtype) that is known to fail, with the reason. One that passes fails the run.
EXPECTED: dict[tuple[str, str, str], str] = {}


class FakeDriver:
    """What Triton asks about the device, answered for the row under test."""

    row: Arch = ROWS[0]

    def get_current_device(self) -> int:
        # A number per row: Triton keeps its compiled kernels per device.
        return ROWS.index(self.row)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*self.row.target)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


FAKE = FakeDriver()


@pytest.fixture(scope="module", autouse=True)
def _cross_compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # An empty cache: ptxas says how many registers it spilled only when it runs.
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
        driver.set_active(FAKE)
        yield
        driver.reset_active()


@pytest.fixture(scope="module", autouse=True)
def _counted(_cross_compiling: None) -> Iterator[None]:
    yield
    print(f"\n{len(FOUND)} kernels compiled, {sum(map(bool, FOUND.values()))} with problems")


#: Problems by what was compiled: operators share kernels.
FOUND: dict[Any, list[str]] = {}


def _shape_of(v: Any) -> Any:
    """What of an argument makes another kernel."""
    if isinstance(v, Tensor):
        return str(v.dtype), FULL and v.data_ptr() % 16
    if isinstance(v, tuple):
        return tuple(map(_shape_of, v))
    if isinstance(v, int) and not isinstance(v, bool):
        return (v == 1, v % 16 == 0, abs(v) >= 2**31) if FULL else abs(v) >= 2**31
    return v if isinstance(v, (bool, str, type(None))) else type(v).__name__


@dataclass
class Compiler:
    """Receives launches, compiles the new ones and collects what is wrong."""

    row: Arch

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self.launches = 0

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        self.launches += 1
        assert len(grid) <= 3 and all(1 <= n <= m for n, m in zip(grid, (2**31 - 1, 65535, 65535))), f"grid {grid}"
        key = (self.row.name, id(kernel), _shape_of(args), repr(sorted(meta.items())))
        if key not in FOUND:
            name = f"{kernel.repr(None)} {({n: v for n, v in meta.items() if n.isupper() or n.startswith('num')})}"
            FOUND[key] = [f"{name}: {problem}" for problem in self.compile(kernel, grid, args, meta)]
        self.problems += FOUND[key]

    def compile(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> Iterator[str]:
        log = io.StringIO()
        try:
            with time_limit(SECONDS), contextlib.redirect_stdout(log):
                compiled = kernel.run(*args, grid=grid, warmup=True, **meta)
        except Exception as e:
            yield f"does not compile: {type(e).__name__}: {str(e)[-2000:]}"
            return
        if compiled.metadata.shared > self.row.shared_memory:
            yield f"{compiled.metadata.shared} bytes of shared memory, the row has {self.row.shared_memory}"
        if "amdgcn" in compiled.asm:
            text = compiled.asm["amdgcn"]
            # Spilled scalar registers go to lanes of vector registers, which costs little.
            for what in ("vgpr_spill_count", "private_segment_fixed_size"):
                amount = max((int(n) for n in re.findall(rf"\.{what}:\s*(\d+)", text)), default=0)
                if amount:
                    yield f"{what} is {amount}"
        else:
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())]
            if any(spills):
                yield f"{max(spills)} bytes of registers are spilled"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so long; if the compiler's native code does not return to Python by then, the process ends."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"compiling took over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _samples(op: Op[..., Any], dtype: torch.dtype, layout: str) -> Iterator[Sample]:
    """Large ones first: where two launches differ in alignment only, theirs is compiled."""
    for case in _bench_cases.cases():
        if case.op == op.name:
            yield case.build(Make(dtype, empty=True))
    found = list(SAMPLES[op.name](Make(dtype, empty=True)))
    yield from sorted(found, key=lambda s: s.note != "big")
    if layout != "contiguous":
        yield from (s for s in SAMPLES[op.name](Make(dtype, layout, empty=False)) if s.note not in ("big", "long"))


def _call(op: Op[..., Any], sample: Sample) -> None:
    """Forward, and backward with respect to all that is differentiable."""
    try:
        bound = op.signature.bind(*sample.args, **sample.kwargs)
        op(*bound.args, **bound.kwargs)
        leaves = []
        for n, v in bound.arguments.items():
            if n in op.differentiable and isinstance(v, Tensor) and v.dtype.is_floating_point:
                bound.arguments[n] = v.detach().requires_grad_()
                leaves.append(bound.arguments[n])
        if not leaves:
            return
        result = op(*bound.args, **bound.kwargs)
        outs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
        torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs], allow_unused=True)
    except (NoKernel, ArgumentError, GradientError):
        return  # the operator does not take this dtype; tests/test_ops.py decides whether it may refuse


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: f"{c[0].name}-{str(c[1]).removeprefix('torch.')}")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_compiles(name: str, column: tuple[Arch, torch.dtype, str]) -> None:
    row, dtype, layout = column
    if str(dtype).removeprefix("torch.") in row.unsupported_dtypes:
        pytest.skip(f"{row.name} has no {dtype}")
    op, compiler = REGISTRY[name], Compiler(row)
    FAKE.row = row
    # Plans hold numbers of the row they were made for.
    for each in REGISTRY.values():
        each._plans.clear()
    with _launch.capturing(compiler), backends.use_arch(row):
        for sample in _samples(op, dtype, layout):
            _call(op, sample)
        if not compiler.launches and dtype == BF16:
            for sample in (s for d in (torch.int32, torch.bool) for s in _samples(op, d, layout)):
                _call(op, sample)
    for each in REGISTRY.values():
        each._plans.clear()
    assert compiler.launches or dtype != BF16, "no sample launched a kernel"
    problems = list(dict.fromkeys(compiler.problems))
    reason = EXPECTED.get((name, row.name, str(dtype).removeprefix("torch.")))
    if reason is None:
        assert not problems, "\n".join(problems)
    else:
        assert problems, f"compiles, although the table of expected failures says: {reason}"


def test_expected_failures_name_what_exists() -> None:
    columns = {(row.name, str(dtype).removeprefix("torch.")) for row, dtype, _ in COLUMNS}
    for name, row, dtype in EXPECTED:
        assert name in REGISTRY and (row, dtype) in columns, (name, row, dtype)


def test_spilling_and_shared_memory_are_seen() -> None:
    """The gate itself: a kernel that must spill, and a row with no shared memory."""
    import triton.language as tl

    @triton.jit
    def hog(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, tl.sort(tl.load(x + i)))

    for row in (ROWS_BY_NAME["sm_90"], ROWS_BY_NAME["gfx942"]):
        FAKE.row = row
        x = torch.empty(4096)
        found = list(Compiler(row).compile(hog, (1,), (x, x), {"N": 4096, "num_warps": 1}))
        assert any("spill" in problem or "private" in problem for problem in found), found
    poor = Arch("poor", ROWS_BY_NAME["sm_90"].target, shared_memory=1)
    FAKE.row = ROWS_BY_NAME["sm_90"]
    found = list(Compiler(poor).compile(hog, (1,), (x, x), {"N": 512, "num_warps": 4}))
    assert any("shared memory" in problem for problem in found), found


ROWS_BY_NAME = {row.name: row for row in ROWS}
