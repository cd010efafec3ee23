"""The kernel behind every elementwise operator, and the decorator that declares one.

The iteration space is collapsed to as few dimensions as the strides of all operands allow. The last two are tiled, so that
an operand that is contiguous along either of them is read in whole lines; the others are counted off the program id.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gemskit import _layout, backends
from gemskit._bind import SCALARS, ZERO, adapter, arguments, fill, given, parameters, scalar_types, slots
from gemskit._dtypes import HALVES, TRITON, common_dtype, compute_type
from gemskit._jit import jit
from gemskit._launch import launch
from gemskit._op import Named, Op, P, R
from gemskit._plan import PLANS, Planned

#: Filled in per operator: the formula, called by the names of its parameters.
FORMULA: Any = None


@jit
def _outer(i, sizes, strides):
    """The offset of outer index ``i``: of all dimensions but the two that are tiled."""
    o = i * 0
    for k in tl.static_range(len(sizes) - 3, -1, -1):
        o += (i % sizes[k]) * strides[k]
        i = i // sizes[k]
    return o


@jit
def _converted(v, kind: tl.constexpr):
    """``v`` in another type; floats wrap around in the narrow ints, as torch's go through wider ones."""
    if v.dtype.is_floating() and kind.is_int() and kind.primitive_bitwidth > 1 and kind.primitive_bitwidth < 32:
        v = v.to(tl.int64)
    return v.to(kind)


