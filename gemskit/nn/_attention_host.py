"""Launching the attention kernels: what a call is (`Problem`), block sizes, splits, block lists, gradients.

Which kernel serves a problem is chosen in `run` and `run_backward`, by the numbers of the launch table and nothing else.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemskit import _layout
from gemskit._driver import dot_precision
from gemskit._following import launch_next
from gemskit._launch import launch
from gemskit.errors import NoKernel
from gemskit.nn._attention import attention_forward, attention_merge
from gemskit.nn._attention_grads import (
    attention_delta,
    attention_grad_key_value,
    attention_grad_mask,
    attention_grad_query,
)
from gemskit.nn._attention_lists import attention_list

_SPLIT = 128  # above this head size the accumulators of both gradients together spill registers: two launches then
FEW = 16  # query rows of a sequence up to which a call is a decoding step


def blocks(head_size: int, config: Mapping[str, int], *, itemsize: int = 2, kernel: str = "forward") -> dict[str, int]:
    """Block sizes of one kernel, as the keyword arguments of its launch.

    ``config`` is the launch table's row: rows ``m`` of a query block and columns ``n`` of a key block in the forward at
    head size 64, ``warps``, ``stages``, and optionally ``wide``, the warps of the backward above head size 128
    (default ``warps``). ``kernel`` is "forward", "few" (rows), "key_value" or "query". Wider heads and 4 or 8 byte
    elements take smaller blocks, so that accumulators stay in registers and tiles in shared memory.
    """
    wide = max(16, _layout.next_power_of_2(head_size))
    m, n, warps, stages = config["m"], config["n"], config["warps"], config["stages"]
    if kernel == "few" and wide > 256:  # one key is a row of 576 numbers, whose first 512 are the value
        return {"M": 16, "N": 32 if itemsize <= 2 else 16, "num_warps": 8, "num_stages": 1}
    if itemsize > 2:  # no matrix unit takes these at full precision: operands live in registers
        side = max(16, min(32, 4096 // (wide * itemsize)))
        return {"M": min(m, side), "N": min(n, side), "num_warps": 4, "num_stages": 1}
    if kernel in ("forward", "few"):
        return {
            "M": min(m, max(16, 16384 // wide)),
            "N": n if wide <= 128 else min(n, 32),
            "num_warps": warps,
            "num_stages": stages,
        }
    fewer = max(1, stages - 1)
    if wide > 128:
        warps = config["wide"]
    if kernel == "query":
        rows = min(m, max(16, 16384 // wide))
        return {
            "M": rows,
            "N": min(n, 524288 // (rows * wide)),
            "num_warps": warps,
            "num_stages": stages if stages > 2 and wide <= 64 else fewer,
        }
    if wide <= 128:
        return {"M": min(n, 32), "N": 64, "num_warps": warps, "num_stages": fewer}
    return {"M": min(n, 4 * warps), "N": 8 * warps, "num_warps": warps, "num_stages": fewer}


@dataclass(frozen=True)
class Mods:
    """Functions of the user's, as jit functions of ``(.., aux)``, and the tensors and numbers that they read."""

    score: Any = None
    slope: Any = None
    visible: Any = None
    aux: tuple[Any, ...] = ()
    #: Whether ``visible`` answers alike for all batches and heads.
    shared: bool = False


