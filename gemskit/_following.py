"""Launches that are set up while the one before them ends (programmatic dependent launch, sm_90 on).

A launch that reads what the one before it wrote begins 3 us after that one's end. Set up before, it waits on the device: H200,
sums of 8192² bf16 in two launches 50.1 us, so 48.4; to let it begin while the first one still computes gains nothing more.
"""

from __future__ import annotations

import importlib
from typing import Any

import triton.language as tl

from gemskit import _interpret, _launch, backends
from gemskit._jit import jit

try:
    _cuda: Any = importlib.import_module("triton.language.extra.cuda")
except ImportError:  # a Triton of another vendor
    _cuda = None
gdc_wait: Any = getattr(_cuda, "gdc_wait", None)


@jit
def previous(FOLLOWS: tl.constexpr) -> None:
    """Wait until all is written that the launch before wrote: what a kernel given to `launch_next` begins with."""
    if FOLLOWS:
        gdc_wait()


def launch_next(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """`launch` after another one of the same call. ``kernel`` takes ``FOLLOWS`` and begins with :func:`previous`."""
    follows = bool(backends.arch().config("launch")["follows"]) and not _interpret.active()
    options = {"launch_pdl": True} if follows else {}
    _launch.launch(kernel, grid, args, {**meta, "FOLLOWS": follows, **options})
