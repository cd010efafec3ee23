"""What the attention kernels share: tiles of matrices, where sequences lie, scores with what modifies them, dropout.

What a call lacks is None (a pointer, a number, a function of the user's) and leaves no code. Scores live in base 2 (``exp2``).
"""

from __future__ import annotations

import triton.language as tl

from gemskit import language
from gemskit._jit import jit
from gemskit.pointwise._draw import _fraction, _philox

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@jit
def tile(
    base, start, rows, row_stride, cols, col_stride, limit,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows ``start + rows`` below ``limit`` and columns below WIDTH of a matrix, zero elsewhere."""
    if WIDE:  # int64 costs two registers an offset: only where one tile reaches past 2^31 elements
        rows_wide, cols_wide = rows.to(tl.int64), cols.to(tl.int64)
    else:
        rows_wide, cols_wide = rows, cols
    at = base + tl.cast(start, tl.int64) * row_stride + (rows_wide * row_stride + cols_wide * col_stride)
    return _loaded(at, start + rows, limit, cols, WIDTH, PADDED, EDGE)


@jit
def _loaded(at, rows, limit, cols, WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr):
    if EDGE and WIDTH != PADDED:
        found = tl.load(at, mask=(rows < limit) & (cols < WIDTH), other=0.0)
    elif EDGE:
        found = tl.load(at, mask=rows < limit, other=0.0)
    elif WIDTH != PADDED:
        found = tl.load(at, mask=cols < WIDTH, other=0.0)
    else:
        found = tl.load(at)
    return found


@jit
def pages_of(table, start, limit, table_step, PAGE: tl.constexpr, N: tl.constexpr):
    """The pages that N keys from ``start`` on fill or lie in, each looked up once; any page where there is no key."""
    pages = ()
    for j in tl.static_range((N + PAGE - 1) // PAGE):
        place = start + j * PAGE
        pages = pages + (tl.load(table + place // PAGE * table_step, mask=place < limit, other=0),)
    return pages


@jit
def cached_tile(
    base, start, rows, row_stride, cols, col_stride, limit, pages, table_step, page_stride, split_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of N keys or values, which may lie in pages of PAGE rows: those of `pages_of` with AHEAD, else a table of all.

    With SPLIT, column c is at ``c // SPLIT * split_stride + c % SPLIT * col_stride``.
    """
    if PAGE == 0:
        return tile(base, start, rows, row_stride, cols, col_stride, limit, WIDTH, PADDED, EDGE, WIDE)
    else:
        if SPLIT == 0:
            columns = cols.to(tl.int64) * col_stride
        else:
            columns = (cols // SPLIT).to(tl.int64) * split_stride + cols % SPLIT * col_stride
        if PAGE % N == 0:
            if AHEAD:
                page = pages[0]
            else:
                page = tl.load(pages + start // PAGE * table_step)
            at = base + page.to(tl.int64) * page_stride + tl.cast(start % PAGE, tl.int64) * row_stride
            at = at + (rows.to(tl.int64) * row_stride + columns)
        else:
            place = start + rows
            if AHEAD:
                page = tl.zeros_like(rows) + pages[0]
                for j in tl.static_range(1, N // PAGE):
                    page = tl.where(rows < j * PAGE, page, pages[j])
            else:
                page = tl.load(pages + place // PAGE * table_step, mask=place < limit, other=0)
            at = base + (page.to(tl.int64) * page_stride + (place % PAGE).to(tl.int64) * row_stride) + columns
        return _loaded(at, start + rows, limit, cols, WIDTH, PADDED, EDGE)


@jit
def window(keys, tokens, left, right, SIDES: tl.constexpr, BOTTOM: tl.constexpr):
    """The place of row 0 among the keys, and the first and last key that it sees where SIDES has a left (2) or right (1) one."""
    shift = 0
    if BOTTOM:
        shift = keys - tokens
    low, high = shift, shift
    if SIDES % 2 == 1:
        high = shift + right
    if SIDES >= 2:
        low = shift - left
    return shift, low, high


@jit
def put(base, start, rows, row_stride, cols, col_stride, limit, values, WIDTH: tl.constexpr):
    """Store the part of ``values`` that `tile` would load."""
    at = base + tl.cast(start, tl.int64) * row_stride
    at += rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride
    tl.store(at, values.to(base.dtype.element_ty), mask=(start + rows < limit) & (cols < WIDTH))


@jit
def line(base, start, local, stride, limit, other, EDGE: tl.constexpr):
    """Elements ``start + local`` of a vector, ``other`` from ``limit`` on."""
    at = base + tl.cast(start, tl.int64) * stride + local * stride
    if EDGE:
        found = tl.load(at, mask=start + local < limit, other=other)
    else:
        found = tl.load(at)
    return found


@jit
def span(bounds, bounds_step, used, used_step, batch, most):
    """Where a sequence begins among packed rows, and its number of rows: ``used`` counts them within ``bounds`` or ``most``."""
    first = tl.cast(batch, tl.int64) * 0
    count = most
    if bounds is not None:
        first = tl.load(bounds + batch * bounds_step).to(tl.int64)
        count = (tl.load(bounds + (batch + 1) * bounds_step) - first).to(tl.int32)
    if used is not None:
        count = tl.minimum(tl.load(used + batch * used_step).to(tl.int32), most)
    return first, count


@jit
def scaled(scale, scale_low, TYPE: tl.constexpr):
    """The scale; a float argument is float32, so float64 takes the remainder in a second one."""
    return tl.cast(scale, TYPE) + tl.cast(scale_low, TYPE)


@jit
def slope_of(slopes, batch_stride, head_stride, batch, head):
    """The ALiBi slope of a head, or of the head of every row."""
    return tl.load(slopes + tl.cast(batch, tl.int64) * batch_stride + head * head_stride)


@jit
def _capped(scores, cap):
    return cap * language.tanh(language.div(scores, tl.full((1, 1), 0, scores.dtype) + cap))


@jit
def _biased(scores, rows, cols, slope, shift):
    if slope is not None:
        scores = scores - slope * tl.abs(rows + shift - cols).to(scores.dtype)
    return scores


@jit
def logits(product, batch, head, rows, cols, length, size, scale, cap, slope, shift, aux, SCORE: tl.constexpr):
    """Scores in base 2: scaled, soft-capped, with the ALiBi bias, then SCORE of all that.

    Functions of the user's see no row or column outside of the problem: they may read memory by them.
    """
    if cap is None and slope is None and SCORE is None:
        return product * (scale * LOG2E)
    else:
        scores = product * scale
        if cap is not None:
            scores = _capped(scores, cap)
        scores = _biased(scores, rows, cols, slope, shift)
        if SCORE is not None:
            rows, cols = tl.minimum(rows, length - 1), tl.minimum(cols, size - 1)
            scores = SCORE(scores, batch, head, rows, cols, aux).to(product.dtype)
        return scores * LOG2E


@jit
def back_through(
    grad, product, batch, head, rows, cols, length, size, scale, cap, slope, shift, aux,
    SCORE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """From the gradient of `logits` (natural units) to that of the scaled product; zero stays zero."""
    if cap is None and SCORE is None:
        return grad
    else:
        scores = product * scale
        factor = tl.full((1, 1), 1, product.dtype)
        if cap is not None:
            scores = _capped(scores, cap)
            ratio = scores / cap
            factor = 1 - ratio * ratio
        if SCORE is not None:
            scores = _biased(scores, rows, cols, slope, shift)
            rows, cols = tl.minimum(rows, length - 1), tl.minimum(cols, size - 1)
            factor = factor * SLOPE(scores, batch, head, rows, cols, aux).to(product.dtype)
        return tl.where(grad == 0, 0.0, grad * factor)


@jit
def masked(
    scores, batch, head, rows, cols, mask, mask_m, mask_n, length, size, low, high, aux,
    MASK: tl.constexpr, SIDES: tl.constexpr, VISIBLE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 with the masks applied.

    MASK 1 is boolean, 2 is added. EDGE bounds columns by ``size`` and by the diagonals: SIDES 1 hides columns above
    ``row + high``, 2 those below ``row + low``. VISIBLE is a function of the user's.
    """
    if MASK != 0:
        at = mask + (rows.to(tl.int64) * mask_m + cols.to(tl.int64) * mask_n)
        bias = tl.load(at, mask=(rows < length) & (cols < size), other=0)
        if MASK == 1:
            scores = tl.where(bias != 0, scores, -float("inf"))
        else:
            scores += bias.to(scores.dtype) * LOG2E
    if EDGE:
        live = within(rows, cols, size, low, high, SIDES)
        if VISIBLE is not None:
            rows, cols = tl.minimum(rows, length - 1), tl.minimum(cols, size - 1)
            live = live & VISIBLE(batch, head, rows, cols, aux)
        scores = tl.where(live, scores, -float("inf"))
    return scores


@jit
def within(rows, cols, size, low, high, SIDES: tl.constexpr):
    """Whether a row sees a column, by position alone."""
    live = cols < size
    if SIDES % 2 == 1:
        live = live & (cols <= rows + high)
    if SIDES >= 2:
        live = live & (cols >= rows + low)
    return live


@jit
def kept(seed, line, start, cols, width, dropout):
    """True with probability 1 - dropout: one block of a row each, columns ``start`` to ``start + N``.

    ``line`` numbers the rows of the whole problem (int64, M), ``width`` is a multiple of 4 that no column reaches; the number
    belongs to the element, not to the block that asks.
    """
    N: tl.constexpr = cols.shape[0]
    counter = line[:, None] * (width // 4) + (start // 4 + tl.arange(0, N // 4))[None, :]
    a, b, c, d = _philox(seed, counter)
    a, b = (_fraction(a) >= dropout).to(tl.int8), (_fraction(b) >= dropout).to(tl.int8)
    c, d = (_fraction(c) >= dropout).to(tl.int8), (_fraction(d) >= dropout).to(tl.int8)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d)) != 0


@jit
def exponentials(scores, lse):
    """exp(score - lse) from base 2 scores and natural lse; a row with no key has lse -inf and weights 0."""
    base = tl.where(lse == -float("inf"), 0.0, lse * LOG2E)
    return tl.exp2(scores - base)
