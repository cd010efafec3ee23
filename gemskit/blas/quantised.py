"""Products of quantised factors: float8 and int8 with scales of tensors, rows or blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._jit import jit
from gemskit._layout import cdiv
from gemskit._op import Named, P, R, operator
from gemskit.blas._blocks import blocks
from gemskit.blas._drive import Gemm, gemm
from gemskit.blas._terms import plain
from gemskit.blas.matmul import rows
from gemskit.errors import NoKernel

#: The side of the blocks that torch's scales count.
BLOCK = 128


@gemm(aten="_int_mm", factors=("input", "mat2"))
def int_mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input @ mat2`` of int8 matrices (M, K) and (K, N), of any sizes: (M, N), int32. Source: ``torch._int_mm``."""
    if input.dtype != torch.int8 or mat2.dtype != torch.int8:
        raise TypeError(f"both factors must have the dtype int8, not {input.dtype} and {mat2.dtype}")
    return torch.mm(input.to(torch.int32), mat2.to(torch.int32))


int_mm.epilogue(plain)


def _each(scale: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """The scale of each element of a factor, by broadcasting."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim != 2:
        raise ValueError(f"scales of shape {list(scale.shape)} do not fit {list(shape)}")
    for d, (n, side) in enumerate(zip(shape, block)):
        if scale.shape[d] not in (1, n, cdiv(n, side)):
            raise ValueError(f"scales of shape {list(scale.shape)} do not fit {list(shape)} in blocks of {list(block)}")
        if scale.shape[d] not in (1, n):
            scale = scale.repeat_interleave(side, d).narrow(d, 0, n)
    return scale


def _scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, block: Sequence[int]) -> Tensor:
    """The product in float32 at least; ``block`` is of M, N and K."""
    dtype = torch.promote_types(scale_a.dtype, torch.float32)
    x = a.to(dtype) * _each(scale_a, a.shape[-2:], (block[0], block[2]))
    return x @ (b.to(dtype) * _each(scale_b, b.shape[-2:], (block[2], block[1])))


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``; float8 saturates."""
    return t.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype) if dtype.itemsize == 1 else t.to(dtype)


class _Scaled(Gemm[P, R]):
    """A product of float8 with scales: of tensors and rows they are its epilogue, of blocks another kernel's."""

    float8 = True

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        a, b, scale_a, scale_b = (named[n] for n in (*self.factors, "scale_a", "scale_b"))
        (M, K), N = a.shape, b.shape[1]
        # Scales of a tensor, of rows and of columns are constant along K.
        lines = [s.numel() == 1 or tuple(s.shape) == line for s, line in ((scale_a, (M, 1)), (scale_b, (1, N)))]
        if a.dtype.is_floating_point and all(lines):
            return super().plan(named, outs)
        sides = [
            BLOCK if s.ndim == 2 and s.shape[d] not in (1, n) else 1 for s, d, n in ((scale_a, 0, M), (scale_b, 1, N))
        ]
        slices = max(s.shape[d] if s.ndim == 2 else 1 for s, d in ((scale_a, 1), (scale_b, 0)))
        block = (sides[0], sides[1], BLOCK if slices > 1 else max(K, 1))

        def run(outs: tuple[Tensor, ...], keep: Any, arguments: Named) -> None:
            a, b = (arguments[n] for n in self.factors)
            scales = [s if s.ndim == 2 else s.view(1, 1) for s in (arguments["scale_a"], arguments["scale_b"])]
            rest = arguments["bias"], arguments["scale_result"]
            blocks(self.name, outs[0], a, b, scales[0], scales[1], block, *rest, named["use_fast_accum"])

        return run


def _scaling(meaning: Callable[..., Tensor]) -> _Scaled[..., Tensor]:
    keep = ("scale_a", "scale_b", "bias", "scale_result")
    return _Scaled(meaning, factors=("input", "mat2"), keep=keep, aten="_scaled_mm")


