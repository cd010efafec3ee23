"""Modules with the constructor arguments and the state of torch's, that call gemskit's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gemskit.errors import ArgumentError
from gemskit.nn.batch_norm import batch_norm, instance_norm
from gemskit.nn.gates import silu_and_mul
from gemskit.nn.group_norm import group_norm
from gemskit.nn.norm import layer_norm, rms_norm
from gemskit.nn.rotary import apply_rotary_pos_emb


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` by :func:`gemskit.nn.rms_norm`: the same arguments and state."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x`` (..., *normalized_shape)."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` by :func:`gemskit.nn.layer_norm`: the same arguments and state."""

    def forward(self, input: Tensor) -> Tensor:
        """The norm of ``input`` (..., *normalized_shape)."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` by :func:`gemskit.nn.group_norm`: the same arguments and state."""

    def forward(self, input: Tensor) -> Tensor:
        """The norm of ``input`` (N, C, ...)."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the modules of 1, 2 and 3 dimensions have in common."""

    def forward(self, input: Tensor) -> Tensor:
        """The norm of ``input`` (N, C, ...); in training the running statistics are moved."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        by_batch = self.training or (mean is None and var is None)
        return batch_norm(input, mean, var, self.weight, self.bias, by_batch, momentum, self.eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` by :func:`gemskit.nn.batch_norm`: the same arguments and state."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` by :func:`gemskit.nn.batch_norm`: the same arguments and state."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` by :func:`gemskit.nn.batch_norm`: the same arguments and state."""


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    """What the modules of 1, 2 and 3 dimensions have in common; torch's looks at the dimensions and calls this."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        by_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_input, momentum, self.eps
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` by :func:`gemskit.nn.instance_norm`: the same arguments and state."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` by :func:`gemskit.nn.instance_norm`: the same arguments and state."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` by :func:`gemskit.nn.instance_norm`: the same arguments and state."""


class SiluAndMul(nn.Module):
    """``silu(x[..., :d]) * x[..., d:]`` for packed ``x`` (..., 2d)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2d) to (..., d)."""
        return silu_and_mul(x)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding with cached tables of ``base ** (-2i / dim) * position``.

    Args:
        dim: channels that rotate, at most those of a head; even.
        max_seq_len: rows of the tables.
        base: of the wavelengths.
        interleaved: whether pairs are neighbours (2i, 2i + 1), not (i, i + dim / 2).

    The tables are buffers outside the state dict and stay float32 when the module is cast.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, max_seq_len: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim % 2:
            raise ArgumentError(f"RotaryEmbedding: dim is {dim}; accepted: even numbers")
        self.dim, self.max_seq_len, self.base, self.interleaved = dim, max_seq_len, base, interleaved
        for name, table in zip(("cos", "sin"), self._tables(torch.get_default_device())):
            self.register_buffer(name, table, persistent=False)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Angles in float64: float32 loses the sixth digit of an angle of 100,000.
        steps = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim
        angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu"), self.base**-steps)
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        empty = self.cos.is_meta
        super()._apply(fn, recurse)
        if empty or self.cos.dtype != torch.float32:
            self.cos, self.sin = self._tables(self.cos.device)
        return self

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None, *, layout: str = "bshd"
    ) -> tuple[Tensor, Tensor]:
        """As :func:`gemskit.nn.apply_rotary_pos_emb` with the cached tables."""
        return apply_rotary_pos_emb(q, k, self.cos, self.sin, position_ids, self.interleaved, layout=layout)
