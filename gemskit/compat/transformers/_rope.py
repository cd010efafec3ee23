"""Rotary positions: the function that an attention module calls, replaced for that module alone."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gemskit
from gemskit.compat.transformers import _probe
from gemskit.compat.transformers._patch import Patch, sharded


class _Form(NamedTuple):
    """How a function rotates: what its tables hold for a head of ``D`` channels, and which channels are a pair."""

    table: str  # "halves": entries repeat after half of them; "pairs": each entry twice; "single": one for each pair
    interleaved: bool  # pairs (2i, 2i + 1), not (i, i + n)
    split: bool = False  # even channels are moved to the front, odd ones behind them, before rotating halves
    keeps: bool = False  # the result has the dtype of q, however wide the tables are


_FORMS = [
    _Form("halves", False),
    _Form("single", False),
    _Form("halves", True),
    _Form("pairs", True),
    _Form("single", True),
    _Form("halves", False, True),
]
_FOUND: dict[Hashable, tuple[_Form, tuple[str, ...]] | None] = {}


def rope(model: nn.Module, patch: Patch) -> None:
    """Replace the functions ``apply_rotary...`` that modules call by :func:`gemskit.apply_rotary_pos_emb`."""
    for path, module in model.named_modules():
        stock = inspect.unwrap(type(module).forward)
        if not isinstance(stock, types.FunctionType):
            continue
        names = [n for n in stock.__code__.co_names if n.startswith("apply_rotary") and n in stock.__globals__]
        if names and stock is not type(module).forward:
            patch.left("rope", module, "its forward is decorated")
            continue
        chosen = []
        for name in names:
            function = stock.__globals__[name]
            found = _match(function)
            if found is None:
                patch.left("rope", module, f"{name} rotates in another way")
            elif found[0].table != "single" and any(b.is_meta for b in model.buffers()):
                patch.left("rope", module, "its tables are not in memory")
            elif found[0].table != "single" and not _tables_repeat(model, path, found[0].table):
                patch.left("rope", module, f"the tables of {name} do not repeat as {found[0].table}")
            else:
                chosen.append((name, _rotation(function, *found)))
        if chosen:
            patch.forward("rope", module, _overlaid(stock, tuple(chosen)))


@functools.cache
def _overlaid(function: types.FunctionType, names: tuple[tuple[str, Any], ...]) -> types.FunctionType:
    """The function with some of its module's globals replaced, for itself alone."""
    namespace = {**function.__globals__, **dict(names)}
    # By this name torch.compile would look up globals in the module instead.
    del namespace["__name__"]
    made = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    made.__module__ = function.__module__
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


# -- what the function computes -------------------------------------------------------------------------------------------


def _match(function: Any) -> tuple[_Form, tuple[str, ...]] | None:
    """The form of ``function(q, k, cos, sin, ...)`` and the names of its further arguments."""
    key: Any = type(function) if isinstance(function, nn.Module) else function
    if key not in _FOUND:
        _FOUND[key] = _probed(function)
    return _FOUND[key]


def _probed(function: Any) -> tuple[_Form, tuple[str, ...]] | None:
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        names = tuple(inspect.signature(called).parameters)
    except (TypeError, ValueError):
        return None
    further = names[4:]
    if names[:4] != ("q", "k", "cos", "sin") or not set(further) <= {"position_ids", "unsqueeze_dim"}:
        return None
    for form in _FORMS:
        try:
            if all(_agrees(function, form, *sizes) for sizes in ((16, 16, 1), (16, 16, 2))):
                return form._replace(keeps=_keeps(function, form)), further
        except Exception:  # The tables have a shape that it does not take.
            continue
    return None


def _tensors(form: _Form, channels: int, rotated: int, unsqueeze_dim: int) -> list[Tensor]:
    """q, k, cos and sin: random tables in the form."""
    tables = [_probe.randn(2, 5, rotated // 2, seed=seed) for seed in (5, 6)]
    if form.table == "halves":
        tables = [torch.cat((t, t), -1) for t in tables]
    elif form.table == "pairs":
        tables = [t.repeat_interleave(2, -1) for t in tables]
    heads = [_probe.randn(2, n, 5, channels, seed=n) for n in (4, 2)]
    return [*(t if unsqueeze_dim == 1 else t.transpose(1, 2) for t in heads), *tables]


def _agrees(function: Any, form: _Form, channels: int, rotated: int, unsqueeze_dim: int) -> bool:
    named = {} if unsqueeze_dim == 1 else {"unsqueeze_dim": unsqueeze_dim}
    given = _tensors(form, channels, rotated, unsqueeze_dim)
    with torch.no_grad():
        found = function(*given, **named)
        q, k, cos, sin = given
        expected = _rotate(form, q, k, cos, sin, unsqueeze_dim)
    return isinstance(found, tuple) and len(found) == 2 and all(map(_probe.close, found, expected))


def _keeps(function: Any, form: _Form) -> bool:
    q, k, cos, sin = _tensors(form, 16, 16, 1)
    with torch.no_grad():
        return bool(function(q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.bfloat16)


def _tables_repeat(model: nn.Module, path: str, kind: str) -> bool:
    """Whether the nearest modules that make tables of cos and sin repeat their entries in this way."""
    modules = dict(model.named_modules())
    while True:
        prefix = path + "." if path else ""
        makers = [m for n, m in modules.items() if n.startswith(prefix) and "Rotary" in type(m).__name__]
        found = [table for m in makers for table in _made(m)]
        if found or not path:
            break
        path = path.rpartition(".")[0]
    halves = [t.chunk(2, dim=-1) if kind == "halves" else (t[..., ::2], t[..., 1::2]) for t in found]
    return bool(found) and all(a.shape == b.shape and torch.equal(a, b) for a, b in halves)


def _made(module: nn.Module) -> list[Tensor]:
    """The tables that a module makes for a few positions; none if it is called in another way."""
    types_of_layers = getattr(module, "layer_types", None) or [None]
    found: list[Tensor] = []
    for kind in types_of_layers:
        made = _probe.twin(module)
        buffer = next((b for b in module._buffers.values() if b is not None), torch.empty(0))
        positions = torch.arange(1, 6, device=buffer.device)[None]
        try:
            with torch.no_grad():
                tables = type(module).forward(
                    made, torch.zeros(1, device=buffer.device), positions, *filter(None, [kind])
                )
        except Exception:  # Positions of images, or no positions at all.
            continue
        if isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(t, Tensor) for t in tables):
            found += tables
    return found


# -- the replacement ------------------------------------------------------------------------------------------------------


def _rotate(form: _Form, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    if form.table == "halves":
        cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
    elif form.table == "pairs":
        cos, sin = cos[..., ::2], sin[..., ::2]
    if form.split:
        q, k = (torch.cat((t[..., ::2], t[..., 1::2]), -1) for t in (q, k))
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    return gemskit.apply_rotary_pos_emb(q, k, cos, sin, None, form.interleaved, layout=layout)


@functools.cache
def _rotation(function: Any, form: _Form, further: tuple[str, ...]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(further, args)), **kwargs}
        dim = given.get("unsqueeze_dim", 1)
        plain = q.ndim == k.ndim == 4 and cos.ndim == 3 and dim in (1, 2) and given.get("position_ids") is None
        if not plain or cos.requires_grad or sharded(q, k):
            return function(q, k, cos, sin, *args, **kwargs)
        if not form.keeps and q.dtype != cos.dtype:
            wide = torch.promote_types(q.dtype, cos.dtype)
            q, k = q.to(wide), k.to(wide)
        return _rotate(form, q, k, cos, sin, dim)

    return rotate
