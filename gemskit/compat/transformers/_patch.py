"""The record of what was changed in a model, and its way back."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

#: What a copied configuration has of its own: everything else goes back to the original on restore.
_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")


@dataclasses.dataclass
class Report:
    """What :func:`optimize` did: of each rule, modules by class, and the classes that it left alone, with the reason."""

    applied: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        done = [f"{rule:10} {name} x {n}" for rule, found in self.applied.items() for name, n in found.items()]
        left = [f"{rule:10} {name}: left, {why}" for rule, found in self.skipped.items() for name, why in found.items()]
        return "\n".join([*done, *left]) or "nothing"


class Patch:
    """Attributes set in modules, with what they replaced. A copy of the model takes along a copy that restores the copy."""

    def __init__(self) -> None:
        self.report = Report()
        self._changes: list[tuple[nn.Module, str, bool, Any, Any]] = []
        self._configs: list[tuple[Any, Any]] = []

    def did(self, rule: str, module: nn.Module) -> None:
        """Count ``module`` as changed."""
        found = self.report.applied.setdefault(rule, {})
        found[type(module).__name__] = found.get(type(module).__name__, 0) + 1

    def left(self, rule: str, module: nn.Module, why: str) -> None:
        """Note why ``module`` stays."""
        self.report.skipped.setdefault(rule, {})[type(module).__name__] = why

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Put ``value`` into the module's ``__dict__``, past its ``__setattr__``."""
        own = module.__dict__
        self._changes.append((module, name, name in own, own.get(name), value))
        own[name] = value

    def forward(self, rule: str, module: nn.Module, function: Callable[..., Any]) -> bool:
        """Make ``function`` the forward of this one module, unless somebody else has replaced it."""
        own = module.__dict__
        # The hooks of accelerate stand in for forward and call the true one by this name.
        name = "_old_forward" if "_hf_hook" in own and "_old_forward" in own else "forward"
        if name == "forward" and name in own:
            self.left(rule, module, "its forward is replaced already")
            return False
        self.set(module, name, types.MethodType(function, module))
        self.did(rule, module)
        return True

    def own_configs(self, model: nn.Module) -> None:
        """Give the model configurations of its own: one object often serves several models, and names implementations."""
        if self._configs:
            return
        copies: dict[int, tuple[Any, Any]] = {}

        def copied(config: Any) -> Any:
            if id(config) not in copies:
                twin = copy.copy(config)
                copies[id(config)] = config, twin
                for key, value in config.__dict__.items():
                    if isinstance(value, PreTrainedConfig):
                        twin.__dict__[key] = copied(value)
            return copies[id(config)][1]

        for module in model.modules():
            for key, value in list(module.__dict__.items()):
                if isinstance(value, PreTrainedConfig):
                    self.set(module, key, copied(value))
        self._configs = list(copies.values())

    def undo(self) -> None:
        """Put everything back, last change first."""
        twins = {id(twin) for _, twin in self._configs}
        for config, twin in self._configs:
            # What was set meanwhile (use_cache by a trainer) stays set.
            for key, value in twin.__dict__.items():
                if key not in _CHOICES and id(value) not in twins:
                    config.__dict__[key] = value
        for module, name, had, old, value in reversed(self._changes):
            own = module.__dict__
            if own.get(name) is value:
                if had:
                    own[name] = old
                else:
                    del own[name]
            elif name == "forward" and own.get("_old_forward") is value:
                own["_old_forward"] = types.MethodType(type(module).forward, module)
            elif name in ("forward", "_old_forward"):
                warnings.warn(f"gemskit: {type(module).__name__}.{name} was replaced after optimize() and stays")
        self._changes, self._configs = [], []


def sharded(*tensors: Any) -> bool:
    """Whether any is a DTensor, which the operators do not split: the stock forward does."""
    return any(isinstance(t, DTensor) for t in tensors)


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the dtype of autocast where that is on, as torch casts the arguments of its products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]
