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
from torch.nn.attention import SDPBackend

from gemskit.testing import Make, Sample

Build = Callable[[Make], Sample]


@dataclass(frozen=True)
class Way:
    """One of several ways in which torch computes a call."""

    name: str
    call: Callable[..., Any]
    #: Attention may only use this.
    backend: SDPBackend | None = None


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
    #: Only the first of several results is compared and differentiated: peers have no other.
    first: bool = False
    #: Whether torch.compile has a column: it calls the same library for products, and for attention what ``ways`` has.
    compiled: bool = True
    #: The fastest of these stands for torch eager, and the row says which.
    ways: tuple[Way, ...] = ()
    #: Backward and the forward before it are one measurement: one may compute ahead what the other needs.
    whole: bool = False
    #: The part of every argument, result and gradient that is verified, where float64 has no room or time for all.
    cut: Callable[[Tensor], Tensor] | None = None
    #: The meaning in less memory, for verification.
    exact: Callable[..., Any] | None = None


def call(*shapes: tuple[int, ...], **kwargs: Any) -> Build:
    """Tensors of these shapes, and arguments by name."""
    return lambda make: Sample(tuple(make(*s) for s in shapes), kwargs)


BIG = 8192
ELEMENTS = 1 << 26


def cases() -> Iterator[BenchCase]:
    """All rows, operator by operator."""
    # They import this module for what a row is.
    from gemskit import _bench_attention, _bench_elementwise, _bench_products, _bench_reduce, _bench_rows

    # What takes longest to compile comes first.
    for module in (_bench_attention, _bench_products, _bench_rows, _bench_reduce, _bench_elementwise):
        yield from module.cases()