@dataclass
class Problem:
    """One call of the kernels. All tensors have the axes (batch, heads, rows, columns), with any strides.

    Packed sequences have a batch of 1 and the bounds ``bounds_q`` and ``bounds_k`` (sequences + 1); ``used`` is the number of
    keys of each. With a ``table`` (sequences, pages) the batch of ``key`` and ``value`` is that of pages, and their rows are
    those of a page. ``length`` and ``size`` are the most rows and keys of a sequence.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    batch: int
    length: int
    size: int
    scale: float | None = None
    mask: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    left: int | None = None
    right: int | None = None
    bottom: bool = False
    cap: float = 0.0
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    bounds_q: Tensor | None = None
    bounds_k: Tensor | None = None
    used: Tensor | None = None
    table: Tensor | None = None
    #: Of query, key and value, by (batch, key head).
    descale: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    #: A key's columns lie in groups of so many, this stride apart (0: they do not).
    split: tuple[int, int] = (0, 0)
    mods: Mods = field(default_factory=Mods)
    name: str = "scaled_dot_product_attention"
    #: Whether gradients are to be the same in every run, whatever torch's setting is.
    deterministic: bool = False

    def __post_init__(self) -> None:
        head, width = self.query.shape[-1], self.value.shape[-1]
        self.heads, self.owners = self.query.shape[1], self.key.shape[1]
        if self.owners != self.value.shape[1] or self.owners == 0 or self.heads % self.owners:
            raise NoKernel(
                f"{self.name}: {self.heads} query, {self.owners} key and {self.value.shape[1]} value heads "
                "given; key and value need the same number (or one of them 1), which divides query's"
            )
        self.group = self.heads // self.owners
        self.type = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        factor = float(self.scale) if self.scale is not None else 1 / math.sqrt(head or 1)
        (short,) = struct.unpack("f", struct.pack("f", factor))
        stays = 1 / (1 - self.dropout) if self.dropout < 1 else 0.0
        #: scale, scale_low, dropout, kept_scale
        self.numbers = (short, factor - short, self.dropout if self.dropout else None, stays)
        wide, wide_value = (max(16, _layout.next_power_of_2(n)) for n in (head, width))
        if head != wide and width != wide_value:
            # Triton 3.6 miscompiles tiles of 64 x 64 that are padded to two widths (sm_90, E 33, Ev 20: off by 1.4).
            wide = wide_value = max(wide, wide_value)
        self.width = max(wide, wide_value)
        if self.width > (1024 if self.table is not None else 256):
            raise NoKernel(
                f"{self.name}: head sizes {head} and {width} given, up to 256 accepted, and 1024 with pages of keys"
            )
        self.shape: dict[str, Any] = {
            "HEAD": head,
            "E": wide,
            "VALUE": width,
            "EV": wide_value,
            "SIDES": (self.right is not None) + 2 * (self.left is not None),
            "BOTTOM": self.bottom,
            "PRECISION": dot_precision(self.query.dtype),
        }
        self.kind = 0 if self.mask is None else 1 if self.mask.dtype == torch.bool else 2
        self.modified = {"SCORE": self.mods.score, "VISIBLE": self.mods.visible}

    @property
    def empty(self) -> bool:
        """Whether no score is computed."""
        return 0 in (self.batch, self.heads, self.length, self.size, self.value.shape[-1])

    def wide(self, *tensors: Tensor) -> bool:
        """Whether a tile of 256 rows and columns of any of these reaches past 2^31 elements."""
        every = (self.query, self.key, self.value, *tensors)
        return any(256 * (t.stride(-2) + t.stride(-1)) >= 2**31 for t in every)

    @property
    def sides(self) -> tuple[int, int]:
        """The window: how many columns left and right of the diagonal a row sees."""
        return (self.left or 0, self.right or 0)

    @property
    def cap_or_none(self) -> float | None:
        return float(self.cap) if self.cap else None

    def blocks(self, config: Mapping[str, int], kernel: str) -> dict[str, int]:
        """Block sizes for this call."""
        return blocks(self.width, config, itemsize=self.query.element_size(), kernel=kernel)

    def at(self, t: Tensor) -> tuple[int, ...]:
        """Strides of a tensor with the axes of the problem; all packed sequences are in one batch."""
        return t.stride() if self.bounds_q is None else (0, *t.stride()[1:])

    def strides(self, t: Tensor | None, count: int) -> tuple[int, ...]:
        """Strides of an optional tensor."""
        return (0,) * count if t is None else t.stride()

    @property
    def mask_at(self) -> tuple[int, ...]:
        return self.strides(self.mask, 4)

    @property
    def slopes_at(self) -> tuple[int, int]:
        """ALiBi slopes are by head, or by batch and head."""
        if self.slopes is None:
            return (0, 0)
        return (0, self.slopes.stride(0)) if self.slopes.dim() == 1 else (self.slopes.stride(0), self.slopes.stride(1))

    @property
    def steps(self) -> tuple[int, ...]:
        """Strides of what is by sequence or head."""
        return tuple(0 if t is None else t.stride(0) for t in (self.bounds_q, self.bounds_k, self.used, self.sinks))

    @property
    def draws(self) -> int:
        """The width of a row in the numbering of dropout's draws; 0 without dropout, so that kernels do not differ by it."""
        return (self.size + 3) // 4 * 4 if self.seed is not None else 0


