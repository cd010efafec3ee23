"""Which ATen overloads an operator or function of gemskit can serve: found by comparing torch's schemas with signatures.

An overload is served where every argument of its schema has a parameter of the same name (``self`` and other renamed ones: of
the same place) and a fitting type, every parameter without a default gets an argument, and the results are as many. What torch
decomposes above autograd (CompositeImplicitAutograd without a kernel of the device), views, factories and whatever draws random
numbers stay torch's.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gemskit
from gemskit import _checks
from gemskit._compile import _results
from gemskit._dtypes import FLOAT8, PARTS, TRITON
from gemskit._op import REGISTRY, Op
from gemskit.compat import _aten_leaves

#: Modules of functions that only make views, or tensors from nothing.
_NOTHING_TO_SERVE = {"gemskit.pointwise.views"}
_FACTORIES = {"linspace", "logspace"}

_EXPLICIT = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")

#: Schema types, and what the annotation of a parameter must contain to take them.
_FITS = {
    "Tensor": r"\bTensor\b(?!\])",
    "number": r"\b(Number|Scalar|float)\b",
    "float": r"\b(Number|Scalar|float)\b",
    "int": r"\b(int|Number|Scalar|Dims)\b",
    "bool": r"\bbool\b",
    "str": r"\b(str|Literal)\b",
    "ScalarType": r"torch\.dtype",
    "MemoryFormat": r"torch\.memory_format",
    "Layout": r"torch\.layout",
    "Device": r"torch\.device",
    "List[int]": r"Dims|Sequence\[int\]|list\[int\]|Shape",
    "List[bool]": r"Sequence\[bool\]",
    "List[Tensor]": r"Sequence\[Tensor\]",
    "List[Optional[Tensor]]": r"Indices",
}


@dataclass(frozen=True)
class Target:
    """An ATen overload and the code that serves it."""

    #: Without the namespace: ``"add.Tensor"``, ``"silu_"``.
    key: str
    schema: Any
    #: The names that select it, that of the gemskit function first.
    names: tuple[str, ...]
    #: A row of the benchmark table, which has "softmax" and "softmax backward".
    row: str
    #: What is called, as an expression, and the object that it starts with.
    callee: str
    served_by: Any
    #: Argument names of the schema as the callee takes them: positional, or ``name=argument``.
    arguments: tuple[str, ...]
    #: Dtypes that there are kernels for; None where only the function knows.
    dtypes: frozenset[torch.dtype] | None
    #: Tensor arguments that may be given as numbers.
    numbers: frozenset[str]

    @property
    def packet(self) -> str:
        """The name without the overload."""
        return self.key.partition(".")[0]


def _known() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def _has(name: str, *keys: str) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, k) for k in keys)


@functools.cache
def targets(dispatch_key: str) -> dict[str, Target]:
    """The overloads that can be served at ``dispatch_key``, by name."""
    packets: dict[str, list[str]] = {}
    for name in _known():
        if name.startswith("aten::"):
            packets.setdefault(name[6:].partition(".")[0], []).append(name)
    found: dict[str, Target] = {}
    for base, serving in _candidates(packets).items():
        for packet in (base, f"{base}_"):
            for name in sorted(packets.get(packet, ())):
                if name[6:] not in found and _replaceable(name, dispatch_key):
                    target = _first(name, packet != base, serving, dispatch_key)
                    if target is not None:
                        found[target.key] = target
    return dict(sorted(found.items()))


def _candidates(packets: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Operators and functions that may serve a packet: leaves of torch's own, operators that name it, functions of its name."""
    serving: dict[str, list[Any]] = {}
    for name, leaf in _aten_leaves.LEAVES.items():
        serving.setdefault(name.removesuffix("_") if name.endswith("_") else name, []).append(leaf)
    for op in REGISTRY.values():
        if op.aten and not op.random:
            serving.setdefault(op.aten.partition(".")[0], []).append(op)
    for name in dir(gemskit):
        base, fn = name.removesuffix("_"), getattr(gemskit, name)
        if name in packets and inspect.isroutine(fn) and base not in _FACTORIES:
            if fn.__module__ not in _NOTHING_TO_SERVE:
                serving.setdefault(base, []).append(fn)
    return serving


