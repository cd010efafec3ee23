"""Rows of the benchmark: softmax, norms, gates, rotary embedding, losses, and how they are written in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit._bench_cases import BIG, BenchCase, Build, call
from gemskit.testing import Make, Sample


def add_rms_norm(x: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor) -> tuple[Tensor, Tensor]:
    """As torch's users write it."""
    s = x + residual
    return F.rms_norm(s, shape, weight, 1e-5), s


def skip_layer_norm(x: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
    """As torch's users write it."""
    return F.layer_norm(x + residual, shape, weight, bias)


def silu_and_mul(x: Tensor) -> Tensor:
    """As torch's users write it."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor) -> Tensor:
    """As torch's users write it."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate) * up


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As torch's users write it: tokens before heads, tables of half the channels."""
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


def _norm(rows: int, cols: int, tensors: int = 1, vectors: int = 1) -> Build:
    return lambda make: Sample(
        (*(make(rows, cols) for _ in range(tensors)), (cols,), *(make(cols) for _ in range(vectors)))
    )


def _classes(make: Make) -> Tensor:
    return make(8192, dtype=torch.int64, low=0, high=128256)


def _loss(make: Make) -> Sample:
    return Sample((make(8192, 128256), _classes(make)))


def _linear_loss(prepare: str) -> Build:
    # Gradients take two more products.
    flops = 2.0 * 8192 * 4096 * 128256 * (3 if prepare else 1)
    return lambda make: Sample(
        (make(8192, 4096), make(128256, 4096), _classes(make)), {"prepare": prepare}, flops=flops
    )


SOFTMAX = ((8192, 1024), (8192, 4096), (8192, 16384), (8192, 32768), (1024, 65536), (256, 131072))
NORMS = ((8192, 4096), (4096, 16384), (32768, 1024), (256, 131072))


def cases() -> Iterator[BenchCase]:
    """All rows of this family."""
    for op in ("softmax", "log_softmax"):
        for rows, cols in SOFTMAX:
            yield BenchCase(op, f"{rows}x{cols}", call((rows, cols), dim=1))
            yield BenchCase(op, f"{rows}x{cols} backward", call((rows, cols), dim=1), backward=True)
    for op, vectors in (("rms_norm", 1), ("layer_norm", 2)):
        for rows, cols in NORMS:
            yield BenchCase(op, f"{rows}x{cols}", _norm(rows, cols, vectors=vectors))
        for rows, cols in NORMS[:3]:
            yield BenchCase(op, f"{rows}x{cols} backward", _norm(rows, cols, vectors=vectors), backward=True)
    yield BenchCase("fused_add_rms_norm", "8192x4096", _norm(8192, 4096, tensors=2), peer=add_rms_norm)
    yield BenchCase("skip_layer_norm", "8192x4096", _norm(8192, 4096, tensors=2, vectors=2), peer=skip_layer_norm)
    yield BenchCase("silu_and_mul", "8192x28672 packed", call((BIG, 28672)), peer=silu_and_mul)
    yield BenchCase("gelu_and_mul", "8192x28672 packed", call((BIG, 28672)), peer=gelu_and_mul)
    yield BenchCase(
        "apply_rotary_pos_emb", "8x4096 h32/8 d128",
        lambda make: Sample((make(8, 4096, 32, 128), make(8, 4096, 8, 128), make(4096, 64), make(4096, 64))),
        peer=rotate,
    )  # fmt: skip
    yield BenchCase(
        "embedding", "16384 of 128256x4096",
        lambda make: Sample(
            (make(16384, dtype=torch.int64, low=0, high=128256), make(128256, 4096)),
            read=16384 * (8 + 4096 * make.dtype.itemsize),
        ),
    )  # fmt: skip
    yield BenchCase("cross_entropy", "8192x128256", _loss)
    yield BenchCase("cross_entropy", "8192x128256 backward", _loss, backward=True)
    yield BenchCase("cross_entropy", "8192x128256 forward and backward", _loss, backward=True, whole=True)
    name = "fused_linear_cross_entropy"
    yield BenchCase(name, "8192x4096x128256", _linear_loss(""))
    yield BenchCase(
        name, "8192x4096x128256 forward and backward", _linear_loss("input linear_weight"), backward=True, whole=True
    )
