"""Binary search in sorted sequences, and membership."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import fill
from gemskit._dtypes import TRITON, Number, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import operator
from gemskit.errors import DtypeError, ShapeError
from gemskit.reduce._compact import flat
from gemskit.reduce._search_shared import search_shared
from gemskit.reduce._sort import sort_into


@jit
def _wanted(
    values, number, sizes, value_strides, count,
    VIA: tl.constexpr, COMPUTE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The places of a program's block, which of them are there, and what is looked for: elements, or a number."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * B + tl.arange(0, B)
    live = i < count
    if values is None:
        x = tl.full((B,), number, COMPUTE)
    else:
        x = tl.load(values + offset(i, sizes, value_strides), live).to(VIA).to(COMPUTE)
    return i, live, x


@jit
def _search(
    out, values, number, seq, sorter, sizes, out_strides, value_strides, seq_rows, sorter_rows, seq_col, sorter_col,
    count, length, steps,
    VIA: tl.constexpr, COMPUTE: tl.constexpr, RIGHT: tl.constexpr, EQUAL: tl.constexpr, INVERT: tl.constexpr,
    B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i, live, x = _wanted(values, number, sizes, value_strides, count, VIA, COMPUTE, B, WIDE)
    row = seq + offset(i, sizes, seq_rows)
    low = i * 0
    high = low + length
    for _ in range(steps):
        # Halfway without an overflow; where the search is over, nothing is read.
        mid = low + (high - low) // 2
        open = live & (low < high)
        at = mid
        if sorter is not None:
            at = tl.load(sorter + offset(i, sizes, sorter_rows) + mid * sorter_col, open, other=0)
        y = tl.load(row + at * seq_col, open).to(VIA).to(COMPUTE)
        # A NaN is neither at least nor above anything: NaNs are looked for at the end.
        if RIGHT:
            above = y > x
        else:
            above = y >= x
        if EQUAL:
            # What is looked for may be before NaNs; torch's search, which has to be followed otherwise, does not see it there.
            above = above | (y != y)
        low = tl.where(open & (above == 0), mid + 1, low)
        high = tl.where(open & above, mid, high)
    where = out + offset(i, sizes, out_strides)
    if EQUAL:
        y = tl.load(row + low * seq_col, live & (low < length)).to(VIA).to(COMPUTE)
        found = (low < length) & (y == x)
        if INVERT:
            found = found == 0
        tl.store(where, found, live)
    else:
        tl.store(where, low.to(out.dtype.element_ty), live)


@jit
def _member(
    out, values, number, tests, sizes, out_strides, value_strides, test_sizes, test_strides, count, length,
    VIA: tl.constexpr, COMPUTE: tl.constexpr, INVERT: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i, live, x = _wanted(values, number, sizes, value_strides, count, VIA, COMPUTE, B, WIDE)
    found = i < 0
    if tests is None:
        found = x == number.to(COMPUTE)
    else:
        for j in range(length):
            found = found | (x == tl.load(tests + offset(j, test_sizes, test_strides)).to(VIA).to(COMPUTE))
    if INVERT:
        found = found == 0
    tl.store(out + offset(i, sizes, out_strides), found, live)


#: By the type of the number in the place of a tensor.
_NUMBERS = {None: None, float: {"number": "fp64"}, int: {"number": "i64"}}
_SEARCH: dict[Any, Any] = {t: fill(_search, "searchsorted", annotation) for t, annotation in _NUMBERS.items()}
_MEMBER: dict[Any, Any] = {t: fill(_member, "isin", annotation) for t, annotation in _NUMBERS.items()}


def _number(v: Any) -> tuple[type | None, float | int | None]:
    """The key of a kernel for ``v``, and what to pass: None for a tensor."""
    if isinstance(v, Tensor):
        return None, None
    return (float, v) if isinstance(v, float) else (int, int(v))


def _types(a: Any, b: Any) -> tuple[torch.dtype, dict[str, Any]]:
    via = torch.result_type(a, b)
    return via, dict(VIA=TRITON[via], COMPUTE=TRITON[compute_type(via)])


def search(
    out: Tensor, values: Any, seq: Tensor, sorter: Tensor | None = None, right: bool = False, equal: bool = False,
    invert: bool = False,
) -> None:  # fmt: skip
    """Into ``out`` where each of ``values`` would go into the sorted rows ``seq``; with ``equal`` whether it is there."""
    count, length, shape = out.numel(), seq.shape[-1], tuple(out.shape)
    if not count:
        return
    rows = [(*s.stride()[:-1], 0) if s is not None and s.ndim > 1 else (0,) * len(shape) for s in (seq, sorter)]
    mine = tuple(values.stride()) if isinstance(values, Tensor) else (0,) * len(shape)
    sizes, strides = _layout.collapse(shape, [tuple(out.stride()), mine, *rows])
    config = backends.arch().config("pointwise")
    kind, number = _number(values)
    _, types = _types(seq, values)
    wide = _layout.is_wide(shape, [tuple(out.stride()), mine])
    wide = wide or _layout.any_wide(*(s for s in (seq, sorter) if s is not None))
    meta = dict(types, RIGHT=right, EQUAL=equal, INVERT=invert, WIDE=wide)
    pivots = backends.arch().config("search")
    one_row = sorter is None and not any(map(any, strides[2:]))
    if one_row and kind is None and pivots["programs"] and count >= pivots["fewest"]:
        _from_pivots(out, values, seq, sizes, strides, meta, pivots)
        return
    # Four elements a thread, one warp a program: the lines that its searches share stay near (H200, 16M in 1M: 1.00 ms, 1.14
    # in blocks of 1024 by four).
    block = min(config["block"] // 8, _layout.next_power_of_2(count))
    arguments = (
        out, values if kind is None else None, number, seq, sorter, sizes, *strides,
        seq.stride(-1), 0 if sorter is None else sorter.stride(-1), count, length, length.bit_length(),
    )  # fmt: skip
    launch(_SEARCH[kind], (_layout.cdiv(count, block),), arguments, dict(meta, B=block, num_warps=1))


def _from_pivots(
    out: Tensor, values: Tensor, seq: Tensor, sizes: Any, strides: Any, meta: dict[str, Any], config: dict[str, int]
) -> None:  # fmt: skip
    """The search in one row, from pivots in shared memory."""
    count, length, per, threads = out.numel(), seq.shape[-1], config["per"], config["threads"]
    most = config["bytes"] // max(4, meta["COMPUTE"].primitive_bitwidth // 8)
    pivots = min(max(threads, _layout.next_power_of_2(length)), most)
    apart = _layout.next_power_of_2(_layout.cdiv(length, pivots))
    tiles = _layout.cdiv(count, per * threads)
    # Two tiles at least for a table: H200, 1M in 1M float32 58 us from 132 programs, 64 from 264, 76 from none.
    programs = min(_layout.cdiv(tiles, 2), config["programs"])
    width = min(per, 16 // values.element_size()) if strides[1][-1:] == (1,) else 1
    arguments = (
        out, values, seq, sizes, strides[0], strides[1], seq.stride(-1), count, length, apart, tiles, programs,
        length.bit_length(),
    )  # fmt: skip
    meta = dict(
        meta, WHOLE=apart == 1, FILL=pivots // threads, PER=per, V=width, T=threads, num_warps=threads // 32
    )  # fmt: skip
    launch(search_shared, (programs,), arguments, meta)


def _checked(name: str, out: Tensor, seq: Tensor, input: Any) -> None:
    if out.numel() and torch.result_type(seq, input) == torch.bool:
        raise DtypeError(f"{name}: bools are not searched, by torch neither; convert them to uint8")


@operator(aten="searchsorted.Tensor")
def searchsorted(
    sorted_sequence: Tensor, input: Tensor | Number, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Where each of ``input`` would go into the sorted last dimension of ``sorted_sequence``: int64, or int32.

    Before equal elements, or after them with ``right`` (``side="right"``); NaN at the end. ``sorted_sequence`` is one row or
    as many as ``input`` has; ``sorter`` is what would sort it. Source: ``torch.searchsorted``.
    """
    return torch.searchsorted(sorted_sequence, input, out_int32=out_int32, right=right, side=side, sorter=sorter)


