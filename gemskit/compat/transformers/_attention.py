"""Attention, by the interface that Transformers offers: an implementation named "gemskit", and its masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import gemskit
from gemskit.compat.transformers._patch import Patch, autocast, sharded

NAME = "gemskit"
#: Heads wider than this have no kernel.
_WIDEST = 256
#: Arguments that change what attention means and that only torch's implementation or none follows.
_OTHERS = ("cache", "indices", "block_indices")


def register() -> None:
    """Make ``attn_implementation="gemskit"`` known, with masks as torch's: without any, padding would count."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(model: nn.Module, patch: Patch) -> None:
    """Select the implementation for every submodel that declares to support others than its own."""
    register()
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    # One configuration may serve a model and a submodel: all have to support it.
    refused = {id(m.config) for m in models if not _supports(m)}
    patch.own_configs(model)
    for submodel, before in [(m, m.config) for m in models]:
        if not _supports(submodel):
            patch.left("attention", submodel, "declares no support of other implementations")
        elif id(before) not in refused:
            before._attn_implementation_internal = NAME
            patch.did("attention", submodel)


def _supports(model: Any) -> bool:
    declared = getattr(model, "_supports_sdpa", False) or getattr(model, "_supports_attention_backend", False)
    return bool(declared) and bool(model._can_set_attn_implementation())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, H, S, D) queries to (B, Hkv, T, D) keys, as (B, S, H, Dv).

    ``softcap`` bounds the scores, ``s_aux`` are scores of one key a head that has no value, ``position_bias`` is added.
    """
    if sharded(query) or any(kwargs.get(name) is not None for name in _OTHERS):
        optional: dict[str, Any] = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        kwargs.update({n: v for n, v in optional.items() if v is not None})
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return stock
    query, key, value = autocast(query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    length = query.shape[2]
    causal = length > 1 and attention_mask is None and causal
    if causal and key.shape[2] > length:
        # The first tokens into an empty cache of fixed size: what lies behind them is empty.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal, query, key), False
    width = max(query.shape[-1] + (_PAD if s_aux is not None else 0), value.shape[-1])
    if attention_mask is None and (softcap is not None or s_aux is not None) and width <= _WIDEST:
        out = _flash(query, key, value, dropout, scale, causal, softcap, s_aux)
    elif softcap is not None or width > _WIDEST:
        out = _explicit(query, key, value, attention_mask, dropout, scale, causal, softcap, s_aux)
    elif s_aux is not None:
        out = _with_sinks(query, key, value, attention_mask, dropout, scale, causal, s_aux)
    else:
        out = _fused(query, key, value, attention_mask, dropout, scale, causal)
    return out.transpose(1, 2).contiguous(), None


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float, causal: bool
) -> Tensor:
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    return gemskit.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, causal: bool, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """By the operator that takes soft-cap and sinks, but no mask. Under a causal rule there are as many keys as queries."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out, _ = gemskit.flash_attention(
        q, k, v, s_aux=sinks, dropout_p=dropout, softmax_scale=scale, right=0 if causal else -1, softcap=softcap or 0.0
    )
    return out.transpose(1, 2)


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """The bias and the mask as one mask to add."""
    lowest = torch.finfo(query.dtype).min
    if causal:
        mask = _triangle(query, key)
    if mask is None:
        return bias
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else bias + mask


def _triangle(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()


# -- with a mask, what the kernel has no argument for -----------------------------------------------------------------

#: Channels that a sink adds: one, and others that keep rows aligned to 16 bytes.
_PAD = 8


def _with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    causal: bool,
    sinks: Tensor,
) -> Tensor:
    """A sink is the score of a key without value: one more key, and one more channel for its score.

    That channel holds sink / scale in queries, 1 in the new key, 0 in all others. The new key comes first, with a new query,
    so that the diagonal of causal attention stays where it was.
    """
    batch, heads, length, size = query.shape
    part = (sinks / scale).to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, length, 1)
    query = torch.cat((query, F.pad(part, (0, _PAD - 1))), -1)
    first = F.pad(query.new_ones(1), (size, _PAD - 1)).expand(batch, key.shape[1], 1, -1)
    key = torch.cat((first, F.pad(key, (0, _PAD))), 2)
    value = F.pad(value, (0, 0, 1, 0))
    if causal:
        return _fused(F.pad(query, (0, 0, 1, 0)), key, value, None, dropout, scale, True)[:, :, 1:]
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
    return _fused(query, key, value, mask, dropout, scale, False)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float, causal: bool,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention with its scores in memory, as the stock models compute it that ask for these arguments."""
    batch, heads, length, _ = query.shape
    groups = (batch, key.shape[1], -1)
    scores = gemskit.matmul(query.reshape(*groups, *query.shape[2:]), key[:, :, None].mT) * scale
    scores = scores.reshape(batch, heads, length, -1)
    if softcap is not None:
        scores = gemskit.tanh(scores / softcap) * softcap
    if causal:
        mask = _triangle(query, key)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        last = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, length, 1)
        scores = torch.cat((scores, last), -1)
    weights = gemskit.softmax(scores, -1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = F.dropout(weights, dropout) if dropout else weights
    out: Tensor = gemskit.matmul(weights.reshape(*groups, length, key.shape[2]), value[:, :, None])
    return out.reshape(batch, heads, length, -1)
