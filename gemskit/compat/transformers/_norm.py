"""Norms of the last dimension: torch's modules, and every class that computes an RMS norm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemskit
from gemskit.compat.transformers import _probe
from gemskit.compat.transformers._patch import Patch, sharded

#: Variants by module: the name of eps, whether the weight is an offset from one, whether a wider weight widens the result.
_FOUND: dict[Hashable, tuple[str, bool, bool] | None] = {}


def norms(model: nn.Module, patch: Patch) -> None:
    """Replace norms by :func:`gemskit.rms_norm`, :func:`gemskit.gemma_rms_norm` and :func:`gemskit.layer_norm`."""
    for module in model.modules():
        if type(module).forward is nn.LayerNorm.forward:
            patch.forward("norms", module, _layer_norm)
        elif type(module).forward is nn.RMSNorm.forward:
            patch.forward("norms", module, _rms_norm)
        elif _like_rms_norm(module):
            key = _probe.key(module)
            if key not in _FOUND:
                _FOUND[key] = _variant(module)
            found = _FOUND[key]
            if found is not None:
                patch.forward("norms", module, _forward(*found))
            elif "Norm" in type(module).__name__:
                patch.left("norms", module, "computes something else than an RMS norm")
        elif "RMSNorm" in type(module).__name__:
            patch.left("norms", module, "has more than a weight and an epsilon, or more than one argument")


def _like_rms_norm(module: nn.Module) -> bool:
    weights = [p for p in module._parameters.values() if p is not None]
    return (
        len(weights) == 1
        and module._parameters.get("weight") is weights[0]
        and weights[0].ndim == 1
        and not module._modules
        and not module._buffers
        and any(isinstance(v, float) for v in module.__dict__.values())
        and _probe.one_argument(module)
    )


def _variant(module: nn.Module) -> tuple[str, bool, bool] | None:
    """The variant that gives the numbers of the class: for inputs where epsilon counts and where not, for halves."""
    made = _probe.twin(module)
    weight = made._parameters["weight"]
    assert weight is not None
    cols = weight.shape
    with torch.no_grad():
        try:
            inputs = [_probe.randn(2, 3, *cols, seed=1) * scale for scale in (3.0, 1e-3)]
            found = [type(module).forward(made, x) for x in inputs]
            half = type(module).forward(_probe.twin(module, torch.bfloat16), inputs[0].bfloat16())
            mixed = type(module).forward(made, inputs[0].bfloat16())
        except Exception:  # Whatever it wants of its argument, it is no norm.
            return None
        if (
            not isinstance(half, Tensor)
            or half.dtype != torch.bfloat16
            or mixed.dtype not in (half.dtype, weight.dtype)
        ):
            return None
        for eps in (n for n, v in module.__dict__.items() if isinstance(v, float)):
            for offset in (False, True):
                expected = [F.rms_norm(x, cols, weight + 1 if offset else weight, getattr(module, eps)) for x in inputs]
                if all(map(_probe.close, found, expected)) and _probe.close(half, expected[0], 2**-6):
                    return eps, offset, mixed.dtype == weight.dtype
    return None


@functools.cache
def _forward(eps: str, offset: bool, widens: bool) -> Callable[..., Tensor]:
    """One function for all modules of a variant, so that torch.compile compiles it once."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if sharded(weight, hidden_states):
            stock: Tensor = type(self).forward(self, hidden_states)
            return stock
        if widens and weight.dtype != hidden_states.dtype:
            hidden_states = hidden_states.to(torch.promote_types(weight.dtype, hidden_states.dtype))
        if offset:
            return gemskit.gemma_rms_norm(hidden_states, weight, getattr(self, eps))
        return gemskit.rms_norm(hidden_states, weight.shape, weight, getattr(self, eps))

    return forward


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    if sharded(self.weight, x):
        return nn.RMSNorm.forward(self, x)
    return gemskit.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _layer_norm(self: Any, input: Tensor) -> Tensor:
    # Autocast computes layer norms of halves in float32 and returns float32.
    if sharded(self.weight, input) or torch.is_autocast_enabled(input.device.type):
        return nn.LayerNorm.forward(self, input)
    return gemskit.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
