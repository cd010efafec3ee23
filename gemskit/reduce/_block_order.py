"""The elements of a program in the order of a digit of 8 bits, stably, in one block of PTX.

Triton has neither counters nor a scatter in shared memory, without which ranks cost a sorting network. A warp has PER rows of 32
elements. Ballots say which lanes of a row have the same digit; counters of the warp, how many came before it in earlier rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: Threads of a program: one for each of the 256 digits.
WARPS = 8


@gluon.constexpr_function
def before():  # type: ignore[no-untyped-def]
    """Lines of PTX: of the numbers n of threads, the sum of those before each, ``same``; ``sums`` has a word for a warp."""
    lines = ["mov.u32 same, n;"]
    for j in range(5):
        lines.append(f"shfl.sync.up.b32 a|q, same, {1 << j}, 0, 0xffffffff;\n@q add.u32 same, same, a;")
    lines.append("""mov.u32 a, sums;
shl.b32 b, warp, 2;
add.u32 a, a, b;
setp.eq.u32 q, lane, 31;
@q st.shared.b32 [a], same;
sub.u32 same, same, n;
bar.sync 0;""")
    for w in range(WARPS - 1):
        lines.append(f"ld.shared.b32 a, [sums+{4 * w}];\nsetp.gt.u32 q, warp, {w};\n@q add.u32 same, same, a;")
    return lines


@gluon.constexpr_function
def code(bits, per):  # type: ignore[no-untyped-def]
    """A block of PTX. Operands: ``per`` results, ``per`` words of so many bits, ``per`` digits; a row of the warp each."""
    size = bits // 8
    lines: list[str] = []
    digit = [f"${2 * per + k}" for k in range(per)]
    lines.append(f"""{{
.shared .align 16 .b8 counters[{WARPS * 1024}];
.shared .align 16 .b8 sums[{WARPS * 4}];
.shared .align 16 .b8 room[{WARPS * 32 * per * size}];
.reg .pred q;
.reg .b32 thread, warp, lane, mine, lower, higher, same, at, a, b, n;
.reg .b32 {", ".join(f"place{k}" for k in range(per))};
.reg .b32 {", ".join(f"before{w}" for w in range(WARPS))};
mov.u32 thread, %tid.x;
and.b32 lane, thread, 31;
shr.u32 warp, thread, 5;
mov.u32 lower, %lanemask_lt;
mov.u32 higher, %lanemask_gt;
mov.u32 mine, counters;
shl.b32 a, warp, 10;
add.u32 mine, mine, a;
shl.b32 a, lane, 4;
add.u32 a, a, mine;
mov.u32 n, 0;
st.shared.v4.b32 [a], {{n, n, n, n}};
st.shared.v4.b32 [a+512], {{n, n, n, n}};
bar.warp.sync 0xffffffff;""")
    for k in range(per):
        lines.append("mov.u32 same, 0xffffffff;")
        for j in range(8):
            lines.append(f"""and.b32 a, {digit[k]}, {1 << j};
setp.ne.u32 q, a, 0;
vote.sync.ballot.b32 b, q, 0xffffffff;
@!q not.b32 b, b;
and.b32 same, same, b;""")
        # All lanes read before the last of a digit writes. The digit is kept above the place: one register.
        lines.append(f"""shl.b32 at, {digit[k]}, 2;
add.u32 at, at, mine;
ld.shared.b32 n, [at];
and.b32 a, same, lower;
popc.b32 a, a;
add.u32 n, n, a;
shl.b32 a, {digit[k]}, 16;
add.u32 place{k}, n, a;
and.b32 a, same, higher;
setp.eq.u32 q, a, 0;
add.u32 n, n, 1;
bar.warp.sync 0xffffffff;
@q st.shared.b32 [at], n;
bar.warp.sync 0xffffffff;""")
    # Each thread has a digit: how many of it are in warps before each, then in all.
    lines.append("""bar.sync 0;
shl.b32 at, thread, 2;
mov.u32 a, counters;
add.u32 at, at, a;
mov.u32 n, 0;""")
    for w in range(WARPS):
        lines.append(f"""mov.u32 before{w}, n;
ld.shared.b32 a, [at+{1024 * w}];
add.u32 n, n, a;""")
    lines += before()
    for w in range(WARPS):
        lines.append(f"""add.u32 a, before{w}, same;
st.shared.b32 [at+{1024 * w}], a;""")
    lines.append("bar.sync 0;\nmov.u32 b, room;")
    for k in range(per):
        lines.append(f"""shr.u32 at, place{k}, 16;
shl.b32 at, at, 2;
add.u32 at, at, mine;
ld.shared.b32 n, [at];
and.b32 a, place{k}, 0xffff;
add.u32 n, n, a;
shl.b32 n, n, {size.bit_length() - 1};
add.u32 n, n, b;
st.shared.b{bits} [n], ${per + k};""")
    lines.append(f"""bar.sync 0;
shl.b32 a, warp, {(32 * per * size).bit_length() - 1};
add.u32 a, a, b;
shl.b32 n, lane, {size.bit_length() - 1};
add.u32 a, a, n;""")
    for k in range(per):
        lines.append(f"ld.shared.b{bits} ${k}, [a+{k * 32 * size}];")
    # The next turn of a loop may write what slower warps still read.
    lines.append("bar.sync 0;\n}")
    return "\n".join(lines)


@gluon.constexpr_function
def _operands(bits, per):  # type: ignore[no-untyped-def]
    kind = "l" if bits == 64 else "r"
    return ",".join([f"={kind}"] * per + [kind] * per + ["r"] * per)


@gluon.constexpr_function
def rows_of_32(per):  # type: ignore[no-untyped-def]
    """The layout of a program's elements, (WARPS * per, 32), in the order of rows."""
    return gl.BlockedLayout([per, 1], [1, 32], [WARPS, 1], [1, 0])


@gluon.jit
def in_order_of(digit, word, PER: gl.constexpr):
    """``word``, (WARPS * PER, 32), in the order of ``digit``, from 0 to 255."""
    BITS: gl.constexpr = word.dtype.primitive_bitwidth
    return gl.inline_asm_elementwise(
        code(BITS, PER), _operands(BITS, PER), [word, digit], word.dtype, is_pure=False, pack=PER
    )
