"""What the interpreter finds in kernels in Gluon, whose groups of warps wait for each other and for the copy engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gemskit._gluon import add_block, block_to_shared
from gemskit._interpret import run
from gemskit._tensor_map import Descriptor
from gemskit.errors import InterpreterError


@gluon.jit
def _wait_for_load(matrix, full, tiles, LATE: gl.constexpr):
    for k in gl.static_range(2):
        mbarrier.expect(full.index(k), 16 * 16 * 2)
        block_to_shared(matrix, [0, 16 * k], full.index(k), tiles.index(0 if LATE else k))


@gluon.jit
def _use(out, full, tiles, EARLY: gl.constexpr, LATE: gl.constexpr, FOREVER: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    acc = gl.zeros([16, 16], gl.float32, layout)
    for k in gl.static_range(2):
        if not EARLY:
            mbarrier.wait(full.index(k), 1 if FOREVER and k == 1 else 0)
            if FOREVER:
                mbarrier.wait(full.index(k), 1)
        tile = tiles.index(0 if LATE else k)
        acc = warpgroup_mma(tile, tile.permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    col = gl.arange(0, 16, gl.SliceLayout(0, layout))
    gl.store(out + row[:, None] * 16 + col[None, :], acc)


@gluon.jit
def _two_groups(out, matrix, EARLY: gl.constexpr, LATE: gl.constexpr, FOREVER: gl.constexpr):
    tiles = gl.allocate_shared_memory(matrix.dtype, [2] + matrix.block_type.shape, matrix.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(full.index(k), count=1)
    gl.warp_specialize(
        [(_use, (out, full, tiles, EARLY, LATE, FOREVER)), (_wait_for_load, (matrix, full, tiles, LATE))], [1], [24]
    )


def two_groups(**how: bool) -> tuple[Tensor, Tensor]:
    x, out = torch.randn(16, 32, dtype=torch.bfloat16), torch.empty(16, 16)
    layout = gl.NVMMASharedLayout.get_default_for([16, 16], gl.bfloat16)
    flags = dict(EARLY=False, LATE=False, FOREVER=False) | how
    run(_two_groups, (1,), (out, Descriptor(x, (16, 32), (32, 1), (16, 16), layout)), flags)
    return out, sum((t @ t.t() for t in x.float().split(16, 1)), torch.zeros(16, 16))


def test_groups_of_warps() -> None:
    torch.testing.assert_close(*two_groups())


def test_a_block_that_was_not_waited_for_is_no_number() -> None:
    assert two_groups(EARLY=True)[0].isnan().all()


def test_a_block_that_overwrites_an_operand_is_found() -> None:
    with pytest.raises(InterpreterError, match="an operand of a product changed before the product was waited for"):
        two_groups(LATE=True)


def test_barriers_that_never_come_are_found() -> None:
    with pytest.raises(InterpreterError, match="every group of warps waits"):
        two_groups(FOREVER=True)


@gluon.jit
def _add_twice(sums, EARLY: gl.constexpr, NEVER: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0])
    place = gl.allocate_shared_memory(gl.float32, sums.block_type.shape, sums.layout)
    for k in gl.static_range(2):
        if not EARLY:
            tma.store_wait(0)
        place.store(gl.full([8, 32], k + 1.0, gl.float32, layout))
        fence_async_shared()
        add_block(sums, [4, 0], place)
    if not NEVER:
        tma.store_wait(0)


@gluon.jit
def _adding(sums, EARLY: gl.constexpr, NEVER: gl.constexpr):
    gl.warp_specialize([(_add_twice, (sums, EARLY, NEVER))], [], [])


def added(**how: bool) -> Tensor:
    """Blocks of 8 rows, of which the last four do not exist, in a matrix of 8."""
    out = torch.zeros(8, 32)
    layout = gl.NVMMASharedLayout.get_default_for([8, 32], gl.float32)
    flags = dict(EARLY=False, NEVER=False) | how
    run(_adding, (3,), (Descriptor(out, (8, 32), (32, 1), (8, 32), layout),), flags)
    return out


def test_blocks_are_added() -> None:
    assert torch.equal(added(), torch.tensor([0.0, 9.0]).repeat_interleave(4)[:, None].expand(8, 32))


def test_a_block_that_changes_before_it_is_read_is_found() -> None:
    with pytest.raises(InterpreterError, match="a block changed before it was read to be added"):
        added(EARLY=True)


def test_shared_memory_that_ends_before_it_is_read_is_found() -> None:
    with pytest.raises(InterpreterError, match="shared memory ends before all is read from it"):
        added(NEVER=True)
