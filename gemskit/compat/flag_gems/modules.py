"""``flag_gems.modules``: FlagGems' modules, with its constructor arguments, state and buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import gemskit
from gemskit.compat.flag_gems._adapters import apply_rotary_pos_emb

__all__ = ["GemsDeepseekYarnRoPE", "GemsRMSNorm", "GemsRope", "GemsSiluAndMul"]


class GemsRMSNorm(gemskit.RMSNorm):
    """RMS norm that can add a residual first."""

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-6, elementwise_affine: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x``. With ``residual`` it overwrites that by the sum and ``x`` by the norm of it, and returns both."""
        if residual is None:
            return super().forward(x)
        assert self.eps is not None
        return gemskit.fused_add_rms_norm_(x, residual, self.normalized_shape, self.weight, self.eps)


class GemsSiluAndMul(nn.Module):
    """``silu(x) * y``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``silu(x) * y``."""
        return gemskit.silu_and_mul(x, y)


class GemsRope(nn.Module):
    """Rotary embedding by tables ``cos_cached`` and ``sin_cached`` (max_position_embeddings, rotary_dim / 2).

    A subclass gives other frequencies by ``_compute_inv_freq`` or other tables by ``_set_cos_sin_cache``. The tables are
    buffers outside the state dict.
    """

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(
        self, rotary_dim: int, max_position_embeddings: int = 2048, base: float = 10000.0,
        rotary_interleaved: bool = False, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rotary_dim, self.max_position_embeddings, self.base = rotary_dim, max_position_embeddings, base
        self.rotary_interleaved, self.dtype, self.device = rotary_interleaved, dtype, device
        self._set_cos_sin_cache()

    def _compute_inv_freq(self) -> Tensor:
        """``base ** (-2i / rotary_dim)``, in float64 so that angles of far positions are right."""
        return self.base ** -(torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device="cpu") / self.rotary_dim)

    def _magnitude(self) -> float:
        """What the tables are multiplied by."""
        return 1.0

    def _set_cos_sin_cache(self) -> None:
        inv_freq = self._compute_inv_freq().double()
        positions = torch.arange(self.max_position_embeddings, dtype=torch.float64, device=inv_freq.device)
        angles = torch.outer(positions, inv_freq)
        for name, table in (("cos_cached", angles.cos()), ("sin_cached", angles.sin())):
            table = (table * self._magnitude()).to(device=self.device, dtype=self.dtype)
            self.register_buffer(name, table, persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, position_ids: Tensor | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``query`` and ``key`` (..., seq, heads, head_dim), rotated; overwritten if ``inplace``."""
        return apply_rotary_pos_emb(
            query, key, self.cos_cached, self.sin_cached, position_ids, self.rotary_interleaved, inplace
        )


class GemsDeepseekYarnRoPE(GemsRope):
    """Rotary embedding whose slow channels are stretched by ``scaling_factor``. Source: YaRN (Peng et al. 2023), DeepSeek's form.

    Channels that turn more than ``beta_fast`` times within ``original_max_position_embeddings`` keep their frequency, those
    that turn less than ``beta_slow`` times have it divided, those between are mixed linearly in the channel.
    """

    def __init__(
        self, rotary_dim: int, max_position_embeddings: int = 2048, base: float = 10000.0,
        rotary_interleaved: bool = False, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None, scaling_factor: float = 1.0,
        original_max_position_embeddings: int = 4096, beta_fast: float = 32.0, beta_slow: float = 1.0,
        mscale: float = 1.0, mscale_all_dim: float = 0.0,
    ) -> None:  # fmt: skip
        self.scaling_factor, self.original_max_position_embeddings = scaling_factor, original_max_position_embeddings
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.mscale, self.mscale_all_dim = mscale, mscale_all_dim
        super().__init__(rotary_dim, max_position_embeddings, base, rotary_interleaved, dtype, device)

    def _channel(self, turns: float) -> float:
        """The channel that turns so often within the original length."""
        wavelength = self.original_max_position_embeddings / turns
        return self.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.base))

    def _compute_inv_freq(self) -> Tensor:
        fast = super()._compute_inv_freq()
        low = max(math.floor(self._channel(self.beta_fast)), 0)
        high = min(math.ceil(self._channel(self.beta_slow)), self.rotary_dim - 1)
        channels = torch.arange(len(fast), dtype=torch.float64, device=fast.device)
        slow = ((channels - low) / max(high - low, 1e-3)).clamp(0, 1)
        return fast * (1 - slow) + fast / self.scaling_factor * slow

    def _magnitude(self) -> float:
        grown = 0.1 * math.log(max(self.scaling_factor, 1.0))
        return (1 + self.mscale * grown) / (1 + self.mscale_all_dim * grown)
