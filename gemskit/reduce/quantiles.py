"""Elements by rank: quantiles, medians, the k-th smallest, the most frequent. All sort first; NaN is largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout
from gemskit._bind import fill
from gemskit._dtypes import TRITON, Number, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import operator
from gemskit.errors import ArgumentError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._place import copy
from gemskit.reduce._compact import flat
from gemskit.reduce._select import topk_into
from gemskit.reduce._sort import sort_into
from gemskit.reduce.extrema import _at_index, _extreme_all


@jit
def _numbers(row, step, n, live, steps):
    """How many elements of sorted rows come before the NaNs."""
    low = n * 0 + tl.zeros_like(live.to(tl.int32))
    high = low + n
    for _ in range(steps):
        mid = low + (high - low) // 2
        open = live & (low < high)
        x = tl.load(row + mid * step, open)
        low = tl.where(open & (x == x), mid + 1, low)
        high = tl.where(open & (x != x), mid, high)
    return low


@jit
def _between(row, step, n, q, live, steps, COMPUTE: tl.constexpr, HOW: tl.constexpr, IGNORE: tl.constexpr):
    """The two positions that a quantile lies between, the weight of the second, and whether ``q`` is one."""
    live = live & (q >= 0) & (q <= 1)
    if IGNORE:
        rank = tl.maximum(q * (_numbers(row, step, n, live, steps) - 1).to(COMPUTE), 0)
    else:
        last = tl.load(row + (n - 1) * step, live)
        end = tl.zeros_like(q) + (n - 1)
        rank = tl.where(last == last, q * end, end)
    rank = tl.where(live, rank, 0)
    below = tl.floor(rank)
    weight = rank - below
    above = tl.ceil(rank).to(tl.int64)
    below = below.to(tl.int64)
    if HOW == "lower":
        above, weight = below, weight * 0
    if HOW == "higher":
        below, weight = above, weight * 0
    if HOW == "nearest":
        # Halfway to the even one.
        up = (weight > 0.5) | ((weight == 0.5) & (below % 2 == 1))
        below = tl.where(up, above, below)
        above, weight = below, weight * 0
    if HOW == "midpoint":
        weight = weight * 0 + 0.5
    return below, above, weight, live


@jit
def _quantile(
    out, ordered, q, number, sizes, out_rows, rows_at, out_q, step, q_step, rows, count, n, steps,
    COMPUTE: tl.constexpr, HOW: tl.constexpr, IGNORE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * B + tl.arange(0, B)
    live = i < count
    k, r = i // rows, i % rows
    if q is None:
        at = tl.full((B,), number, COMPUTE)
    else:
        at = tl.load(q + k * q_step, live)
    row = ordered + offset(r, sizes, rows_at)
    below, above, weight, valid = _between(row, step, n, at, live, steps, COMPUTE, HOW, IGNORE)
    a = tl.load(row + below * step, valid, other=float("nan"))
    if HOW == "linear" or HOW == "midpoint":
        b = tl.load(row + above * step, valid, other=float("nan"))
        a = tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))
    tl.store(out + offset(r, sizes, out_rows) + k * out_q, a, live)


@jit
def _quantile_grad(
    dx, grad, ordered, indices, q, number, sizes, grad_rows, rows_at, grad_q, step, q_step, quantiles, count, n, steps,
    COMPUTE: tl.constexpr, HOW: tl.constexpr, IGNORE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Each element, by its rank, adds up what the quantiles next to it give.
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * B + tl.arange(0, B)
    live = i < count
    r, rank = i // n, i % n
    at = offset(r, sizes, rows_at)
    total = tl.zeros((B,), COMPUTE)
    for k in range(quantiles):
        if q is None:
            here = tl.full((B,), number, COMPUTE)
        else:
            here = tl.load(q + k * q_step + i * 0, live)
        below, above, weight, valid = _between(ordered + at, step, n, here, live, steps, COMPUTE, HOW, IGNORE)
        g = tl.load(grad + offset(r, sizes, grad_rows) + k * grad_q, valid, other=0)
        total += tl.where(rank == below, g * (1 - weight), 0) + tl.where(rank == above, g * weight, 0)
    place = tl.load(indices + at + rank * step, live, other=0)
    tl.store(dx + at + place * step, total, live)


_QUANTILE = {None: fill(_quantile, "quantile"), float: fill(_quantile, "quantile", {"number": "fp64"})}
_QUANTILE_GRAD = {
    None: fill(_quantile_grad, "quantile_grad"),
    float: fill(_quantile_grad, "quantile_grad", {"number": "fp64"}),
}
_TILE = 256


def _ordered(input: Tensor, dim: int, indices: bool) -> tuple[Tensor, Tensor | None]:
    """The elements in order along ``dim``, dense, and where they were."""
    values = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    places = torch.empty(input.shape, dtype=torch.int64, device=input.device) if indices else None
    sort_into(values, places, input, dim, False)
    return values, places


def _rows(ordered: Tensor, dim: int, *others: Sequence[int]) -> tuple[int, _layout.Strides, list[_layout.Strides]]:
    """How many rows there are along ``dim``, their sizes, and their strides in ``ordered`` and ``others``."""
    shape, strides = list(ordered.shape), list(ordered.stride())
    del shape[dim], strides[dim]
    sizes, by_row = _layout.collapse(shape, [tuple(strides), *map(tuple, others)])
    return math.prod(shape), sizes, by_row


def _quantile_space(
    ordered: Tensor, result: Tensor, q: Any, dim: int | None, keepdim: bool
) -> tuple[int, int, int, _layout.Strides, list[_layout.Strides], int]:
    """Rows, elements of a row, quantiles; sizes and strides of rows in ``ordered`` and ``result``; its stride of quantiles."""
    many = isinstance(q, Tensor) and q.ndim == 1
    strides = list(result.stride())
    along = strides.pop(0) if many else 0
    if dim is None:
        strides = []
    elif keepdim and strides:
        del strides[dim]
    dim = dim or 0
    rows, sizes, by_row = _rows(ordered, dim, strides)
    return rows, ordered.shape[dim], q.numel() if isinstance(q, Tensor) else 1, sizes, by_row, along


def _quantiles(
    outs: tuple[Tensor, ...], input: Tensor, q: Any, dim: int | None, keepdim: bool, how: str, ignore: bool
) -> None:
    name, out = "nanquantile" if ignore else "quantile", outs[0]
    if not isinstance(q, Tensor) and not 0 <= q <= 1:
        raise ArgumentError(f"{name}: q must be in the range [0, 1], given {q!r}")
    input = flat(input) if dim is None or not input.ndim else input
    at = None if dim is None else dim % input.ndim
    values, _ = _ordered(input, at or 0, False)
    rows, n, count, sizes, (rows_at, out_rows), along = _quantile_space(values, out, q, at, keepdim)
    if not rows * count:
        return
    number = None if isinstance(q, Tensor) else float(q)
    meta = dict(
        COMPUTE=TRITON[input.dtype], HOW=how, IGNORE=ignore, B=_TILE,
        WIDE=_layout.any_wide(values, out), num_warps=4,
    )  # fmt: skip
    arguments = (
        out, values, None if number is not None else q, number, sizes, out_rows, rows_at, along, values.stride(at or 0),
        q.stride(0) if number is None and q.ndim else 0, rows, rows * count, n, n.bit_length(),
    )  # fmt: skip
    launch(_QUANTILE[None if number is None else float], (_layout.cdiv(rows * count, _TILE),), arguments, meta)


def _back(ignore: bool) -> Callable[..., dict[str, Tensor]]:
    def gradient(
        grad: Tensor, input: Tensor, q: Any, dim: int | None, keepdim: bool, interpolation: str
    ) -> dict[str, Tensor]:
        dtype = input.dtype
        dx = torch.empty(input.shape, dtype=dtype, device=grad.device)
        input = flat(input) if dim is None or not input.ndim else input
        at = None if dim is None else dim % input.ndim
        values, indices = _ordered(input, at or 0, True)
        rows, n, count, sizes, (rows_at, grad_rows), along = _quantile_space(values, grad, q, at, keepdim)
        number = None if isinstance(q, Tensor) else float(q)
        meta = dict(
            COMPUTE=TRITON[dtype], HOW=interpolation, IGNORE=ignore, B=_TILE, num_warps=4,
            WIDE=_layout.any_wide(values, grad),
        )  # fmt: skip
        arguments = (
            dx, grad, values, indices, None if number is not None else q, number, sizes, grad_rows, rows_at, along,
            values.stride(at or 0), q.stride(0) if number is None and q.ndim else 0, count, rows * n, n, n.bit_length(),
        )  # fmt: skip
        if rows:
            launch(_QUANTILE_GRAD[None if number is None else float], (_layout.cdiv(rows * n, _TILE),), arguments, meta)
        return {"input": dx}

    return gradient


@operator(aten="quantile", floats=("input",))
def quantile(
    input: Tensor, q: Tensor | Number, dim: int | None = None, keepdim: bool = False, *,
    interpolation: str = "linear", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The element at ``q`` (in [0, 1], a number or a vector, whose dimension comes first) of the way through the sorted ``dim``.

    float32 and float64. A row with a NaN gives NaN; ``interpolation`` says what lies between two elements. A ``q`` outside
    [0, 1] in a tensor raises on the CPU and gives NaN on an accelerator. Source: ``torch.quantile``.
    """
    return torch.quantile(input, q, dim, keepdim, interpolation=interpolation)  # type: ignore[arg-type]