@_scaling
def scaled_mm(
    input: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    scale_result: Tensor | None = None, out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Product of scaled float8 (or int8) matrices (M, K) and (K, N), plus ``bias`` (N,), times ``scale_result``.

    Scales are those of tensors (one element), of rows (M, 1) and columns (1, N), or of blocks: (M, K / 128) or
    (M / 128, K / 128), and (K / 128, N) or (K / 128, N / 128). All layouts and sizes are taken; sums are float32,
    with ``use_fast_accum`` of 14 bits on Hopper. The result has the dtype of ``input`` unless ``out_dtype`` is given.
    Source: ``torch._scaled_mm``.
    """
    found = _scaled(input, mat2, scale_a, scale_b, (BLOCK, BLOCK, BLOCK))
    found = found if bias is None else found + bias
    return _rounded(found if scale_result is None else found * scale_result, out_dtype or input.dtype)


@scaled_mm.epilogue
@jit
def _(acc, scale_a, scale_b, bias, scale_result):
    acc = acc * scale_a * scale_b
    if bias is not None:
        acc += bias
    if scale_result is not None:
        acc *= scale_result
    return acc


def cutlass_scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """:func:`scaled_mm` of float8 or int8 under vLLM's name, whose scales have the same shapes."""
    return scaled_mm(a, b, scale_a, scale_b, bias, None, out_dtype)


class _Batches(Gemm[P, R]):
    float8 = True


def _batches(meaning: Callable[..., Tensor]) -> _Batches[..., Tensor]:
    return _Batches(meaning, factors=("A", "B"), keep=("A_scale", "B_scale"))


@_batches
def bmm_fp8(
    A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Products of the float8 batches ``A`` (B, M, K) and ``B`` (B, K, N), times a scale of each tensor, in ``dtype``.

    The operator of FlashInfer.
    """
    wide = torch.promote_types(A_scale.dtype, torch.float32)
    scales = A_scale.reshape(()) * B_scale.reshape(())
    return _rounded(torch.bmm(A.to(wide), B.to(wide)) * scales, dtype)


@bmm_fp8.epilogue
@jit
def _(acc, A_scale, B_scale):
    return acc * A_scale * B_scale


@operator()
def w8a8_block_fp8_matmul(
    A: Tensor, B: Tensor, As: Tensor, Bs: Tensor, block_size: Sequence[int], output_dtype: torch.dtype = torch.float16
) -> Tensor:
    """``A`` (..., K) by the transpose of ``B`` (N, K), both float8, with scales of blocks ``[n, k]``: (..., N).

    ``As`` (..., K / k) scales each row in slices, ``Bs`` (N / n, K / k) blocks of the weight; each slice is scaled before it is
    added, in float32. The operator of vLLM.
    """
    n, k = block_size
    want = (*A.shape[:-1], cdiv(A.shape[-1], k)), (cdiv(B.shape[0], n), cdiv(B.shape[1], k))
    if A.shape[-1] != B.shape[-1] or (tuple(As.shape), tuple(Bs.shape)) != want:
        raise ValueError(f"the shapes of A and B are those of one product, of As and Bs {list(map(list, want))}")
    dtype = torch.promote_types(As.dtype, torch.float32)
    x = A.to(dtype) * As.repeat_interleave(k, -1).narrow(-1, 0, A.shape[-1])
    y = Bs.repeat_interleave(n, 0).narrow(0, 0, B.shape[0]).repeat_interleave(k, 1).narrow(1, 0, B.shape[1])
    return _rounded(x @ (B.to(dtype) * y).mT, output_dtype).contiguous()


w8a8_block_fp8_matmul.float8 = True


@w8a8_block_fp8_matmul.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor, block_size: Sequence[int],
    **_: Any,
) -> None:  # fmt: skip
    n, k = block_size
    blocks(
        "w8a8_block_fp8_matmul", outs[0].view(math.prod(A.shape[:-1]), B.shape[0]),
        rows(A.view(torch.uint8)).view(A.dtype), B.mT, rows(As), Bs.mT, (1, n, k),
    )  # fmt: skip


def fp8_matmul(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`w8a8_block_fp8_matmul` in blocks of 128 x 128 and bfloat16. The operator of FlagGems."""
    if scale_dtype != torch.float32 or a_s.dtype != torch.float32 or b_s.dtype != torch.float32:
        raise NoKernel(
            f"fp8_matmul: no kernel for scales of {scale_dtype}, {a_s.dtype}, {b_s.dtype}; served is float32"
        )
    return w8a8_block_fp8_matmul(a, b, a_s, b_s, [BLOCK, BLOCK], torch.bfloat16)


@operator(aten="_weight_int8pack_mm", floats=("input", "scales"))
def weight_int8pack_mm(input: Tensor, mat2: Tensor, scales: Tensor) -> Tensor:
    """``(input @ mat2.T) * scales`` of ``input`` (M, K), int8 weights ``mat2`` (N, K) and their ``scales`` (N,).

    Weights become the dtype of ``input`` as they are read. Source: ``torch._weight_int8pack_mm``.
    """
    if mat2.dtype != torch.int8 or not input.dtype.is_floating_point or scales.dtype != input.dtype:
        raise TypeError("the weights have the dtype int8, the input and the scales one floating dtype")
    if scales.shape != mat2.shape[:1]:
        raise ValueError(f"the shape of scales is {[mat2.shape[0]]}, not {list(scales.shape)}")
    dtype = torch.promote_types(input.dtype, torch.float32)
    return (torch.mm(input.to(dtype), mat2.to(dtype).mT) * scales).to(input.dtype)


@weight_int8pack_mm.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, mat2: Tensor, scales: Tensor) -> None:
    whole = max(input.shape[1], 1)
    blocks("weight_int8pack_mm", outs[0], input, mat2.mT, None, scales[None], (1, 1, whole))