def _replaceable(name: str, key: str) -> bool:
    """Whether torch runs a kernel of its own for ``name`` at ``key``, with autograd above it."""
    if not _has(name, key) and (_has(name, "CompositeImplicitAutograd") or not _has(name, *_EXPLICIT)):
        return False
    schema = _schema(name)
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return False
    return any("Tensor" in str(a.type) for a in schema.arguments if not a.is_out)


def _schema(name: str) -> Any:
    base, _, overload = name.partition(".")
    return torch._C._get_schema(base, overload)  # type: ignore[attr-defined]


def _first(name: str, inplace: bool, serving: list[Any], key: str) -> Target | None:
    schema, exact = _schema(name), name[6:]
    # An operator that names the very overload is asked first.
    for one in sorted(serving, key=lambda s: not (isinstance(s, Op) and s.aten == exact)):
        is_op = isinstance(one, Op)
        called = one.name if is_op else one.__name__
        if inplace and (not one.inplace_name if is_op else not called.endswith("_")):
            continue
        if not inplace and not is_op and called.endswith("_"):
            continue
        arguments = _fit(schema, one)
        if arguments is None:
            continue
        callee = f"one.{'_overwrites' if inplace else '_calls'}.call" if is_op else "one"
        row = getattr(one, "row", called.removesuffix("_") if not is_op else called)
        packet = exact.partition(".")[0].removesuffix("_")
        names = {row.partition(" ")[0].lstrip("_"), packet.lstrip("_"), called.lstrip("_").removesuffix("_")}
        public = sorted(names, key=lambda n: (not hasattr(gemskit, n), n != packet, n))
        dtypes = _dtypes(one) if is_op else None
        return Target(
            exact, schema, tuple(public), row, callee, one, tuple(arguments), dtypes, _numbers(one, arguments)
        )
    return None


def _dtypes(op: Op[..., Any]) -> frozenset[torch.dtype]:
    return frozenset(d for d in (*TRITON, *PARTS, *FLOAT8) if _checks._serves(op, d))


def _numbers(one: Any, arguments: list[str]) -> frozenset[str]:
    """The arguments that go to parameters which take numbers too."""
    params = (one.signature if isinstance(one, Op) else inspect.signature(one)).parameters
    places = dict(zip(params, arguments))
    places.update({a.partition("=")[0]: a.partition("=")[2] for a in arguments if "=" in a})
    return frozenset(a for n, a in places.items() if re.search(_FITS["number"], str(params[n].annotation)))


def _fit(schema: Any, one: Any) -> list[str] | None:
    """How ``one`` is called with the schema's arguments; None where they do not fit."""
    signature: inspect.Signature = one.signature if isinstance(one, Op) else inspect.signature(one)
    params = signature.parameters
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in params.values()):
        return None
    given = [a for a in schema.arguments if not a.is_out]
    outs = [a.name for a in schema.arguments if a.is_out]
    if not _as_many(schema, one, signature) or (outs and "out" not in params):
        return None
    names = [n for n in params if n != "out"]
    wanted = {a.name for a in given}
    used: dict[str, str] = {}
    for i, a in enumerate(given):
        n = a.name
        if n not in names or n in used:
            n = names[i] if i < len(names) and names[i] not in used and names[i] not in wanted - {a.name} else ""
        if not n or not _takes(str(a.real_type), str(params[n].annotation)):
            return None
        used[n] = a.name
    if any(params[n].default is inspect.Parameter.empty for n in names if n not in used):
        return None
    return list(_call(params, names, used, outs))


def _call(params: Any, names: list[str], used: dict[str, str], outs: list[str]) -> Iterator[str]:
    by_name = False
    for n in names:
        if n not in used:
            by_name = True
        elif by_name or params[n].kind is inspect.Parameter.KEYWORD_ONLY:
            yield f"{n}={used[n]}"
        else:
            yield used[n]
    if outs:
        yield f"out={outs[0]}" if len(outs) == 1 else f"out=({', '.join(outs)})"


def _takes(kind: str, annotation: str) -> bool:
    optional = kind.startswith("Optional[")
    if optional:
        kind = kind[9:-1]
        # None is false where a bool is meant, and all dimensions.
        if kind != "bool" and not re.search(r"\bNone\b|Dims", annotation):
            return False
    if kind == "int" and annotation.startswith("torch.dtype"):
        return False
    if kind not in _FITS:
        return False
    return re.search(_FITS[kind], annotation) is not None


