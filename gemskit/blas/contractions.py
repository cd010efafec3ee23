"""Sums of products over named dimensions: two tensors at a time, as one matrix product of views of them."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._dtypes import Number
from gemskit._op import operator
from gemskit.blas._drive import Product
from gemskit.blas._integers import Integers
from gemskit.blas._terms import multiply, no_bools, one_dtype, plain
from gemskit.blas.matmul import addmm, addmm_, matmul
from gemskit.errors import ArgumentError, ShapeError
from gemskit.pointwise._place import copy
from gemskit.pointwise.arithmetic import mul
from gemskit.pointwise.copying import contiguous
from gemskit.reduce.sums import sum

_FLOATS, _INTEGERS = Product("contraction", plain), Integers("contraction", plain)


@operator()
def _contraction(
    input: Tensor, other: Tensor, first: str, second: str, result: str, *, out: Tensor | None = None
) -> Tensor:
    """``einsum("first,second->result")`` where each letter is in two of the three."""
    return torch.einsum(f"{first},{second}->{result}", input, other)


def _seen(t: Tensor, letters: str, space: str) -> Tensor:
    """``t`` with its dimensions in the order of ``space``, of size 1 where it lacks one."""
    t = t.permute([letters.index(c) for c in space if c in letters])
    for d, c in enumerate(space):
        if c not in letters:
            t = t.unsqueeze(d)
    return t


def _merged(t: Tensor, letters: str, batch: str, *groups: str) -> Tensor:
    """The view of ``t`` whose last dimensions are ``groups``; the error of ``view`` where there is none."""
    t = _seen(t, letters, batch + "".join(groups))
    sizes = dict(zip(letters, _sizes(t, batch + "".join(groups), letters)))
    return t.view([sizes[c] for c in batch] + [math.prod(sizes[c] for c in g) for g in groups])


def _sizes(t: Tensor, space: str, letters: str) -> list[int]:
    return [t.shape[space.index(c)] for c in letters]


@_contraction.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, other: Tensor, first: str, second: str, result: str) -> None:
    one_dtype("einsum", input=input, other=other)
    out = outs[0]

    def by_memory(letters: set[str], t: Tensor, of: str) -> str:
        return "".join(sorted(letters, key=lambda c: -t.stride(of.index(c))))

    a, b, kept = set(first), set(second), set(result)
    inner = by_memory((a & b) - kept, input, first)
    rows, columns = by_memory(a - b, out, result), by_memory(b - a, out, result)
    if not (inner and rows and columns):
        space = result + inner
        no_bools("einsum", input.dtype, out.numel() * math.prod(_sizes(input, first, inner)) if inner else 0)
        x, y = _seen(input, first, space), _seen(other, second, space)
        out = _seen(out, result, space)
        multiply(x, y, torch.broadcast_shapes(x.shape, y.shape), (out.shape, out.dtype), out=out)
        return
    batch = by_memory(a & b & kept, out, result)
    x, y = _matrices(input, first, batch, rows, inner), _matrices(other, second, batch, inner, columns)
    product = _FLOATS if input.dtype.is_floating_point else _INTEGERS
    try:
        into = _merged(out, result, batch, rows, columns)
    except RuntimeError:
        into = torch.empty((*x.shape[:-1], y.shape[-1]), dtype=out.dtype, device=out.device)
        product.plan(x, y, {}, into)(into, x, y, {})
        sizes = dict(zip(result, out.shape))
        order = batch + rows + columns
        copy(_seen(into.view([sizes[c] for c in order]), order, result), out)
    else:
        product.plan(x, y, {}, into)(into, x, y, {})


def _matrices(t: Tensor, letters: str, batch: str, *groups: str) -> Tensor:
    """``t`` as matrices of its groups of dimensions, copied only where it has to be."""
    try:
        return _merged(t, letters, batch, *groups)
    except RuntimeError:
        t = _seen(t, letters, batch + "".join(groups))
        t = copy(t, torch.empty(t.shape, dtype=t.dtype, device=t.device))
        return _merged(t, batch + "".join(groups), batch, *groups)


@_contraction.gradient_by
def _(
    grad: Tensor, input: Tensor, other: Tensor, first: str, second: str, result: str, needs: set[str]
) -> dict[str, Tensor]:
    return {
        **({"input": _contraction(grad, other, result, second, first)} if "input" in needs else {}),
        **({"other": _contraction(grad, input, result, first, second)} if "other" in needs else {}),
    }


def _without(name: str, t: Tensor, letters: str, dropped: set[str]) -> tuple[Tensor, str]:
    """``t`` summed over what nothing else has."""
    dims = tuple(d for d, c in enumerate(letters) if c in dropped)
    no_bools(name, t.dtype, len(dims))
    return (sum(t, dims, dtype=t.dtype), "".join(c for c in letters if c not in dropped)) if dims else (t, letters)


def _one(name: str, t: Tensor, letters: str, sizes: dict[str, int]) -> tuple[Tensor, str]:
    """``t`` with each letter once, as a diagonal, and without dimensions of size 1 that another tensor broadcasts."""
    for c in [c for c in dict.fromkeys(letters) if letters.count(c) > 1]:
        while letters.count(c) > 1:
            d, e = letters.index(c), letters.rindex(c)
            if t.shape[d] != t.shape[e]:
                raise ShapeError(f"{name}: {c!r} is {t.shape[d]} and {t.shape[e]} in one tensor")
            t = t.diagonal(0, d, e)
            letters = letters[:d] + letters[d + 1 : e] + letters[e + 1 :] + c
    for c in letters:
        size = t.shape[letters.index(c)]
        if size == 1 != sizes[c]:
            t, letters = t.squeeze(letters.index(c)), letters.replace(c, "")
        elif size != sizes[c]:
            raise ShapeError(f"{name}: {c!r} is {size} in one tensor and {sizes[c]} in another")
    return t, letters


def _contract(
    name: str, operands: Sequence[Tensor], terms: Sequence[str], result: str, out: Tensor | None = None
) -> Tensor:
    """The sum of products over all letters that are not in ``result``, two tensors at a time from the left."""
    if len(operands) > 1:
        one_dtype(name, **{f"{k}": t for k, t in enumerate(operands)})
    sizes: dict[str, int] = {}
    for t, letters in zip(operands, terms):
        if t.ndim != len(letters):
            raise ShapeError(f"{name}: {letters!r} names {len(letters)} dimensions of a tensor of {list(t.shape)}")
        for c, n in zip(letters, t.shape):
            sizes[c] = n if sizes.get(c, 1) == 1 else sizes[c]
    if len(set(result)) < len(result) or not set(result) <= set(sizes):
        raise ArgumentError(f"{name}: the result {result!r} names each dimension once, of {''.join(sizes)!r}")
    left, have = _one(name, operands[0], terms[0], sizes)
    for k in range(1, len(operands)):
        right, letters = _one(name, operands[k], terms[k], sizes)
        later = set(result).union(*terms[k + 1 :])
        left, have = _without(name, left, have, set(have) - set(letters) - later)
        right, letters = _without(name, right, letters, set(letters) - set(have) - later)
        last = k == len(operands) - 1
        kept = result if last else "".join(c for c in dict.fromkeys(have + letters) if c in later)
        left = _contraction(left, right, have, letters, kept, out=out if last else None)
        have = kept
    left, have = _without(name, left, have, set(have) - set(result))
    return left if have == result else left.permute([have.index(c) for c in result])


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """The sum of products that ``equation`` names: ``einsum("bij,bjk->bik", a, b)``. Source: ``torch.einsum``.

    Letters name dimensions, ``...`` those that broadcast, a letter twice in one term its diagonal. Tensors are multiplied from
    the left, each pair as one matrix product of views; where nothing is multiplied or summed the result is a view.
    """
    tensors: Sequence[Tensor] = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise ArgumentError(f"einsum: {equation!r} is of {len(terms)} tensors, given {len(tensors)}")
    spare = [c for c in string.ascii_letters if c not in equation]
    # The dimensions that ... stands for, aligned at the last.
    rest = [t.ndim - len(term) + 3 if "..." in term else 0 for t, term in zip(tensors, terms)]
    if min(rest) < 0 or max(rest) > len(spare):
        raise ShapeError(f"einsum: {equation!r} does not fit tensors of {[list(t.shape) for t in tensors]}")
    dots = "".join(spare[: max(rest)])
    terms = [term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, rest)]
    if not arrow:
        once = sorted(c for c in {*left} - {*".,"} if left.count(c) == 1)
        result = "..." + "".join(once) if dots else "".join(once)
    result = result.replace("...", dots)
    if not all(c in string.ascii_letters for c in "".join(terms) + result):
        raise ArgumentError(f"einsum: {equation!r} is not letters, commas, ... and one ->")
    return _contract("einsum", tensors, terms, result)


def tensordot(a: Tensor, b: Tensor, dims: int | Sequence[Sequence[int]] = 2, out: Tensor | None = None) -> Tensor:
    """The sum of products over ``dims``: the last ``n`` of ``a`` with the first ``n`` of ``b``, or two lists of dimensions.

    Source: ``torch.tensordot``.
    """
    if isinstance(dims, int):
        if not 0 <= dims <= min(a.ndim, b.ndim):
            raise ArgumentError(f"tensordot: dims {dims} of tensors of {list(a.shape)} and {list(b.shape)}")
        pairs = list(zip(range(a.ndim - dims, a.ndim), range(dims)))
    else:
        first, second = dims
        if len(first) != len(second):
            raise ArgumentError(f"tensordot: as many dimensions of one as of the other, given {dims}")
        pairs = [(d % a.ndim, e % b.ndim) for d, e in zip(first, second)]
    letters = string.ascii_letters[: a.ndim + b.ndim]
    other = list(letters[a.ndim :])
    for d, e in pairs:
        other[e] = letters[d]
    summed = {letters[d] for d, _ in pairs}
    terms = letters[: a.ndim], "".join(other)
    return _contract("tensordot", (a, b), terms, "".join(c for c in terms[0] + terms[1] if c not in summed), out)


def inner(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``sum(input[i, k] * other[j, k], k)`` of (.., K) and (.., K): the other dimensions of both. Source: ``torch.inner``.

    A tensor without dimensions multiplies.
    """
    if not input.ndim or not other.ndim:
        return mul(input, other, out=out)
    return tensordot(input, other, ([-1], [-1]), out)


