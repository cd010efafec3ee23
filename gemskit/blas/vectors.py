"""Products with vectors: every element of a matrix is read once, so memory is what bounds them."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit._dtypes import Number, accumulate_type, common_dtype, compute_type
from gemskit._jit import jit
from gemskit._op import operator
from gemskit.blas._terms import multiply, no_bools, one_dtype, plus, scaled, shaped, times
from gemskit.blas.matmul import Like
from gemskit.errors import ShapeError
from gemskit.pointwise._drive import Elementwise
from gemskit.pointwise.arithmetic import mul


@operator(aten="mv")
def mv(input: Tensor, vec: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Product of the matrix ``input`` (M, K) and the vector ``vec`` (K,): (M,), both of one dtype. Source: ``torch.mv``."""
    return torch.mv(input, vec)


@mv.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, vec: Tensor) -> None:
    one_dtype("mv", input=input, vec=vec)
    no_bools("mv", vec.dtype, input.numel())
    out = outs[0][:, None]
    multiply(input, vec, input.shape, (out.shape, out.dtype), out=out)


@mv.gradient_by
def _(grad: Tensor, input: Tensor, vec: Tensor, needs: set[str], like: Like) -> dict[str, Tensor]:
    grad, others = grad[:, None], {"input": vec, "vec": input}
    return {n: multiply(grad, other, input.shape, like[n]) for n, other in others.items() if n in needs}


_PLUS = Elementwise("plus", plus)


@operator(aten="addmv")
def addmv(
    input: Tensor, mat: Tensor, vec: Tensor, *, beta: Number = 1, alpha: Number = 1, out: Tensor | None = None
) -> Tensor:
    """``beta * input + alpha * (mat @ vec)``; ``input`` broadcasts to (M,) and is ignored where ``beta`` is 0.

    Source: ``torch.addmv``.
    """
    return torch.addmv(input, mat, vec, beta=beta, alpha=alpha)


@addmv.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, mat: Tensor, vec: Tensor, beta: Number, alpha: Number
) -> None:
    one_dtype("addmv", input=input, mat=mat, vec=vec)
    no_bools("addmv", mat.dtype, mat.numel())
    like = (mat.shape[0], 1), accumulate_type(mat.dtype)
    product = multiply(mat, vec, mat.shape, like)
    named = {"acc": product[:, 0], "input": input, "beta": beta, "alpha": alpha}
    _PLUS(named, outs, like[1])


addmv_ = addmv.inplace


@addmv.gradient_by
def _(
    grad: Tensor, mat: Tensor, vec: Tensor, beta: Number, alpha: Number, needs: set[str], like: Like
) -> dict[str, Tensor]:
    found = {"input": scaled(grad, beta, like["input"])} if "input" in needs else {}
    grad, others = grad[:, None], {"mat": vec, "vec": mat}
    found.update({n: multiply(grad, t, mat.shape, like[n], alpha) for n, t in others.items() if n in needs})
    return found


