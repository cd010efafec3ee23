"""Rows of the benchmark: products of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit._bench_cases import BenchCase, Build, Way
from gemskit.testing import Make, Sample

#: Weights, N x K: queries, keys and values in one; the output; gate and up in one; down.
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
QWEN_32B = ((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600))
TOKENS = (1, 16, 64, 128, 512, 2048, 8192)
FLOAT8 = torch.float8_e4m3fn


def layer(m: int, n: int, k: int) -> Build:
    """How a layer multiplies by its weight: row-major A, column-major B."""
    return lambda make: Sample((make(m, k), make(n, k).t()), flops=2.0 * m * n * k)


def _rows_by_rows(m: int, n: int, k: int) -> Build:
    return lambda make: Sample((make(m, k), make(k, n)), flops=2.0 * m * n * k)


def _columns_by_rows(m: int, n: int, k: int) -> Build:
    return lambda make: Sample((make(k, m).t(), make(k, n)), flops=2.0 * m * n * k)


def _mm(label: str, build: Build, dtype: torch.dtype = torch.bfloat16) -> BenchCase:
    # A row costs a second without torch.compile, which calls the same library for it.
    return BenchCase("mm", label, build, dtype, compiled=False)


def _matrices() -> Iterator[BenchCase]:
    for n, k in LLAMA_8B:
        for m in TOKENS:
            yield _mm(f"{m}x{n}x{k}", layer(m, n, k))
        yield _mm(f"2048x{n}x{k} f16", layer(2048, n, k), torch.float16)
        # The gradients of a layer: grad (M, N) by weight (N, K), and grad.t() (N, M) by the input (M, K).
        yield _mm(f"2048x{k}x{n} grad of input", _rows_by_rows(2048, k, n))
        yield _mm(f"{n}x{k}x2048 grad of weight", _columns_by_rows(n, k, 2048))
    for n, k in QWEN_32B:
        for m in (1, 16, 128, 2048):
            yield _mm(f"{m}x{n}x{k}", layer(m, n, k))
    for side in (512, 1024, 2048, 4096, 8192, 16384):
        yield _mm(f"{side}x{side}x{side}", layer(side, side, side))
    for m, n, k in ((4097, 4095, 1023), (1000, 1000, 1000)):
        yield _mm(f"{m}x{n}x{k}", layer(m, n, k))


def _one_product(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


def _two_products(x: Tensor, weight: Tensor) -> Tensor:
    w1, w3 = weight.chunk(2)
    return F.silu(x @ w1.t()) * (x @ w3.t())


def _gated(m: int) -> BenchCase:
    n, k = 14336, 4096
    # The compiler's best is one product and one kernel for the gate.
    return BenchCase(
        "gated_linear", f"{m}x{n}x{k}",
        lambda make: Sample((make(m, k), make(2 * n, k)), flops=4.0 * m * n * k), peer=_one_product,
        ways=(Way("two products", _two_products), Way("one product", _one_product)),
    )  # fmt: skip


def _scaled_peer(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Any:
    return torch.ops.aten._scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype)


def _scaled(m: int, n: int, k: int) -> BenchCase:
    def build(make: Make) -> Sample:
        scales = (make(*shape, dtype=torch.float32, low=0.5, high=2.0) for shape in ((m, 1), (1, n)))
        factors = make(m, k, dtype=FLOAT8), make(n, k, dtype=FLOAT8).t()
        # The measured roof is that of bfloat16, which float8 goes beyond: half of the work counts.
        return Sample((*factors, *scales), {"out_dtype": torch.bfloat16}, flops=1.0 * m * n * k)

    return BenchCase("scaled_mm", f"{m}x{n}x{k} scales of rows", build, FLOAT8, peer=_scaled_peer, compiled=False)


def _grouped(label: str, sizes: Sequence[int]) -> BenchCase:
    n, k = 14336, 4096
    ends = torch.tensor(sizes).cumsum(0).tolist()

    def build(make: Make) -> Sample:
        offs = torch.tensor(ends, dtype=torch.int32, device=make.device)
        weights = make(len(sizes), n, k).transpose(1, 2)
        return Sample((make(ends[-1], k), weights, offs), flops=2.0 * ends[-1] * n * k)

    # torch.compile might choose another kernel than torch's, but not a library's.
    return BenchCase("grouped_mm", label, build, peer=_grouped_peer, compiled=False)


def _grouped_peer(a: Tensor, b: Tensor, offs: Tensor) -> Any:
    return torch.ops.aten._grouped_mm(a, b, offs=offs)


def cases() -> Iterator[BenchCase]:
    """All rows of this family."""
    yield from _matrices()
    flops = 2.0 * 64 * 1024**3
    yield BenchCase(
        "bmm", "64x1024³", lambda make: Sample((make(64, 1024, 1024), make(64, 1024, 1024)), flops=flops),
        compiled=False,
    )  # fmt: skip
    yield BenchCase(
        "bmm", "64x1024³ b.mT", lambda make: Sample((make(64, 1024, 1024), make(64, 1024, 1024).mT), flops=flops),
        compiled=False,
    )  # fmt: skip
    yield BenchCase(
        "addmm", "4096³", lambda make: Sample((make(4096), make(4096, 4096), make(4096, 4096)), flops=2.0 * 4096**3),
        compiled=False,
    )  # fmt: skip
    yield BenchCase(
        "linear", "8192x4096 -> 14336",
        lambda make: Sample((make(8192, 4096), make(14336, 4096)), flops=2.0 * 8192 * 4096 * 14336), compiled=False,
    )  # fmt: skip
    yield from map(_gated, (16, 2048, 8192))
    for m, n, k in ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 6144, 4096)):
        yield _scaled(m, n, k)
    yield _grouped("8x4096x14336x4096", [4096] * 8)
    # 4,096 tokens of two experts each, as a router gives them.
    yield _grouped("8 groups of 8192x14336x4096", [1800, 1500, 1203, 1100, 900, 797, 600, 292])