@jit
def _tiles(
    outs, ins, sizes, out_strides, in_strides, s0, s1, s2, s3,
    COMPUTE: tl.constexpr, VIA: tl.constexpr, KEEP: tl.constexpr, ALONG: tl.constexpr, PICK: tl.constexpr,
    B1: tl.constexpr, B0: tl.constexpr, ROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # KEEP says per operand: 0 is cast to COMPUTE, 1 keeps its dtype, 2 is rounded to VIA on the way.
    # ALONG says per operand along which tiled dimensions it varies (1: last, 2: last but one): what is broadcast is read once.
    # ROW: all is one row, whose tiles need no division to be counted.
    R: tl.constexpr = len(sizes)
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    n0, n1 = sizes[R - 1], sizes[R - 2]
    if ROW:
        i0 = (i * B0 + tl.arange(0, B0))[None, :]
        i = i * 0
        i1 = i
    else:
        t0 = tl.cdiv(n0, B0)
        i0 = ((i % t0) * B0 + tl.arange(0, B0))[None, :]
        i = i // t0
        t1 = tl.cdiv(n1, B1)
        # One row a tile: what is broadcast along it is a scalar, and needs no exchange between threads (3.5 us of 42 saved).
        if B1 == 1:
            i1 = i % t1
        else:
            i1 = ((i % t1) * B1 + tl.arange(0, B1))[:, None]
        i = i // t1
    m0, m1 = i0 < n0, i1 < n1
    values = ()
    for k in tl.static_range(len(in_strides)):
        at = _outer(i, sizes, in_strides[k])
        if ALONG[k] == 3:
            at += i1 * in_strides[k][R - 2] + i0 * in_strides[k][R - 1]
            live = m0 & m1
        elif ALONG[k] == 2:
            at += i1 * in_strides[k][R - 2]
            live = m1
        elif ALONG[k] == 1:
            at += i0 * in_strides[k][R - 1]
            live = m0
        else:
            live = True
        if k < len(ins):
            v = tl.load(ins[k] + at, live)
            if KEEP[k] != 1:
                v = v.to(COMPUTE)
            if KEEP[k] == 2:
                v = v.to(VIA).to(COMPUTE)
        else:
            v = at  # the logical index
        values = values + (v,)
    results = FORMULA(values, s0, s1, s2, s3)
    for k in tl.static_range(len(outs)):
        at = _outer(i, sizes, out_strides[k]) + i1 * out_strides[k][R - 2] + i0 * out_strides[k][R - 1]
        v = tl.broadcast_to(_converted(results[PICK[k]], outs[k].dtype.element_ty), (B1, B0))
        tl.store(outs[k] + at, v, m0 & m1)


class Elementwise(Planned):
    """A formula as a kernel: ``plan`` it for a layout, run it on tensors of that layout.

    Besides operands and scalars a formula may name ``index`` (the logical index) or ``position`` (along the argument ``dim``),
    ``precise`` (False where everything that it reads and writes is a half) and ``via``, the name of the type that operands are
    promoted to.
    """

    def __init__(
        self, name: str, formula: Any, *, keep: Sequence[str] = (), results: int = 1, rounds: bool = False
    ) -> None:
        self.name, self.formula, self.results, self.rounds = name, formula, results, rounds
        #: Operands that keep their own dtype: conditions, seeds.
        self.keep = frozenset(keep)
        self.names = parameters(formula)
        #: Filled drivers by what is filled in, and by what they were asked for with.
        self._bound: dict[Any, Any] = {}
        self._known: dict[Any, tuple[Any, tuple[str, ...]]] = {}
        super().__init__()

    def plan(
        self, named: Named, outs: Sequence[Tensor], compute: torch.dtype, pick: Sequence[int] | None = None,
        via: torch.dtype | None = None,
    ) -> Callable[[Sequence[Tensor], Named], None]:  # fmt: skip
        """The launch for operands ``named`` and ``outs`` (meta tensors suffice).

        ``pick`` says which results to store, ``via`` is the type that operands are promoted to where that is narrower than
        ``compute``.
        """
        via = via or compute
        shape = tuple(outs[0].shape)
        if 0 in shape:
            return lambda outs, named: None
        operands = [n for n in self.names if isinstance(named.get(n), Tensor)]
        strides = [tuple(o.stride()) for o in outs]
        order = _layout.order(shape, strides)
        strides += [_layout.broadcast_strides(named[n], shape) for n in operands]
        if "index" in self.names:
            strides.append(_layout.contiguous(shape))
        elif "position" in self.names:
            strides.append(tuple(int(d == named["dim"] % len(shape)) for d in range(len(shape))))
        sizes: tuple[int, ...]
        flat: list[_layout.Strides]
        if shape and all(s == strides[0] for s in strides) and strides[0] == _layout.contiguous(shape):
            # Most calls: one row of memory, in the time of one look.
            sizes, flat = (1, math.prod(shape)), [(0, 1)] * len(strides)
        else:
            sizes, flat = _layout.collapse([shape[d] for d in order], [tuple(s[d] for d in order) for s in strides])
            if len(sizes) == 1:
                sizes, flat = (1, *sizes), [(0, *s) for s in flat]
        n_out, n1, n0 = len(outs), sizes[-2], sizes[-1]
        config = backends.arch().config("pointwise")
        # The same number of bytes a thread: with halves, so few elements would not cover the latency of what is computed.
        widest = max([2, *(t.dtype.itemsize for t in (*outs, *(named[n] for n in operands)))])
        block = config["block"] * 4 // widest
        if any(s[-2] == 1 and s[-1] not in (0, 1) for s in flat) and n1 > 1:
            side = config["side"]
            b1, b0 = min(side, _layout.next_power_of_2(n1)), min(side, _layout.next_power_of_2(n0))
        else:
            b0 = min(block, _layout.next_power_of_2(n0))
            b1 = min(max(1, block // b0), _layout.next_power_of_2(n1))
        grid = _layout.cdiv(n0, b0) * _layout.cdiv(n1, b1)
        for n in sizes[:-2]:
            grid *= n
        if "precise" in self.names:
            read = [named[n].dtype for n in operands if named[n].is_floating_point()]
            named = {**named, "precise": not HALVES.issuperset([*read, *[o.dtype for o in outs]])}
        kernel, runtime = self._bind(named, operands, compute, via)
        meta = dict(
            COMPUTE=TRITON[compute],
            VIA=TRITON[via],
            KEEP=tuple(1 if n in self.keep else 2 * (via not in (compute, named[n].dtype)) for n in operands),
            ALONG=tuple((s[-1] != 0) + 2 * (s[-2] != 0) for s in flat[n_out:]),
            PICK=tuple(pick if pick is not None else range(self.results)),
            B1=b1,
            B0=b0,
            ROW=sizes[:-1] == (1,),
            WIDE=_layout.is_wide(sizes, flat),
            num_warps=config["warps"],
        )
        out_strides, in_strides = tuple(flat[:n_out]), tuple(flat[n_out:])

        def run(outs: Sequence[Tensor], named: Named) -> None:
            ins = tuple([named[n] for n in operands])
            scalars = slots([named[n] for n in runtime])
            launch(kernel, (grid,), (tuple(outs), ins, sizes, out_strides, in_strides, *scalars), meta)

        return run

    def _bind(
        self, named: Named, operands: Sequence[str], compute: torch.dtype, via: torch.dtype
    ) -> tuple[Any, tuple[str, ...]]:
        """The filled driver, and the names of its run-time scalars. Strings, None and bools become part of the code."""
        double = any(named[n].dtype == torch.float64 for n in operands)
        asked = (compute, via, double, given(self.names, named))
        if asked in self._known:
            return self._known[asked]
        reads = {n: f"values[{k}]" for k, n in enumerate((*operands, "index"))}
        reads["position"] = reads["index"]
        values = {n: TRITON[via].name if n == "via" else named.get(n) for n in self.names}
        runtime, expressions = arguments(self.names, values, reads, compute)
        if self.rounds and via != compute:
            cast = "{}.to(tl.{}).to(tl.{})"
            names = [str(d).removeprefix("torch.") for d in (via, compute)]
            expressions.update({n: cast.format(expressions[n], *names) for n in runtime})
        key = (tuple(operands), tuple(expressions.items()), compute, double)
        kernel = self._bound.get(key)
        if kernel is None:
            wrap = "({},)" if self.results == 1 else "{}"
            call = adapter(self.name, f"values, {', '.join(SCALARS)}", self.formula, expressions, wrap)
            kernel = self._bound[key] = fill(_tiles, self.name, scalar_types(runtime, compute, named), FORMULA=call)
        self._known[asked] = kernel, runtime
        return kernel, runtime


def split(named: Named) -> dict[str, Any]:
    """The arguments with the real and imaginary parts of each: views of a complex tensor, 0 for what is real."""
    parts = dict(named)
    for n, v in named.items():
        if isinstance(v, Tensor):
            views = _views(v)
            parts[f"{n}_re"], parts[f"{n}_im"] = views if len(views) == 2 else (v, ZERO)
        elif isinstance(v, complex):
            parts[f"{n}_re"], parts[f"{n}_im"] = v.real, v.imag
        elif v is not None and not isinstance(v, str):
            parts[f"{n}_re"], parts[f"{n}_im"] = v, ZERO
    return parts


def _views(t: Tensor) -> tuple[Tensor, ...]:
    """The parts of a complex tensor; a real one itself."""
    if not t.dtype.is_complex:
        return (t,)
    pairs = torch.view_as_real(t)
    return pairs.select(-1, 0), pairs.select(-1, 1)


@jit
def _same(input):
    return input


#: What a gradient formula may name besides parameters.
GRADIENT = ("grad", "grad1", "grad2", "out", "out1", "out2")


class Pointwise(Op[P, R]):
    """An operator applied to each element, its operands broadcast and promoted as torch does."""

    family = "pointwise"
    passes_scalars = True
    elementwise = True
    _formula: Elementwise | None = None

    def __init__(
        self,
        meaning: Callable[P, R],
        *,
        keep: Sequence[str] = (),
        results: int = 1,
        rounds: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(meaning, **options)
        self.keep, self.results, self.rounds = tuple(keep), results, rounds
        self._probed: dict[Any, torch.dtype] = {}
        self._complex: Any = None
        self._complex_kernel: Elementwise | None = None

    def formula(self, fn: Any) -> Any:
        """Attach the formula: a jit function that names the parameters it needs, ``index`` (the logical index) or ``precise``.

        Tensors and numbers arrive in the type computed in (float32 for halves); strings, bools and None are constants.
        """
        self._formula = Elementwise(self.name, fn, keep=self.keep, results=self.results, rounds=self.rounds)
        return fn

    def gradient(self, fn: Any) -> Any:
        """Attach the gradient formula, of ``grad`` and any parameters or ``out``.

        Of further results there are ``grad1``, ``grad2`` and ``out1``, ``out2``. It returns one value for each differentiable
        tensor parameter, in order (those not in ``keep``).
        """
        # Reductions use Elementwise for their gradients: at the head of this file the two would import each other.
        from gemskit.reduce._fold import Fold

        of = tuple(n for n in self.tensors if n not in self.keep)
        kernel = Elementwise(f"{self.name}_grad", fn, keep=self.keep, results=len(of))
        folds = {n: Fold.of_formula(f"{self.name}_grad_{n}", fn, len(of), k, keep=self.keep) for k, n in enumerate(of)}
        names = [n for n in parameters(fn) if n in self.params or n in GRADIENT]

        def vjp(needs: set[str], like: Mapping[str, Any], **named: Any) -> dict[str, Tensor]:
            named = self._counted(named)
            grads = [g for n in GRADIENT[:3] if (g := named.get(n)) is not None]
            grad, compute, shape = grads[0], compute_type(common_dtype(grads)), grads[0].shape
            whole = [n for n in of if n in needs and like[n][0] == shape]
            found: dict[str, Tensor] = {}
            if whole:
                outs = [torch.empty_like(grad, dtype=like[n][1]) for n in whole]
                kernel(named, outs, compute, tuple(of.index(n) for n in whole))
                found.update(zip(whole, outs))
            for n in of:
                if n in needs and n not in found:
                    found[n] = folds[n].to_shape(named, shape, like[n], compute)
            return found

        self.set_gradient(vjp, ("needs", "like", *names), of)
        return fn

    def gradient_by(self, fn: Callable[..., Mapping[str, Tensor | None]]) -> Callable[..., Mapping[str, Tensor | None]]:
        """Attach a gradient written with other operators (see :meth:`Op.gradient_by`).

        It may return gradients of the result's shape and of any float dtype: what was broadcast gets their sum.
        """
        from gemskit.reduce._fold import Fold

        names, kernel = parameters(fn), Elementwise(f"{self.name}_grad_cast", _same)
        fold = Fold.of_formula(f"{self.name}_grad_sum", _same, 1, 0, keep=())

        def vjp(like: Mapping[str, Any], **named: Any) -> dict[str, Tensor | None]:
            found = dict(fn(**{n: like if n == "like" else named[n] for n in names}))
            for n, g in found.items():
                if g is not None and g.shape != like[n][0]:
                    found[n] = fold.to_shape({"input": g}, g.shape, like[n], compute_type(g.dtype))
                elif g is not None and g.dtype != like[n][1]:
                    found[n] = cast = torch.empty_like(g, dtype=like[n][1])
                    kernel({"input": g}, [cast], compute_type(g.dtype))
            return found

        of = tuple(n for n in self.tensors if n not in self.keep)
        self.set_gradient(vjp, tuple(dict.fromkeys(("like", *names))), of)
        return fn

    def complex_formula(self, fn: Any) -> Any:
        """Attach the formula for complex numbers, of ``input_re``, ``input_im`` and so on; what is real has the part 0.

        It returns the two parts, or one value where the result is real. Operands in ``keep`` have their own names.
        """
        self._complex, self.complex = fn, True
        return fn

    def complex_gradient(self, fn: Any) -> Any:
        """Attach the gradient formula for complex numbers, of ``grad_re``, ``grad_im``, ``out_re`` and so on.

        It returns two parts for each differentiable tensor parameter: those of torch's convention, in which the gradient
        of a holomorphic f is ``grad * conj(f')``.
        """
        from gemskit.reduce._fold import Fold

        of = tuple(n for n in self.tensors if n not in self.keep)
        name, count = f"{self.name}_complex_grad", 2 * len(of)
        kernel = Elementwise(name, fn, keep=self.keep, results=count)
        folds = [
            Fold.of_formula(f"{name}_{n}_{part}", fn, count, 2 * k + i, keep=self.keep)
            for k, n in enumerate(of)
            for i, part in enumerate(("re", "im"))
        ]
        real, real_saves = self._vjp, self._saves
        saves = dict.fromkeys(("needs", "like", *real_saves))
        names = {n.removesuffix("_re").removesuffix("_im") for n in parameters(fn)}
        saves.update((n, None) for n in (*self.params, "grad", "out") if n in names)

        def vjp(needs: set[str], like: Mapping[str, Any], **named: Any) -> Mapping[str, Tensor | None]:
            dtypes = [v.dtype for v in named.values() if isinstance(v, Tensor)] + [d for _, d in like.values()]
            if real is not None and not any(d.is_complex for d in dtypes):
                return real(**{n: v for n, v in dict(named, needs=needs, like=like).items() if n in real_saves})
            grad: Tensor = named["grad"]
            compute, shape = compute_type(grad.dtype), grad.shape
            parts = split(self._counted(named))
            found: dict[str, Tensor] = {}
            outs: list[Tensor] = []
            pick: list[int] = []
            for k, n in enumerate(of):
                if n not in needs:
                    continue
                size, dtype = like[n]
                if size == shape:
                    found[n] = torch.empty_like(grad, dtype=dtype)
                else:
                    found[n] = torch.empty(tuple(size), dtype=dtype, device=grad.device)
                for i, view in enumerate(_views(found[n])):
                    if size == shape:
                        outs.append(view)
                        pick.append(2 * k + i)
                    else:
                        folds[2 * k + i].to_shape(parts, shape, (size, view.dtype), compute, view)
            if outs:
                kernel(parts, outs, compute, tuple(pick))
            return found

        self.set_gradient(vjp, tuple(saves), of)
        return fn

    def _plan_complex(
        self, named: Named, outs: Sequence[Tensor], result: torch.dtype, compute: torch.dtype
    ) -> Callable[..., None]:
        if self._complex_kernel is None:
            results = 2 if result.is_complex else 1
            self._complex_kernel = Elementwise(f"{self.name}_complex", self._complex, keep=self.keep, results=results)
        views = [view for o in outs for view in _views(o)]
        run = self._complex_kernel.plan(split(self._counted(named)), views, compute)
        return lambda outs, keep, arguments: run([view for o in outs for view in _views(o)], split(arguments))

    def shapes(self, values: Sequence[Any]) -> Sequence[tuple[int, ...]] | None:
        shape: tuple[int, ...] = ()
        for v in values:
            if isinstance(v, Tensor) and v.ndim:
                size = tuple(v.shape)
                if (shape and size != shape) or 0 in size or v.stride() != _layout.contiguous(size):
                    return None
                shape = size
        return (shape,) * self.results

    def plan(self, named: Named, outs: tuple[Tensor, ...]) -> Callable[..., None]:
        if self._formula is None and not self.complex:
            return super().plan(named, outs)
        values = [named[n] for n in self.tensors if n not in self.keep and named[n] is not None]
        common = common_dtype(values) if values else outs[0].dtype
        kind = self.kind(tuple(named.values()))
        result = self._probed.get(kind)
        if result is None:
            if len(self._probed) >= PLANS:
                self._probed.clear()
            result = self._probed[kind] = self._probe(named)
        # A meaning may also give a wider or a narrower float than its operands promote to: that is rounded to at the end.
        dtype = torch.promote_types(result, common) if result.is_floating_point else common
        if self.complex and (result.is_complex or common.is_complex):
            return self._plan_complex(named, outs, result, compute_type(result if result.is_complex else common))
        assert self._formula is not None
        # torch promotes operands before it computes: 70000 with a float16 tensor is inf.
        via = dtype if dtype.is_floating_point else None
        run = self._formula.plan(self._counted(named), outs, compute_type(dtype), via=via)
        return lambda outs, keep, arguments: run(outs, arguments)

    def _counted(self, named: Named) -> dict[str, Any]:
        """True and False as 1 and 0 where they stand for a tensor: passed at run time like other numbers."""
        return {n: int(v) if isinstance(v, bool) and n in self.tensors else v for n, v in named.items()}

    def _probe(self, named: Named) -> torch.dtype:
        """The dtype of the result, from one element on the CPU: it refuses dtypes and numbers that ``meta`` lets pass."""
        if not self.random:  # whose meaning would advance torch's generator
            named = {
                n: torch.ones([1] * v.ndim, dtype=v.dtype, device="cpu") if isinstance(v, Tensor) else v
                for n, v in named.items()
            }
        found: Any = self._meaning(tuple(named.values()))
        dtypes: list[torch.dtype] = [t.dtype for t in (found if isinstance(found, tuple) else (found,))]
        real = [d for d in dtypes if d.is_floating_point or d.is_complex]
        result = (real or dtypes)[0]
        for d in real[1:]:
            result = torch.promote_types(result, d)
        return result


def pointwise(
    *,
    aten: str | None = None,
    keep: Sequence[str] = (),
    results: int = 1,
    random: bool = False,
    floats: Sequence[str] = (),
    rounds: bool = False,
) -> Callable[[Callable[P, R]], Pointwise[P, R]]:
    """Declare an elementwise operator. Attach its formula with ``@op.formula`` and its gradient with ``@op.gradient``.

    Args:
        aten: the ATen overload it equals, e.g. ``"silu"`` or ``"add.Tensor"``.
        keep: parameters that stay out of type promotion and arrive in their own dtype (conditions, seeds).
        results: how many outputs the formula returns.
        random: whether its values are drawn; such operators are tested statistically.
        floats: parameters that take floating-point tensors only, where torch has no kernel for ints.
        rounds: whether numbers are rounded to the promoted dtype first, as in torch's comparisons of half types; in
            arithmetic they keep the precision computed in.
    """
    return functools.partial(
        Pointwise, aten=aten, keep=keep, results=results, random=random, floats=floats, rounds=rounds
    )
