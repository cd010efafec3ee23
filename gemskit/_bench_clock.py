"""The time of a call that finds nothing in the cache but what a call like it leaves behind.

Before each call a buffer is read that fills the cache several times, and then as many bytes are written as the call writes.
`do_bench` of Triton writes its buffer instead. A call that writes little then also pays for writing back what that left, of which
it has nothing: on an H200 (50 MB of L2) a product of 16 x 4096 x 14336 takes 41 us behind written lines and 34 behind read ones,
and cuBLAS's 43 and 34. A call that writes much pays for its own lines only in the next one, and so must find as many.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemskit import backends

#: Bytes that are read: ten times an H200's L2, in 0.12 ms.
FILL = 1 << 29


@functools.cache
def _filler() -> Tensor:
    return torch.ones(FILL // 4, dtype=torch.int32, device=backends.device)


def milliseconds(fn: Callable[[], Any], written: int, warm: float = 30.0, timed: float = 100.0) -> float:
    """The median time of ``fn``, which writes so many bytes.

    Calls are made for ``warm`` milliseconds, and timed for ``timed``, with the filling of the cache in both.
    """
    device = torch.get_device_module(backends.device)
    filler = _filler()
    left = filler[: min(FILL, written) // 4]

    def run(count: int, fills: int = 1) -> tuple[list[float], float]:
        """Of each call, and of the host for all."""
        events = [[device.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        before = time.perf_counter()
        for start, end in events:
            for _ in range(fills):
                torch.amax(filler, 0)
            left.fill_(1)
            start.record()
            fn()
            end.record()
        host = time.perf_counter() - before
        device.synchronize()
        return [start.elapsed_time(end) for start, end in events], host * 1e3

    fn()
    device.synchronize()
    begin, end = (device.Event(enable_timing=True) for _ in range(2))
    begin.record()
    _, host = run(5)
    end.record()
    device.synchronize()
    each = begin.elapsed_time(end) / 5
    # A host that needs more than half of the time to launch a call gets more: the device is not to wait for it.
    fills = max(1, math.ceil(2 * host / 5 / each))
    run(max(1, int(warm / each)), fills)
    return statistics.median(run(max(1, int(timed / each)), fills)[0])
