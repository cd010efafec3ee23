"""Kernels that remember how to launch themselves.

A plan (collapsed strides, tile sizes, the filled driver) takes about 0.2 ms of host time and depends on layouts only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit import backends

#: Distinct layouts that a kernel or an operator remembers; when full it forgets all, which costs new plans, no compilation.
PLANS = 2048


class Planned:
    """``plan(named, outs, *how)`` gives the launch for a layout; calling the kernel plans once per layout and runs."""

    #: What the kernel reads of the arguments by name.
    names: tuple[str, ...]
    plan: Callable[..., Callable[[Sequence[Tensor], Mapping[str, Any]], None]]

    def __init__(self) -> None:
        self._plans: dict[Any, Callable[[Sequence[Tensor], Mapping[str, Any]], None]] = {}

    def __call__(self, named: Mapping[str, Any], outs: Sequence[Tensor], *how: Any) -> None:
        """Run on ``named`` into ``outs``; ``how`` is hashable."""
        key = (
            backends.arch().name, named.get("dim"), how, *[layout(o) for o in outs],
            *[_key(named.get(n)) for n in self.names],
        )  # fmt: skip
        run = self._plans.get(key)
        if run is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            run = self._plans[key] = self.plan(named, outs, *how)
        run(outs, named)


def layout(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """What a plan depends on."""
    return t.shape, t.stride(), t.dtype


def _key(v: Any) -> Any:
    if isinstance(v, Tensor):
        return layout(v)
    # Numbers are passed at run time; strings, bools and None are part of the code.
    return type(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v
