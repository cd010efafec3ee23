"""Samples of every operator: what the tests, ``python -m gemskit check`` and ``bench`` call it with.

``@samples("name")`` registers a generator of :class:`Sample`; operators without one get their family's. Tensors come from
``make``, which lays them out and gives them the dtype under test, so one sample serves every dtype and layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call: ``op(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: What is special about it, for the test's name. ``"big"`` marks sizes for benchmarks and compile tests only.
    note: str = ""
    #: Floating-point operations, where they and not the bytes are the floor (products, attention).
    flops: float = 0.0
    #: Bytes read, where that is not all of every tensor (a gather).
    read: int = 0


@dataclass
class Make:
    """Makes the tensors of a sample: values from a fixed seed, in the dtype and memory layout under test."""

    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    special: bool = False
    seed: int = 0
    device: str = "cpu"
    #: Leave the values out (compile tests only look at layouts).
    empty: bool = False
    #: Draw the values on the device (benchmarks); otherwise every device gets the same ones.
    fast: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device if self.fast else "cpu").manual_seed(self.seed)
        self.made = 0

    def __call__(
        self, *shape: int, dtype: torch.dtype | None = None, low: float | None = None, high: float | None = None
    ) -> Tensor:
        """A tensor of ``shape``: normal values, or uniform in [low, high); ints in [low, high) too."""
        dtype = dtype or self.dtype
        self.made += 1
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if math.prod(shape) > LARGEST and not self.fast:
            return torch.empty((), dtype=dtype).expand(shape)
        values = self._values(shape, dtype, low, high)
        if self.special and dtype.is_floating_point and low is None and values.numel() > 4:
            flat = values.view(-1)
            marks = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
            flat[: len(marks)] = marks
            flat[-1] = float("nan")
        # "mixed" gives every tensor of a call another layout.
        layout = LAYOUTS[self.made % 4] if self.layout == "mixed" else self.layout
        return lay_out(values.to(self.device), layout)

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype, low: float | None, high: float | None) -> Tensor:
        if self.fast and dtype.is_floating_point and low is None and high is None:
            return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device).to(dtype)
        if dtype == torch.bool:
            return torch.rand(shape, generator=self.generator, device=self.generator.device) > 0.5
        if dtype.is_complex:
            return torch.complex(*(self._values(shape, torch.float64, low, high) for _ in range(2))).to(dtype)
        if not dtype.is_floating_point:
            least = 0 if dtype == torch.uint8 else -9
            first, last = int(least if low is None else low), int(10 if high is None else high)
            return torch.randint(first, last, shape, generator=self.generator, device=self.generator.device).to(dtype)
        if low is None and high is None:
            return torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.generator.device).to(
                dtype
            )
        lo, hi = (0.0 if low is None else low), (1.0 if high is None else high)
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.generator.device)
        return (uniform * (hi - lo) + lo).to(dtype)


#: Larger tensors belong to samples that only compile tests use; they get no memory.
LARGEST = 1 << 21

LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "mixed")


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another memory layout."""
    if layout == "contiguous" or t.ndim == 0:
        return t.contiguous()
    if layout == "transposed":
        return t.mT.contiguous().mT if t.ndim > 1 else lay_out(t, "strided")
    if layout == "sliced":
        # Off by one element, so that nothing is aligned to 16 bytes.
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    if layout == "strided":
        wide = torch.zeros((*t.shape[:-1], t.shape[-1] * 2), dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]
    assert layout == "expanded", layout
    return t[:1].expand(t.shape)


SAMPLES: dict[str, Callable[[Make], Iterator[Sample]]] = {}


def samples(*names: str) -> Callable[[Callable[[Make], Iterator[Sample]]], Callable[[Make], Iterator[Sample]]]:
    """Register the samples of the operators called ``names``."""

    def register(fn: Callable[[Make], Iterator[Sample]]) -> Callable[[Make], Iterator[Sample]]:
        for name in names:
            SAMPLES[name] = fn
        return fn

    return register


def load() -> dict[str, Callable[[Make], Iterator[Sample]]]:
    """The samples of gemskit's own operators, by name."""
    from gemskit import (  # noqa: F401
        _samples_attention,
        _samples_binary,
        _samples_blas,
        _samples_creation,
        _samples_epilogues,
        _samples_grouped,
        _samples_index,
        _samples_movement,
        _samples_nn,
        _samples_pointwise,
        _samples_products,
        _samples_reduce,
        _samples_reduce_more,
        _samples_rows,
        _samples_select,
        _samples_sort,
        _samples_unary,
    )

    return SAMPLES
