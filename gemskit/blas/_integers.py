"""Products of integers, which matrix units do not multiply: multiplied and summed as they are, wrapping around as torch's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, language
from gemskit._bind import SCALARS, adapter, arguments, fill, given, parameters, scalar_types, slots
from gemskit._dtypes import TRITON
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named
from gemskit.blas._space import Space
from gemskit.blas._terms import no_bools

#: Filled in per operator.
EPILOGUE: Any = None

#: The tile of a program: 32 sums a thread.
SIDE = 64


@jit
def _sums(
    out, a, b, extras, batch_sizes, out_strides, a_strides, b_strides, extra_strides,
    out_m, out_n, a_m, a_k, b_k, b_n, extra_m, extra_n, s0, s1, s2, s3, M, N, K,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    batch = i // (tiles_m * tiles_n)
    tile_m, tile_n = language.swizzle(i % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    m = (tile_m * BM + tl.arange(0, BM))[:, None]
    n = (tile_n * BN + tl.arange(0, BN))[None, :]
    a += offset(batch, batch_sizes, a_strides) + m * a_m
    b += offset(batch, batch_sizes, b_strides) + n * b_n
    acc = tl.zeros((BM, BN), ACC)
    for _ in range(K):
        acc += tl.load(a, m < M, other=0).to(ACC) * tl.load(b, n < N, other=0).to(ACC)
        a += a_k
        b += b_k
    inside = (m < M) & (n < N)
    values = ()
    for j in tl.static_range(len(extras)):
        place = extras[j] + offset(batch, batch_sizes, extra_strides[j])
        values = values + (tl.load(place + m * extra_m[j] + n * extra_n[j], inside).to(ACC),)
    out += offset(batch, batch_sizes, out_strides) + m * out_m + n * out_n
    tl.store(out, EPILOGUE(acc, values, s0, s1, s2, s3).to(out.dtype.element_ty), inside)


class Integers:
    """``epilogue(a @ b, ...)`` of integers, modulo the range of their type."""

    def __init__(self, name: str, epilogue: Any) -> None:
        self.name, self.epilogue, self.names = name, epilogue, parameters(epilogue)
        self._known: dict[Any, tuple[Any, tuple[str, ...]]] = {}

    def plan(self, a: Tensor, b: Tensor, named: Named, out: Tensor) -> Callable[..., None]:
        """The launch for ``a`` (.., M, K), ``b`` (.., K, N) and ``out`` (.., M, N), batches broadcast."""
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        # Of bools, those of no terms are served, but torch takes no multiple of an operand either.
        no_bools(self.name, a.dtype, out.numel() * (a.shape[-1] or len(operands)))
        space = Space.of(out, a, b, [named[n] for n in operands])
        acc = torch.int64 if a.dtype == torch.int64 else torch.int32
        kernel, runtime = self._bind(named, operands, acc)
        bm, bn = (min(SIDE, _layout.next_power_of_2(n)) for n in (space.M, space.N))
        grid = _layout.cdiv(space.M, bm) * _layout.cdiv(space.N, bn) * space.batches
        meta = dict(ACC=TRITON[acc], BM=bm, BN=bn, GROUP=8, WIDE=space.wide, num_warps=8 if acc == torch.int64 else 4)
        strided = space.strided
        sizes = space.M, space.N, space.K

        def run(out: Tensor, a: Tensor, b: Tensor, named: Named) -> None:
            if grid:
                extras = tuple([named[n] for n in operands])
                scalars = slots([named[n] for n in runtime])
                launch(kernel, (grid,), (out, a, b, extras, *strided, *scalars, *sizes), meta)

        return run

    def _bind(self, named: Named, operands: list[str], acc: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        key = (acc, given(self.names, named))
        if key not in self._known:
            reads = {"acc": "acc", **{n: f"values[{k}]" for k, n in enumerate(operands)}}
            runtime, expressions = arguments(self.names, {n: named.get(n) for n in self.names}, reads, acc)
            call = adapter(f"{self.name}_epilogue", f"acc, values, {', '.join(SCALARS)}", self.epilogue, expressions)
            self._known[key] = (
                fill(_sums, f"{self.name}_int", scalar_types(runtime, acc, named), EPILOGUE=call),
                runtime,
            )
        return self._known[key]
