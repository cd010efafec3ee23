"""Small random models of Transformers, and what the tests compare of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", reason='pip install "gemskit[transformers]"')
compat = pytest.importorskip("gemskit.compat.transformers")

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LATENT = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mistral": ("Mistral", dict(head_dim=16, sliding_window=8)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=8)),
    "gemma3": ("Gemma3", dict(head_dim=16, sliding_window=8)),
    "deepseek_v3": (
        "DeepseekV3",
        dict(num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, n_group=2,
             num_experts_per_tok=2, topk_group=1, first_k_dense_replace=1, **LATENT),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    "gpt_oss": ("GptOss", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "granite": ("Granite", dict(logits_scaling=2.0)),
    "bert": ("Bert", {}),
    "llava": ("Llava", {}),
}  # fmt: skip
#: What each family has, by rule.
EXPECTED = {
    "llama": "norms mlp rope attention loss",
    "qwen3": "norms mlp rope attention loss",
    "mistral": "norms mlp rope attention loss",
    "mixtral": "norms rope attention experts loss",
    "gemma2": "norms mlp rope attention loss",
    "gemma3": "norms mlp rope attention loss",
    "deepseek_v3": "norms mlp rope attention experts loss",
    "qwen3_moe": "norms rope attention experts loss",
    "gpt_oss": "norms rope attention experts loss",
    "granite": "norms mlp rope attention loss",
    "bert": "norms attention",
    "llava": "norms mlp rope attention loss",
}


def tiny(name: str, **changed: Any) -> Any:
    """A small random model whose norms have weights that differ from their initial ones."""
    family, own = MODELS[name]
    sizes = {**SIZES, **own, **changed}
    torch.manual_seed(0)
    if name == "bert":
        sizes.pop("num_key_value_heads")
        model = hf.BertForMaskedLM(hf.BertConfig(**sizes))
    elif name == "llava":
        vision = hf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = hf.LlavaConfig(
            vision_config=vision, text_config=hf.LlamaConfig(**sizes), image_token_index=5, image_seq_length=4
        )
        model = hf.LlavaForConditionalGeneration(config)
    else:
        config = getattr(hf, family + ("TextConfig" if name == "gemma3" else "Config"))(**sizes)
        model = getattr(hf, family + "ForCausalLM")(config)
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None and (weight.ndim == 1 or "sinks" in key):
                weight.data.add_(torch.randn_like(weight) * 0.2)
    model.set_attn_implementation("eager")
    return model.eval()


def batch(name: str, padding: str, device: str = "cpu") -> dict[str, Tensor]:
    return {k: t.to(device) for k, t in _batch(name, padding).items()}


def _batch(name: str, padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 128, (2, 12), generator=generator)
    seen = torch.ones_like(ids)
    if name == "llava":
        ids[:, 1:5] = 5
        return dict(input_ids=ids, attention_mask=seen, pixel_values=torch.randn(2, 3, 28, 28, generator=generator))
    seen[0, slice(4) if padding == "left" else slice(8, None)] = 0
    return dict(input_ids=ids, attention_mask=seen)


def results(name: str, model: Any) -> dict[str, Any]:
    """Logits, loss, every gradient, tokens with both caches."""
    device = model.device.type
    given = batch(name, "right", device)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    model.train(name != "bert")  # Its dropout draws; nobody else's does.
    extra = {} if name == "bert" else dict(use_cache=False)
    loss = model(**given, labels=labels, **extra).loss
    loss.backward()
    found: dict[str, Any] = {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    found["loss"] = loss.detach()
    with torch.no_grad():
        found["logits"] = model(**given).logits[given["attention_mask"].bool()]
        found["loss, evaluated"] = model(**given, labels=labels).loss
    if name != "bert":
        for cache in ("dynamic", "static"):
            tokens = model.generate(
                **batch(name, "left", device), max_new_tokens=5, do_sample=False, cache_implementation=cache,
                disable_compile=True,
            )  # fmt: skip
            found[f"tokens, {cache} cache"] = tokens
    return found


def same(found: dict[str, Any], expected: dict[str, Any], atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.float().abs().max()))
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=atol * scale, msg=lambda m, k=key: f"{k}: {m}")


IDS = torch.randint(6, 128, (2, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, **kwargs: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False, **kwargs).loss
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}
