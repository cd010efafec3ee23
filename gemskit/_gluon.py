"""What kernels in Gluon share: names that differ between versions of Triton, and barriers of shared memory."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# One of the names is that of Triton 3.6, the other that of later versions.
#: Copies a block of a matrix to shared memory, by the copy engine.
block_to_shared: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
#: Copies elements to shared memory, by the threads that ask.
elements_to_shared: Any = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
#: Waits for the other warps of the group.
group_barrier: Any = getattr(gl, "thread_barrier", None) or gl.barrier


@_core.builtin  # type: ignore[untyped-decorator]
def _add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


#: ``add_block(matrix, coordinates, block)`` adds a block of shared memory to a matrix in global memory, by the copy engine;
#: ``tma.store_wait`` waits until blocks are read. Triton 3.6 has no function for what its compiler can do.
add_block: Any = getattr(tma, "async_atomic_add", None) or _add


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_one(tiles, shape: gl.constexpr, layout: gl.constexpr):
        """The same memory in another shape."""
        return tiles.reinterpret(tiles.dtype, shape, layout)

else:

    @gluon.jit
    def as_one(tiles, shape: gl.constexpr, layout: gl.constexpr):
        """The same memory in another shape."""
        return tiles._reinterpret(tiles.dtype, shape, layout)


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Barriers in shared memory, each complete after so many arrivals. A fence is to follow the last of them."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made
