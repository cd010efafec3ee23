"""The kernel behind every matrix product, and the decorator that declares one.

A product is an epilogue on the accumulator: ``epilogue(acc, ...)`` sees the tile of ``a @ b`` in the type accumulated in,
and operands broadcast to the result (a bias row, a residual). Batch, layout and 64-bit offsets are strides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import SCALARS, adapter, annotations, arguments, fill, parameters, slots
from gemskit._dtypes import TRITON, compute_type
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named, Op, P, R
from gemskit.errors import NoKernel

#: Filled in per operator.
EPILOGUE: Any = None


@triton.jit
def _tiles(
    out, a, b, extras, batch_sizes, out_strides, a_strides, b_strides, extra_strides,
    out_m, out_n, a_m, a_k, b_k, b_n, extra_m, extra_n, s0, s1, s2, s3, M, N, K,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    per_batch = tiles_m * tiles_n
    batch = i // per_batch
    i = i % per_batch
    # Tiles go in groups of GROUP rows, so that the programs that run together share operands in L2.
    group = i // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (i % (GROUP * tiles_n)) % height
    tile_n = (i % (GROUP * tiles_n)) // height
    m = tile_m * BM + tl.arange(0, BM)[:, None]
    n = tile_n * BN + tl.arange(0, BN)[None, :]
    a += offset(batch, batch_sizes, a_strides)
    b += offset(batch, batch_sizes, b_strides)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + m * a_m + k[None, :] * a_k, (m < M) & (k[None, :] < K), other=0)
        y = tl.load(b + k[:, None] * b_k + n * b_n, (k[:, None] < K) & (n < N), other=0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
    live = (m < M) & (n < N)
    values = ()
    for j in tl.static_range(len(extras)):
        at = offset(batch, batch_sizes, extra_strides[j]) + m * extra_m[j] + n * extra_n[j]
        values = values + (tl.load(extras[j] + at, live).to(ACC),)
    result = EPILOGUE(acc, values, s0, s1, s2, s3)
    at = offset(batch, batch_sizes, out_strides) + m * out_m + n * out_n
    tl.store(out + at, result.to(out.dtype.element_ty), live)


class Product:
    """``epilogue(a @ b, ...)`` as a kernel. The epilogue names ``acc``, operands and scalars."""

    def __init__(self, name: str, epilogue: Any) -> None:
        self.name, self.epilogue, self.names = name, epilogue, parameters(epilogue)
        self._bound: dict[Any, Any] = {}

    def plan(self, a: Tensor, b: Tensor, named: Named, out: Tensor) -> Callable[..., None]:
        """The launch for ``a`` (.., M, K), ``b`` (.., K, N) and ``out`` (.., M, N), batches broadcast."""
        if not a.dtype.is_floating_point:
            raise NoKernel(f"{self.name}: no kernel for {a.dtype} products; served are float16, bfloat16, float32, float64")
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        shape, (M, K), N = tuple(out.shape), a.shape[-2:], b.shape[-1]
        batch = shape[:-2]
        strides = [tuple(out.stride())]
        strides += [_layout.broadcast_strides(t, (*batch, *t.shape[-2:])) for t in (a, b)]
        strides += [_layout.broadcast_strides(named[n], shape) for n in operands]
        batch_sizes, flat = _layout.collapse(batch, [s[:-2] for s in strides])
        acc = compute_type(a.dtype)
        config = backends.arch().config("gemm")
        side = 64 if a.dtype in (torch.float32, torch.float64) else config["m"]
        bm = min(side, max(16, triton.next_power_of_2(M)))
        bn = min(side if acc == torch.float32 else 64, max(16, triton.next_power_of_2(N)))
        bk = min(config["k"] if a.element_size() == 2 else 32, max(16, triton.next_power_of_2(K)))
        grid = triton.cdiv(M, bm) * triton.cdiv(N, bn) * math.prod(batch)
        kernel, runtime = self._bind(named, operands, acc)
        meta = dict(
            ACC=TRITON[acc],
            BM=bm,
            BN=bn,
            BK=bk,
            GROUP=config["group"],
            WIDE=_layout.is_wide((*batch, M, N), strides[:1] + strides[3:])
            or _layout.is_wide((*batch, M, K), strides[1:2])
            or _layout.is_wide((*batch, K, N), strides[2:3]),
            num_warps=config["warps"] if bm * bn > 64 * 64 else 4,
            num_stages=config["stages"],
        )
        single = a.dtype == torch.float32
        inner = (*strides[0][-2:], *strides[1][-2:], *strides[2][-2:])
        extra_m, extra_n = tuple(s[-2] for s in strides[3:]), tuple(s[-1] for s in strides[3:])

        def choose() -> dict[str, Any]:
            return dict(meta, PRECISION="tf32" if single and tf32() else "ieee")

        def run(out: Tensor, a: Tensor, b: Tensor, named: Named) -> None:
            if grid:
                extras = tuple([named[n] for n in operands])
                scalars = slots([named[n] for n in runtime])
                batches = (batch_sizes, flat[0], flat[1], flat[2], tuple(flat[3:]))
                launch(kernel, (grid,), (out, a, b, extras, *batches, *inner, extra_m, extra_n, *scalars, M, N, K), choose())

        return run

    def _bind(self, named: Named, operands: Sequence[str], acc: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        reads = {"acc": "acc", **{n: f"values[{k}]" for k, n in enumerate(operands)}}
        runtime, expressions = arguments(self.names, {n: named.get(n) for n in self.names}, reads, acc)
        key = (tuple(operands), tuple(expressions.items()), acc)
        if key not in self._bound:
            call = adapter(f"{self.name}_epilogue", f"acc, values, {', '.join(SCALARS)}", self.epilogue, expressions)
            self._bound[key] = fill(_tiles, self.name, annotations(runtime, acc), EPILOGUE=call)
        return self._bound[key], runtime


def tf32() -> bool:
    """Whether torch's settings let float32 products run in TensorFloat-32."""
    return torch.get_float32_matmul_precision() != "highest"


class Gemm(Op[P, R]):
    """A product of its two ``factors``, which :meth:`operands` prepares."""

    family = "gemm"
    _product: Product | None = None

    def __init__(self, meaning: Callable[P, R], *, factors: tuple[str, str], **options: Any) -> None:
        super().__init__(meaning, **options)
        self.factors = factors
        self._prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = lambda out, a, b: (out, a, b)

    def epilogue(self, fn: Any) -> Any:
        """Attach what becomes of the accumulator: a jit function of ``acc`` and any parameters by name."""
        self._product = Product(self.name, fn)
        return fn

    def views(
        self, fn: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Attach how (out, first, second) become matrices: a function that returns views of them."""
        self._prepare = fn
        return fn

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        if self._product is None:
            return super().plan(named, outs)
        prepare, (first, second) = self._prepare, self.factors
        out, a, b = prepare(outs[0], named[first], named[second])
        run = self._product.plan(a, b, named, out)

        def go(outs: Sequence[Tensor], keep: Any, arguments: Named) -> None:
            out, a, b = prepare(outs[0], arguments[first], arguments[second])
            run(out, a, b, arguments)

        return go


def gemm(*, factors: tuple[str, str], aten: str | None = None) -> Callable[[Callable[P, R]], Gemm[P, R]]:
    """Declare a matrix product; attach its epilogue with ``@op.epilogue`` and its gradient with ``@op.gradient_by``."""
    return functools.partial(Gemm, factors=factors, aten=aten)
