"""The kernels behind scatter_reduce: extremes, means, counts, and the gradients of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import compute_type
from gemskit._jit import jit
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise._indexing import along, at_least_1d, corner, read
from gemskit.pointwise._place import clear, zeros
from gemskit.reduce import _scatter
from gemskit.reduce._scatter import Where, _rank


@jit
def _ranked(input, least):
    return _rank(input, least)


@jit
def _unranked(rank, input, hits):
    if input.dtype == tl.float64:
        value = (rank ^ ((rank >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    elif input.dtype == tl.float32:
        value = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        value = rank.to(input.dtype)
    if hits is not None:
        value = tl.where(hits != 0, value, input)
    return value


@jit
def _lowest(index, least, wide):
    if wide:
        return index.to(tl.int64) * 0 + (0x7FFFFFFFFFFFFFFF if least else -0x7FFFFFFFFFFFFFFF - 1)
    else:
        return index * 0 + (0x7FFFFFFF if least else -0x80000000)


@jit
def _unhit(input, hits):
    return tl.where(hits != 0, 0, input)


@jit
def _mean(total, hits, include_self):
    n = tl.maximum(hits + include_self, 1)
    if total.dtype.is_floating():
        return language.div(total, n.to(total.dtype))
    else:
        # Rounded down, where the hardware truncates.
        n = n.to(tl.int64)
        t = total.to(tl.int64)
        q = t // n
        return tl.where((t % n != 0) & (t < 0), q - 1, q)


_RANK = Elementwise("scatter_rank", _ranked)
_LOWEST = Elementwise("scatter_lowest", _lowest)
_UNRANK = Elementwise("scatter_unrank", _unranked, keep=("rank", "hits"))
_UNHIT = Elementwise("scatter_unhit", _unhit, keep=("hits",))
_MEAN = Elementwise("scatter_mean", _mean, keep=("hits",))


def _hits(shape: Sequence[int], device: torch.device, where: Where) -> Tensor:
    """How often each element is written to."""
    count = zeros(shape, torch.int32, device)
    _scatter.count(count, where)
    return count


def _extreme(out: Tensor, input: Tensor, where: Where, source: Tensor, least: bool, include_self: bool) -> None:
    compute = compute_type(out.dtype)
    wide = compute.itemsize == 8
    rank = torch.empty(out.shape, dtype=torch.int64 if wide else torch.int32, device=out.device)
    hits = None
    if include_self:
        _RANK({"input": input, "least": least}, [rank], compute)
    else:
        _LOWEST({"least": least, "wide": wide}, [rank], torch.int64)
        hits = _hits(out.shape, out.device, where)
    _scatter.extreme(rank, where, source, least, compute)
    _UNRANK({"rank": rank, "input": input, "hits": hits}, [out], compute)


def reduce_into(
    out: Tensor, input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool
) -> None:
    """``out`` = ``input`` with ``source`` reduced into it at the spots of the index."""

    def where(t: Tensor) -> Any:
        return along(t, dim, index)

    if reduce == "prod":
        _scatter.multiply(out, input, dim, index, source, include_self)
        return
    if reduce in ("amax", "amin"):
        _extreme(out, input, where, source, reduce == "amin", include_self)
        return
    mean = reduce == "mean"
    if include_self and not mean:
        _scatter.add(out, input, where, source)
        return
    hits = _hits(out.shape, out.device, where)
    compute = compute_type(out.dtype)
    # A mean of halves is divided before it is rounded.
    dtype = compute if compute.is_floating_point else out.dtype
    total = torch.empty(out.shape, dtype=dtype, device=out.device) if mean else out
    start = input
    if not include_self:
        start = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        _UNHIT({"input": input, "hits": hits}, [start], compute)
    _scatter.add(total, start, where, source)
    if mean:
        _MEAN({"total": total, "hits": hits, "include_self": int(include_self)}, [out], compute)


# -- gradients -------------------------------------------------------------------------------------------------------------


@jit
def _equal(a, b):
    return a == b


@jit
def _share(grad, n):
    return language.div(grad, n.to(grad.dtype))


@jit
def _kept(value, when):
    return value * when.to(value.dtype)


@jit
def _self_product(grad, out, input, rest):
    # Of an input that is zero the product of all the others is asked for.
    return tl.where(input == 0, grad * rest, language.div(grad * out, tl.where(input == 0, 1, input)))


@jit
def _nonzero(input):
    return tl.where(input == 0, 1, input)


@jit
def _is_zero(src):
    return src == 0


@jit
def _filled(src, zeros):
    return tl.where((src == 0) & (zeros == 1), 1, src)


@jit
def _src_product(src, zeros, grad, out, rest):
    return tl.where((src == 0) & (zeros == 1), grad * rest, language.div(grad * out, tl.where(src == 0, 1, src)))


_EQUAL = Elementwise("scatter_equal", _equal)
_IS_ZERO = Elementwise("scatter_is_zero", _is_zero)
_NONZERO = Elementwise("scatter_nonzero", _nonzero)
_SHARE = Elementwise("scatter_share", _share, keep=("n",))
_KEPT = Elementwise("scatter_kept", _kept, keep=("when",))
_SELF_PRODUCT = Elementwise("scatter_prod_grad_input", _self_product)
_FILLED = Elementwise("scatter_filled", _filled, keep=("zeros",))
_SRC_PRODUCT = Elementwise("scatter_prod_grad_src", _src_product, keep=("zeros",))


def gradients(
    grad: Tensor, input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool, out: Tensor,
    needs: set[str],
) -> dict[str, Tensor | None]:  # fmt: skip
    """By parameter."""
    compute, device = compute_type(out.dtype), grad.device
    if reduce == "sum" and include_self and "src" not in needs:
        return {"input": grad}
    given, shape = grad, input.shape
    grad, input, index, out = (at_least_1d(t) for t in (grad, input, index, out))
    whole = at_least_1d(src)
    part = corner(whole, index)

    def where(t: Tensor) -> Any:
        return along(t, dim, index)

    def picked(t: Tensor, dtype: torch.dtype = compute) -> Tensor:
        found = torch.empty(index.shape, dtype=dtype, device=device)
        read(found, t, where(t))
        return found

    def like(t: Tensor, dtype: torch.dtype = compute) -> Tensor:
        return torch.empty(t.shape, dtype=dtype, device=device)

    dself: Tensor | None = None
    dsrc = like(src, out.dtype)
    if tuple(whole.shape) != tuple(index.shape):
        clear(dsrc)
    dpart = corner(dsrc, index)
    hits = None if include_self and reduce != "mean" else _hits(out.shape, device, where)
    if reduce in ("sum", "mean"):
        share = grad
        if reduce == "mean":
            share = like(grad)
            _MEAN({"total": grad, "hits": hits, "include_self": int(include_self)}, [share], compute)
        dself = share
        read(dpart, share, where(share))
    elif reduce == "prod":
        if "input" in needs:
            dself, ones, rest = like(input), like(input, out.dtype), like(input)
            _NONZERO({"input": input}, [ones], compute)
            _scatter.multiply(rest, ones, dim, index, whole, include_self)
            _SELF_PRODUCT({"grad": grad, "out": out, "input": input, "rest": rest}, [dself], compute)
        if "src" in needs:
            _src_products(dpart, grad, input, dim, index, part, include_self, out, picked)
    else:
        mine, theirs, n = like(input, torch.int32), like(index, torch.int32), like(input, torch.int32)
        _EQUAL({"a": input, "b": out}, [mine], compute)
        _EQUAL({"a": part, "b": picked(out)}, [theirs], compute)
        _scatter.add(n, mine, where, theirs)
        share, dself = like(grad), like(input)
        _SHARE({"grad": grad, "n": n}, [share], compute)
        _KEPT({"value": share, "when": mine}, [dself], compute)
        _KEPT({"value": picked(share), "when": theirs}, [dpart], compute)
    final: Tensor | None = None
    if include_self and reduce == "sum":
        final = given
    elif dself is not None:
        final = torch.empty(shape, dtype=out.dtype, device=device)
        if include_self:
            _scatter.start(at_least_1d(final), dself)
        else:
            _UNHIT({"input": grad if reduce == "mean" else dself, "hits": hits}, [at_least_1d(final)], compute)
    return {"input": final, "src": dsrc}


def _src_products(
    out: Tensor, grad: Tensor, input: Tensor, dim: int, index: Tensor, src: Tensor, include_self: bool, result: Tensor,
    picked: Any,
) -> None:  # fmt: skip
    """The gradient of a product with respect to its factors: the product of the others, also where one of them is zero."""
    compute, device = compute_type(out.dtype), out.device

    def where(t: Tensor) -> Any:
        return along(t, dim, index)

    zero, count = torch.empty(index.shape, dtype=torch.int32, device=device), zeros(input.shape, torch.int32, device)
    _IS_ZERO({"src": src}, [zero], compute)
    _scatter.add(count, count, where, zero)
    alike = picked(count, torch.int32)
    filled = torch.empty(index.shape, dtype=out.dtype, device=device)
    rest = torch.empty(input.shape, dtype=compute, device=device)
    _FILLED({"src": src, "zeros": alike}, [filled], compute)
    _scatter.multiply(rest, input, dim, index, filled, include_self)
    named: Mapping[str, Any] = {
        "src": src, "zeros": alike, "grad": picked(grad), "out": picked(result), "rest": picked(rest),
    }  # fmt: skip
    _SRC_PRODUCT(named, [out], compute)
