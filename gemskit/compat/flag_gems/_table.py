"""From FlagGems' names to gemskit's operators: who serves a name, and in which order its arguments go."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

import gemskit
from gemskit.compat.flag_gems import _adapters, _signatures
from gemskit.errors import ArgumentError

Function = Callable[..., Any]

#: The operator that serves a name to which no rule of `target` leads.
_TARGETS = {
    "_index_put_impl_": "index_put_",
    "clip": "clamp",
    "clip_": "clamp_",
    "cross_entropy_loss": "cross_entropy",
    "dropout_backward": "native_dropout_backward",
    # FlagGems' function overwrites x and residual.
    "fused_add_rms_norm": "fused_add_rms_norm_",
    "group_mm": "grouped_mm",
    "true_divide": "div",
    "true_divide_": "div_",
    "true_divide_out": "div",
    "weight_norm_interface_backward": "weight_norm_backward",
}
#: Parameters that neither name nor position leads to.
_RENAMED = {
    ("arange", "end"): "start",
    ("multinomial", "gen"): "generator",
    ("repeat_interleave_tensor", "repeats"): "input",
}
#: Names that are refused, and why: gemskit has, or may get, something else under them.
_REFUSED = {
    "runtime": "the vendor is `gemskit.vendor`, the architecture's table `gemskit.backends.arch()`",
    "set_configs": "launches follow from rules, there are no configurations to set",
    "testing": "samples and checks are in `gemskit.testing` and `python -m gemskit check`",
    "utils": "declare operators of your own with `gemskit.pointwise.pointwise`",
}
#: What FlagGems appends to an operator's name for one of its overloads.
_OVERLOADS = (
    *("_scalar_tensor", "_tensor_scalar", "_tensor_tensor", "_tensor_float", "_float_tensor"),
    *("_scalar_self", "_scalar_other", "_self_int", "_self_tensor", "_dim_int", "_dim_values"),
    *("_scalar", "_tensor", "_self", "_dim", "_dims", "_correction", "_mode", "_stable", "_start", "_m"),
)
_FAMILIES = ("gemskit.blas.", "gemskit.nn.", "gemskit.pointwise.", "gemskit.reduce.")


def operator(name: str) -> Function | None:
    """gemskit's public operator called ``name``; None if there is none."""
    found = getattr(gemskit, name, None)
    ours = callable(found) and not isinstance(found, type) and found.__module__.startswith(_FAMILIES)
    return found if ours else None


def target(name: str) -> str | None:
    """The name of the gemskit operator behind FlagGems' ``name``; None if gemskit has none."""
    base = _TARGETS.get(name, name)
    if operator(base):
        return base
    base = base.removesuffix("_out")
    stem, end = (base[:-1], "_") if base.endswith("_") else (base, "")
    guesses = [base, *(stem.removesuffix(tail) + end for tail in _OVERLOADS if stem.endswith(tail))]
    return next((one for guess in guesses for one in (guess, guess.removeprefix("_")) if operator(one)), None)


class _Unfit(Exception):
    """FlagGems' arguments have no place in gemskit's function."""


