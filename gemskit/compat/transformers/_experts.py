"""Mixtures of experts, by the interface that Transformers offers: an implementation named "gemskit"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

import gemskit
from gemskit.compat.transformers._attention import NAME
from gemskit.compat.transformers._mlp import _GATES, activation
from gemskit.compat.transformers._patch import Patch

#: Which gate a module has that takes the halves of its input, if it is a known one.
_GATE = "_gemskit_gate"


def register() -> None:
    """Make ``experts_implementation="gemskit"`` known."""
    ExpertsInterface.register(NAME, experts_forward)


def experts(model: nn.Module, patch: Patch) -> None:
    """Select the implementation for modules of experts that choose one by their configuration."""
    register()
    found = [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")]
    chosen = [m for m in found if hasattr(m.config, "_experts_implementation_internal")]
    # Weights of one byte are quantised: their own implementations read the same setting.
    if any(p.element_size() == 1 for m in chosen for p in m.parameters()):
        return patch.left("experts", chosen[0], "its weights are quantised")
    if chosen:
        patch.own_configs(model)
    for module in chosen:
        config: Any = module.config
        config._experts_implementation_internal = NAME
        kind: Any = type(module)
        if kind._apply_gate is _default_apply_gate:
            patch.set(module, _GATE, activation(module.act_fn))
        patch.did("experts", module)
    return None


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each token (T, H) through its K experts, as the weighted sum. Rows are sorted by expert; the host waits for nothing."""
    tokens, k = top_k_index.shape
    chosen, order = gemskit.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(self.num_experts, device=chosen.device, dtype=chosen.dtype)
    ends = gemskit.searchsorted(chosen, numbers, right=True, out_int32=True)
    # Where experts are spread over devices, those of others have the number behind the last: no group has their rows.
    bias = chosen.clamp(max=self.num_experts - 1) if self.has_bias else None

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        y = gemskit.grouped_mm(x.to(weight.dtype), weight if self.is_transposed else weight.mT, ends)
        return y if bias is None else y + gemskit.index_select(getattr(self, f"{name}_bias"), 0, bias)

    x = gemskit.index_select(hidden_states, 0, order // k)
    if self.has_gate:
        x = _gate(self, project(x, "gate_up_proj"))
    else:
        x = self.act_fn(project(x, "up_proj"))
    x = project(x, "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    weights = top_k_weights.reshape(-1)
    if getattr(self, "_is_expert_parallel", False):
        weights = weights.masked_fill(top_k_index.reshape(-1) >= self.num_experts, 0)
    # Back in the order of tokens, whose rows are added in a fixed order.
    x = gemskit.index_select(x, 0, gemskit.argsort(order)) * weights[:, None]
    return x.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def _gate(self: Any, x: Tensor) -> Tensor:
    kind = self.__dict__.get(_GATE)
    gated: Tensor = self._apply_gate(x) if kind is None else _GATES[kind](x)
    return gated
