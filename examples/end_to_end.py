"""Tokens a second of a Llama-3-8B shape cut to eight layers: explicit calls, Transformers optimized, and torch.

    python examples/end_to_end.py [--rows eager compile optimize adapter explicit] [--tiny --device cpu]

Random bfloat16 weights. Prefill is one prompt of 4096 tokens with all its logits; decode is one token a sequence after a
context of 1024, with a cache of fixed size; the training step is forward, backward and AdamW of 4096 tokens. ``explicit``
is the model of ``decoder.py``, which calls gemskit itself; all others are ``LlamaForCausalLM``. Each row is a process of
its own and prints the median of its repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from decoder import Cache, Config, Decoder, loss_of
from torch import Tensor

import gemskit
from gemskit import compat

ROWS = ("eager", "compile", "optimize", "adapter", "explicit")
#: Tokens that a cache holds behind the prompt.
ROOM = 64
TASKS = ("prefill", "decode 1", "decode 32", "train")


def shape(tiny: bool, tokens: int) -> Config:
    if tiny:
        return Config(vocab=128, max_tokens=tokens)
    return Config(
        vocab=128256, hidden=4096, inner=14336, layers=8, heads=32, kv_heads=8, max_tokens=tokens, theta=500000.0
    )


class Explicit:
    """The model of ``decoder.py``."""

    def __init__(self, config: Config, device: str, dtype: torch.dtype) -> None:
        self.config = config
        self.model = Decoder(config).to(device, dtype)

    def prefill(self, tokens: Tensor) -> Callable[[], Any]:
        return lambda: self.model(tokens)

    def decode(self, prompt: Tensor) -> Callable[[], Any]:
        caches = [Cache(self.config, len(prompt), self.model.embedding) for _ in self.model.layers]
        self.model(prompt, caches)

        def step() -> Tensor:
            # The same position again and again: a step costs what it costs there.
            for cache in caches:
                cache.length = prompt.shape[1]
            return gemskit.argmax(self.model(prompt[:, -1:], caches)[:, -1], dim=-1)

        return step

    def loss(self, tokens: Tensor) -> Tensor:
        return loss_of(self.model(tokens[:, :-1]), tokens[:, 1:])


class Transformers:
    """``LlamaForCausalLM``, as it is, optimized, or compiled by torch."""

    def __init__(self, config: Config, device: str, dtype: torch.dtype, row: str) -> None:
        import transformers

        settings = transformers.LlamaConfig(
            vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.inner,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_tokens, rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        )  # fmt: skip
        with torch.device(device):
            self.model: Any = transformers.LlamaForCausalLM(settings)
        self.model.to(dtype)
        if row == "optimize":
            from gemskit.compat.transformers import optimize

            optimize(self.model)
        self.call = torch.compile(self.model) if row == "compile" else self.model
        self.static = transformers.StaticCache

    def prefill(self, tokens: Tensor) -> Callable[[], Any]:
        return lambda: self.call(input_ids=tokens, use_cache=False)

    def decode(self, prompt: Tensor) -> Callable[[], Any]:
        cache = self.static(config=self.model.config, max_cache_len=prompt.shape[1] + ROOM)
        left = 0

        def step() -> Tensor:
            # Positions move on until the room is used, then the prompt is read anew.
            nonlocal left
            if not left:
                cache.reset()
                self.model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
                left = ROOM
            left -= 1
            logits = self.call(input_ids=prompt[:, -1:], past_key_values=cache).logits
            return logits[:, -1].argmax(-1)

        return step

    def loss(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.call(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found


def median(step: Callable[[], Any], device: str, repetitions: int) -> float:
    """Seconds of a call, after three to warm up."""
    wait = torch.accelerator.synchronize if device != "cpu" else lambda: None
    times = []
    for _ in range(3 + repetitions):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measure(row: str, device: str, tiny: bool, repetitions: int) -> dict[str, float]:
    """Tokens a second of each task."""
    prompt, context = (16, 8) if tiny else (4096, 1024)
    config = shape(tiny, prompt + ROOM)
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    model = Explicit(config, device, dtype) if row == "explicit" else Transformers(config, device, dtype, row)
    tokens = torch.randint(1, config.vocab, (32, prompt), device=device)
    found = {}
    adapter = compat.use_aten() if row == "adapter" else contextlib.nullcontext()
    with adapter:
        model.model.eval()
        with torch.no_grad():
            found["prefill"] = prompt / median(model.prefill(tokens[:1]), device, repetitions)
            for batch in (1, 32):
                step = model.decode(tokens[:batch, :context])
                found[f"decode {batch}"] = batch / median(step, device, repetitions)
        model.model.train()
        optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-5, fused=device != "cpu")

        def train() -> None:
            model.loss(tokens[:1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        found["train"] = prompt / median(train, device, repetitions)
    if device != "cpu":
        found["memory"] = torch.accelerator.max_memory_allocated() / 2**30
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens a second of a Llama-3-8B shape of eight layers")
    parser.add_argument("--device", default=gemskit.device if torch.accelerator.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=None)
    parser.add_argument("--tiny", action="store_true", help="two small layers, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.device, options.tiny, options.repetitions)))
        return 0
    print(f"{'tokens/s':10}" + "".join(f"{task:>12}" for task in TASKS) + f"{'GiB':>8}", flush=True)
    # What the adapter maps by default is what was measured to be faster on an accelerator.
    rows = options.rows or [r for r in ROWS if r != "adapter" or options.device != "cpu"]
    failed = 0
    for row in rows:
        how = ["--one", row, "--device", options.device, "--repetitions", str(options.repetitions)]
        done = subprocess.run(
            [sys.executable, __file__, *how, *(["--tiny"] if options.tiny else [])], capture_output=True, text=True
        )
        if done.returncode:
            failed += 1
            print(f"{row:10}  failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        memory = f"{found['memory']:8.1f}" if "memory" in found else ""
        print(f"{row:10}" + "".join(f"{found[task]:12.0f}" for task in TASKS) + memory, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
