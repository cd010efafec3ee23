"""Products of groups: rows that go to experts, their weights' gradients, and batches of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemskit._bind import slots
from gemskit._checks import describe
from gemskit._dtypes import FLOAT8, compute_type
from gemskit._jit import jit
from gemskit._op import Named, Op, P, R, operator
from gemskit.blas import _grouped
from gemskit.blas._drive import Product
from gemskit.blas._epilogue import AnyEpilogue, Fused, Step, formula
from gemskit.blas._terms import plain, widened
from gemskit.errors import NoKernel
from gemskit.pointwise._place import cast


def _ends(offs: Tensor) -> list[int]:
    """Where groups end; on ``meta``, where only shapes count, at 0."""
    return [0] * offs.shape[0] if offs.is_meta else offs.tolist()


def _checked(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None, bias: Tensor | None) -> None:
    if mat_a.ndim not in (2, 3) or mat_b.ndim not in (2, 3):
        raise ValueError("factors have 2 or 3 dimensions, of which the last two are matrices")
    if not mat_a.dtype.is_floating_point or mat_a.dtype != mat_b.dtype:
        raise TypeError(f"both factors have one floating dtype, not {mat_a.dtype} and {mat_b.dtype}")
    if bias is not None:
        raise NotImplementedError("no bias, which torch does not take yet either")
    groups = [t.shape[0] for t in (mat_a, mat_b) if t.ndim == 3]
    if (offs is None) != (len(groups) == 2):
        raise ValueError("offs is given where a factor is a matrix, and only there")
    if offs is None:
        return
    if offs.ndim != 1 or offs.dtype != torch.int32:
        raise TypeError("offs must be an int32 vector, the ends of groups")
    if groups and groups[0] != offs.shape[0]:
        raise ValueError(f"{offs.shape[0]} offs do not fit the size of a factor of {groups[0]} groups")
    if mat_a.shape[-1] != mat_b.shape[-2]:
        raise ValueError(f"matrices of sizes {list(mat_a.shape)} and {list(mat_b.shape)} do not fit")


def _product(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    """The groups one after the other."""
    if offs is None:
        return torch.bmm(a, b)
    ends = _ends(offs)
    spans = list(zip([0, *ends], ends))
    if a.ndim == b.ndim:
        return torch.stack([a[:, s:e] @ b[s:e] for s, e in spans])
    dim, many = (0, a) if a.ndim == 2 else (1, b)
    parts = [a[s:e] @ b[g] if dim == 0 else a[g] @ b[:, s:e] for g, (s, e) in enumerate(spans)]
    # What no group has is zero.
    total = many.shape[dim]
    rest = total - (ends[-1] if ends else 0)
    shape = (rest, b.shape[2]) if dim == 0 else (a.shape[1], rest)
    return torch.cat([*parts, a.new_zeros(shape)], dim)


class _Groups(Product):
    """The product of groups, and its kernels by what its epilogue is given."""

    def __init__(self, name: str, epilogue: Any) -> None:
        super().__init__(name, epilogue)
        self._after: dict[Any, _grouped.After] = {}

    def run(self, out: Tensor, a: Tensor, b: Tensor, offs: Tensor | None, named: Named) -> None:
        """Launch into ``out``."""
        if offs is None:
            return self.plan(a, b, named, out)(out, a, b, named)
        if "precise" in self.names:
            named = {**named, "precise": not (a.dtype.itemsize == 2 and out.dtype.itemsize <= 2)}
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        bound = self._bind(named, operands, compute_type(a.dtype))
        after = self._after.get(bound)
        if after is None:
            kernels = _grouped.After(self.name, bound.epilogue, bound.annotations, lambda: bound.wgmma)
            after = self._after[bound] = kernels
        scalars = slots([named[n] for n in bound.runtime])
        _run(out, a, b, offs, None, None, after, tuple([named[n] for n in operands]), scalars)


class _GroupedMm(Fused[P, R]):
    """The operator, which takes epilogues."""

    product = _Groups("grouped_mm", plain)

    def _fused(self, meaning: Callable[..., Any], extras: tuple[str, ...], steps: list[Step]) -> Op[..., Any]:
        derived: _GroupedMm[..., Any] = _GroupedMm(meaning, floats=("mat_a", "mat_b"))
        derived.product = _Groups(derived.name, formula(steps, plain))
        derived.kernel(derived.launched)
        return derived

    def launched(
        self, outs: tuple[Tensor, ...], keep: Any, mat_a: Tensor, mat_b: Tensor, offs: Tensor | None, **named: Any
    ) -> None:
        """The kernel."""
        self.product.run(outs[0], mat_a, mat_b, offs, named)


def _grouped_operator(meaning: Callable[P, R]) -> _GroupedMm[P, R]:
    return _GroupedMm(meaning, aten="_grouped_mm", floats=("mat_a", "mat_b"))


@_grouped_operator
def grouped_mm(
    mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None, *, epilogue: AnyEpilogue | None = None,
) -> Tensor:  # fmt: skip
    """Products of groups, whose ends ``offs`` (int32) has on the device; the host does not wait for it.

    (T, K) by (G, K, N): each group of rows by its matrix, (T, N). (G, M, K) by (K, T): the same of columns. (M, T) by (T, N): a
    product for each group of steps, (G, M, N). Two batches: :func:`bmm`, no ``offs``. Rows of no group are zero, which torch
    leaves unset. Source: ``torch.nn.functional.grouped_mm``.
    """
    _checked(mat_a, mat_b, offs, bias)
    a, b = widened(out_dtype, mat_a, mat_b)
    return _product(a, b, offs)


grouped_mm.kernel(grouped_mm.launched)


def _run(
    out: Tensor, a: Tensor, b: Tensor, offs: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    after: _grouped.After = _grouped.PLAIN, extras: tuple[Tensor, ...] = (), scalars: tuple[Any, ...] = slots(()),
    fast: bool = False,
) -> None:  # fmt: skip
    if a.ndim == b.ndim:
        _grouped.steps(out, a, b, offs, scale_a, scale_b, after, extras, scalars, fast)
    elif a.ndim == 2:
        _grouped.rows(out, a, b, offs, scale_a, scale_b, after, extras, scalars, fast)
    else:
        extras = tuple([t.expand(out.shape).mT for t in extras])
        _grouped.rows(out.mT, b.mT, a.mT, offs, scale_b, scale_a, after, extras, scalars, fast)


@grouped_mm.gradient_by
def _(grad: Tensor, mat_a: Tensor, mat_b: Tensor, offs: Tensor | None, needs: set[str]) -> dict[str, Tensor]:
    grad = cast(grad, mat_a.dtype)
    return {
        **({"mat_a": grouped_mm(grad, mat_b.mT, offs)} if "mat_a" in needs else {}),
        **({"mat_b": grouped_mm(mat_a.mT, grad, offs)} if "mat_b" in needs else {}),
    }


@operator(aten="_scaled_grouped_mm", floats=("mat_a", "mat_b", "scale_a", "scale_b"))
def scaled_grouped_mm(
    mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor | None = None,
    bias: Tensor | None = None, scale_result: Tensor | None = None, out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`grouped_mm` of float8, times float32 scales of the rows of ``mat_a`` and the columns of ``mat_b``.

    Scales are (T,), (G, M) or, of groups of steps, (G * M,); those of columns alike. The result is bfloat16 unless ``out_dtype``
    says otherwise. Source: ``torch._scaled_grouped_mm``.
    """
    _checked(mat_a, mat_b, offs, bias)
    if scale_result is not None:
        raise NotImplementedError("no scale of the result, which torch does not take yet either")
    scale_a, scale_b = _shaped(mat_a, mat_b, scale_a, scale_b, offs)
    a, b = (t.to(torch.promote_types(s.dtype, torch.float32)) for t, s in ((mat_a, scale_a), (mat_b, scale_b)))
    rows, columns = scale_a.unsqueeze(-1), scale_b.unsqueeze(-2)
    # A scale of each group comes before the groups are joined, any other after.
    before = (mat_a.ndim == 3 > mat_b.ndim, mat_b.ndim == 3 > mat_a.ndim)
    found = _product(a * rows if before[0] else a, b * columns if before[1] else b, offs)
    found = found if before[0] else found * rows
    return (found if before[1] else found * columns).to(out_dtype or torch.bfloat16)