@searchsorted.kernel
def _(
    outs: tuple[Tensor], keep: Any, sorted_sequence: Tensor, input: Any, out_int32: bool, right: bool,
    side: str | None, sorter: Tensor | None,
) -> None:  # fmt: skip
    _checked("searchsorted", outs[0], sorted_sequence, input)
    if side not in (None, "left", "right"):
        raise ShapeError(f"searchsorted: side is 'left' or 'right', given {side!r}")
    search(outs[0], input, sorted_sequence, sorter, right or side == "right")


@operator(aten="bucketize.Tensor")
def bucketize(
    input: Tensor | Number, boundaries: Tensor, *, out_int32: bool = False, right: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The bucket of each element between sorted ``boundaries`` (n,), 0 to n: int64, or int32.

    Bucket i ends in ``boundaries[i]``, or before it with ``right``. Source: ``torch.bucketize``.
    """
    return torch.bucketize(input, boundaries, out_int32=out_int32, right=right)  # type: ignore[arg-type]


@bucketize.kernel
def _(outs: tuple[Tensor], keep: Any, input: Any, boundaries: Tensor, out_int32: bool, right: bool) -> None:
    _checked("bucketize", outs[0], boundaries, input)
    if boundaries.ndim != 1:
        raise ShapeError(f"bucketize: boundaries must have one dimension, given {list(boundaries.shape)}")
    search(outs[0], input, boundaries, None, right)


def _compared(count: int, types: dict[str, Any]) -> int:
    """Most test elements that are compared one by one: above it a binary search reads less.

    Of many values it does from pivots above 112 bytes. H200, 16M int64: compared with 20 81 us, with 24 93, 3.1 instructions
    each at half the rate; searched for in 32 64 us, in 64 67. float32: compared with 48 101, searched for in 64 57.
    """
    config = backends.arch().config("search")
    if config["programs"] and count >= 4 * config["fewest"]:
        return min(64, 112 * 8 // int(types["COMPUTE"].primitive_bitwidth))
    return 64


@operator(aten="isin.Tensor_Tensor")
def isin(
    elements: Tensor | Number, test_elements: Tensor | Number, *, assume_unique: bool = False, invert: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Whether each of ``elements`` is among ``test_elements``, or is not with ``invert``; NaN is equal to nothing.

    ``assume_unique`` changes nothing here. Source: ``torch.isin``.
    """
    # torch 2.13 refuses some layouts, more of them with assume_unique.
    if isinstance(test_elements, Tensor):
        test_elements = test_elements.reshape(-1)
    return torch.isin(elements, test_elements, invert=invert)  # type: ignore[call-overload, arg-type, no-any-return]


@isin.kernel
def _(
    outs: tuple[Tensor], keep: Any, elements: Any, test_elements: Any, assume_unique: bool, invert: bool
) -> None:  # fmt: skip
    (out,) = outs
    for n, v in (("elements", elements), ("test_elements", test_elements)):
        if isinstance(v, Tensor) and v.dtype == torch.bool:
            raise DtypeError(f"isin: {n} is a bool tensor, which torch refuses too; convert it to uint8")
    count = out.numel()
    _, types = _types(elements, test_elements)
    if isinstance(test_elements, Tensor) and test_elements.numel() > _compared(count, types):
        tests = flat(test_elements)
        ordered = torch.empty_like(tests)
        sort_into(ordered, None, tests, 0, False)
        search(out, elements, ordered, None, False, True, invert)
        return
    if not count:
        return
    mine = [tuple(out.stride()), tuple(elements.stride()) if isinstance(elements, Tensor) else (0,) * out.ndim]
    sizes, strides = _layout.collapse(out.shape, mine)
    space: Any = ((1,), [(0,)])
    if isinstance(test_elements, Tensor):
        space = _layout.collapse(test_elements.shape, [tuple(test_elements.stride())])
    kind, number = _number(test_elements)
    if kind is None:
        kind, number = _number(elements)
    config = backends.arch().config("pointwise")
    block = min(config["block"], _layout.next_power_of_2(count))
    arguments = (
        out, elements if isinstance(elements, Tensor) else None, number,
        test_elements if isinstance(test_elements, Tensor) else None, sizes, *strides, space[0], space[1][0],
        count, test_elements.numel() if isinstance(test_elements, Tensor) else 1,
    )  # fmt: skip
    meta = dict(types, INVERT=invert, B=block, WIDE=_layout.is_wide(out.shape, mine), num_warps=config["warps"])
    launch(_MEMBER[kind], (_layout.cdiv(count, block),), arguments, meta)
