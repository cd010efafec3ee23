"""Matrices that the copy engine of a GPU moves by blocks (TMA), as arguments of a launch.

A kernel gets such a matrix as 128 bytes that the driver encodes. Only the address in them changes from call to call, and it is
their first word (checked here), so that a launch patches it like any pointer.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemskit.errors import NoKernel

#: Words of 8 bytes of an encoded matrix, which has to be aligned to 64 bytes while it is encoded.
WORDS = 16
#: Addresses, and all strides but the last, are multiples of this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Descriptor:
    """``base`` (a tensor, or a reference to one) from its first element on, as a matrix of which kernels load ``block`` at once.

    Elements outside of ``shape`` load as zero and are not stored. The last stride is 1.
    """

    base: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    #: How blocks lie in shared memory, for kernels in Gluon; None: Triton decides.
    layout: Any = None

    def triton(self, base: Any) -> Any:
        """What Triton's compiler takes for it, with another ``base``."""
        where = (base, list(self.shape), list(self.strides), list(self.block))
        if self.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(*where)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Gluon

        return Gluon(*where, self.layout)


@dataclass(frozen=True)
class Box:
    """What a compiled kernel says of a descriptor: how it swizzles a block, and what it loads by one instruction."""

    swizzle: int
    sizes: tuple[int, ...]


def loadable(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether a matrix with these strides can have a descriptor."""
    return (
        strides[-1] == 1
        and all(s > 0 and s * itemsize % ALIGNMENT == 0 and s * itemsize < 2**40 for s in strides[:-1])
        and all(0 < n < 2**31 for n in shape)
    )


#: CUtensorMapDataType.
_TYPES = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9}
#: CU_TENSOR_MAP_L2_PROMOTION_L2_128B.
_PROMOTE = 2


def encode(d: Descriptor, box: Box, address: int, library: ctypes.CDLL) -> tuple[int, ...]:
    """The words of ``d`` at ``address``, by the driver's ``cuTensorMapEncodeTiled``."""
    rank, dtype = len(d.shape), d.base.dtype
    bytes_of = [s * dtype.itemsize for s in d.strides]
    raw = (ctypes.c_uint64 * (WORDS + 8))()
    start = -ctypes.addressof(raw) % 64 // 8
    code = _function(library)(
        ctypes.addressof(raw) + 8 * start, _TYPES.get(dtype, 0), rank, address,
        (ctypes.c_uint64 * rank)(*reversed(d.shape)), (ctypes.c_uint64 * rank)(*reversed(bytes_of[:-1])),
        (ctypes.c_uint32 * rank)(*reversed(box.sizes)), (ctypes.c_uint32 * rank)(*(1,) * rank),
        0, box.swizzle, _PROMOTE, 0,
    )  # fmt: skip
    words = tuple(raw[start : start + WORDS])
    if code or words[0] != address:
        raise NoKernel(f"the driver cannot describe a matrix of {d.shape}, strides {d.strides}: error {code}")
    return words


@functools.cache
def _function(library: ctypes.CDLL) -> Any:
    found = library.cuTensorMapEncodeTiled
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    found.argtypes = [
        pointer, number, number, pointer, pointer, pointer, pointer, pointer, number, number, number, number,
    ]  # fmt: skip
    found.restype = ctypes.c_int
    return found
