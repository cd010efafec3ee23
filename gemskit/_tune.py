"""``python -m gemskit tune``: time every choice that the rule for products considers, and keep those that beat its own.

A shape is MxNxK, or BxMxNxK for batches; the second factor lies as a weight does, (N, K). What is kept goes to the user's table,
``tuned.json`` in the cache directory, which products of these sizes obey from the next process on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemskit import _driver, backends
from gemskit._bench_clock import milliseconds
from gemskit._op import REGISTRY
from gemskit._replay import Replay, trace
from gemskit._report import replace
from gemskit.blas import _rule
from gemskit.blas._rule import Choice
from gemskit.errors import ArgumentError, DeviceError

#: What a choice must win over the rule's, and how often each is timed, in turns: clocks and neighbours drift by a few percent.
GAIN, ROUNDS = 1.02, 3

Timed = list[tuple[Choice, float]]


def shape(text: str) -> tuple[int, int, int, int]:
    """Batches, M, N, K."""
    try:
        sizes = tuple(int(n) for n in text.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ArgumentError(f"tune: {text!r} is no shape MxNxK or BxMxNxK")
    return (1, *sizes) if len(sizes) == 3 else sizes  # type: ignore[return-value]


def _close(got: Tensor, want: Tensor) -> bool:
    """Within the rounding of the result, and of sums in float32."""
    error = (got.double() - want).abs().max().item()
    return error <= 2 * torch.finfo(got.dtype).eps * want.abs().max().item()


def time_shape(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device,
    timer: Callable[..., float] = milliseconds,
) -> Timed:  # fmt: skip
    """Every choice that launches, with its time in ms: the rule's first. One whose result is wrong raises."""
    config = backends.arch(device if device.type != "cpu" else None).config("gemm")
    if not config["wgmma"]:
        raise DeviceError(f"tune: {backends.arch().name} has one tile for all products; there is nothing to choose")
    batches, M, N, K = sizes
    a = torch.randn(batches, M, K, device=device, dtype=dtype)
    b = torch.randn(batches, N, K, device=device, dtype=dtype).mT
    want = a.double() @ b.double()
    product: Any = REGISTRY["bmm"]._product  # type: ignore[attr-defined]
    rule = _rule.best(M, N, K, batches, config["processors"])
    runs: list[tuple[Choice, Callable[[], Any]]] = []
    for choice in (rule, *(c for c in _rule.choices(M, N, K, batches, config["processors"]) if c != rule)):
        launches = product.with_choice(a, b, a.new_empty(batches, M, N), choice)
        if launches is not None:
            run = _call(launches, a, b)
            if not _close(run(), want):
                raise ArithmeticError(f"tune: {choice} gives a wrong product")
            runs.append((choice, run))
    written = batches * M * N * dtype.itemsize
    times = [[timer(run, written, warm=6.0, timed=25.0) for _, run in runs] for _ in range(ROUNDS)]
    return [(choice, statistics.median(t)) for (choice, _), t in zip(runs, zip(*times))]


def _call(launches: Callable[..., None], a: Tensor, b: Tensor) -> Callable[[], Any]:
    """The product by these launches, as cheap to call as the operator: small ones would else take as long as the host does."""

    def fn(a: Tensor, b: Tensor) -> list[Tensor]:
        out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=a.device)
        launches(out, a, b)
        return [out]

    if _driver.entry() is None:
        return lambda: fn(a, b)[0]
    fn(a, b)  # compiles
    replay = Replay(trace(fn, (a, b), (0, 0)), (a, b), a.device)
    return lambda: replay((a, b))[0]


def improvements(timed: Timed) -> Choice | None:
    """The fastest, where it beats the rule's, which is the first."""
    choice, best = min(timed, key=lambda pair: pair[1])
    return choice if best * GAIN < timed[0][1] else None


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m gemskit tune", description=__doc__)
    parser.add_argument("shapes", nargs="+", metavar="MxNxK", type=shape)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--dry-run", action="store_true", help="print what was found and keep nothing")
    parser.add_argument("--table", type=Path, default=_rule.user_table(), help="the table to add to (%(default)s)")
    options = parser.parse_args(argv)
    if backends.vendor.device_type == "cpu":
        raise DeviceError("tune: there is no accelerator here")
    device = torch.device(backends.vendor.device_type, torch.accelerator.current_device_index())
    found = {}
    for sizes in options.shapes:
        timed = time_shape(sizes, getattr(torch, options.dtype), device)
        better = improvements(timed)
        for line in _lines(sizes, timed, better):
            print(line, flush=True)
        if better is not None:
            found[_rule.name_of(*sizes)] = list(_rule.pick_of(better))
    if found and not options.dry_run:
        keep(options.table, backends.arch(device).name, found)
        print(f"{len(found)} of {len(options.shapes)} kept in {options.table}")
    return 0


def _lines(sizes: tuple[int, int, int, int], timed: Timed, better: Choice | None) -> Iterator[str]:
    flops = 2 * math.prod(sizes)
    yield f"{_rule.name_of(*sizes)}  {len(timed)} choices"
    for choice, ms in sorted(timed, key=lambda pair: pair[1])[:5]:
        mark = "kept" if choice is better else "rule" if choice is timed[0][0] else ""
        split = f"{choice.split} tiles in {choice.pieces}" if choice.split else "whole"
        turned = "transposed" if choice.transposed else ""
        yield (
            f"  {choice.BM:3} x {choice.BN:3} {split:16} {turned:10} {ms * 1e3:9.1f} us {flops / ms / 1e9:6.0f} TFLOP/s  "
            f"estimated {choice.time:9.1f} us  {mark}"
        ).rstrip()


def keep(path: Path, arch: str, found: dict[str, list[Any]]) -> None:
    """Add to a table of tuned products."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(arch, {}).update(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
    _rule.tuned.cache_clear()
