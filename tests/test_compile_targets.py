"""Every operator, forward and backward, compiled for every architecture whose status claims so. No GPU is needed.

The host code runs once with CPU tensors; every launch is handed to Triton's compiler for the row's target with the argument
types, constants and options that the hardware would get. It fails if it does not compile, spills registers, or needs more
shared memory than the row has. A run compiles the launches of the largest samples and a few others of each operator;
``GEMSKIT_COMPILE=full`` compiles all, also those that differ only in alignment and divisibility.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import itertools
import os
import re
import signal
import zlib
from collections import Counter
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

import gemskit
from gemskit import _bench_cases, _driver, _launch, backends, epilogues
from gemskit._op import REGISTRY, Op
from gemskit._tensor_map import Descriptor
from gemskit.backends import Arch
from gemskit.blas import _drive, _rule
from gemskit.errors import ArgumentError, GradientError, NoKernel
from gemskit.testing import Make, Sample, lay_out, load

#: Longest that one kernel may compile; attention takes 0.8 s.
SECONDS = 90
FULL = os.environ.get("GEMSKIT_COMPILE") == "full"

ROWS = [row for vendor in backends.vendors.values() for row in vendor.archs if row.status != "declared"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
#: One row of each vendor gets more launches of an operator, other dtypes, and the tiles of transposed tensors.
MAIN = ("sm_90", "gfx942")
#: Row, dtype, layout, and how many launches of an operator are compiled (all, with GEMSKIT_COMPILE=full).
COLUMNS = [(row, BF16, "contiguous", 3 if row.name in MAIN else 2) for row in ROWS]
COLUMNS += [(row, FP32, "transposed", 3) for row in ROWS if row.name in MAIN]
COLUMNS += [(row, FP64, "contiguous", 2) for row in ROWS if row.name in MAIN]

#: Bytes that a kernel may spill on NVIDIA, and why.
SPILLS: dict[str, tuple[int, str]] = {
    "sort_rows": (
        160,
        "8192 rows of 4096 bf16 on H200: 0.82 ms with 2048 words a warp, 1.14 with 1024, which spills nothing",
    ),
    "radix_move": (160, "16M bf16 on H200: 0.74 ms with tiles of 1024, 0.80 with 512, which spills nothing"),
    "polar_complex": (16, "sine and cosine with the reduction of large arguments"),
    "radix_block_move": (48, "80 registers, so that three programs fit; outside of any loop"),
    "sort_block_rows": (24, "as of radix_block_move, in Triton 3.9; 0 in 3.6"),
    "attention_hopper_grad_key_value": (128, "numbers of a tile, outside of the loop over rows"),
    "attention_hopper": (
        144,
        "head size 256 in Triton 3.9, 0 in 3.6: numbers of a tile, outside of the loop over keys",
    ),
    "attention_hopper_grad_query": (272, "head size 256 in Triton 3.9, 0 in 3.6"),
    "attention_hopper_grads_together": (
        244,
        "head size 128: numbers of a tile, and 8 in the loop over rows where the next scores come first",
    ),
    "attention_hopper_grads_together_wide": (
        512,
        "head size 256: numbers of a tile, and addresses in the loop over rows; 3.6 spills 92 bytes, 3.9 290",
    ),
    "matmul": (8, "a small tile of float32 without tensor cores"),
    "cos_grad": (16, "sine with the reduction of large arguments"),
    "group_norm": (8, "32 masked elements a thread; a row that is not held would be read twice"),
    "layer_norm_grad_weight_bias": (32, "numbers of a program, outside of the loop over rows"),
    "norm_vector_sums_part": (8, "it adds the gradients of a batch's samples, a thousandth of what was read for them"),
}

#: (operator, row, dtype) that is known to fail, with the reason. One that passes fails the run.
EXPECTED: dict[tuple[str, str, str], str] = {}


class FakeDriver:
    """What Triton asks about the device, answered for the row under test."""

    row: Arch = ROWS[0]

    def get_current_device(self) -> int:
        # A number per row: Triton keeps its compiled kernels per device.
        return sum(self.row.name.encode())

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
        # Not set_active and reset_active: the latter looks for a GPU.
        patch.setattr(driver, "_active", FAKE)
        yield


@pytest.fixture(scope="module", autouse=True)
def _counted(_cross_compiling: None) -> Iterator[None]:
    yield
    print(f"\n{len(FOUND)} kernels compiled, {sum(bool(problems) for _, problems in FOUND.values())} with problems")


#: Problems by what was compiled: operators share kernels. The launch is kept, as the key holds its kernel's id.
FOUND: dict[Any, tuple[Launch, list[str]]] = {}


def _shape_of(v: Any) -> Any:
    """What of an argument makes another kernel."""
    if isinstance(v, Tensor):
        return str(v.dtype), FULL and v.data_ptr() % 16
    if isinstance(v, tuple):
        return tuple(map(_shape_of, v))
    if isinstance(v, Descriptor):
        return str(v.base.dtype), v.block, v.layout
    if isinstance(v, int) and not isinstance(v, bool):
        return (v == 1, v % 16 == 0, abs(v) >= 2**31) if FULL else abs(v) >= 2**31
    return v if isinstance(v, (bool, str, type(None))) else type(v).__name__


@dataclass(frozen=True)
class Launch:
    """A launch that stands for all that compile to the same kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.repr(None))

    def __str__(self) -> str:
        return f"{self.name} { {n: v for n, v in self.meta.items() if n.isupper() or n.startswith('num')} }"

    def problems(self, row: Arch) -> Iterator[str]:
        """Compile for ``row`` and say what is wrong."""
        log = io.StringIO()
        FAKE.row = row
        try:
            with time_limit(SECONDS), contextlib.redirect_stdout(log):
                compiled = _driver.compile(self.kernel, tuple(map(_driver.described, self.args)), self.meta)
        except Exception as e:
            yield f"does not compile: {type(e).__name__}: {str(e)[-2000:]}"
            return
        if compiled.metadata.shared > row.shared_memory:
            yield f"{compiled.metadata.shared} bytes of shared memory, the row has {row.shared_memory}"
        if "amdgcn" in compiled.asm:
            # Spilled scalar registers go to lanes of vector registers, which costs little.
            for what in ("vgpr_spill_count", "private_segment_fixed_size"):
                amount = max((int(n) for n in re.findall(rf"\.{what}:\s*(\d+)", compiled.asm["amdgcn"])), default=0)
                if amount:
                    yield f"{what} is {amount}"
        else:
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())]
            if "serialized" in log.getvalue():
                yield "products on tensor cores wait for each other"
            if max(spills, default=0) > SPILLS.get(self.name.rpartition(".")[2], (0, ""))[0]:
                yield f"{max(spills)} bytes of registers are spilled"


