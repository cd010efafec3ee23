"""Binary search of many values in one sorted row: its pivots in shared memory, in blocks of PTX.

From global memory each step reads 32 lines for a warp, 27 cycles of the L1 (H200); from shared memory, 2 to 6. The pivots are a
tree by levels (a node n has 2n and 2n + 1 below it): in the order of the row, the first levels would all lie in one bank.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemskit._layout import offset
from gemskit.reduce._block_count import places, vectors
from gemskit.reduce._keys import key_of


@gluon.constexpr_function
def _room(size):  # type: ignore[no-untyped-def]
    """Operands: a result, the address of so many bytes of shared memory, and one that is not read."""
    return f"{{\n.shared .align 16 .b8 pivots[{size}];\nmov.u32 $0, pivots;\n}}"


@gluon.constexpr_function
def _plant(bits, per, pivots):  # type: ignore[no-untyped-def]
    """Operands: ``per`` results, ``per`` keys in order, their numbers j, from 0 to ``pivots``, the address of the tree.

    Pivot j is left of all that come after it: the node (pivots + j) / 2z, where z is the lowest bit of j. Number 0, behind all
    others, has the place before the root.
    """
    log = (bits // 8).bit_length() - 1
    lines = ["{\n.reg .b32 at, low;"]
    for k in range(per):
        lines.append(f"""brev.b32 low, ${2 * per + k};
