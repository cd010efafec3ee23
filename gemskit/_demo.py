"""``python -m gemskit demo``: sentence embeddings on gemskit beside the same model in plain torch."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import gemskit

SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The orchestra plays a symphony.",
    "Musicians perform a classical piece.",
    "The stock market fell sharply today.",
    "Share prices dropped this afternoon.",
)

# Embeddings have length 1. The bound for float32 is the promise of the demo; the other two are a few roundings of a
# component near 0.2 in that dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def main(argv: list[str]) -> int:
    """Embed sentences, compare with plain torch, and say which kernels ran. Returns 1 when the results differ.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
    """
    options = _parse(argv)
    dtype: torch.dtype = getattr(torch, options.dtype)
    minilm = example("minilm")
    model = minilm.load(options.device, dtype)
    reference = minilm.load_weights(minilm.model_folder(), options.device, dtype)
    tokens, mask = model.tokenize(options.sentences)

    def ours() -> Tensor:
        embeddings: Tensor = model.embed(tokens, mask)
        return embeddings

    def theirs() -> Tensor:
        return torch_embed(reference, tokens, mask, model.config.layers, model.config.heads, model.config.eps)

    with gemskit.interpret() if options.interpret else contextlib.nullcontext(), gemskit.record() as calls:
        embeddings = ours()
        scores = minilm.similarities(embeddings)
    difference = (embeddings.float() - theirs().float()).abs().max().item()
    tolerance = TOLERANCE[dtype]

    print(
        f"all-MiniLM-L6-v2, {len(tokens)} sentences, {options.dtype} on {options.device}, vendor {gemskit.vendor.name}\n"
    )
    print(similarity_table(options.sentences, scores))
    verdict = "within" if difference <= tolerance else "ABOVE"
    print(f"\nlargest difference from plain torch: {difference:.1e} ({verdict} the tolerance {tolerance:.0e})")
    print(kernel_summary([call.kernel for call in calls]))
    if options.interpret:
        print("not timed: interpreted kernels say nothing about speed")
    else:
        print(f"median time: gemskit {median_ms(ours):.2f} ms, plain torch {median_ms(theirs):.2f} ms (warm)")
    return 0 if difference <= tolerance else 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gemskit demo", description="embed sentences with all-MiniLM-L6-v2 and compare with plain torch"
    )
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="what to embed; default: six built-in ones")
    parser.add_argument("--device", help="torch device; default: the accelerator if there is one, else cpu")
    parser.add_argument("--dtype", choices=[str(dtype).split(".")[1] for dtype in TOLERANCE], default="float32")
    parser.add_argument("--interpret", action="store_true", help="run the kernels on the CPU, by Triton's interpreter")
    options = parser.parse_args(argv)
    options.sentences = options.sentences or list(SENTENCES)
    if options.device is None:
        on_accelerator = torch.accelerator.is_available() and not options.interpret
        options.device = gemskit.device if on_accelerator else "cpu"
    return options


def example(name: str) -> ModuleType:
    """The module ``name`` of the examples: a part of the installed package, or the checkout's folder of that name."""
    file = Path(__file__).parents[1] / "examples" / f"{name}.py"
    if importlib.util.find_spec("gemskit._examples") is not None or not file.exists():
        return importlib.import_module(f"gemskit._examples.{name}")
    spec = importlib.util.spec_from_file_location(f"gemskit._examples.{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def torch_embed(
    weights: Mapping[str, Tensor], tokens: Tensor, mask: Tensor, layers: int = 6, heads: int = 12, eps: float = 1e-12
) -> Tensor:
    """The same model by ``torch.nn.functional`` alone, from the names of the weight file: (batch, hidden)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def split_heads(x: Tensor) -> Tensor:
        return x.view(*tokens.shape, heads, -1).transpose(1, 2)

    x = F.embedding(tokens, weights["embeddings.word_embeddings.weight"])
    x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        query, key, value = (
            split_heads(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        attended = linear(mixed.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    kept = mask[:, :, None].to(x.dtype)
    return F.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)


def similarity_table(sentences: Sequence[str], scores: Tensor, width: int = 40) -> str:
    """``scores`` (n, n) as lines of aligned columns, each headed by the number of its sentence."""
    labels = [sentence if len(sentence) <= width else sentence[: width - 1] + "…" for sentence in sentences]
    pad = max(len(label) for label in labels)
    lines = [" " * (pad + 5) + "".join(f"{column:7d}" for column in range(1, len(labels) + 1))]
    for number, (label, row) in enumerate(zip(labels, scores.tolist()), start=1):
        lines.append(f"{number:3d}  {label:<{pad}}" + "".join(f"{score:7.3f}" for score in row))
    return "\n".join(lines)


def kernel_summary(kernels: Sequence[str]) -> str:
    """Which kernels ran and how often; 'meaning' stands for a call that plain torch served on the CPU."""
    counts = Counter(kernels)
    meaning = counts.pop("meaning", 0)
    lines = []
    if meaning:
        lines.append(f"calls served by the plain-torch meaning, as the tensors are on the CPU: {meaning}")
    if counts:
        lines.append("kernels: " + ", ".join(f"{name} x{count}" for name, count in counts.most_common()))
    return "\n".join(lines)


def median_ms(run: Callable[[], Tensor], warm: int = 3, rounds: int = 20) -> float:
    """The median of ``rounds`` timed runs in milliseconds, each until the device has finished, after ``warm`` others."""
    times = []
    for _ in range(warm + rounds):
        start = time.perf_counter()
        if run().device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[warm:])