@operator(aten="nanquantile", floats=("input",))
def nanquantile(
    input: Tensor, q: Tensor | Number, dim: int | None = None, keepdim: bool = False, *,
    interpolation: str = "linear", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`quantile` of the elements that are not NaN; NaN of a row without any. Source: ``torch.nanquantile``."""
    return torch.nanquantile(input, q, dim, keepdim, interpolation=interpolation)  # type: ignore[arg-type]


@quantile.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, q: Any, dim: int | None, keepdim: bool, interpolation: str
) -> None:
    _quantiles(outs, input, q, dim, keepdim, interpolation, False)


@nanquantile.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, q: Any, dim: int | None, keepdim: bool, interpolation: str
) -> None:
    _quantiles(outs, input, q, dim, keepdim, interpolation, True)


_NAMES = ("grad", "input", "q", "dim", "keepdim", "interpolation")
quantile.set_gradient(_back(False), _NAMES, of=("input",))
nanquantile.set_gradient(_back(True), _NAMES, of=("input",))


# -- k-th value and medians ------------------------------------------------------------------------------------------------


def _picked(input: Tensor, at: Tensor | int, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The elements and indices at ``at`` (with size 1 along ``dim``) in the order that a stable sort gives."""
    if not input.ndim:
        return input.clone(), torch.zeros((), dtype=torch.int64, device=input.device)
    values, indices = torch.sort(input, dim=dim, stable=True)
    if isinstance(at, int):
        values, indices = values.narrow(dim, at, 1), indices.narrow(dim, at, 1)
    else:
        values, indices = values.gather(dim, at), indices.gather(dim, at)
    if not keepdim:
        values, indices = values.squeeze(dim), indices.squeeze(dim)
    return values.contiguous(), indices.contiguous()


@operator(aten="kthvalue", named=torch.return_types.kthvalue)
def kthvalue(
    input: Tensor, k: int, dim: int = -1, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.kthvalue:
    """The ``k``-th smallest element (from 1) along ``dim``, and its index; of equal elements in the order of their indices.

    Source: ``torch.kthvalue``.
    """
    # torch's own index of equal elements is any of theirs; its refusals are ours.
    torch.kthvalue(input, k, dim, keepdim)
    return torch.return_types.kthvalue(_picked(input, k - 1, dim, keepdim))


@kthvalue.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, k: int, dim: int, keepdim: bool) -> None:
    if not outs[0].numel():
        return
    if input.ndim:
        _without_bools("kthvalue", input)
    size = input.shape[dim] if input.ndim else 1
    if not 1 <= k <= size:
        raise ArgumentError(f"kthvalue: k is from 1 to {size}, the size of dimension {dim}; given {k}")
    shape = list(input.shape) or [1]
    shape[dim] = k
    found = [torch.empty(shape, dtype=d, device=input.device) for d in (input.dtype, torch.int64)]
    topk_into(found[0], found[1], input if input.ndim else input.view(1), k, dim, False)
    for out, all_of in zip(outs, found):
        copy(all_of.narrow(dim, k - 1, 1) if keepdim and input.ndim else all_of.select(dim, k - 1), out)


@jit
def _middle(
    values, indices, ordered, places, sizes, value_rows, index_rows, rows_at, step, rows, n, steps,
    IGNORE: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    i = i * B + tl.arange(0, B)
    live = i < rows
    at = offset(i, sizes, rows_at)
    count = i * 0 + n
    if ordered.dtype.element_ty.is_floating():
        count = _numbers(ordered + at, step, n, live, steps)
    if IGNORE:
        rank = tl.maximum(count - 1, 0) // 2
    else:
        rank = tl.where(count < n, count, (n - 1) // 2)
    at += rank * step
    tl.store(values + offset(i, sizes, value_rows), tl.load(ordered + at, live), live)
    if indices is not None:
        tl.store(indices + offset(i, sizes, index_rows), tl.load(places + at, live), live)


def _median(outs: Sequence[Tensor], input: Tensor, dim: int, keepdim: bool, ignore: bool, name: str) -> None:
    if not outs[0].numel():
        return
    _without_bools(name, input)
    input = input if input.ndim else input.view(1)
    dim %= input.ndim
    ordered, places = _ordered(input, dim, len(outs) > 1)
    strides = [list(o.stride()) for o in (outs[0], outs[-1])]
    if keepdim:
        for one in strides:
            del one[dim : dim + 1]
    rows, sizes, (rows_at, value_rows, index_rows) = _rows(ordered, dim, *strides)
    n = input.shape[dim]
    meta = dict(IGNORE=ignore, B=64, WIDE=_layout.is_wide(input.shape, [ordered.stride()]), num_warps=2)
    where = (outs[0], outs[1] if len(outs) > 1 else None, ordered, places, sizes, value_rows, index_rows, rows_at)
    launch(_middle, (_layout.cdiv(rows, 64),), (*where, ordered.stride(dim), rows, n, n.bit_length()), meta)


def _without_bools(name: str, input: Tensor) -> None:
    if input.dtype == torch.bool:
        raise ArgumentError(f"{name}: input is a bool tensor, which torch refuses too; convert it to uint8")


def _middles(input: Tensor, dim: int, keepdim: bool, ignore: bool) -> tuple[Tensor, Tensor]:
    n = input.shape[dim] if input.ndim else 1
    count = n - (input != input).sum(dim, keepdim=True)
    rank = (count - 1).clamp_min(0) // 2 if ignore else torch.where(count < n, count, (n - 1) // 2)
    return _picked(input, rank, dim, keepdim)


@operator(aten="median")
def median_all(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The lower median of all elements, NaN if one is NaN: :func:`median` without ``dim``. Source: ``torch.median``."""
    return torch.median(input)


@operator(aten="nanmedian")
def nanmedian_all(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The lower median of all elements but NaNs: :func:`nanmedian` without ``dim``. Source: ``torch.nanmedian``."""
    return torch.nanmedian(input)


@operator(aten="median.dim", named=torch.return_types.median)
def median_dim(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.median:
    """Lower medians along ``dim`` and their indices: :func:`median` with ``dim``. Source: ``torch.median``."""
    # torch's own index of equal elements is any of theirs; its refusals are ours.
    torch.median(input, dim, keepdim)
    return torch.return_types.median(_middles(input, dim, keepdim, False))


@operator(aten="nanmedian.dim", named=torch.return_types.nanmedian)
def nanmedian_dim(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.nanmedian:
    """Lower medians of numbers along ``dim`` and their indices: :func:`nanmedian` with ``dim``. Source: ``torch.nanmedian``."""
    torch.nanmedian(input, dim, keepdim)
    return torch.return_types.nanmedian(_middles(input, dim, keepdim, True))


def _of_all(outs: tuple[Tensor, ...], input: Tensor, ignore: bool, name: str) -> None:
    _without_bools(name, input)
    if not input.numel():
        nothing = float("nan") if input.dtype.is_floating_point else torch.iinfo(input.dtype).min
        _FILL({"value": nothing}, [outs[0]], compute_type(input.dtype))
        return
    _median(outs, flat(input), 0, False, ignore, name)


@jit
def _given(value):
    return value


_FILL = Elementwise("median_of_nothing", _given)


@median_all.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor) -> None:
    _of_all(outs, input, False, "median")


@nanmedian_all.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor) -> None:
    _of_all(outs, input, True, "nanmedian")


@median_dim.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, dim: int, keepdim: bool) -> None:
    _median(outs, input, dim, keepdim, False, "median")


@nanmedian_dim.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, dim: int, keepdim: bool) -> None:
    _median(outs, input, dim, keepdim, True, "nanmedian")


median_all.gradient_by(_extreme_all)
nanmedian_all.gradient_by(_extreme_all)
median_dim.gradient_by(_at_index)
nanmedian_dim.gradient_by(_at_index)
kthvalue.gradient_by(_at_index)


@overload
def median(input: Tensor, *, out: Tensor | None = None) -> Tensor: ...
@overload
def median(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.median: ...
def median(input: Tensor, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """The lower median of all elements; with ``dim`` (values, indices) along it. Source: ``torch.median``.

    NaN if there is one, at the first of them; of equal elements the index is that of a stable sort. The gradient of
    ``median(input)`` is shared by ties, that of the values along ``dim`` goes to the element at the index.
    """
    if not args and not kwargs:
        return median_all(input, out=out)
    found = median_dim(input, *args, out=out, **kwargs)
    return found if out is None else torch.return_types.median(found)


@overload
def nanmedian(input: Tensor, *, out: Tensor | None = None) -> Tensor: ...
@overload
def nanmedian(
    input: Tensor, dim: int, keepdim: bool = False, *, out: tuple[Tensor, Tensor] | None = None
) -> torch.return_types.nanmedian: ...
def nanmedian(input: Tensor, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """:func:`median` of the elements that are not NaN; NaN where there is none. Source: ``torch.nanmedian``."""
    if not args and not kwargs:
        return nanmedian_all(input, out=out)
    found = nanmedian_dim(input, *args, out=out, **kwargs)
    return found if out is None else torch.return_types.nanmedian(found)