clz.b32 low, low;
add.u32 low, low, 1;
add.u32 at, ${2 * per + k}, {pivots};
shr.u32 at, at, low;
shl.b32 at, at, {log};
add.u32 at, at, ${3 * per};
st.shared.b{bits} [at], ${per + k};
mov.u32 ${k}, 0;""")
    lines.append("bar.sync 0;\n}")
    return "\n".join(lines)


@gluon.constexpr_function
def _descend(bits, per, pivots, right, equal):  # type: ignore[no-untyped-def]
    """Operands: ``per`` results, ``per`` keys, the address of the tree. How many pivots a key is behind of, 0 to ``pivots``.

    With ``equal`` at most ``pivots`` - 1 and, in the sign, whether the next one is equal.
    """
    size = bits // 8
    log, levels = size.bit_length() - 1, pivots.bit_length() - 1
    base = f"${2 * per}"
    before = f"setp.{'le' if right else 'lt'}.s{bits}"
    lines = [
        f"""{{
.reg .pred p;
.reg .b32 left, right, n, low, {", ".join(f"at{k}" for k in range(per))};
.reg .b{bits} last, {", ".join(f"y{k}" for k in range(per))};
mov.u32 n, 0;
sub.u32 left, n, {base};
add.u32 right, left, {size};
add.u32 at0, {base}, {size};"""
    ]
    lines += [f"mov.u32 at{k}, at0;" for k in range(1, per)]
    for _ in range(levels):
        lines += [f"ld.shared.b{bits} y{k}, [at{k}];" for k in range(per)]
        for k in range(per):
            lines.append(f"""{before} p, y{k}, ${per + k};
selp.b32 n, right, left, p;
mad.lo.u32 at{k}, at{k}, 2, n;""")
    if equal:
        for k in range(per):
            # The last node that the key went left from: without the ones at the end of the path, and the zero before them.
            lines.append(f"""add.u32 at{k}, at{k}, left;
shr.u32 at{k}, at{k}, {log};
not.b32 n, at{k};
brev.b32 n, n;
clz.b32 n, n;
add.u32 n, n, 1;
shr.u32 n, at{k}, n;
shl.b32 n, n, {log};
add.u32 n, n, {base};
ld.shared.b{bits} y{k}, [n];""")
        for k in range(per):
            lines.append(f"""setp.eq.s{bits} p, y{k}, ${per + k};
mov.u32 low, {-pivots & 0xFFFFFFFF};
@p mov.u32 low, {0x80000000 - pivots};
add.u32 ${k}, at{k}, low;""")
    else:
        lines.append(f"ld.shared.b{bits} last, [{base}];")
        for k in range(per):
            lines.append(f"""add.u32 at{k}, at{k}, left;
shr.u32 at{k}, at{k}, {log};
sub.u32 at{k}, at{k}, {pivots};
mov.u32 n, 0;
{before} p, last, ${per + k};
@p mov.u32 n, 1;
add.u32 n, n, at{k};
setp.gt.u32 p, n, {pivots - 1};
@p mov.u32 at{k}, {pivots};
mov.u32 ${k}, at{k};""")
    lines.append("}")
    return "\n".join(lines)


@gluon.constexpr_function
def _operands(per, *kinds):  # type: ignore[no-untyped-def]
    return ",".join(["=r"] * per + [kind for kind in kinds for _ in range(per)])


@gluon.constexpr_function
def _kind(bits):  # type: ignore[no-untyped-def]
    return "l" if bits == 64 else "r"


@gluon.jit(do_not_specialize=["count", "length", "apart", "tiles", "programs", "steps"])
def search_shared(
    out, values, seq, sizes, out_strides, value_strides, seq_col, count, length, apart, tiles, programs, steps,
    VIA: gl.constexpr, COMPUTE: gl.constexpr, RIGHT: gl.constexpr, EQUAL: gl.constexpr, INVERT: gl.constexpr,
    WHOLE: gl.constexpr, FILL: gl.constexpr, PER: gl.constexpr, V: gl.constexpr, T: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Pivots are the last elements of ``apart`` each (a power of two; WHOLE: one); a program has every so many-th tile."""
    PIVOTS: gl.constexpr = FILL * T
    BITS: gl.constexpr = 64 if COMPUTE.primitive_bitwidth == 64 else 32
    KIND: gl.constexpr = _kind(BITS)
    FLOATS: gl.constexpr = COMPUTE.is_floating()
    j, _, _ = places(FILL, 1, T)
    at = gl.where(j == 0, PIVOTS, j)
    if WIDE:
        at = at.to(gl.int64)
    at = at * apart - 1
    there = at < length
    pivot = key_of(gl.load(seq + at * seq_col, there).to(VIA).to(COMPUTE), False)
    MOST: gl.constexpr = 0x7FFFFFFFFFFFFFFF if BITS == 64 else 0x7FFFFFFF
    pivot = gl.where(there, pivot, MOST)
    one, _, _ = places(1, 1, T)
    tree = gl.inline_asm_elementwise(_room(PIVOTS * (BITS // 8)), "=r,r", [one], gl.int32, is_pure=False, pack=1)
    planted = [pivot, j, j * 0 + gl.convert_layout(tree, vectors(FILL, 1, T // 32))]
    gl.inline_asm_elementwise(
        _plant(BITS, FILL, PIVOTS), _operands(FILL, KIND, "r", "r"), planted, gl.int32, is_pure=False, pack=FILL
    )
    # torch halves the row, and goes right from a NaN: where it meets one on the way, all that is behind ``known`` is at the end.
    known = length
    if FLOATS and not EQUAL:
        last = gl.load(seq + (known - 1) * seq_col)
        if last != last:
            known = known * 0 - 1
            for step in range(steps):  # noqa: B007
                mid = known + 1 + (length - known - 1) // 2
                y = gl.load(seq + gl.minimum(mid, length - 1) * seq_col)
                known = gl.where((mid < length) & (y == y), mid, known)
    place, _, _ = places(PER, V, T)
    tree = place * 0 + gl.convert_layout(tree, vectors(PER, V, T // 32))
    if WIDE:
        place = place.to(gl.int64)
    for tile in range(gl.program_id(0), tiles, programs):
        i = place + tile.to(place.dtype) * (PER * T)  # type: ignore[attr-defined]
        live = i < count
        x = gl.load(values + offset(i, sizes, value_strides), live).to(VIA).to(COMPUTE)
        low = gl.inline_asm_elementwise(
            _descend(BITS, PER, PIVOTS, RIGHT, EQUAL and WHOLE), _operands(PER, KIND, "r"), [key_of(x, False), tree],
            gl.int32, is_pure=False, pack=PER,
        )  # fmt: skip
        where = out + offset(i, sizes, out_strides)
        if EQUAL and WHOLE:
            found = (low < 0) & ((low & 0x7FFFFFFF) < length)
        else:
            if WIDE:
                low = low.to(gl.int64)
            low = low * apart
            if not WHOLE:
                half = apart // 2
                while half > 0:
                    y = gl.load(seq + gl.minimum(low + (half - 1), length - 1) * seq_col).to(VIA).to(COMPUTE)
                    low += gl.where((y <= x) if RIGHT else (y < x), half, 0)
                    half = half // 2
            low = gl.minimum(low, length)
            if EQUAL:
                y = gl.load(seq + gl.minimum(low, length - 1) * seq_col).to(VIA).to(COMPUTE)
                found = (low < length) & (y == x)
        if EQUAL:
            if FLOATS:
                found = found & (x == x)
            if INVERT:
                found = found == 0
            gl.store(where, found, live)
        else:
            if FLOATS:
                low = gl.where((low > known) | (x != x), length, low)
            gl.store(where, low.to(out.dtype.element_ty), live)