def _places(name: str, theirs: inspect.Signature, ours: Mapping[str, inspect.Parameter]) -> dict[str, str | None]:
    """Our parameter for each of theirs: that of the same name, else that of the same position, else None."""
    positional = [p.name for p in ours.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    by_name = {n: our for n in theirs.parameters if (our := _RENAMED.get((name, n), n)) in ours}
    places: dict[str, str | None] = {}
    for i, (n, p) in enumerate(theirs.parameters.items()):
        here = positional[i] if p.kind is p.POSITIONAL_OR_KEYWORD and i < len(positional) else None
        places[n] = by_name.get(n, None if here in by_name.values() else here)
        if places[n] is None and p.default is p.empty:
            raise _Unfit(f"it has no parameter for {n!r}")
    needed = {p.name for p in ours.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if missing := needed - set(places.values()):
        raise _Unfit(f"it needs {', '.join(map(repr, sorted(missing)))} too")
    return places


def _idle(value: Any, default: Any) -> bool:
    """Whether a parameter that gemskit lacks was left as it is."""
    same = isinstance(value, (bool, int, float, str)) and value == default
    return same or any(value is one for one in (default, None, False, torch.strided))


def bind(name: str, fn: Function, theirs: inspect.Signature) -> Function:
    """``fn`` with FlagGems' parameter names, order and defaults; ``fn`` itself where they are its own."""
    ours = inspect.signature(fn).parameters
    given = list(theirs.parameters.values())
    places = _places(name, theirs, ours)
    spread = next((n for n, p in ours.items() if p.kind is p.VAR_POSITIONAL), None)
    positional = [n for n, p in ours.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    straight, plain = 0, True
    # Defaults that differ are passed; None stands for the default where ours is not None.
    defaults: dict[str, Any] = {}
    for i, p in enumerate(given):
        our = places[p.name]
        alike = our is not None and (p.default is not None or ours[our].default is None)
        plain = plain and alike and our == p.name
        if p.kind is not p.KEYWORD_ONLY:
            placed = alike and positional[i : i + 1] == [our]
            straight += placed and straight == i
            plain = plain and placed
        if our is not None and p.default not in (p.empty, None) and p.default != ours[our].default:
            defaults[p.name] = p.default
    if plain and not defaults:
        return fn
    # As many positional arguments as these go on as they are.
    last = max((i for i, p in enumerate(given) if p.default is p.empty or p.name in defaults), default=-1)
    quick = range(last + 1, straight + 1)

    order = [p.name for p in given if p.kind is not p.KEYWORD_ONLY]
    required = {p.name for p in given if p.default is p.empty}
    # Whether None goes on, as it does where it is our default too.
    none = {n for n, our in places.items() if our is None or ours[our].default in (None, inspect.Parameter.empty)}

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) in quick:
            return fn(*args)
        # dict() refuses what is given twice.
        values = {**defaults, **dict(**dict(zip(order, args)), **kwargs)}
        if len(args) > len(order) or not places.keys() >= values.keys() >= required:
            theirs.bind(*args, **kwargs)  # raises
        named: dict[str, Any] = {}
        for n, value in values.items():
            our = places[n]
            if our is None:
                if not _idle(value, theirs.parameters[n].default):
                    raise ArgumentError(f"{name}: {n}={value!r} is not supported; accepted: {theirs.parameters[n]}")
            elif value is not None or n in none:
                named[our] = value
        return fn(named.pop(spread), **named) if spread in named else fn(**named)

    call.__name__ = call.__qualname__ = name
    call.__signature__ = theirs  # type: ignore[attr-defined]
    return call


def _into(fn: Function) -> Function:
    """``fn`` with ``out`` as its last argument, in place or by name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs) if "out" in kwargs else fn(*args[:-1], out=args[-1], **kwargs)

    return functools.wraps(fn)(call)


def _same_arguments(name: str, ours: str) -> bool:
    """Whether a name beyond 5.0.2 is that of our operator, or of its overload for numbers, tensors or ``out``."""
    stem = ours.removesuffix("_")
    overload = re.fullmatch(rf"_?{re.escape(stem)}((_scalar|_tensor)*(_out)?)_?", name)
    return overload is not None and (not overload[1] or stem not in _adapters.__all__)


@functools.cache
def _resolve(name: str) -> Function | str:
    """What serves ``name``, or why nothing does."""
    if name in _adapters.__all__:
        adapter: Function = getattr(_adapters, name)
        return adapter
    if name in _REFUSED:
        return _REFUSED[name]
    ours, theirs = target(name), _signatures.signature(name)
    fn = None if ours is None else operator(ours)
    if fn is None:
        return "gemskit has no such operator"
    if theirs is None and not _same_arguments(name, str(ours)):
        return "FlagGems 5.0.2 has none, and the arguments of later ones are not known here"
    if theirs is None or any(p.kind is p.VAR_POSITIONAL for p in theirs.parameters.values()):
        return _into(fn) if name.endswith("_out") else fn
    try:
        return bind(name, fn, theirs)
    except _Unfit as unfit:
        return f"gemskit.{ours} takes other arguments: {unfit}"


def find(name: str) -> Function:
    """What serves FlagGems' ``name``: an adapter, or gemskit's operator bound to FlagGems' 5.0.2 parameters.

    A name that 5.0.2 does not have is gemskit's own operator, with torch's parameters.

    Raises:
        AttributeError: nothing serves it; the message says why and names the nearest.
    """
    found = _resolve(name)
    if isinstance(found, str):
        near = difflib.get_close_matches(name, names(), 3)
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        raise AttributeError(f"flag_gems.{name}: {found}{hint}", name=name)
    return found


@functools.cache
def names() -> tuple[str, ...]:
    """Every name that is served: those of FlagGems 5.0.2, and gemskit's operators under their own."""
    known = {*_signatures.parameters(), *_adapters.__all__, *(n for n in dir(gemskit) if operator(n))}
    return tuple(sorted(n for n in known if not n.startswith("__") and callable(_resolve(n))))


def attributes(namespace: dict[str, Any], wanted: Callable[[str], bool]) -> tuple[Function, Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a module that has the ``wanted`` names."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not wanted(name):
            raise AttributeError(f"{namespace['__name__']} has no {name!r}", name=name)
        # The module remembers, so the second time costs nothing.
        namespace[name] = found = find(name)
        return found

    def listing() -> list[str]:
        return sorted({*(n for n in namespace if not n.startswith("_")), *filter(wanted, names())})

    return get, listing