class Launches(dict[Any, Launch]):
    """Receives launches and keeps one of each kind."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        assert len(grid) <= 3 and all(1 <= n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535))), (
            f"grid {grid}"
        )
        key = (id(kernel), _shape_of(args), repr(sorted(meta.items())))
        self.setdefault(key, Launch(kernel, grid, args, meta))

    def chosen(self, most: int) -> list[tuple[Any, Launch]]:
        """``most`` of them: the first of every kernel (forward, backward, folds), then the second of every kernel, ..."""
        turn: Counter[str] = Counter()
        order = []
        for key, launch in self.items():
            order.append((turn[launch.name], key, launch))
            turn[launch.name] += 1
        return [(key, launch) for _, key, launch in sorted(order, key=lambda o: o[0])[:most]]


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


class Unfilled(Make):
    """Makes tensors without values, as only their layout matters; large ones are contiguous, which costs no copy."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        t = torch.empty(shape, dtype=dtype or self.dtype)
        return t if t.numel() > 1 << 20 else lay_out(t, self.layout)


#: Of the benchmark's calls of an operator about so many are visited, and none whose tensors this machine may have no room for.
DRAWN, ROOM = 6, 1 << 32


def _samples(op: Op[..., Any], dtype: torch.dtype, layout: str) -> Iterator[Sample]:
    """Large ones first: where two launches differ in alignment only, theirs is compiled."""
    rows = [case for case in _bench_cases.cases() if case.op == op.name]
    for case in rows[:: 1 if FULL else max(1, len(rows) // DRAWN)]:
        tensors = case.build(Make(dtype, device="meta", empty=True)).args
        if all(t.nbytes <= ROOM for t in tensors if isinstance(t, Tensor)):
            yield case.build(Unfilled(dtype))
    yield from sorted(load()[op.name](Unfilled(dtype, layout)), key=lambda sample: sample.note != "big")


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


def _title(column: tuple[Arch, torch.dtype, str, int]) -> str:
    return f"{column[0].name}-{str(column[1]).removeprefix('torch.')}"


#: One of so many operators is compiled for sm_90 in bfloat16, for gfx942, and for each other column: elementwise ones, which
#: share a driver, and others. A kernel takes a second, and there are 3,000.
EVERY = {True: (6, 12, 24), False: (1, 3, 24)}


def _visited() -> list[Any]:
    """Every operator that is not elementwise for sm_90 in bfloat16; of the rest a draw, the same in every run."""
    found = []
    for name, op in REGISTRY.items():
        for column in COLUMNS:
            place = MAIN.index(column[0].name) if column[1] == BF16 and column[0].name in MAIN else 2
            every = EVERY[op.family == "pointwise"][place]
            if FULL or zlib.crc32(f"{name} {_title(column)}".encode()) % every == 0:
                found.append(pytest.param(name, column, id=f"{name}-{_title(column)}"))
    return found


@pytest.mark.parametrize(("name", "column"), _visited())
def test_compiles(name: str, column: tuple[Arch, torch.dtype, str, int]) -> None:
    row, dtype, layout, most = column
    if str(dtype).removeprefix("torch.") in row.unsupported_dtypes:
        pytest.skip(f"{row.name} has no {dtype}")
    op, launches = REGISTRY[name], Launches()
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        for sample in _samples(op, dtype, layout):
            _call(op, sample)
        if not launches and dtype == BF16:
            for sample in (s for d in (FP32, torch.int32, torch.bool) for s in _samples(op, d, layout)):
                _call(op, sample)
    _forget_plans()
    assert launches or dtype != BF16, "no sample launched a kernel"
    problems = []
    for key, launch in launches.chosen(len(launches) if FULL else most):
        if (row.name, key) not in FOUND:
            FOUND[row.name, key] = launch, [f"{launch}: {problem}" for problem in launch.problems(row)]
        problems += FOUND[row.name, key][1]
    reason = EXPECTED.get((name, row.name, str(dtype).removeprefix("torch.")))
    if reason is None:
        assert not problems, "\n".join(problems)
    else:
        assert problems, f"compiles, although the table of expected failures says: {reason}"


@pytest.mark.parametrize("name", MAIN)
def test_epilogues_compile(name: str) -> None:
    """In each kernel of products, with operands along both sides."""
    row, launches = next(row for row in ROWS if row.name == name), Launches()
    make = Unfilled(BF16)
    scales = make(2048, dtype=FP32)
    with _launch.capturing(launches), backends.use_arch(row):
        for m in (1, 16, 2048):
            a, b = make(m, 1024), make(2048, 1024).mT
            biased = epilogues.bias(make(2048)).then(epilogues.gelu)
            scaled = epilogues.scale_rows(scales[:m]).then(epilogues.scale_columns(scales))
            quantised = [] if "float8_e4m3fn" in row.unsupported_dtypes else [epilogues.quantise(scales[:1])]
            for epilogue in (biased, scaled, epilogues.residual(make(m, 2048)), *quantised):
                gemskit.mm(a, b, epilogue=epilogue)
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert launches and not problems, "\n".join(problems)


@pytest.mark.parametrize(("columns", "together"), [(128, 0), (256, 0), (64, 256), (128, 256), (256, 256)])
def test_attention_for_hopper_compiles(columns: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only 256 columns may spill."""
    if columns <= 128:
        for name in ("attention_hopper", "attention_hopper_grad_query"):
            monkeypatch.delitem(SPILLS, name)
    row = next(row for row in ROWS if row.name == "sm_90")
    row = dataclasses.replace(
        row, launch={**row.launch, "attention": {**row.config("attention"), "together": together}}
    )
    launches, make = Launches(), Unfilled(BF16)
    q, k, v = (make(2, n, 4096, columns).requires_grad_() for n in (8, 2, 2))
    with _launch.capturing(launches), backends.use_arch(row):
        _forget_plans()
        out = gemskit.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    _forget_plans()
    hopper = [launch for launch in launches.values() if "attention" in launch.name]
    problems = [f"{launch}: {problem}" for launch in hopper for problem in launch.problems(row)]
    # Above 128 columns keys and values have a launch each; together all gradients have one.
    assert len(hopper) == (3 if together else 4 if columns == 128 else 5) and not problems, "\n".join(problems)


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_packed_attention_for_hopper_compiles(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only 256 columns may spill."""
    if columns < 256:
        monkeypatch.delitem(SPILLS, "attention_hopper")
    row = next(row for row in ROWS if row.name == "sm_90")
    launches, make = Launches(), Unfilled(BF16)
    q, k, v = (make(4096, n, columns) for n in (8, 2, 2))
    ends = torch.empty(5, dtype=torch.int32)
    with _launch.capturing(launches), backends.use_arch(row):
        _forget_plans()
        gemskit.flash_attn_varlen_func(q, k, v, 2048, ends, 2048, ends, causal=True)
    _forget_plans()
    names = [launch.name.rpartition(".")[2] for launch in launches.values()]
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert names == ["attention_packed_tiles", "attention_hopper"] and not problems, "\n".join(problems)


@pytest.mark.parametrize("name", MAIN)
def test_factors_of_float64_from_narrow_memory_compile(name: str) -> None:
    """Which the samples of two operators have; none of their launches is a first one."""
    row, launches = next(row for row in ROWS if row.name == name), Launches()
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        for op in ("weight_int8pack_mm", "_paged_attention"):
            for sample in load()[op](Unfilled(FP64)):
                if any(isinstance(v, Tensor) and v.dtype.itemsize == 1 for v in sample.args):
                    _call(REGISTRY[op], sample)
    _forget_plans()
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    # Triton 3.6 spills 8 bytes in one of them.
    problems = [problem for problem in problems if "does not compile" in problem]
    assert len(launches) >= 2 and not problems, "\n".join(problems)


@pytest.mark.parametrize("fast", [False, True])
def test_float8_products_for_hopper_compile(fast: bool) -> None:
    """With sums of float32 next to those of tensor cores, unless these suffice."""
    row, launches = next(row for row in ROWS if row.name == "sm_90"), Launches()
    f8, f32 = Unfilled(torch.float8_e4m3fn), Unfilled(FP32)
    ends = torch.empty(4, dtype=torch.int32)
    a, b = f8(1024, 1024), f8(1024, 1024).mT
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        for scales in ((f32(), f32()), (f32(8, 1), f32(1, 1024))):
            gemskit.scaled_mm(a, b, *scales, None, None, BF16, fast)
        gemskit.scaled_grouped_mm(a, f8(4, 1024, 1024).mT, f32(1024), f32(4, 1024), ends, use_fast_accum=fast)
        gemskit.scaled_grouped_mm(a, b, f32(4096), f32(4096), ends, use_fast_accum=fast)
        if not fast:
            gemskit.bmm_fp8(f8(4, 512, 512), f8(4, 512, 512).mT, f32(), f32(), BF16)
    _forget_plans()
    assert len(launches) == 5 - fast and all(launch.meta["PROMOTED"] is not fast for launch in launches.values())
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("steps", "fast"), [(1, False), (2, False), (2, True)], ids=str)
def test_float8_products_in_gluon_compile(steps: int, fast: bool) -> None:
    """In steps of 128 or 256; those that stay on tensor cores take larger tiles, and no larger steps."""
    row, launches = next(row for row in ROWS if row.name == "sm_90"), Launches()
    row = dataclasses.replace(row, launch={**row.launch, "gemm": {**row.config("gemm"), "float8": steps}})
    f32, kinds = Unfilled(FP32), (torch.float8_e4m3fn, torch.float8_e5m2)
    scales = f32(4096, 1), f32(1, 4096)
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        for first, second in list(itertools.product(kinds, kinds))[:: 3 if fast else 1]:
            a, b = Unfilled(first)(4096, 4096), Unfilled(second)(4096, 4096).mT
            gemskit.scaled_mm(a, b, *scales, None, None, BF16, fast)
        gemskit.scaled_mm(a[:40], b, f32(40, 1), scales[1], f32(4096), None, first, fast)
    _forget_plans()
    found = [launch for launch in launches.values() if "STAGES" in launch.meta]
    assert len(found) == (3 if fast else 5)
    assert all(launch.meta["PROMOTED"] is not fast for launch in found)
    assert {launch.meta["BK"] for launch in found} == {128 if fast else 128 * steps}
    assert max(launch.meta["BM"] * launch.meta["BN"] for launch in found) == (2 if fast else 1) * 128 * 128
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("tile", [(64, 32), (64, 64), (192, 128), (128, 256)], ids=str)
def test_tiles_for_hopper_compile(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one to three groups of warps: one tile a program and several, whole and split, that begin in others, gated."""
    row, launches = next(row for row in ROWS if row.name == "sm_90"), Launches()
    make = Unfilled(BF16)

    def chosen(*given: Any) -> _rule.Choice:
        found = [c for c in _rule.choices(*given[:7]) if (c.BM, c.BN) == tile]
        return found[0 if given[0] == 8 * tile[0] else -1]

    monkeypatch.setattr(_drive, "choose", chosen)
    with _launch.capturing(launches), backends.use_arch(row):
        for m, n in ((8 * tile[0], 8 * tile[1]), (64 * tile[0], 64 * tile[1]), (64 * tile[0] + 8, 64 * tile[1] + 8)):
            _forget_plans()
            other = make(n) if tile in ((192, 128), (128, 256)) else make(m, n)
            gemskit.mm(make(m, 1024), make(n, 1024).mT, epilogue=epilogues.residual(other))
        if tile[1] >= 64:
            gemskit.gated_linear(make(4096, 1024), make(4096, 1024), make(4096, 1024))
    _forget_plans()
    found = [launch for launch in launches.values() if "STAGES" in launch.meta]
    assert {launch.meta["ONE"] for launch in found} == {launch.meta["OVER"] for launch in found} == {False, True}
    assert {launch.meta["WORKERS"] for launch in found} == {_rule.WORKERS.get(tile[0], 2)}
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("at", range(len(_rule.TILES)))
def test_products_of_groups_for_hopper_compile(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, of weights by rows, and columns, which are stored along them; a matrix beside tiles that leave registers for it."""
    row, launches = next(row for row in ROWS if row.name == "sm_90"), Launches()
    tile, make, ends = _rule.TILES[at], Unfilled(BF16), torch.empty(4, dtype=torch.int32)
    monkeypatch.setattr(_rule, "TILES", (tile,))
    other = make(2048) if tile[0] == 192 else make(4096, 2048)
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        gemskit.grouped_mm(make(4096, 1024), make(4, 2048, 1024).mT, ends, epilogue=epilogues.residual(other))
        gemskit.grouped_mm(make(4096, 1024), make(4, 1024, 2048), ends)
        gemskit.grouped_mm(make(4, 2048, 1024), make(4096, 1024).mT, ends)
    _forget_plans()
    assert [(launch.meta["BM"], launch.meta["BN"]) for launch in launches.values()] == [tile[:2]] * 3
    problems = [f"{launch}: {problem}" for launch in launches.values() for problem in launch.problems(row)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", [16, 256])
def test_keys_in_pages_are_loaded_as_far_ahead_as_others(page: int) -> None:
    """Which shows in shared memory: a look-up that the loads of the same step wait for would take a stage."""
    row, make = next(row for row in ROWS if row.name == "sm_90"), Unfilled(BF16)
    (query, keys), pages = (make(4, 1, 32, 128), make(4, 2048, 4, 128)), make(4 * 2048 // page, page, 4, 128)
    ends, used = torch.empty(5, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    table = torch.empty(4, 2048 // page, dtype=torch.int32)
    shared = []
    for paged in (False, True):
        launches = Launches()
        _forget_plans()
        with _launch.capturing(launches), backends.use_arch(row):
            if paged:
                gemskit.flash_attn_varlen_func(
                    query[:, 0], pages, pages, max_seqlen_q=1, cu_seqlens_q=ends, max_seqlen_k=2048, seqused_k=used,
                    block_table=table, causal=True, softcap=30.0,
                )  # fmt: skip
            else:
                gemskit.flash_attn_func(query, keys, keys, causal=True, softcap=30.0)
        _forget_plans()
        forward = next(launch for launch in launches.values() if launch.name.endswith("attention_forward"))
        assert not list(forward.problems(row))
        compiled = _driver.compile(forward.kernel, tuple(map(_driver.described, forward.args)), forward.meta)
        shared.append(compiled.metadata.shared)
    assert shared[0] == shared[1]


@pytest.mark.parametrize("name", ["sm_90", "sm_80"])
def test_kernels_that_follow_wait_before_they_read(name: str) -> None:
    row, launches = next(row for row in ROWS if row.name == name), Launches()
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        gemskit.sum(torch.ones(1 << 20))
    _forget_plans()
    texts = []
    for launch in launches.values():
        assert not list(launch.problems(row))
        compiled = _driver.compile(launch.kernel, tuple(map(_driver.described, launch.args)), launch.meta)
        texts.append(compiled.asm["ptx"])
    assert ["griddepcontrol.wait" in text for text in texts] == [False, name == "sm_90"]
    before, _, _ = texts[1].partition("griddepcontrol.wait")
    assert name != "sm_90" or not re.search(r"\b(ld|st)\.global", before)


def _forget_plans() -> None:
    """Plans hold numbers of the row they were made for."""
    for op in REGISTRY.values():
        op._plans.clear()


def test_expected_failures_name_what_exists() -> None:
    columns = {(row.name, str(dtype).removeprefix("torch.")) for row, dtype, _, _ in COLUMNS}
    for name, row, dtype in EXPECTED:
        assert name in REGISTRY and (row, dtype) in columns, (name, row, dtype)


def test_spilling_and_shared_memory_are_seen() -> None:
    """The gate itself: a kernel that must spill, and a row with no shared memory."""
    import triton.language as tl

    @triton.jit
    def hog(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        values = tl.load(x + i)
        tl.store(y + i, values - tl.sum(values))

    rows = {row.name: row for row in ROWS}
    x = torch.empty(65536)
    for row in MAIN:
        found = list(Launch(hog, (1,), (x, x), {"N": 65536, "num_warps": 1}).problems(rows[row]))
        assert any("spill" in problem or "private" in problem for problem in found), found
    poor = dataclasses.replace(rows["sm_90"], shared_memory=1)
    found = list(Launch(hog, (1,), (x, x), {"N": 512, "num_warps": 4}).problems(poor))
    assert any("shared memory" in problem for problem in found), found


@pytest.mark.parametrize(("rows", "columns"), [(4096, 16384), (4096, 12288)])
def test_gradients_of_norms_in_gluon_compile(rows: int, columns: int) -> None:
    """Rows in a ring of shared memory, and sums over them in registers."""
    row = next(row for row in ROWS if row.name == "sm_90")
    launches, make = Launches(), Unfilled(BF16)
    x, w, b = (make(*size).requires_grad_() for size in ((rows, columns), (columns,), (columns,)))
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        for out, leaves in (
            (gemskit.layer_norm(x, (columns,), w, b), (x, w, b)),
            (gemskit.rms_norm(x, (columns,), w), (x, w)),
        ):
            torch.autograd.grad(out, leaves, torch.empty_like(out))
    _forget_plans()
    found = [launch for launch in launches.values() if "ACROSS" in launch.meta]
    assert len(found) == 2 and all(launch.meta["STAGES"] == 3 for launch in found)
    problems = [f"{launch}: {problem}" for launch in found for problem in launch.problems(row)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_sorts_by_blocks_compile(dtype: torch.dtype) -> None:
    """Radix sorts that move by blocks in shared memory, rows that are one, winners of topk; histograms and searches there."""
    row, launches = next(row for row in ROWS if row.name == "sm_90"), Launches()
    numbers = {**row.config("radix"), "blocks": 1, "rows": 1024}
    row = dataclasses.replace(row, launch={**row.launch, "radix": numbers})
    make = Unfilled(dtype)
    _forget_plans()
    with _launch.capturing(launches), backends.use_arch(row):
        gemskit.sort(make(64, 128256))
        gemskit.sort(make(8192, 4096))
        gemskit.topk(make(64, 128256), 1024)
        gemskit.histc(make(1 << 20), 2000)
        for values in (make(1 << 20), Unfilled(torch.int64)(1 << 20)):
            gemskit.searchsorted(values[: 1 << 17], values)
            gemskit.searchsorted(values[:1000], values, right=True)
        gemskit.isin(make(1 << 22), make(64))
    _forget_plans()
    found = [launch for launch in launches.values() if "_block_" in launch.name or "_shared" in launch.name]
    assert {launch.name.rpartition(".")[2] for launch in found} == {
        "radix_block_count", "radix_block_move", "sort_block_rows", "topk_block_join", "histogram_shared", "search_shared",
    }  # fmt: skip
    problems = [f"{launch}: {problem}" for launch in found for problem in launch.problems(row)]
    assert not problems, "\n".join(problems)
