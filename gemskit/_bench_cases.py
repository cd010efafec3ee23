"""What ``python -m gemskit bench`` times: for each operator, calls of the sizes that models make.

Bytes are counted from the tensors of the call (each read once, each output written once); FLOPs are given where arithmetic
is the floor. Tests never run these; ``tests/test_compile_targets.py`` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemskit.testing import Make, Sample

Build = Callable[[Make], Sample]


@dataclass(frozen=True)
class BenchCase:
    """One row of the table."""

    op: str
    label: str
    build: Build
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    #: What a torch user would write, where that is not the operator's meaning (which keeps intermediates in float32).
    peer: Callable[..., Any] | None = None
    #: What of the results is compared, where several are right: drawn values, positions of equal elements.
    compare: Callable[[Sample, Sequence[Tensor]], list[Tensor]] | None = None


def _add_rms_norm(x: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, shape, weight, 1e-5), s


def _skip_layer_norm(x: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, shape, weight, bias)


def _silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate) * up


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


def call(*shapes: tuple[int, ...], **kwargs: Any) -> Build:
    """Tensors of these shapes, and arguments by name."""
    return lambda make: Sample(tuple(make(*s) for s in shapes), kwargs)


def _norm(rows: int, cols: int, tensors: int = 1, vectors: int = 1) -> Build:
    return lambda make: Sample(
        (*(make(rows, cols) for _ in range(tensors)), (cols,), *(make(cols) for _ in range(vectors)))
    )


def _product(m: int, n: int, k: int) -> Build:
    # Row-major A, column-major B: how a layer multiplies by its weight.
    return lambda make: Sample((make(m, k), make(n, k).t()), flops=2.0 * m * n * k)


def _attention(b: int, hq: int, hk: int, s: int, d: int, causal: bool) -> Build:
    return lambda make: Sample(
        (make(b, hq, s, d), make(b, hk, s, d), make(b, hk, s, d)),
        dict(is_causal=causal, enable_gqa=hq != hk),
        flops=4.0 * b * hq * s * s * d * (0.5 if causal else 1.0),
    )


BIG = 8192
ELEMENTS = 1 << 26
SOFTMAX = ((8192, 1024), (8192, 4096), (8192, 16384), (8192, 32768), (1024, 65536), (256, 131072))


def cases() -> Iterator[BenchCase]:
    """All rows, operator by operator."""
    # They import this module for what a row is.
    from gemskit import _bench_elementwise, _bench_reduce

    yield from _bench_elementwise.cases()
    yield from _bench_reduce.cases()
    for op in ("softmax", "log_softmax"):
        for rows, cols in SOFTMAX:
            yield BenchCase(op, f"{rows}x{cols}", call((rows, cols), dim=1))
            yield BenchCase(op, f"{rows}x{cols} backward", call((rows, cols), dim=1), backward=True)
    for rows, cols in ((8192, 4096), (4096, 16384), (32768, 1024), (256, 131072)):
        yield BenchCase("rms_norm", f"{rows}x{cols}", _norm(rows, cols))
        yield BenchCase("layer_norm", f"{rows}x{cols}", _norm(rows, cols, vectors=2))
    yield BenchCase("rms_norm", "8192x4096 backward", _norm(8192, 4096), backward=True)
    yield BenchCase("layer_norm", "8192x4096 backward", _norm(8192, 4096, vectors=2), backward=True)
    yield BenchCase("fused_add_rms_norm", "8192x4096", _norm(8192, 4096, tensors=2), peer=_add_rms_norm)
    yield BenchCase("skip_layer_norm", "8192x4096", _norm(8192, 4096, tensors=2, vectors=2), peer=_skip_layer_norm)
    yield BenchCase("silu_and_mul", "8192x28672 packed", call((BIG, 28672)), peer=_silu_and_mul)
    yield BenchCase("gelu_and_mul", "8192x28672 packed", call((BIG, 28672)), peer=_gelu_and_mul)
    yield BenchCase(
        "apply_rotary_pos_emb", "8x4096 h32/8 d128",
        lambda make: Sample((make(8, 4096, 32, 128), make(8, 4096, 8, 128), make(4096, 64), make(4096, 64))),
        peer=_rotate,
    )  # fmt: skip
    yield BenchCase(
        "embedding", "16384 of 128256x4096",
        lambda make: Sample(
            (make(16384, dtype=torch.int64, low=0, high=128256), make(128256, 4096)),
            read=16384 * (8 + 4096 * make.dtype.itemsize),
        ),
    )  # fmt: skip
    yield BenchCase(
        "cross_entropy", "8192x128256",
        lambda make: Sample((make(8192, 128256), make(8192, dtype=torch.int64, low=0, high=128256))),
    )  # fmt: skip
    yield BenchCase(
        "cross_entropy", "8192x128256 backward",
        lambda make: Sample((make(8192, 128256), make(8192, dtype=torch.int64, low=0, high=128256))), backward=True,
    )  # fmt: skip
    yield BenchCase(
        "fused_linear_cross_entropy", "8192x4096x128256",
        lambda make: Sample(
            (make(8192, 4096), make(128256, 4096), make(8192, dtype=torch.int64, low=0, high=128256)),
            flops=2.0 * 8192 * 4096 * 128256,
        ),
    )  # fmt: skip
    for m, n, k in (
        (8192, 8192, 8192),
        (4096, 4096, 4096),
        (2048, 6144, 4096),
        (128, 4096, 14336),
        (16, 14336, 4096),
        (1, 4096, 4096),
    ):
        yield BenchCase("mm", f"{m}x{n}x{k}", _product(m, n, k))
    yield BenchCase(
        "bmm", "64x1024³", lambda make: Sample((make(64, 1024, 1024), make(64, 1024, 1024)), flops=2.0 * 64 * 1024**3)
    )
    yield BenchCase(
        "addmm", "4096³", lambda make: Sample((make(4096), make(4096, 4096), make(4096, 4096)), flops=2.0 * 4096**3)
    )
    yield BenchCase(
        "linear", "8192x4096 -> 14336",
        lambda make: Sample((make(8192, 4096), make(14336, 4096)), flops=2.0 * 8192 * 4096 * 14336),
    )  # fmt: skip
    for b, hq, hk, s, d, causal in (
        (4, 32, 32, 4096, 128, True),
        (2, 32, 8, 8192, 128, True),
        (16, 16, 16, 1024, 64, False),
    ):
        label = f"b{b} h{hq}/{hk} s{s} d{d}{' causal' if causal else ''}"
        yield BenchCase("scaled_dot_product_attention", label, _attention(b, hq, hk, s, d, causal))
    yield BenchCase(
        "scaled_dot_product_attention",
        "b4 h32/32 s4096 d128 causal backward",
        _attention(4, 32, 32, 4096, 128, True),
        backward=True,
    )