def _as_many(schema: Any, one: Any, signature: inspect.Signature) -> bool:
    kinds = [str(r.type) for r in schema.returns]
    text = str(signature.return_annotation)
    if kinds == ["bool"]:
        return text == "bool"
    if text == "Any" or any(k != "Tensor" for k in kinds):
        return False
    if isinstance(one, Op):
        return len(kinds) == _results(one)
    return len(kinds) == (text.count("Tensor") if text.startswith("tuple[") else int(text == "Tensor"))


def wrapper(target: Target, template: str, scope: dict[str, Any]) -> Any:
    """The Python kernel of ``target``: ``template`` with its parameters, its call and the call of the original filled in."""
    if target.key not in _programs:
        _programs[target.key] = _program(target, template)
    code, defaults = _programs[target.key]
    names = {"one": target.served_by, "dtypes": target.dtypes, "numbers": NUMBERS, "wrapped": wrapped}
    namespace = {**defaults, **scope, **names}
    exec(code, namespace)
    return namespace["run"]


#: Code and default values by overload: compiling all of it takes 0.3 s.
_programs: dict[str, tuple[Any, dict[str, Any]]] = {}


def _program(target: Target, template: str) -> tuple[Any, dict[str, Any]]:
    defaults: dict[str, Any] = {}
    params, given, stars = ["keyset"], ["keyset"], False
    for a in target.schema.arguments:
        if a.kwarg_only and not stars:
            stars = True
            params.append("*")
        if a.has_default_value():
            defaults[f"_{a.name}"] = a.default_value
        params.append(f"{a.name}=_{a.name}" if a.has_default_value() else a.name)
        given.append(f"{a.name}={a.name}" if a.kwarg_only else a.name)
    tensors = _tensors(target)
    text = template.format(
        params=", ".join(params),
        given=", ".join(given),
        ours=f"{target.callee}({', '.join(target.arguments)})",
        refuse=_refusal(target, tensors),
        tensors=", ".join([*tensors, ""]).strip() or "_",
        any_number=" or ".join(f"{n}.__class__ in numbers" for n in tensors) or "False",
    )
    return compile(text, f"<gemskit over aten::{target.key}>", "exec"), defaults


def _tensors(target: Target) -> list[str]:
    return [a.name for a in target.schema.arguments if "Tensor" in str(a.type) and "List" not in str(a.type)]


def _refusal(target: Target, tensors: list[str]) -> str:
    """A test for what has no kernel by its type, which is cheaper than the error that says so."""
    tests = []
    for a in target.schema.arguments:
        if a.name in tensors and not a.is_out:
            n, test = a.name, f"{a.name}.dtype not in dtypes" if target.dtypes is not None else "False"
            if str(a.type) != "Tensor":
                test = f"({n} is not None and {test})"
            tests.append(f"({n}.__class__ {'not in numbers and' if n in target.numbers else 'in numbers or'} {test})")
    return " or ".join(tests) or "False"


#: What the dispatcher hands to Python kernels in the place of a tensor that stands for a Python number.
NUMBERS = frozenset((bool, int, float, complex))


def wrapped(*given: Any) -> tuple[Any, ...]:
    """Tensors again in the place of numbers, of a dtype that gives the same result type: only C++ can mark a tensor as one.

    A 0-dim tensor does not promote tensors with dimensions of its category, and the widest dtype keeps the value. Beside 0-dim
    tensors it is a dtype like any other, so there the number takes the result's.
    """
    tensors = [v for v in given if isinstance(v, Tensor)]
    found: list[Any] = []
    v: Any
    for v in given:
        kind: Any = type(v)
        if kind in NUMBERS:
            dtype = _WIDE[kind]
            if tensors:
                same = [torch.result_type(t, v) for t in tensors]
                if any(s != t.dtype for s, t in zip(same, tensors)) or not any(t.ndim for t in tensors):
                    dtype = functools.reduce(torch.promote_types, same)
            v = torch.tensor(v, dtype=dtype)
        found.append(v)
    return tuple(found)


_WIDE = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