@operator(aten="dot")
def dot(input: Tensor, tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``sum(input * tensor)`` of two vectors (n,) of one dtype: (). Halves are summed in float32. Source: ``torch.dot``."""
    return torch.dot(input, tensor)


@dot.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, tensor: Tensor) -> None:
    one_dtype("dot", input=input, tensor=tensor)
    no_bools("dot", input.dtype, 1)
    out = outs[0][None]
    multiply(input, tensor, input.shape, (out.shape, out.dtype), out=out)


@dot.gradient_by
def _(grad: Tensor, input: Tensor, tensor: Tensor, needs: set[str], like: Like) -> dict[str, Tensor]:
    others = {"input": tensor, "tensor": input}
    return {n: multiply(grad, other, input.shape, like[n]) for n, other in others.items() if n in needs}


def vdot(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """:func:`dot` of real vectors. Source: ``torch.vdot``."""
    return dot(input, other, out=out)


@operator(aten="linalg_vecdot", floats=("x", "y"))
def linalg_vecdot(x: Tensor, y: Tensor, *, dim: int = -1, out: Tensor | None = None) -> Tensor:
    """``sum(x * y, dim)``, the two broadcast against each other. Halves are summed in float32.

    Source: ``torch.linalg.vecdot``.
    """
    return torch.linalg.vecdot(x, y, dim=dim)  # type: ignore[no-any-return]


@linalg_vecdot.kernel
def _(outs: tuple[Tensor, ...], keep: Any, x: Tensor, y: Tensor, dim: int) -> None:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    out = outs[0].unsqueeze(dim)
    multiply(x, y, shape, (out.shape, out.dtype), out=out)


@linalg_vecdot.gradient_by
def _(grad: Tensor, x: Tensor, y: Tensor, dim: int, needs: set[str], like: Like) -> dict[str, Tensor]:
    shape, grad = torch.broadcast_shapes(x.shape, y.shape), grad.unsqueeze(dim)
    return {n: multiply(grad, other, shape, like[n]) for n, other in {"x": y, "y": x}.items() if n in needs}


def outer(input: Tensor, vec2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``input[i] * vec2[j]`` of two vectors (n,) and (m,): (n, m), in the dtype of :func:`mul`. Source: ``torch.outer``."""
    if input.ndim != 1 or vec2.ndim != 1:
        raise ShapeError(f"outer: accepted are two vectors, given {list(input.shape)} and {list(vec2.shape)}")
    return mul(input[:, None], vec2, out=out)


#: Another name of torch's for it.
ger = outer


@jit
def _addr(input, vec1, vec2, beta, alpha):
    product = times(vec1 * vec2, alpha)
    return tl.where(beta == 0, product, times(input, beta) + product)


_ADDR = Elementwise("addr", _addr)


@operator(aten="addr")
def addr(
    input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: Number = 1, alpha: Number = 1, out: Tensor | None = None
) -> Tensor:
    """``beta * input + alpha * outer(vec1, vec2)``; ``input`` broadcasts and is ignored where ``beta`` is 0.

    Source: ``torch.addr``.
    """
    return torch.addr(input, vec1, vec2, beta=beta, alpha=alpha)


@addr.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, input: Tensor, vec1: Tensor, vec2: Tensor, beta: Number, alpha: Number
) -> None:
    named = {"input": input, "vec1": vec1[:, None], "vec2": vec2, "beta": beta, "alpha": alpha}
    dtype = common_dtype((input, vec1, vec2))
    _ADDR(named, outs, compute_type(dtype), None, dtype)


addr_ = addr.inplace


@addr.gradient_by
def _(
    grad: Tensor, vec1: Tensor, vec2: Tensor, beta: Number, alpha: Number, needs: set[str], like: Like
) -> dict[str, Tensor]:
    found = {"input": scaled(grad, beta, like["input"])} if "input" in needs else {}
    if "vec1" in needs:
        want = (*like["vec1"][0], 1), like["vec1"][1]
        found["vec1"] = multiply(grad, vec2, grad.shape, want, alpha).view(-1)
    if "vec2" in needs:
        found["vec2"] = multiply(grad, vec1[:, None], grad.shape, like["vec2"], alpha)
    return found


def _interleaved(input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a Kronecker product as views whose dimensions alternate."""
    rank = max(input.ndim, other.ndim)
    first, second = (t.view((1,) * (rank - t.ndim) + tuple(t.shape)) for t in (input, other))
    for d in range(rank):
        first, second = first.unsqueeze(2 * d + 1), second.unsqueeze(2 * d)
    return first, second


@operator(aten="kron")
def kron(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The Kronecker product: in the place of each element of ``input``, it times all of ``other``. Source: ``torch.kron``.

    Sizes multiply; what has fewer dimensions gets some of size 1 in front. Dtypes are promoted.
    """
    # torch 2.13 refuses matrices of some layouts.
    return torch.kron(input.contiguous(), other.contiguous())


@kron.kernel
def _(outs: tuple[Tensor, ...], keep: Any, input: Tensor, other: Tensor) -> None:
    a, b = _interleaved(input, other)
    shape, dtype = torch.broadcast_shapes(a.shape, b.shape), common_dtype((input, other))
    multiply(a, b, shape, (shape, dtype), None, compute_type(dtype), outs[0].view(shape))


@kron.gradient_by
def _(grad: Tensor, input: Tensor, other: Tensor, needs: set[str], like: Like) -> dict[str, Tensor]:
    a, b = _interleaved(input, other)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    grad = grad.view(shape)
    found: dict[str, Tensor] = {}
    if "input" in needs:
        found["input"] = shaped(multiply(grad, b, shape, (a.shape, input.dtype)), input.shape)
    if "other" in needs:
        found["other"] = shaped(multiply(grad, a, shape, (b.shape, other.dtype)), other.shape)
    return found
