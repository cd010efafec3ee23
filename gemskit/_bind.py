"""Drivers are kernels with free names; this fills the names in.

``fill`` copies a driver with its own globals, so that ``tl.reduce`` finds a combine function (Triton refuses one passed
as a constexpr) and every operator gets its own kernel name and cache key. ``adapter`` writes the few lines that call an
author's formula *by parameter name*: what the formula names is what it gets, in any order.
"""

from __future__ import annotations

import itertools
import linecache
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl

from gemskit._dtypes import TRITON, scalar_annotation
from gemskit._jit import jit
from gemskit.errors import DeclarationError

_serial = itertools.count()


def parameters(fn: Any) -> tuple[str, ...]:
    """The parameter names of a formula, jitted or not."""
    code = getattr(fn, "fn", fn).__code__
    return tuple(code.co_varnames[: code.co_argcount])


def fill(driver: Any, name: str, annotations: Mapping[str, str] | None = None, **names: Any) -> Any:
    """A copy of ``driver`` called ``name`` in which the given free names and annotations are set."""
    f = driver.fn
    copy = types.FunctionType(f.__code__, {**f.__globals__, **names}, f.__name__, f.__defaults__)
    copy.__module__, copy.__qualname__ = f.__module__, f.__qualname__
    copy.__annotations__ = {**f.__annotations__, **(annotations or {})}
    # Run-time scalars keep one compiled kernel for all their values; 1 would otherwise become a constant.
    fixed = [p for p in parameters(driver) if p in SCALARS]
    options: Any = dict(repr=lambda _: name, do_not_specialize=fixed)
    if driver.is_gluon():
        from triton.experimental import gluon

        return gluon.jit(copy, **options)
    return jit(copy, **options)


#: Stands for a zero of the type computed in that is part of the code: the imaginary part of what is real.
ZERO = object()

#: The names of the run-time scalar slots that every driver has; unused ones are None.
SCALARS = ("s0", "s1", "s2", "s3")


def slots(values: Sequence[Any]) -> tuple[Any, ...]:
    """``values`` padded with None to the number of scalar slots."""
    return (*values, *(None,) * (len(SCALARS) - len(values)))


def arguments(
    names: Sequence[str], named: Mapping[str, Any], operands: Mapping[str, str], compute: torch.dtype
) -> tuple[tuple[str, ...], dict[str, str]]:
    """How a formula gets what it names: the names of its run-time scalars, and an expression for every name.

    Numbers are passed at run time in the type computed in, floats as floats where that is an int type; strings, bools and None
    become part of the code.
    """
    runtime = tuple(dict.fromkeys(n for n in names if is_number(named.get(n)) and n not in operands))
    if len(runtime) > len(SCALARS):
        raise DeclarationError(f"a formula has at most {len(SCALARS)} run-time scalars, given {runtime}")
    expressions = {n: repr(v) for n, v in named.items() if v is None or isinstance(v, (str, bool))}
    zero = f"tl.full((), 0, tl.{str(compute).removeprefix('torch.')})"
    expressions.update({n: zero for n, v in named.items() if v is ZERO})
    cast = "{}" if compute.is_floating_point else f"{{}}.to(tl.{TRITON[compute].name})"
    expressions.update({n: s if isinstance(named[n], float) else cast.format(s) for n, s in zip(runtime, SCALARS)})
    return runtime, {**expressions, **operands}


def given(names: Sequence[str], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of the arguments the code of a kernel depends on: a key for filled drivers."""
    key: list[Any] = []
    for n in names:
        v = named.get(n)
        if isinstance(v, torch.Tensor):
            v = torch.Tensor
        elif is_number(v):
            v = int if isinstance(v, int) else float
        key.append(v)
    return tuple(key)


def scalar_types(
    runtime: Sequence[str], compute: torch.dtype, named: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The Triton types of the scalar slots in use, for such values as ``named``."""
    named = named or {}
    double = any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in named.values())
    real = compute if compute.is_floating_point else torch.float64 if double else torch.float32
    return {
        s: scalar_annotation(real if isinstance(named.get(n), float) else compute) for s, n in zip(SCALARS, runtime)
    }


def is_number(v: Any) -> bool:
    """Whether ``v`` is passed to kernels at run time."""
    return isinstance(v, (int, float)) and not isinstance(v, bool)


def generated(name: str, pool: str, body: str, **names: Any) -> Any:
    """The jit function ``name(pool)`` with this indented body; it sees ``tl`` and ``names``."""
    text = f"def {name}({pool}):\n{body}\n"
    namespace: dict[str, Any] = {"__name__": "gemskit.generated", "tl": tl, **names}
    # inspect.getsource, which Triton reads kernels with, finds generated text through linecache.
    file = f"<gemskit {name} {next(_serial)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"), namespace)
    return jit(namespace[name])


def adapter(name: str, pool: str, fn: Any, expressions: Mapping[str, str], wrap: str = "{}") -> Any:
    """A jit function of ``pool`` that calls ``fn`` with the expressions that its parameters name."""
    missing = [p for p in parameters(fn) if p not in expressions]
    if missing:
        raise DeclarationError(f"{name}: the formula asks for {missing}; it may name {sorted(expressions)}")
    call = f"F({', '.join(expressions[p] for p in parameters(fn))})"
    return generated(name, pool, f"    return {wrap.format(call)}", F=fn)
