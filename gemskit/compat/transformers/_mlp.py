"""Gated perceptrons: ``down(act(gate(x)) * up(x))``, with separate or joined projections."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemskit
from gemskit.compat.transformers import _probe
from gemskit.compat.transformers._patch import Patch

_GATES: dict[str, Callable[..., Tensor]] = {
    "silu": gemskit.silu_and_mul,
    "gelu": gemskit.gelu_and_mul,
    "gelu_tanh": functools.partial(gemskit.gelu_and_mul, approximate="tanh"),
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
#: The gate and the names of the projections (gate, up, down) or (gate_up, down), by module; or why there are none.
_FOUND: dict[Hashable, tuple[str, tuple[str, ...]] | str] = {}
_SIZE = 8


def mlp(model: nn.Module, patch: Patch) -> None:
    """Replace the activation and the product of gated perceptrons by one operator; the projections stay modules."""
    for module in model.modules():
        if len(module._modules) not in (3, 4) or module._parameters or module._buffers:
            continue
        if not _probe.one_argument(module) or not any(map(activation, module._modules.values())):
            continue
        key = (_probe.key(module), *map(activation, module._modules.values()))
        if key not in _FOUND:
            _FOUND[key] = _roles(module)
        found = _FOUND[key]
        if isinstance(found, str):
            patch.left("mlp", module, found)
        else:
            patch.forward("mlp", module, _forward(*found))


def activation(module: Any) -> str | None:
    """Which activation a child or a function computes, if it is one that a gate has."""
    if not callable(module) or getattr(module, "_parameters", None) or getattr(module, "_modules", None):
        return None
    x = torch.linspace(-5, 5, 41, device="cpu")
    try:
        with torch.no_grad():
            y = module(x)
    except Exception:  # Not a function of one tensor.
        return None
    return next((name for name, known in _ACTIVATIONS.items() if _probe.close(y, known(x), 2e-6)), None)


class _Projection(nn.Module):
    """Stands in for a projection, whatever class that has."""

    def __init__(self, outputs: int, seed: int) -> None:
        super().__init__()
        self.matrix = _probe.randn(outputs, _SIZE, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


def _roles(module: nn.Module) -> tuple[str, tuple[str, ...]] | str:
    """Which child is which projection: the assignment that gives the numbers of the class, in both modes."""
    (act,) = acts if len(acts := [n for n, m in module._modules.items() if activation(m)]) == 1 else ("",)
    if not act:
        return "has more than one activation"
    kind = activation(module._modules[act])
    assert kind is not None
    x = _probe.randn(2, 3, _SIZE, seed=4)
    children = [n for n in module._modules if n != act]
    joined = len(children) == 2
    for names in itertools.permutations(children):
        sizes = (2 * _SIZE, _SIZE) if joined else (_SIZE,) * 3
        made = _probe.twin(module)
        parts = [_Projection(size, seed) for seed, size in enumerate(sizes)]
        made._modules.update(zip(names, parts))
        gate, up = parts[0](x).chunk(2, dim=-1) if joined else (parts[0](x), parts[1](x))
        if all(_close(made, x, parts[-1](_ACTIVATIONS[kind](gate) * up), training) for training in (False, True)):
            return kind, names
    return "computes something else than down(act(gate) * up)"


def _close(made: nn.Module, x: Tensor, expected: Tensor, training: bool) -> bool:
    made.__dict__["training"] = training
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            found = type(made).forward(made, x)
        # Dropout of a rate of 0 draws nothing; one of another rate shows.
        return torch.equal(state, torch.get_rng_state()) and _probe.close(found, expected)
    except Exception:  # It reads something of its projections: they are more than functions to it.
        return False
    finally:
        torch.set_rng_state(state)


@functools.cache
def _forward(kind: str, names: tuple[str, ...]) -> Callable[..., Tensor]:
    gated = _GATES[kind]
    *inner, down = names

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, down)(gated(*[getattr(self, name)(x) for name in inner]))
        return found

    return forward
