"""Calls of operators on an accelerator, for the tests there: forward and backward, compared, repeated."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gemskit
from gemskit._op import REGISTRY, Op
from gemskit.testing import Make, Sample, load

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator of torch.cuda")
#: Calls after which nothing is new.
WARM = 5
#: Modules whose sums are in no fixed order, and whose writes to one place keep any, where torch is not told otherwise.
UNORDERED = (
    "gemskit.reduce.scattering", "gemskit.pointwise.indexing", "gemskit.nn.embedding", "gemskit.nn.attention",
    "gemskit.nn.flash", "gemskit.nn.flexible",
)  # fmt: skip
#: One of so many operators is called: elementwise ones share one driver, others have more of their own.
EVERY = {True: 16, False: 4}


# -- which operators ---------------------------------------------------------------------------------------------------------


def drawn(name: str, walk: str) -> bool:
    """Whether a test that walks the registry visits the operator; ``GEMSKIT_TESTS=full`` visits all that it can.

    Those whose results have a size that the data decide wait for the device; tests/test_device_operators.py has them.
    """
    family = REGISTRY[name].family
    if family == "sized":
        return False
    every = EVERY[family == "pointwise"]
    return os.environ.get("GEMSKIT_TESTS") == "full" or zlib.crc32(f"{name} {walk}".encode()) % every == 0


#: What the walks call, so that it can be compiled at once.
CALLED: set[str] = set()


def each_way(walk: str) -> Callable[[Any], Any]:
    """Parametrize by the operators of a walk, forward and backward."""
    names = [name for name in REGISTRY if drawn(name, walk)]
    CALLED.update(names)
    # A random operator's gradient is zero, or that of its formula with a mask, which the tests of random operators see to.
    ways = [(n, False) for n in names]
    ways += [(n, True) for n in names if REGISTRY[n].differentiable and not REGISTRY[n].random]
    return pytest.mark.parametrize(("name", "backward"), ways, ids=[n + "-backward" * b for n, b in ways])


@pytest.fixture(scope="session")
def warmed() -> Iterator[None]:
    """Compile what the walks call with all CPUs, which compiling test by test would leave idle."""
    if torch.cuda.is_available():
        samples = {name: sample_of(name) for name in sorted(CALLED)}
        done = gemskit.warmup([(REGISTRY[name], s.args, s.kwargs) for name, s in samples.items()])
        print(f"\n{done}")
    # All of torch's objects are there for good; to look through them takes a third of a second, and tests collect often.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -- calls ---------------------------------------------------------------------------------------------------------------


def tensors(sample: Sample) -> list[Tensor]:
    return [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, Tensor)]


def sample_of(name: str, device: str = "cuda", seed: int = 0) -> Sample:
    """The largest sample that is no long row; contiguous, so that other values can be copied into it."""
    found = [s for s in load()[name](Make(torch.float32, device=device, seed=seed)) if s.note not in ("big", "long")]
    plain = [s for s in found if all(t.is_contiguous() for t in tensors(s))]
    chosen = max(plain, key=lambda s: max(t.numel() for t in tensors(s)))
    for t in tensors(chosen) if name == "pow" else ():
        t.abs_()  # a power of a negative number is NaN
    return chosen


def forward(op: Callable[..., Any], sample: Sample) -> list[Tensor]:
    found = op(*sample.args, **sample.kwargs)
    return list(found) if isinstance(found, tuple) else [found]


def leaves_of(op: Op[..., Any], sample: Sample) -> list[Tensor]:
    """The inputs with a gradient, which require it from now on."""
    named = {**dict(zip(op.params, sample.args)), **sample.kwargs}
    found = [v for n, v in named.items() if n in op.differentiable and isinstance(v, Tensor) and v.is_floating_point()]
    return [t.requires_grad_() for t in found]


def gradients(op: Op[..., Any], sample: Sample, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a weighting of the outputs that is the same at every call."""
    outs = [o for o in forward(op, sample) if o.requires_grad]
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outs]
    return [g for g in torch.autograd.grad(outs, leaves, weights, allow_unused=True) if g is not None]


@contextlib.contextmanager
def in_order(name: str) -> Iterator[None]:
    """Torch told to be deterministic, for operators that are not otherwise."""
    torch.use_deterministic_algorithms(REGISTRY[name].__module__ in UNORDERED, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def step(name: str, backward: bool, sample: Sample) -> Callable[[], list[Tensor]]:
    """The call: results without gradients, or forward and backward to the gradients."""
    op = REGISTRY[name]
    leaves = leaves_of(op, sample) if backward else []

    def call() -> list[Tensor]:
        with in_order(name):
            return gradients(op, sample, leaves) if backward else forward(op, sample)

    return call


def same(got: Sequence[Tensor], want: Sequence[Tensor], off: float = 0.0) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=off, atol=off, equal_nan=True)


close = functools.partial(same, off=2e-3)


def change(sample: Sample, other: Sample) -> None:
    """Give ``sample`` the values of ``other``, in place."""
    with torch.no_grad():
        for old, new in zip(tensors(sample), tensors(other), strict=True):
            old.copy_(new)


def repeat(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The last result of several, all enqueued and done."""
    found = [call() for _ in range(WARM)][-1]
    torch.cuda.synchronize()
    return found