scaled_grouped_mm.float8 = True


def _shaped(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales by group where there is one for each."""
    wants = [tuple(a.shape[:-1]), (*b.shape[:-2], b.shape[-1])]
    if a.ndim == b.ndim == 2 and offs is not None:
        wants = [(offs.shape[0], a.shape[0]), (offs.shape[0], b.shape[1])]
    for scale, want in zip((scale_a, scale_b), wants):
        if tuple(scale.shape) not in (want, (want[0] * want[-1],) if len(want) == 2 else want):
            raise ValueError(f"scales of shape {list(scale.shape)} do not fit {list(want)}")
    return scale_a.view(wants[0]), scale_b.view(wants[1])


@jit
def _by_scales(acc, scale_a, scale_b):
    return acc * scale_a * scale_b


_SCALED_BATCHES = Product("scaled_grouped_mm", _by_scales)


@scaled_grouped_mm.kernel
def _(
    outs: tuple[Tensor, ...], keep: Any, mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_b: Tensor,
    offs: Tensor | None, use_fast_accum: bool, **_: Any,
) -> None:  # fmt: skip
    if mat_a.dtype not in FLOAT8:
        raise NoKernel(f"scaled_grouped_mm: no kernel for {describe(mat_a)}; served are two factors of one float8")
    (out,) = outs
    scale_a, scale_b = _shaped(mat_a, mat_b, scale_a, scale_b, offs)
    if offs is not None:
        return _run(out, mat_a, mat_b, offs, scale_a, scale_b, fast=use_fast_accum)
    named = {"scale_a": scale_a.unsqueeze(-1), "scale_b": scale_b.unsqueeze(-2), "use_fast_accum": use_fast_accum}
    _SCALED_BATCHES.plan(mat_a, mat_b, named, out)(out, mat_a, mat_b, named)
