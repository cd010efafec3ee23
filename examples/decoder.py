"""A Llama-style decoder as custom model code on gemskit: trained, then generating with a key-value cache.

    python examples/decoder.py [--device cuda] [--steps 20]

Grouped-query attention, rotary positions, SwiGLU, and RMSNorm fused with the residual sum. The script trains the model
on a small text task built below, beside the same weights run in plain torch (the section ``torch_logits``, written
independently), prints both loss curves, and then generates greedily with and without the cache.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gemskit

# ---- the model ----


@dataclass(frozen=True)
class Config:
    vocab: int
    hidden: int = 64
    inner: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    max_tokens: int = 128
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Cache:
    """Keys and values that one layer has seen, in buffers of (batch, max_tokens, kv_heads, head_dim)."""

    def __init__(self, config: Config, batch: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, config.max_tokens, config.kv_heads, config.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; return those of all tokens so far."""
        start, self.length = self.length, self.length + key.shape[1]
        self.keys[:, start : self.length] = key
        self.values[:, start : self.length] = value
        return self.keys[:, : self.length], self.values[:, : self.length]


class Layer(nn.Module):
    """Attention and perceptron, each followed by the residual sum and the norm of what comes next."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        # Products of the same input are stacked: one matrix for query, key and value, one for gate and up.
        self.qkv = weight((config.heads + 2 * config.kv_heads) * config.head_dim, config.hidden)
        self.out = weight(config.hidden, config.heads * config.head_dim)
        self.gate_up = weight(2 * config.inner, config.hidden)
        self.down = weight(config.hidden, config.inner)
        self.mlp_norm = nn.Parameter(torch.ones(config.hidden))
        self.next_norm = nn.Parameter(torch.ones(config.hidden))

    def forward(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """``x`` is normalised, ``residual`` the running sum, both (batch, seq, hidden); returns the next such pair."""
        shape, eps = (self.config.hidden,), self.config.eps
        attended = self.attention(x, cos, sin, cache)
        x, residual = gemskit.fused_add_rms_norm(attended, residual, shape, self.mlp_norm, eps)
        update = gemskit.linear(gemskit.silu_and_mul(gemskit.linear(x, self.gate_up)), self.down)
        return gemskit.fused_add_rms_norm(update, residual, shape, self.next_norm, eps)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        batch, seq, _ = x.shape
        heads, kv_heads = self.config.heads, self.config.kv_heads
        qkv = gemskit.linear(x, self.qkv).view(batch, seq, heads + 2 * kv_heads, self.config.head_dim)
        query, key, value = qkv.tensor_split([heads, heads + kv_heads], dim=2)
        query, key = gemskit.apply_rotary_pos_emb(query, key, cos, sin)
        if cache is not None:
            key, value = cache.extend(key, value)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (batch, heads, seq, head_dim)
        # A single new token sees every token before it, so only a longer run of tokens needs the causal mask.
        mixed = gemskit.scaled_dot_product_attention(query, key, value, is_causal=seq > 1, enable_gqa=True)
        return gemskit.linear(mixed.transpose(1, 2).reshape(batch, seq, -1), self.out)


class Decoder(nn.Module):
    """Token ids (batch, seq) to logits (batch, seq, vocab)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = weight(config.vocab, config.hidden)
        self.first_norm = nn.Parameter(torch.ones(config.hidden))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = weight(config.vocab, config.hidden)
        frequencies = config.theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_tokens), frequencies)  # (max_tokens, head_dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """With ``caches`` the tokens continue what those hold: a prompt into empty ones, then one token at a time."""
        start = caches[0].length if caches else 0
        cos, sin = (table[start : start + tokens.shape[1]] for table in (self.cos, self.sin))
        residual = gemskit.embedding(tokens, self.embedding)
        x = gemskit.rms_norm(residual, (self.config.hidden,), self.first_norm, self.config.eps)
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos, sin, caches[index] if caches else None)
        return gemskit.linear(x, self.head)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, use_cache: bool = True) -> Tensor:
        """``tokens`` (batch, seq) followed by the ``count`` most probable next ones, chosen one by one."""
        caches = [Cache(self.config, len(tokens), self.embedding) for _ in self.layers] if use_cache else None
        new = tokens
        for _ in range(count):
            logits = self(new if use_cache else tokens, caches)
            new = gemskit.argmax(logits[:, -1], dim=-1)[:, None]
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


def weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / columns**0.5)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return gemskit.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- the same model in plain torch, to compare with ----


def torch_logits(model: Decoder, tokens: Tensor) -> Tensor:
    """The logits of ``model``'s weights, computed by ``torch.nn.functional`` alone."""
    config = model.config
    seq = tokens.shape[1]

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.eps) * scale

    def rotate(x: Tensor) -> Tensor:  # (batch, heads, seq, head_dim): feature pairs (i, i + head_dim / 2) as complex
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(model.cos[:seq], model.sin[:seq])
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = F.embedding(tokens, model.embedding)
    scale = model.first_norm
    for layer in model.layers:
        assert isinstance(layer, Layer)
        group = config.heads // config.kv_heads
        rows = [config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim]
        query, key, value = (
            F.linear(norm(x, scale), matrix).view(*tokens.shape, -1, config.head_dim).transpose(1, 2)
            for matrix in layer.qkv.tensor_split(rows)
        )
        query, key, value = rotate(query), rotate(key).repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        future = torch.ones(seq, seq, dtype=torch.bool, device=x.device).triu(1)
        scores = (query @ key.transpose(2, 3) / config.head_dim**0.5).masked_fill(future, float("-inf"))
        x = x + F.linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), layer.out)
        gate, up = F.linear(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, layer.down)
        scale = layer.next_norm
    return F.linear(norm(x, scale), model.head)


def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- the task and the training loop ----

NAMES, VERBS, THINGS = ["ada", "ben", "cleo"], ["sees", "draws", "likes"], ["a cat", "the sea", "two birds"]
ALPHABET = sorted(set("".join(NAMES + VERBS + THINGS) + " ."))


def text(sentences: int, seed: int) -> str:
    """Random sentences of a three-word grammar: after 'ada s' comes 'ees', which is what there is to learn."""
    chosen = random.Random(seed)
    return "".join(f"{chosen.choice(NAMES)} {chosen.choice(VERBS)} {chosen.choice(THINGS)}. " for _ in range(sentences))


def encode(characters: str) -> Tensor:
    return torch.tensor([ALPHABET.index(character) for character in characters])


def decode(tokens: Tensor) -> str:
    return "".join(ALPHABET[token] for token in tokens.tolist())


def batches(steps: int, batch: int = 16, seq: int = 32, seed: int = 0) -> list[Tensor]:
    """``steps`` batches of (batch, seq + 1) token ids, cut at random from the text."""
    tokens = encode(text(400, seed))
    chosen = random.Random(seed)
    starts = [[chosen.randrange(len(tokens) - seq) for _ in range(batch)] for _ in range(steps)]
    return [torch.stack([tokens[start : start + seq + 1] for start in row]) for row in starts]


def train(
    model: Decoder,
    data: Sequence[Tensor],
    logits: Callable[[Decoder, Tensor], Tensor] = Decoder.__call__,
    loss: Callable[[Tensor, Tensor], Tensor] = loss_of,
) -> list[float]:
    """The loss before each step of gradient descent with momentum, one step a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for tokens in data:
        value = loss(logits(model, tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description="train a small decoder on gemskit and on plain torch, then generate")
    parser.add_argument("--device", default=gemskit.device if torch.accelerator.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Decoder(Config(vocab=len(ALPHABET))).to(options.device)
    twin = copy.deepcopy(model)
    data = [tokens.to(options.device) for tokens in batches(options.steps)]

    ours = train(model, data)
    theirs = train(twin, data, torch_logits, torch_loss)
    print(f"step   gemskit     torch   difference   (device {options.device})")
    for step, (mine, other) in enumerate(zip(ours, theirs)):
        print(f"{step:4d}  {mine:8.5f}  {other:8.5f}   {abs(mine - other):10.1e}")
    worst = max(abs(mine - other) for mine, other in zip(ours, theirs))
    print(f"largest difference {worst:.1e}")

    prompt = encode("ada sees ")[None].to(options.device)
    cached, uncached = (model.generate(prompt, 40, use_cache) for use_cache in (True, False))
    same = torch.equal(cached, uncached)
    print(f"\ngenerated: {decode(cached[0])!r}\ncached and uncached generation {'agree' if same else 'DIFFER'}")
    return 0 if same and worst < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
