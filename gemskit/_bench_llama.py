"""A decoder of Llama's shape for ``python -m gemskit bench --model``: one module, whose calls are torch's or gemskit's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemskit


@dataclass(frozen=True)
class Sizes:
    """Those of Llama-3-8B, with fewer layers."""

    layers: int = 8
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocab: int = 128256
    eps: float = 1e-5
    theta: float = 500000.0

    @property
    def columns(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Cache:
    """Keys and values of a layer, and how many there are before the token that is decoded."""

    keys: Tensor
    values: Tensor
    #: (batch,) int32 on the device, and the page of each sequence, (batch, 1).
    lengths: Tensor
    table: Tensor


class Calls(Protocol):
    """What a layer calls. Tokens come before heads: (batch, tokens, heads, columns)."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor: ...
    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def linear(self, x: Tensor, weight: Tensor) -> Tensor: ...
    def gated(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor: ...
    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...
    def cache_shape(self, batch: int, size: int, heads: int, columns: int) -> tuple[int, ...]: ...
    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, start: int) -> Tensor: ...
    def loss(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor: ...


class Torch:
    """As torch's users write it. The host knows the position, so that attention needs no mask and reads no more than there is."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return self.norm(residual, weight, eps), residual

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def gated(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        return turned(q), turned(k)

    def cache_shape(self, batch: int, size: int, heads: int, columns: int) -> tuple[int, ...]:
        return batch, heads, size, columns

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, start: int) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        tokens = q.shape[2]
        if cache is not None:
            cache.keys[:, :, start : start + tokens] = k
            cache.values[:, :, start : start + tokens] = v
            if tokens == 1:
                k, v = (t[:, :, : start + 1] for t in (cache.keys, cache.values))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        return found.transpose(1, 2)

    def loss(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)


class Gemskit:
    """Explicit calls of gemskit."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        return gemskit.embedding(ids, weight)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return gemskit.rms_norm(x, weight.shape, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return gemskit.fused_add_rms_norm(x, residual, weight.shape, weight, eps)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return gemskit.linear(x, weight)

    def gated(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            # Keeps what the gradient needs, as torch does; gated_linear multiplies again.
            return gemskit.silu_and_mul(gemskit.linear(x, gate), gemskit.linear(x, up))
        return gemskit.gated_linear(x, gate, up)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return gemskit.apply_rotary_pos_emb(q, k, cos, sin)

    def cache_shape(self, batch: int, size: int, heads: int, columns: int) -> tuple[int, ...]:
        return batch, size, heads, columns

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, start: int) -> Tensor:
        tokens = q.shape[1]
        if cache is not None and tokens == 1:
            found: Tensor = gemskit.flash_attn_with_kvcache(
                q, cache.keys, cache.values, k, v, cache_seqlens=cache.lengths, block_table=cache.table
            )
            return found
        if cache is not None:
            gemskit.copy_(cache.keys[:, start : start + tokens], k)
            gemskit.copy_(cache.values[:, start : start + tokens], v)
        found = gemskit.flash_attn_func(q, k, v, causal=True)
        return found

    def loss(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # Three products, as torch's; linear_cross_entropy takes four to do without the logits' 1 GB.
        found: Tensor = gemskit.cross_entropy(gemskit.linear(x, weight), target)
        return found


class Layer(nn.Module):
    """The weights of a layer."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        keys = s.key_heads * s.columns
        shapes = dict(
            norm1=(s.hidden,), q=(s.hidden, s.hidden), k=(keys, s.hidden), v=(keys, s.hidden), o=(s.hidden, s.hidden),
            norm2=(s.hidden,), gate=(s.inner, s.hidden), up=(s.inner, s.hidden), down=(s.hidden, s.inner),
        )  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    norm1: nn.Parameter
    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    o: nn.Parameter
    norm2: nn.Parameter
    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter


class Llama(nn.Module):
    """The decoder; ``calls`` says whose operators it runs on."""

    def __init__(self, sizes: Sizes, calls: Calls, longest: int) -> None:
        super().__init__()
        self.sizes, self.calls, self.longest = sizes, calls, longest
        self.embed = nn.Parameter(torch.empty(sizes.vocab, sizes.hidden))
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.empty(sizes.hidden))
        self.head = nn.Parameter(torch.empty(sizes.vocab, sizes.hidden))
        self.cos: Tensor
        self.sin: Tensor

    @torch.no_grad()
    def draw(self, seed: int = 0) -> Llama:
        """Random weights that keep the size of what they multiply, so that every layer counts; and the tables of rotations."""
        generator = torch.Generator(self.embed.device).manual_seed(seed)
        for weight in self.parameters():
            std, mean = (0.1, 1.0) if weight.ndim == 1 else (weight.shape[-1] ** -0.5, 0.0)
            weight.normal_(mean, std, generator=generator)
        return self.tables()

    def tables(self) -> Llama:
        """One entry for each channel, rounded to the weights' dtype."""
        s, device = self.sizes, self.embed.device
        rates = s.theta ** -(torch.arange(0, s.columns, 2, device=device, dtype=torch.float32) / s.columns)
        angles = torch.arange(self.longest, device=device, dtype=torch.float32)[:, None] * rates
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos().to(self.embed.dtype), angles.sin().to(self.embed.dtype)
        return self

    def like(self, calls: Calls) -> Llama:
        """The same weights under other calls."""
        with torch.device("meta"):
            other = Llama(self.sizes, calls, self.longest)
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return other.tables()

    def caches(self, batch: int, size: int, length: int) -> list[Cache]:
        """Empty caches for every layer."""
        s, device, dtype = self.sizes, self.embed.device, self.embed.dtype
        shape = self.calls.cache_shape(batch, size, s.key_heads, s.columns)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        table = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
        keys, values = (torch.zeros(s.layers, *shape, dtype=dtype, device=device) for _ in range(2))
        return [Cache(keys[i], values[i], lengths, table) for i in range(s.layers)]

    def hidden(self, ids: Tensor, caches: list[Cache] | None, start: int) -> Tensor:
        """The last layer's output, normalised."""
        calls, s = self.calls, self.sizes
        batch, tokens = ids.shape
        cos, sin = self.cos[start : start + tokens], self.sin[start : start + tokens]
        x = residual = calls.embedding(ids, self.embed)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if i == 0:
                x = calls.norm(x, layer.norm1, s.eps)
            else:
                x, residual = calls.add_norm(x, residual, layer.norm1, s.eps)
            q, k, v = (calls.linear(x, w).view(batch, tokens, -1, s.columns) for w in (layer.q, layer.k, layer.v))
            q, k = calls.rotate(q, k, cos, sin)
            x = calls.attend(q, k, v, None if caches is None else caches[i], start)
            x = calls.linear(x.flatten(2), layer.o)
            x, residual = calls.add_norm(x, residual, layer.norm2, s.eps)
            x = calls.linear(calls.gated(x, layer.gate, layer.up), layer.down)
        return calls.add_norm(x, residual, self.norm, s.eps)[0]

    def next_logits(self, ids: Tensor, caches: list[Cache] | None, start: int) -> Tensor:
        """Logits after the last token, (batch, vocabulary); writes the caches."""
        return self.calls.linear(self.hidden(ids, caches, start)[:, -1], self.head)

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy."""
        return self.calls.loss(self.hidden(ids, None, 0).flatten(0, 1), self.head, target.flatten())

    def transformers_state(self) -> dict[str, Any]:
        """The weights under the names of ``LlamaForCausalLM``."""
        names = dict(
            norm1="input_layernorm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
            norm2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
        )  # fmt: skip
        found: dict[str, Any] = {
            "model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm, "lm_head.weight": self.head,
        }  # fmt: skip
        for i, layer in enumerate(self.layers):
            found |= {f"model.layers.{i}.{hf}.weight": getattr(layer, name) for name, hf in names.items()}
        return found
