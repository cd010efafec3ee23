"""Finding out what a module computes by calling its class on a small stand-in, never on the module itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn


def key(module: nn.Module) -> Hashable:
    """What decides how a module computes: its class, its settings, its children's names. Layers differ in their index."""
    settings = {n: v for n, v in module.__dict__.items() if isinstance(v, (bool, int, float, str, type(None)))}
    settings = {n: v for n, v in settings.items() if n not in ("training", "layer_idx")}
    weights = tuple((n, None if p is None else p.shape) for n, p in module._parameters.items())
    return type(module), tuple(sorted(settings.items(), key=str)), tuple(module._modules), weights


def twin(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A shallow copy on the CPU with random parameters and the forward of its class."""
    made = copy.copy(module)
    own = {n: v for n, v in module.__dict__.items() if n not in ("forward", "_old_forward", "_hf_hook")}
    made.__dict__ = {n: dict(v) if isinstance(v, dict) else v for n, v in own.items()}
    for name, weight in module._parameters.items():
        if weight is not None:
            made._parameters[name] = nn.Parameter((randn(*weight.shape, seed=3) * 0.5 + 1).to(dtype), False)
    return made


def randn(*shape: int, seed: int) -> Tensor:
    """Normal numbers on the CPU that leave torch's generator alone."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def one_argument(module: nn.Module) -> bool:
    """Whether forward takes a single argument."""
    try:
        return len(inspect.signature(type(module).forward).parameters) == 2
    except (TypeError, ValueError):
        return False


def close(found: Any, expected: Tensor, rtol: float = 1e-5) -> bool:
    """Whether ``found`` is the expected tensor, up to ``rtol`` of its largest element."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    bound = rtol * float(expected.float().abs().max())
    return torch.allclose(found.float(), expected.float(), rtol=rtol, atol=bound)
