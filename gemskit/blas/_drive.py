"""The kernel behind every matrix product, and the decorator that declares one.

A product is an epilogue on the accumulator: ``epilogue(acc, ...)`` sees the tile of ``a @ b`` in the type accumulated in,
and operands broadcast to the result (a bias row, a residual). Batch, layout and 64-bit offsets are strides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends, language
from gemskit._bind import SCALARS, adapter, arguments, fill, given, parameters, scalar_types, slots
from gemskit._checks import describe
from gemskit._driver import dot_precision
from gemskit._dtypes import FLOAT8, HALVES, TRITON
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._layout import offset
from gemskit._op import Named, P, R
from gemskit.blas import _few
from gemskit.blas._epilogue import Fused, Step, formula
from gemskit.blas._factors import plus_product, promoted
from gemskit.blas._integers import Integers
from gemskit.blas._rule import BANDWIDTH, LAUNCH, Choice, choose
from gemskit.blas._space import Space, read
from gemskit.errors import DtypeError, NoKernel
from gemskit.pointwise._place import copy

#: Filled in per operator.
EPILOGUE: Any = None

#: What matrix units multiply, and the type that they accumulate in.
ACCUMULATORS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.int8: torch.int32,
    **dict.fromkeys(FLOAT8, torch.float32),
}


@jit
def _tiles(
    out, a, b, up, extras, batch_sizes, out_strides, a_strides, b_strides, extra_strides,
    out_m, out_n, a_m, a_k, b_k, b_n, extra_m, extra_n, s0, s1, s2, s3, M, N, K,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, ALONG: tl.constexpr, PROMOTED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    k = tl.arange(0, BK)
    if WIDE:
        i = i.to(tl.int64)
        k = k.to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    per_batch = tiles_m * tiles_n
    batch = i // per_batch
    i = i % per_batch
    # Tiles go in groups of GROUP rows, so that the programs that run together share operands in L2.
    tile_m, tile_n = language.swizzle(i, tiles_m, tiles_n, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    a += offset(batch, batch_sizes, a_strides)
    b += offset(batch, batch_sizes, b_strides)
    # Rows and columns beyond the end wrap around, so that the loop needs no mask for them; the store drops them.
    a_at = (m % M)[:, None] * a_m + k[None, :] * a_k
    b_at = k[:, None] * b_k + (n % N)[None, :] * b_n
    acc = tl.zeros((BM, BN), ACC)
    if up is not None:
        up += offset(batch, batch_sizes, b_strides)
        other = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        if EVEN_K:
            x, y = tl.load(a + a_at), tl.load(b + b_at)
        else:
            x = tl.load(a + a_at, k[None, :] < K - start, other=0.0)
            y = tl.load(b + b_at, k[:, None] < K - start, other=0.0)
        acc = plus_product(acc, x, y, PRECISION, PROMOTED)
        if up is not None:
            if EVEN_K:
                y = tl.load(up + b_at)
            else:
                y = tl.load(up + b_at, k[:, None] < K - start, other=0.0)
            other = plus_product(other, x, y, PRECISION, PROMOTED)
            up += BK * b_k
        # Scalar pointers advance, tile offsets stay: one add a step, and only the offsets inside a tile can leave int32.
        a += BK * a_k
        b += BK * b_k
    m, n = m[:, None], n[None, :]
    live = (m < M) & (n < N)
    values = read(extras, m, n, M, N, batch, batch_sizes, extra_strides, extra_m, extra_n, ACC, ALONG)
    if up is not None:
        values = (other,) + values
    result = EPILOGUE(acc, values, s0, s1, s2, s3)
    at = offset(batch, batch_sizes, out_strides) + m * out_m + n * out_n
    tl.store(out + at, result.to(out.dtype.element_ty), live)


#: Launches ``out, a, b, up, further operands, scalars``.
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...], tuple[Any, ...]], None]


class Bound:
    """An epilogue with its operands and scalars in place, and the kernels that run it."""

    def __init__(self, name: str, epilogue: Any, acc: torch.dtype, runtime: tuple[str, ...]) -> None:
        self.name, self.epilogue, self.acc, self.runtime = name, epilogue, acc, runtime
        self.annotations = scalar_types(runtime, acc)

    @functools.cached_property
    def plain(self) -> Any:
        return fill(_tiles, self.name, self.annotations, EPILOGUE=self.epilogue)

    @functools.cached_property
    def few(self) -> Any:
        return fill(_few.few_rows, f"{self.name}_few", self.annotations, EPILOGUE=self.epilogue)

    @functools.cached_property
    def wgmma(self) -> Any:
        # Gluon takes 0.1 s to import.
        from gemskit.blas._hopper import Kernels

        return Kernels(f"{self.name}_wgmma", self.epilogue, self.annotations)


class Product:
    """``epilogue(a @ b, ...)`` as a kernel. The epilogue names ``acc``, operands and scalars.

    A ``gated`` one also names ``up``: ``a`` times a second matrix, which ``named`` has and which is laid out as ``b`` is.
    """

    def __init__(self, name: str, epilogue: Any, gated: bool = False) -> None:
        self.name, self.epilogue, self.names, self.gated = name, epilogue, parameters(epilogue), gated
        self._bound: dict[Any, Bound] = {}
        self._known: dict[Any, Bound] = {}

    def plan(self, a: Tensor, b: Tensor, named: Named, out: Tensor) -> Callable[..., None]:
        """The launch for ``a`` (.., M, K), ``b`` (.., K, N) and ``out`` (.., M, N), batches broadcast."""
        if a.dtype not in ACCUMULATORS:
            raise NoKernel(f"{self.name}: no kernel for {a.dtype} products")
        operands = [n for n in self.names if isinstance(named.get(n), Tensor) and not (self.gated and n == "up")]
        if "precise" in self.names:
            named = {**named, "precise": not (a.dtype.itemsize == 2 and out.dtype.itemsize <= 2)}
        space = Space.of(out, a, b, [named[n] for n in operands])
        if not (space.M and space.N):
            return lambda out, a, b, named: None
        bound = self._bind(named, operands, ACCUMULATORS[a.dtype])
        few = _few.plan(space, a.dtype, bound.acc, bound.few, self.gated)
        # Several rows of float8 are there for aligned loads only.
        anywhere = few if a.dtype not in FLOAT8 or 1 in (space.M, space.N) else None
        fast_sums = bool(named.get("use_fast_accum"))
        plain = anywhere or self._plain(space, a, bound, fast_sums)
        # A matrix of float32 to be added: 1,064 bytes of a thread would spill (H200, 128256x4096x1024: 3.4 ms for 1.5).
        small = any(named[n].dtype.itemsize > 2 and along == 3 for n, along in zip(operands, space.along))
        # 17 to 32 rows are the columns of a tile on Hopper's tensor cores (32x4096x14336: 33.9 us, by few rows' kernel 39.5).
        fewest = few if self.gated or min(space.M, space.N) <= 16 else None
        fast = fewest or self._wgmma(space, a, bound, small, fast_sums) or plain
        lines: tuple[tuple[int, int] | None, ...] = (None, None)
        if fast is plain and not few and a.ndim == b.ndim == 2 and self._worth_copies(space, a.dtype):
            first, second = (t if (s := aligned_strides(t)) is None else empty_strided(t, s, "meta") for t in (a, b))
            moved = self._wgmma(Space.of(out, first, second, [named[n] for n in operands]), a, bound, small)
            if moved:
                fast, lines = moved, (aligned_strides(a), aligned_strides(b))

        def run(out: Tensor, a: Tensor, b: Tensor, named: Named) -> None:
            up = named["up"] if self.gated else None
            first, second = (t if s is None else copy(t, empty_strided(t, s, t.device)) for t, s in zip((a, b), lines))
            # Descriptors of addresses that are no multiple of 16 do not exist.
            unaligned = (first.data_ptr() | second.data_ptr() | (up.data_ptr() if up is not None else 0)) % 16
            launches = plain if unaligned else fast
            launches(
                out, first, second, up, tuple([named[n] for n in operands]), slots([named[n] for n in bound.runtime])
            )

        return run

    def _worth_copies(self, space: Space, dtype: torch.dtype) -> bool:
        """Whether Hopper's kernel on copies of the factors, whose lines the copy engine can read, is the faster one.

        The plain kernel, which loads such lines by 2 bytes, multiplies at 0.09 to 0.15 PFLOP/s, Hopper's at 0.6.
        """
        M, N, K = space.M, space.N, space.K
        saved = 2 * M * N * K * (1 / 0.15e9 - 1 / 0.6e9)
        copies = 2 * (LAUNCH + 2 * 2 * max(M, N) * K / BANDWIDTH)
        return space.batches == 1 and not self.gated and dtype.itemsize == 2 and saved > copies

    def _wgmma(self, space: Space, a: Tensor, bound: Bound, small: bool, fast_sums: bool = False) -> Run | None:
        """The kernel for Hopper's tensor cores, where the row of the table and the factors permit it."""
        row = backends.arch()
        config = row.config("gemm")
        # Up to 32 rows or columns the plain kernel multiplies as halves, exactly, where float8's sums have 14 bits.
        float8 = config["float8"] if a.dtype in FLOAT8 and min(space.M, space.N) > 32 else 0
        if not config["wgmma"] or not (float8 or a.dtype in HALVES) or not space.K:
            return None
        # Every tile has 64 rows or more for each group of warps; two sums of the large ones take all registers.
        two = promoted(a.dtype, 64, fast_sums)
        sizes = (space.M, space.N, space.K, space.batches, config["processors"])
        depth = float8 if two else min(float8, 1)
        choice = choose(*sizes, self.gated, small or two, row.name, depth, 3 in space.along)
        found: Run | None = bound.wgmma.plan(space, a.dtype, choice, self.gated, two)
        return found

    def with_choice(self, a: Tensor, b: Tensor, out: Tensor, choice: Choice) -> Callable[..., None] | None:
        """The launch of Hopper's kernel for (out, a, b) with a choice that the rule might not take; None where it has none."""
        bound = self._bind({}, [], ACCUMULATORS[a.dtype])
        run: Run | None = bound.wgmma.plan(Space.of(out, a, b, []), a.dtype, choice)
        return None if run is None else lambda out, a, b: run(out, a, b, None, (), slots([]))

    def _plain(self, space: Space, a: Tensor, bound: Bound, fast_sums: bool) -> Run:
        """The kernel that runs everywhere."""
        row, acc, kernel = backends.arch(), bound.acc, bound.plain
        M, N, K = space.M, space.N, space.K
        # Two accumulators: as many columns of both together as else of one.
        config, few = ({**c, "n": c["n"] // (1 + self.gated)} for c in (row.config("gemm"), row.config("gemm_few")))
        meta = tiles(config, few, M, N, K, a.dtype, space.batches)
        grid = (_layout.cdiv(M, meta["BM"]) * _layout.cdiv(N, meta["BN"]) * space.batches,)
        meta |= dict(ACC=TRITON[acc], EVEN_K=K % meta["BK"] == 0, WIDE=space.wide, ALONG=space.along)
        meta["PROMOTED"] = promoted(a.dtype, meta["BM"], fast_sums)
        strided = space.strided

        def run(
            out: Tensor, a: Tensor, b: Tensor, up: Tensor | None, extras: tuple[Tensor, ...], scalars: tuple[Any, ...]
        ) -> None:
            how = dict(meta, PRECISION=dot_precision(a.dtype))
            launch(kernel, grid, (out, a, b, up, extras, *strided, *scalars, M, N, K), how)

        return run

    def _bind(self, named: Named, operands: Sequence[str], acc: torch.dtype) -> Bound:
        asked = (acc, given(self.names, named))
        if asked in self._known:
            return self._known[asked]
        places = ["up", *operands] if self.gated else operands
        reads = {"acc": "acc", **{n: f"values[{k}]" for k, n in enumerate(places)}}
        runtime, expressions = arguments(self.names, {n: named.get(n) for n in self.names}, reads, acc)
        key = (tuple(operands), tuple(expressions.items()), acc)
        if key not in self._bound:
            call = adapter(f"{self.name}_epilogue", f"acc, values, {', '.join(SCALARS)}", self.epilogue, expressions)
            self._bound[key] = Bound(self.name, call, acc, runtime)
        self._known[asked] = self._bound[key]
        return self._bound[key]


def aligned_strides(t: Tensor) -> tuple[int, int] | None:
    """Strides of a copy of the matrix ``t`` whose lines begin at multiples of 16 bytes; None where those of ``t`` do."""
    line, step = (1, 0) if t.stride(0) == 1 and t.stride(1) != 1 else (0, 1)
    if t.stride(step) == 1 and t.stride(line) % 8 == 0:
        return None
    wide = 8 * _layout.cdiv(t.shape[step], 8)
    return (wide, 1) if step else (1, wide)


def empty_strided(t: Tensor, strides: tuple[int, int], device: torch.device | str) -> Tensor:
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=device)


def tiles(
    config: Mapping[str, int],
    few: Mapping[str, int] | None,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    batches: int = 1,
) -> dict[str, Any]:
    """The tile of a product: the table's for halves, 64 x 64 x 32 for float32 and 32 x 32 x 16 for float64.

    float32 takes 8 warps: with 4, products without tensor cores spill on sm_90 and sm_100.

    No side is longer than the matrix needs, so few rows read the other factor once and compute little in vain. Products with
    too few tiles for the machine take the smaller, deeper ones of ``few`` (128x4096x14336, H200, bf16: 0.053 ms for 0.117).
    """
    if few and dtype.itemsize == 2:
        if _layout.cdiv(M, config["m"]) * _layout.cdiv(N, config["n"]) * batches < config["fill"]:
            config = {**config, **few}
    sides = {torch.float32: (64, 64, 32), torch.float64: (32, 32, 16)}.get(
        dtype, (config["m"], config["n"], config["k"])
    )
    # As many bytes of K of the small types, but not for few rows, whose operands go through registers.
    if dtype.itemsize == 1 and min(M, N) >= 64:
        sides = (*sides[:2], 2 * sides[2])
    # Matrix units take 32 bytes of K at a time.
    least = (16, 16, 32 // dtype.itemsize if dtype.itemsize == 1 else 16)
    bm, bn, bk = (min(side, max(low, _layout.next_power_of_2(n))) for side, low, n in zip(sides, least, (M, N, K)))
    warps = config["warps"] if bm * bn > 64 * 64 else 8 if dtype == torch.float32 and bm * bn > 32 * 64 else 4
    return dict(BM=bm, BN=bn, BK=bk, GROUP=config["group"], num_warps=warps, num_stages=config["stages"])


#: How (out, first, second) become matrices: views of them that begin at the same elements.
Views = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Gemm(Fused[P, R]):
    """A product of its two ``factors``, each a matrix or a batch of them unless :meth:`views` says otherwise."""

    family = "gemm"
    passes_scalars = True
    _product: Product | None = None
    _integers: Integers | None = None
    _views: Views | None = None

    def __init__(
        self, meaning: Callable[P, R], *, factors: tuple[str, str], keep: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(meaning, **options)
        self.factors = factors
        #: Operands of the epilogue that may have another dtype than the factors.
        self.keep = frozenset(keep)

    def epilogue(self, fn: Any) -> Any:
        """Attach what becomes of the accumulator: a jit function of ``acc`` and any parameters by name."""
        self._product, self._integers = Product(self.name, fn), Integers(self.name, fn)
        return fn

    def _fused(self, meaning: Callable[..., Any], extras: tuple[str, ...], steps: list[Step]) -> Gemm[..., Any]:
        assert self._product is not None
        rules = dict(factors=self.factors, keep=(*self.keep, *extras), writes=self.writes, floats=self.factors)
        derived: Gemm[..., Any] = Gemm(meaning, **rules)  # type: ignore[arg-type]
        derived.epilogue(formula(steps, self._product.epilogue))
        derived._views, own = self._views, self._shapes
        if own is not None:

            def shapes(*values: Any) -> Sequence[tuple[int, ...]] | None:
                found = own(*values[len(extras) :])
                others = [tuple(v.shape) for v in values[: len(extras)] if isinstance(v, Tensor)]
                return found if found and all(o in (found[0], found[0][-1:]) for o in others) else None

            derived.shape_rule(shapes)
        return derived

    def views(self, fn: Views) -> Views:
        """Attach how (out, first, second) become matrices: views that begin at the same elements."""
        self._views = fn
        return fn

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        if self._views is not None:
            return super().shapes(values)
        named = dict(zip(self.params, values))
        a, b = (tuple(named.pop(n).shape) for n in self.factors)
        if len(a) < 2 or len(b) < 2 or a[:-2] != b[:-2] or a[-1] != b[-2] or 0 in a or 0 in b:
            return None
        out = (*a[:-1], b[-1])
        others = [tuple(v.shape) for v in named.values() if isinstance(v, Tensor)]
        return (out,) if all(o in (out, out[-1:]) for o in others) else None

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        if self._product is None:
            return super().plan(named, outs)
        first, second = self.factors
        out, a, b = outs[0], named[first], named[second]
        given = {n: named[n] for n in self.tensors if isinstance(named[n], Tensor)}
        allowed = {a.dtype, named.get("out_dtype") or a.dtype}
        mixed = a.dtype != b.dtype and not {a.dtype, b.dtype} <= FLOAT8.keys()
        if mixed or any(t.dtype not in allowed for n, t in given.items() if n not in {*self.keep, *self.factors}):
            raise DtypeError(f"{self.name}: all tensors must have one dtype, given {describe(given)}")
        if self._views:
            out, a, b = self._views(out, a, b)
        exact = not a.dtype.is_floating_point and out.dtype == a.dtype
        product = self._integers if exact and self._integers else self._product
        run = product.plan(a, b, named, out)
        return lambda outs, keep, arguments: run(outs[0], arguments[first], arguments[second], arguments)


def gemm(
    *, factors: tuple[str, str], aten: str | None = None, floats: Sequence[str] = (), keep: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Gemm[P, R]]:
    """Declare a matrix product; attach its epilogue with ``@op.epilogue`` and its gradient with ``@op.gradient_by``.

    ``keep`` names operands of the epilogue that may have another dtype than the factors.
    """
    return functools.partial(Gemm, factors=factors, aten=aten, floats=floats, keep=keep)
