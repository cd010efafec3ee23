"""Sliding windows: copied out of a tensor, and added up again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._dtypes import TRITON, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import operator
from gemskit.errors import DtypeError
from gemskit.pointwise._place import SAME, Axis, copy, fit, place, stand_in

_Ints = int | tuple[int, ...] | list[int]


def _pair(v: _Ints) -> tuple[int, int]:
    if isinstance(v, int):
        return v, v
    return (v[0], v[-1])


@jit
def _window(p, turn, most, count, step, dilation):
    """In this turn: the window that holds position ``p``, where in it that is, and whether there is one."""
    window = p // step - turn
    inside = p - window * step
    return window, inside // dilation, (window >= 0) & (window < count) & (inside % dilation == 0) & (inside < most)


@jit(repr=lambda _: "overlap_add")
def _overlap(
    out, windows, lead, sizes, counts, kernels, steps, dilations, pads, turns, out_lead, in_lead, out_strides, in_strides,
    window_strides, ACC: tl.constexpr, B1: tl.constexpr, B0: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every element sums what windows hold of it, in the order of the windows from the last to the first."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    t0, t1 = tl.cdiv(sizes[1], B0), tl.cdiv(sizes[0], B1)
    i0 = ((i % t0) * B0 + tl.arange(0, B0))[None, :]
    i = i // t0
    i1 = ((i % t1) * B1 + tl.arange(0, B1))[:, None]
    i = i // t1
    live = (i1 < sizes[0]) & (i0 < sizes[1])
    base = windows + offset(i, lead, in_lead)
    total = tl.zeros((B1, B0), ACC)
    for a in range(turns[0]):
        w1, k1, ok1 = _window(i1 + pads[0], a, kernels[0] * dilations[0], counts[0], steps[0], dilations[0])
        for b in range(turns[1]):
            w0, k0, ok0 = _window(i0 + pads[1], b, kernels[1] * dilations[1], counts[1], steps[1], dilations[1])
            at = w1 * window_strides[0] + w0 * window_strides[1] + k1 * in_strides[0] + k0 * in_strides[1]
            total += tl.load(base + at, live & ok1 & ok0, other=0).to(ACC)
    to = offset(i, lead, out_lead) + i1 * out_strides[0] + i0 * out_strides[1]
    tl.store(out + to, total.to(out.dtype.element_ty), live)


def _added(
    out: Tensor,
    windows: Tensor,
    steps: tuple[int, int],
    dilations: tuple[int, int] = (1, 1),
    pads: tuple[int, int] = (0, 0),
) -> Tensor:
    """The windows (..., kh, kw, lh, lw) added at their places in ``out`` (..., h, w)."""
    if not out.numel():
        return out
    kernels, counts = tuple(windows.shape[-4:-2]), tuple(windows.shape[-2:])
    lead, (out_lead, in_lead) = _layout.collapse(out.shape[:-2], [out.stride()[:-2], windows.stride()[:-4]])
    turns = tuple((k - 1) * d // s + 1 for k, d, s in zip(kernels, dilations, steps))
    sizes = tuple(out.shape[-2:])
    config = backends.arch().config("pointwise")
    b0 = min(config["block"], _layout.next_power_of_2(sizes[1]))
    b1 = min(max(1, config["block"] // b0), _layout.next_power_of_2(sizes[0]))
    grid = _layout.cdiv(sizes[1], b0) * _layout.cdiv(sizes[0], b1)
    for n in lead:
        grid *= n
    wide = _layout.any_wide(out, windows)
    meta = dict(
        ACC=TRITON[torch.int32 if out.dtype == torch.bool else compute_type(out.dtype)],
        B1=b1,
        B0=b0,
        WIDE=wide,
        num_warps=config["warps"],
    )
    strides = (
        out_lead, in_lead, tuple(out.stride()[-2:]), tuple(windows.stride()[-4:-2]), tuple(windows.stride()[-2:])
    )  # fmt: skip
    launch(
        _overlap, (grid,), (out, windows, lead, sizes, counts, kernels, steps, dilations, pads, turns, *strides), meta
    )
    return out


@operator(aten="unfold_backward")
def unfold_backward(grad_in: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """The gradient of ``input.unfold(dim, size, step)``: each element sums what the windows hold of it. No atomics."""
    fit("unfold_backward", grad_in, stand_in(input_sizes).unfold(dim, size, step))
    return torch.ops.aten.unfold_backward(grad_in, input_sizes, dim, size, step)  # type: ignore[no-any-return]


def _unfolded(out: Tensor, windows: Tensor, dim: int, step: int) -> Tensor:
    if not out.ndim:
        out = out.view(1)
        windows = windows.unsqueeze(0) if windows.ndim == 1 else windows
    dim %= out.ndim
    # The size of a window is the last dimension; the tile has the windows' dimension and the innermost other one.
    if dim == out.ndim - 1:
        into, held = out.unsqueeze(-2), windows.transpose(-1, -2).unsqueeze(-2).unsqueeze(-4)
        return _added(into, held, (1, step))
    into, held = out.movedim(dim, -2), windows.movedim((dim, -1, -2), (-2, -3, -1)).unsqueeze(-3)
    return _added(into, held, (step, 1))


@unfold_backward.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, grad_in: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int
) -> None:  # fmt: skip
    _unfolded(outs[0], grad_in, dim, step)


@unfold_backward.gradient_by
def _(grad: Tensor, dim: int, size: int, step: int) -> dict[str, Tensor]:
    return {"grad_in": grad.unfold(dim, size, step)}


def _windows(t: Tensor, image: Sequence[int], kernel: _Ints, dilation: _Ints, padding: _Ints, stride: _Ints) -> Tensor:
    """(..., C * kh * kw, L) as (..., C, kh, kw, lh, lw)."""
    kernels = _pair(kernel)
    counts = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, d, p, s in zip(image, kernels, _pair(dilation), _pair(padding), _pair(stride))
    ]
    windows: Tensor = t.unflatten(-1, counts).unflatten(-3, (t.shape[-2] // (kernels[0] * kernels[1]), *kernels))
    return windows


def _copied_out(
    out: Tensor, image: Tensor, kernel: _Ints, dilation: _Ints, padding: _Ints, stride: _Ints
) -> Tensor:  # fmt: skip
    if not out.numel():
        return out
    into = _windows(out, image.shape[-2:], kernel, dilation, padding, stride)
    (kh, kw), (dh, dw), (sh, sw), pads = _pair(kernel), _pair(dilation), _pair(stride), _pair(padding)
    if any(pads):
        shape = (*image.shape[:-2], image.shape[-2] + 2 * pads[0], image.shape[-1] + 2 * pads[1])
        axes = [*[SAME] * (image.ndim - 2), *(Axis("window", p) if p else SAME for p in pads)]
        image = place(torch.empty(shape, dtype=image.dtype, device=image.device), image, axes)
    # (..., lh, lw, kh, kw): views that overlap.
    held = image.unfold(-2, (kh - 1) * dh + 1, sh).unfold(-2, (kw - 1) * dw + 1, sw)[..., ::dh, ::dw]
    copy(held.movedim((-2, -1), (-4, -3)), into)
    return out


def _added_up(out: Tensor, t: Tensor, kernel: _Ints, dilation: _Ints, padding: _Ints, stride: _Ints) -> Tensor:
    if not out.numel():
        return out
    windows = _windows(t, out.shape[-2:], kernel, dilation, padding, stride)
    return _added(out, windows, _pair(stride), _pair(dilation), _pair(padding))


def _check(name: str, input: Tensor) -> None:
    """As torch, whose rule for ``meta`` does not say so."""
    if not input.is_floating_point() and input.dtype != torch.bool:
        raise DtypeError(f"{name}: input must be floating point or bool, given {input.dtype}")


@operator(aten="im2col")
def im2col(
    input: Tensor,
    kernel_size: int | tuple[int, ...] | list[int],
    dilation: int | tuple[int, ...] | list[int],
    padding: int | tuple[int, ...] | list[int],
    stride: int | tuple[int, ...] | list[int],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Windows of images (N, C, H, W) or (C, H, W) as columns: (N, C * kh * kw, L). ``torch.nn.functional.unfold``."""
    _check("im2col", input)
    columns: Tensor = torch.ops.aten.im2col(input, _pair(kernel_size), _pair(dilation), _pair(padding), _pair(stride))
    return columns


