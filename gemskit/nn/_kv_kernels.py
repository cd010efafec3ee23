"""Kernels of key-value caches: rows written at slots, and the weighted sum of two attention states."""

from __future__ import annotations

import triton.language as tl

from gemskit._jit import jit
from gemskit.language import div


@jit
def cache_rows(
    sources, caches, scales, slots, table, lengths,
    source_at, cache_at, table_at, table_step, slot_step, heads, widths, page, limit, new, shift,
    KIND: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One program writes one token into each of the caches, at its slot; a slot below 0 or past the cache is skipped.

    The slot is that of ``slots``, or (with ``table``) that of row ``lengths + i`` of sequence ``token // new``.
    ``source_at`` are strides by token, head, column (by batch first, with ``table``), ``cache_at`` by page, slot, head, column
    and group of columns: column c of a cache with SPLIT is at group ``c // SPLIT``, column ``c % SPLIT``. KIND is the float8
    that bytes hold ("" for values as they are), of ``value / scale``. ``shift`` is a column to begin at.
    """
    token = tl.program_id(0).to(tl.int64)
    if table is not None:
        batch, i = token // new, token % new
        row = i
        if lengths is not None:
            row = tl.load(lengths + batch).to(tl.int64) + i
        live = (row >= 0) & (row < limit)
        slot = tl.load(table + batch * table_at + row // page * table_step, mask=live, other=0).to(tl.int64) * page
        slot += row % page
    else:
        slot = tl.load(slots + token * slot_step).to(tl.int64)
        live = (slot >= 0) & (slot < limit)
        batch, i = token * 0, token
    h, w = tl.arange(0, H)[:, None].to(tl.int64), tl.arange(0, W)[None, :].to(tl.int64)
    for k in tl.static_range(len(sources)):
        at, to = source_at[k], cache_at[k]
        mask = live & (h < heads) & (w < widths[k])
        values = tl.load(sources[k] + batch * at[0] + i * at[1] + h * at[2] + w * at[3], mask=mask, other=0.0)
        place = caches[k] + slot // page * to[0] + slot % page * to[1] + h * to[2]
        c = w + shift[k]
        if SPLIT[k] == 0:
            place = place + c * to[3]
        else:
            place = place + c // SPLIT[k] * to[4] + c % SPLIT[k] * to[3]
        if KIND != "":
            wide = values.to(tl.float32)
            if scales[k] is not None:
                wide = div(wide, tl.zeros((1, 1), tl.float32) + tl.load(scales[k]).to(tl.float32))
            if KIND == "e4m3":
                wide = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -448.0), 448.0), wide)
                found = wide.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            else:
                wide = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -57344.0), 57344.0), wide)
                found = wide.to(tl.float8e5).to(tl.uint8, bitcast=True)
            tl.store(place, found, mask=mask)
        else:
            tl.store(place, values.to(caches[k].dtype.element_ty), mask=mask)


@jit
def merge_states(
    first, first_lse, second, second_lse, out, lse,
    first_at, first_lse_at, second_at, second_lse_at, out_at, lse_at, heads, width,
    TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of (tokens, heads, columns); lse is (heads, tokens)."""
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    w = tl.arange(0, BLOCK).to(tl.int64)
    a = tl.load(first_lse + head * first_lse_at[0] + token * first_lse_at[1]).to(TYPE)
    b = tl.load(second_lse + head * second_lse_at[0] + token * second_lse_at[1]).to(TYPE)
    # What has seen no key says -inf, in some libraries +inf.
    a = tl.where(a == float("inf"), -float("inf"), a)
    b = tl.where(b == float("inf"), -float("inf"), b)
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == -float("inf"), 0.0, top)
    left, right = tl.exp2((a - base) * 1.4426950408889634), tl.exp2((b - base) * 1.4426950408889634)
    total = left + right
    safe = tl.where(total == 0.0, 1.0, total)
    x = tl.load(first + token * first_at[0] + head * first_at[1] + w * first_at[2], mask=w < width, other=0.0)
    y = tl.load(second + token * second_at[0] + head * second_at[1] + w * second_at[2], mask=w < width, other=0.0)
    # A weight of zero takes nothing, whatever stands there.
    x, y = tl.where(left == 0.0, 0.0, x.to(TYPE) * left), tl.where(right == 0.0, 0.0, y.to(TYPE) * right)
    found = (x + y) * (1.0 / safe)
    to = out + token * out_at[0] + head * out_at[1] + w * out_at[2]
    tl.store(to, found.to(out.dtype.element_ty), mask=w < width)
    place = lse + head * lse_at[0] + token * lse_at[1]
    tl.store(place, (base + tl.log2(total) * 0.6931471805599453).to(lse.dtype.element_ty))