def _flat(batch1: Tensor, batch2: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrices whose product is the sum of those of the batches."""
    if batch1.ndim != 3 or batch2.ndim != 3 or batch1.shape[0] != batch2.shape[0]:
        raise ShapeError(f"addbmm: accepted are two batches, given {list(batch1.shape)} and {list(batch2.shape)}")
    first, second = contiguous(batch1.transpose(0, 1)), contiguous(batch2)
    if first.shape[2] != second.shape[1]:
        raise ShapeError(f"addbmm: the matrices of {list(batch1.shape)} and {list(batch2.shape)} do not fit")
    n, b, m = first.shape
    return first.view(n, b * m), second.view(b * m, second.shape[2])


def addbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Number = 1, alpha: Number = 1, out: Tensor | None = None
) -> Tensor:
    """``beta * input + alpha * sum(batch1[i] @ batch2[i])`` of (B, N, K) and (B, K, M): (N, M). Source: ``torch.addbmm``.

    ``input`` broadcasts to the result. One product of length B * K, as :func:`addmm`, whose dtypes it takes.
    """
    return addmm(input, *_flat(batch1, batch2), beta=beta, alpha=alpha, out=out)


def addbmm_(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Number = 1, alpha: Number = 1) -> Tensor:
    """In-place :func:`addbmm`: overwrites ``input``."""
    return addmm_(input, *_flat(batch1, batch2), beta=beta, alpha=alpha)


def linalg_multi_dot(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """The product of matrices in the order that takes the fewest multiplications; the first and last may be vectors.

    Source: ``torch.linalg.multi_dot``.
    """
    if len(tensors) < 2:
        raise ArgumentError(f"linalg_multi_dot: accepted are two tensors or more, given {len(tensors)}")
    sizes = [1 if tensors[0].ndim == 1 else tensors[0].shape[0], *(t.shape[-1] for t in tensors[:-1])]
    sizes.append(1 if tensors[-1].ndim == 1 else tensors[-1].shape[-1])
    sizes[-2] = tensors[-1].shape[0]

    @functools.cache
    def cheapest(i: int, j: int) -> tuple[int, int]:
        """The multiplications of tensors i to j, and after which of them the last product splits."""
        if i == j:
            return 0, i
        return min(
            (cheapest(i, k)[0] + cheapest(k + 1, j)[0] + sizes[i] * sizes[k + 1] * sizes[j + 1], k) for k in range(i, j)
        )

    def product(i: int, j: int) -> Tensor:
        if i == j:
            return tensors[i]
        k = cheapest(i, j)[1]
        whole = (i, j) == (0, len(tensors) - 1)
        return matmul(product(i, k), product(k + 1, j), out=out if whole else None)  # type: ignore[no-any-return]

    return product(0, len(tensors) - 1)


def chain_matmul(*matrices: Tensor, out: Tensor | None = None) -> Tensor:
    """:func:`linalg_multi_dot` of two matrices or more; of one, that one itself. Source: ``torch.chain_matmul``."""
    return linalg_multi_dot(matrices, out=out) if len(matrices) > 1 else matrices[0]