def lists(p: Problem, m: int, n: int, *, by_key: bool = False) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """For each tile of M rows the tiles of N columns in which the user's mask leaves anything (or the reverse)."""
    if p.mods.visible is None:
        return None, None, (0, 0, 0)
    down, across = _layout.cdiv(p.length, m), _layout.cdiv(p.size, n)
    if by_key:
        down, across = across, down
    batch, heads = (1, 1) if p.mods.shared else (p.batch, p.heads)
    found = torch.empty((batch, heads, down, across), dtype=torch.int32, device=p.query.device)
    counts = torch.empty((batch, heads, down), dtype=torch.int32, device=p.query.device)
    meta = {"M": m, "N": n, "BY_KEY": by_key, "VISIBLE": p.mods.visible, "SIDES": p.shape["SIDES"], "BOTTOM": p.bottom}
    launch(
        attention_list,
        (down * batch * heads,),
        (found, counts, heads, p.length, p.size, *p.sides, p.mods.aux),
        {**meta, "num_warps": 4},
    )
    return found, counts, (0, 0, across) if p.mods.shared else (heads * down, down, across)


def parts_of(
    rows: int, size: int, planes: int, block: Mapping[str, int], config: Mapping[str, int], whole: int = 0
) -> int:
    """In how many parts keys are read: enough programs for every processor, each with four tiles or in 16 parts at least.

    With blocks of ``whole`` keys one program a processor is enough. H200: 1024 keys in 16 parts 11.4 us, in 4 12.8; 32 x 8192 in
    one part, with such blocks, 136, in two 140.
    """
    programs, processors = max(1, _layout.cdiv(rows, block["M"]) * planes), config["processors"]
    if whole and 10 * programs >= 9 * processors:
        return 1
    tiles = _layout.cdiv(size, block["N"])
    # A few tiles take no longer than the launch that would join them.
    return max(1, min(2 * processors // programs, max(tiles // 4, min(tiles, 16) if tiles >= 8 else 1), 72))


def few_rows(block: dict[str, int], rows: int) -> dict[str, int]:
    """Blocks for a few query rows: no more rows than there are."""
    return {**block, "M": min(block["M"], max(16, _layout.next_power_of_2(rows)))}


def run(p: Problem, out: Tensor, lse: Tensor, config: Mapping[str, int], *, parts: int = 0) -> None:
    """Write the result into ``out``, (batch, heads, rows, columns), and ``lse``, (batch, heads, rows) of `Problem.type`.

    A few query rows (decoding) are too few programs: those of the heads that share a key head then stand in one tile, and
    keys are read in ``parts``, by default as many as make the device busy.
    """
    if config["wgmma"] and p.length > FEW and parts <= 1:
        # Gluon takes 0.1 s to import.
        from gemskit.nn import _attention_hopper

        if _attention_hopper.run(p, out, lse, config):
            return
    if config["wgmma"] and p.length == 1:
        from gemskit.nn import _attention_hopper_few

        if _attention_hopper_few.run(p, out, lse, config, parts):
            return
    block = p.blocks(config, "forward")
    rows, pack = p.length, False
    if p.length <= FEW or parts > 1 or p.width > 256:
        pack = p.group > 1 and p.mask is None and p.mods.visible is None
        rows = p.length * (p.group if pack else 1)
        block = few_rows(p.blocks(config, "few"), rows)
        if not parts:
            planes = p.batch * (p.owners if pack else p.heads)
            alone = _layout.cdiv(rows, block["M"]) * planes <= config["processors"]
            # Longer blocks, where nothing hides that a program waits but what it has asked for.
            long = config["whole"] if p.width <= 128 and p.query.element_size() == 2 else 0
            if alone and p.table is not None and long and p.key.shape[2] % long:
                long = 0  # 32 x 8192 keys in pages of 16: 184 us for 142
            parts = parts_of(rows, p.size, planes, block, config, long) if p.mods.visible is None else 1
            if parts == 1 and long:
                block |= {"N": long, "num_stages": block["num_stages"] - (not alone)}
    split = parts > 1
    to, to_lse, out_at, lse_at = parted(p, out, lse, parts)
    listed, counts, listed_at = lists(p, block["M"], block["N"])
    page, n = 0 if p.table is None else p.key.shape[2], block["N"]
    # A block of keys that lies in one page or fills a few is looked up before it is needed.
    ahead = listed is None and 0 < page and (page % n == 0 or (n % page == 0 and n <= 8 * page))
    keys_at, values_at = (t.stride() if page else p.at(t) for t in (p.key, p.value))
    planes = p.batch * (p.owners if pack else p.heads)
    launch(
        attention_forward,
        (_layout.cdiv(rows, block["M"]) * planes * (parts if split else 1),),
        (
            p.query, p.key, p.value, p.mask, to, to_lse, p.seed,
            p.bounds_q, p.bounds_k, p.used, p.table, p.sinks, p.slopes, *p.descale, listed, counts, p.mods.aux,
            p.at(p.query), (*keys_at, p.split[1]), values_at, p.mask_at,
            out_at, lse_at, p.strides(p.table, 2), p.slopes_at, sum((p.strides(t, 2) for t in p.descale), ()), listed_at, p.steps,
            p.heads, p.group, p.length, p.size, parts if split else None, *p.sides, p.draws,
            *p.numbers, p.cap_or_none,
        ),
        {
            **p.shape, **p.modified, "MASK": p.kind, "PACK": pack, "PAGE": page, "AHEAD": ahead, "SPLIT": p.split[0],
            "WIDE": p.wide(out), **block,
        },
    )  # fmt: skip
    if split:
        merge(to, to_lse, out, lse)


def parted(p: Problem, out: Tensor, lse: Tensor, parts: int) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """Where programs that have one of so many parts of the keys write to, and the strides, that from part to part last."""
    if parts <= 1:
        return out, lse, (*p.at(out), 0), (*p.at(lse), 0)
    to, to_lse = (torch.empty((parts, *t.shape), dtype=p.type, device=t.device) for t in (out, lse))
    return to, to_lse, (*p.at(to[0]), to.stride(0)), (*p.at(to_lse[0]), to_lse.stride(0))


def merge(parts: Tensor, parts_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write what the parts (S, batch, heads, rows, columns), with dense columns, are together."""
    count, batch, heads, length, width = parts.shape
    if 0 in (batch, heads, length, width):
        return
    launch_next(
        attention_merge,
        (batch * heads * length,),
        (
            parts, parts_lse, out, lse, parts.stride()[1:], parts_lse.stride()[1:], out.stride(),
            heads, length, parts.stride(0), parts_lse.stride(0),
        ),
        {
            "SPLITS": count, "S": _layout.next_power_of_2(count), "VALUE": width,
            "EV": _layout.next_power_of_2(width), "num_warps": 4,
        },
    )  # fmt: skip


def run_backward(
    p: Problem,
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    config: Mapping[str, int],
    *,
    to_query: Tensor | None,
    to_key: Tensor | None,
    to_value: Tensor | None,
    to_mask: Tensor | None = None,
) -> Tensor:
    """Write the gradients that are not None, each (batch, heads, rows, columns) with any strides; returns delta (as lse).

    With ``sinks`` delta is what their gradient needs; without, it may be empty.

    ``to_mask`` is that of an added mask, with size 1 where it broadcasts.
    """
    if config["wgmma"] and to_mask is None:
        from gemskit.nn import _attention_hopper_grads

        if _attention_hopper_grads.run(p, grad, grad_lse, out, lse, config, to_query, to_key, to_value):
            return torch.empty(0, device=grad.device)
    delta = torch.empty_like(lse)
    wide = p.wide(grad, out)
    launch(
        attention_delta,
        (_layout.cdiv(p.length, 32) * p.batch * p.heads,),
        (
            out, grad, grad_lse, delta, p.bounds_q, p.at(out), p.at(grad), p.at(lse),
            (0, 0, 0) if grad_lse is None else p.at(grad_lse), p.steps,
            p.heads, p.length,
        ),
        {"VALUE": p.shape["VALUE"], "EV": p.shape["EV"], "M": 32, "WIDE": wide, "num_warps": 4},
    )  # fmt: skip
    tensors = (p.query, p.key, p.value, p.mask, grad, lse, delta, p.seed)
    strides = (p.at(p.query), p.at(p.key), p.at(p.value), p.mask_at, p.at(grad), p.at(lse))
    sequences = (p.bounds_q, p.bounds_k, p.used, p.slopes)
    sizes = (p.heads, p.group, p.length, p.size, *p.sides, p.draws, *p.numbers)
    meta = {**p.shape, **p.modified, "MASK": p.kind, "WIDE": wide, "SLOPE": p.mods.slope}
    if to_key is not None or to_value is not None:
        block, both = p.blocks(config, "key_value"), [(to_key is not None, to_value is not None)]
        if p.width > _SPLIT and both == [(True, True)]:
            both = [(True, False), (False, True)]
        keys = to_key if to_key is not None else p.key
        values = to_value if to_value is not None else p.value
        listed, counts, listed_at = lists(p, block["M"], block["N"], by_key=True)
        for with_key, with_value in both:
            launch(
                attention_grad_key_value,
                (_layout.cdiv(p.size, block["N"]) * p.batch * p.owners,),
                (
                    *tensors, *sequences, listed, counts, p.mods.aux, keys, values,
                    *strides, p.slopes_at, listed_at, p.steps, p.at(keys), p.at(values), *sizes, p.cap_or_none,
                ),
                {**meta, **block, "KEY_GRAD": with_key, "VALUE_GRAD": with_value},
            )  # fmt: skip
    if to_query is not None:
        block = p.blocks(config, "query")
        listed, counts, listed_at = lists(p, block["M"], block["N"])
        launch(
            attention_grad_query,
            (_layout.cdiv(p.length, block["M"]) * p.batch * p.heads,),
            (
                *tensors, *sequences, listed, counts, p.mods.aux, to_query,
                *strides, p.slopes_at, listed_at, p.steps, p.at(to_query), *sizes, p.cap_or_none,
            ),
            {**meta, **block},
        )  # fmt: skip
    if to_mask is not None:
        _mask_gradient(
            p, to_mask, tensors, strides, sizes, {**p.blocks(config, "query"), "num_stages": 1, "WIDE": wide}
        )
    return delta


def _mask_gradient(
    p: Problem,
    to_mask: Tensor,
    tensors: tuple[Any, ...],
    strides: tuple[Any, ...],
    sizes: tuple[Any, ...],
    block: dict[str, Any],
) -> None:
    counts = (p.batch, p.heads, _layout.cdiv(p.length, block["M"]), _layout.cdiv(p.size, block["N"]))
    single = [n == 1 for n in to_mask.shape]
    launch(
        attention_grad_mask,
        (math.prod(1 if one else n for one, n in zip(single, counts, strict=True)),),
        (*tensors, to_mask, *strides, to_mask.stride(), p.batch, *sizes),
        {**p.shape, **dict(zip(("ONE_BATCH", "ONE_HEAD", "ONE_ROW", "ONE_COL"), single, strict=True)), **block},
    )
