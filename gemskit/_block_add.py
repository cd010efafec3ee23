"""Adding a block of shared memory to a matrix in global memory by the copy engine of a GPU, for kernels in Gluon."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma


@_core.builtin  # type: ignore[untyped-decorator]
def _add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


def _found() -> Any:
    """Gluon has this function from Triton 3.8 on, what it takes was there before."""
    given = getattr(tma, "async_atomic_add", None)
    parts = hasattr(gluon_ir.GluonOpBuilder, "create_async_tma_reduce"), hasattr(ir, "DESCRIPTOR_REDUCE_KIND")
    return given or (_add if all(parts) else None)


#: ``add_block(matrix, coordinates, block)``; None where this Triton cannot. ``tma.store_wait`` waits until blocks are read.
add_block = _found()