@im2col.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, kernel_size: _Ints, dilation: _Ints, padding: _Ints, stride: _Ints
) -> None:  # fmt: skip
    _copied_out(outs[0], input, kernel_size, dilation, padding, stride)


@im2col.gradient_by
def _(
    grad: Tensor, kernel_size: _Ints, dilation: _Ints, padding: _Ints, stride: _Ints, like: Mapping[str, Any]
) -> dict[str, Tensor]:  # fmt: skip
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    return {"input": _added_up(dx, grad, kernel_size, dilation, padding, stride)}


@operator(aten="col2im")
def col2im(
    input: Tensor,
    output_size: int | tuple[int, ...] | list[int],
    kernel_size: int | tuple[int, ...] | list[int],
    dilation: int | tuple[int, ...] | list[int],
    padding: int | tuple[int, ...] | list[int],
    stride: int | tuple[int, ...] | list[int],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Columns (N, C * kh * kw, L) or (C * kh * kw, L) added up at their places in images: (N, C, H, W). No atomics.

    Halves are added in float32. The reverse of :func:`im2col`; ``torch.nn.functional.fold``.
    """
    _check("col2im", input)
    sizes = _pair(output_size), _pair(kernel_size), _pair(dilation), _pair(padding), _pair(stride)
    return torch.ops.aten.col2im(input, *sizes)  # type: ignore[no-any-return]


@col2im.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, output_size: _Ints, kernel_size: _Ints, dilation: _Ints,
    padding: _Ints, stride: _Ints,
) -> None:  # fmt: skip
    _added_up(outs[0], input, kernel_size, dilation, padding, stride)


@col2im.gradient_by
def _(
    grad: Tensor, kernel_size: _Ints, dilation: _Ints, padding: _Ints, stride: _Ints, like: Mapping[str, Any]
) -> dict[str, Tensor]:  # fmt: skip
    shape, dtype = like["input"]
    dx = torch.empty(shape, dtype=dtype, device=grad.device)
    return {"input": _copied_out(dx, grad, kernel_size, dilation, padding, stride)}
