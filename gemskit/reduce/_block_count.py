"""How often each bin occurs among the elements of a program, in one block of PTX with counters in shared memory.

Triton's own histogram has no such counters: 256 bins cost 80 instructions an element, and here 4. Lanes next to each other have
counters of their own, so that a bin that many elements have takes 8 adds one after the other and not 32; where all elements of
a warp are of one bin, they are one add. What is no element is counted in a bin that nobody reads. Sums of ints are exact in
any order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gemskit.reduce._block_order import WARPS, before

#: Threads of a program, and the fewest bins: one for each. The most bins: 8 KiB of counters.
THREADS = WARPS * 32
MOST = 2048


@gluon.constexpr_function
def code(per, bins, scan):  # type: ignore[no-untyped-def]
    """A block of PTX. Operands: ``per`` results, ``per`` bins, from 0 to ``bins``, of which the last counts for nothing.

    Result ``k`` of a thread is the count of bin ``k * THREADS + thread``, 0 if there is none. With ``scan``, of 256 bins: and,
    times 65536, that of all bins before it.
    """
    copies = min(4, MOST // bins)
    log = (4 * copies).bit_length() - 1
    own = bins // THREADS
    kind = "b32" if copies == 1 else f"v{copies}.b32"
    parts = ["n", "a", "b", "at"][:copies]
    zeros, loaded = ", ".join(["n"] * copies), ", ".join(parts)
    if copies > 1:
        zeros, loaded = f"{{{zeros}}}", f"{{{loaded}}}"
    lines: list[str] = []
    lines.append(f"""{{
.shared .align 16 .b8 counters[{(bins + 1) << log}];
.shared .align 16 .b8 sums[{WARPS * 4}];
.reg .pred q, one;
.reg .b32 thread, warp, lane, own, mine, same, at, a, b, n;
.reg .b32 {", ".join(f"found{k}" for k in range(own))};
mov.u32 thread, %tid.x;
and.b32 lane, thread, 31;
shr.u32 warp, thread, 5;
mov.u32 mine, counters;
shl.b32 own, thread, {log};
add.u32 own, own, mine;
and.b32 a, lane, {copies - 1};
shl.b32 a, a, 2;
add.u32 mine, mine, a;
mov.u32 n, 0;""")
    # The counters that a thread reads: no other thread needs to wait for it.
    for k in range(own):
        lines.append(f"st.shared.{kind} [own+{(k * THREADS) << log}], {zeros};")
    lines.append(f"""shfl.sync.up.b32 a|q, ${per}, 1, 0, 0xffffffff;
xor.b32 same, a, ${per};""")
    for k in range(1, per):
        lines.append(f"xor.b32 a, ${per + k}, ${per};\nor.b32 same, same, a;")
    lines.append("""setp.ne.u32 q, same, 0;
vote.sync.ballot.b32 same, q, 0xffffffff;
setp.ne.u32 q, same, 0;
or.b32 same, same, lane;
setp.eq.u32 one, same, 0;
bar.sync 0;""")
    lines.append(f"""shl.b32 at, ${per}, {log};
add.u32 at, at, mine;
@one red.shared.add.u32 [at], {32 * per};
@!q bra counted;
red.shared.add.u32 [at], 1;""")
    for k in range(1, per):
        lines.append(f"shl.b32 at, ${per + k}, {log};\nadd.u32 at, at, mine;\nred.shared.add.u32 [at], 1;")
    lines.append("counted: bar.sync 0;")
    for k in range(own):
        lines.append(f"ld.shared.{kind} {loaded}, [own+{(k * THREADS) << log}];")
        lines += [f"add.u32 n, n, {part};" for part in parts[1:]]
        lines.append(f"mov.u32 found{k}, n;")
    if scan:
        lines += before()
        lines.append("shl.b32 same, same, 16;\nadd.u32 found0, found0, same;")
    lines += [f"mov.u32 ${k}, {f'found{k}' if k < own else 0};" for k in range(per)]
    lines.append("}")
    return "\n".join(lines)


@gluon.constexpr_function
def _operands(per):  # type: ignore[no-untyped-def]
    return ",".join(["=r"] * per + ["r"] * per)


@gluon.constexpr_function
def vectors(per, width, warps=WARPS):  # type: ignore[no-untyped-def]
    """The layout of a program's elements, (per // width, threads, width): ``width`` elements of a thread side by side."""
    return gl.BlockedLayout([per // width, 1, width], [1, 32, 1], [1, warps, 1], [2, 1, 0])


@gluon.jit
def places(PER: gl.constexpr, V: gl.constexpr, T: gl.constexpr = THREADS):
    """Of each element: which it is in memory, the bin of a count in its place, and which of its thread's bins that is."""
    layout: gl.constexpr = vectors(PER, V, T // 32)
    turn = gl.arange(0, PER // V, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    thread = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    v = gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    of_thread = turn * V + v
    return turn * (T * V) + thread * V + v, of_thread * T + thread, of_thread + thread * 0


@gluon.jit
def counted(bin, BINS: gl.constexpr, SCAN: gl.constexpr = False):
    """How often each of BINS bins occurs, in the places of elements (:func:`places`); what has the bin BINS is left out."""
    PER: gl.constexpr = bin.shape[0] * bin.shape[2]
    return gl.inline_asm_elementwise(code(PER, BINS, SCAN), _operands(PER), [bin], gl.int32, is_pure=False, pack=PER)
