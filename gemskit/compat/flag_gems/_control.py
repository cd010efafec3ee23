"""FlagGems' switches, on top of :mod:`gemskit.compat.aten`, which is imported when the first of them is used."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import warnings
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any

from gemskit import backends
from gemskit.compat.flag_gems import _signatures, _table
from gemskit.errors import ArgumentError, MissingExtra, VendorError

#: Names of operators, or the path of a YAML file that lists them under ``include:`` or ``exclude:``.
Names = Sequence[str] | Set[str] | str | None

#: The vendor that serves this process, for example ``"nvidia"``.
vendor_name: str = backends.vendor.name


def _aten() -> ModuleType:
    return importlib.import_module("gemskit.compat.aten")


def _listed(given: Names, key: str) -> list[str] | None:
    """The names given, in a file or not; None for the default."""
    if given is None or given == "default":
        return None
    if not isinstance(given, str):
        return sorted(set(given))
    if not given.endswith((".yml", ".yaml")):
        raise ArgumentError(f"{key}: {given!r} is a string; accepted: a list of names, a .yaml file, 'default' or None")
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("flag_gems: lists in YAML files need PyYAML: pip install pyyaml") from error
    found = yaml.safe_load(Path(given).read_text(encoding="utf-8")) or []
    return sorted(set(found.get(key) or [] if isinstance(found, dict) else found))


def _operators(given: list[str]) -> tuple[list[str], list[str]]:
    """What `gemskit.compat.aten` calls them, and those that replace nothing in torch. Overloads pass as they are."""
    served: list[str] = []
    lacking: list[str] = []
    for name in given:
        found = name if "." in name else _table.target(name)
        if found is None:
            if name not in _signatures.parameters():
                near = difflib.get_close_matches(name, (*_signatures.parameters(), *_table.names()), 3)
                hint = f"; the nearest: {', '.join(near)}" if near else ""
                raise ArgumentError(f"flag_gems: no operator is called {name!r}{hint}")
            lacking.append(name)
            continue
        try:
            _aten().select([found])
            served.append(found)
        except ArgumentError:
            if "." in name:
                raise
            lacking.append(name)
    return sorted(set(served)), lacking


def _chosen(include: Names, exclude: Names) -> dict[str, Any] | None:
    """The arguments of ``enable_aten`` for one of the two, ``include`` before ``exclude``; None if nothing is left to enable."""
    if include == "all":
        return {"include": "all"}
    wanted = _listed(include, "include")
    if wanted is not None:
        served, lacking = _operators(wanted)
        if lacking:
            warnings.warn(
                f"flag_gems: {', '.join(lacking)} stay torch's: no operator of gemskit replaces an ATen operator there",
                stacklevel=4,
            )
        return {"include": served} if served else None
    skipped = _listed(exclude, "exclude") if include is None else None
    # What replaces nothing is excluded anyway.
    return {"exclude": _operators(skipped)[0]} if skipped else {}


def _enable(include: Names, exclude: Names, record: bool, path: str | Path | None) -> Any:
    chosen = _chosen(include, exclude)
    if chosen is not None:
        return _aten().enable_aten(**chosen, record=record, path=path)
    warnings.warn("flag_gems: nothing is enabled", stacklevel=3)
    return None


def enable(
    lib: object = None, unused: Names = None, registrar: object = None, record: bool = False, once: bool = False,
    path: str | Path | None = None,
) -> Any:  # fmt: skip
    """Let torch call gemskit's operators: the default set of ``enable_aten``, without those in ``unused``.

    ``record`` logs every call to ``path``. ``lib``, ``registrar`` and ``once`` are accepted and have no effect. Returns the
    handle of ``enable_aten``.
    """
    return _enable(None, unused, record, path)


def only_enable(
    lib: object = None, include: Names = None, registrar: object = None, record: bool = False, once: bool = False,
    path: str | Path | None = None,
) -> Any:  # fmt: skip
    """Let torch call gemskit's operators in ``include``; ``"all"`` is every one, ``"default"`` and None are the default set.

    What gemskit cannot replace stays torch's, with a warning. Else as `enable`.
    """
    return _enable(include, None, record, path)


@contextlib.contextmanager
def use_gems(
    exclude: Names = None, include: Names = None, record: bool = False, once: bool = False,
    path: str | Path | None = None,
) -> Iterator[Any]:  # fmt: skip
    """`enable` without ``exclude``, or `only_enable` of ``include`` if that is given, inside a ``with``."""
    with _enable(include or None, exclude or None, record, path) or contextlib.nullcontext() as handle:
        yield handle


def disable() -> None:
    """Undo `enable` and `only_enable`."""
    _aten().disable_aten()


def no_gems() -> contextlib.AbstractContextManager[Any]:
    """Plain torch inside a ``with``, while gemskit is enabled."""
    context: contextlib.AbstractContextManager[Any] = _aten().no_aten()
    return context


def all_registered_ops() -> list[str]:
    """The names of the operators that torch calls now."""
    return list(_aten().registered_ops())


def all_registered_keys() -> list[str]:
    """The ATen overloads that are gemskit's now."""
    return list(_aten().registered_keys())


def set_backend(name: str = "auto") -> None:
    """Accept ``"auto"``, ``"triton"`` and the vendor that serves this process, which are the same here.

    Raises:
        VendorError: the process is served by another vendor, which only ``GEMSKIT_VENDOR`` can change.
    """
    accepted = ("auto", "triton", vendor_name)
    if name not in accepted:
        raise VendorError(
            f"flag_gems.set_backend: {name!r}; accepted here: {', '.join(map(repr, accepted))}. A process is served by one "
            f"vendor; start it with GEMSKIT_VENDOR=<name> for another ({', '.join(backends.vendors)})"
        )


@contextlib.contextmanager
def use_backend(name: str = "auto") -> Iterator[None]:
    """`set_backend` inside a ``with``."""
    set_backend(name)
    yield
