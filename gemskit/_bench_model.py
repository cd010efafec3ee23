"""``python -m gemskit bench --model``: a Llama with random weights, end to end: prefill, decoding, the gradient of the loss.

The same weights run under torch eager, torch.compile, explicit calls of gemskit, the ATen adapter, and where Transformers is
installed as its LlamaForCausalLM, plain and optimized. Each is compared with a float32 run of the torch model before it is
timed. Times are of the wall clock between two synchronisations, host included; medians of rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemskit import backends, compat
from gemskit._bench_host import settle, synchronise
from gemskit._bench_llama import Gemskit, Llama, Sizes, Torch
from gemskit._report import environment, replace
from gemskit.errors import ArgumentError

#: One token for each sequence of a batch, and what makes the caches as they were after the prompt.
Step = tuple[Callable[[], Tensor], Callable[[], None]]

EAGER = "torch eager"
TASKS = ("prefill", "decode", "training")
#: Tokens that a round decodes at most.
ROOM = 64


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    name: str
    #: (batch, tokens) to the logits after the last.
    prefill: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Step]
    #: Tokens and targets to the loss.
    loss: Callable[[Tensor, Tensor], Tensor]
    weights: nn.Module
    #: Names of weights whose gradient is compared.
    watched: tuple[str, ...] = ("layers.0.q", "head")
    #: Around all of it.
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    #: Whether decoding is also captured in a CUDA graph.
    captured: bool = True


# -- ways to run it -------------------------------------------------------------------------------------------------------


def own(
    name: str, model: Llama, compiled: bool = False, scope: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Variant:
    """The module of `gemskit._bench_llama`."""
    ready: Callable[[Any], Any] = (lambda fn: torch.compile(fn, dynamic=False)) if compiled else (lambda fn: fn)
    next_logits, loss = ready(model.next_logits), ready(model.loss)

    def prefill(ids: Tensor) -> Tensor:
        found: Tensor = next_logits(ids, model.caches(ids.shape[0], ids.shape[1] + ROOM, ids.shape[1]), 0)
        return found

    def decoder(ids: Tensor) -> Step:
        batch, length = ids.shape
        # All sequences have one prompt, so that one is enough to fill the caches.
        first, caches = (model.caches(n, length + ROOM, length) for n in (1, batch))
        model.next_logits(ids[:1], first, 0)
        for to, made in zip(caches, first):
            to.keys.copy_(made.keys.expand_as(to.keys))
            to.values.copy_(made.values.expand_as(to.values))
        token = ids[:, -1:].clone()
        # Every step writes the same place, and costs the same.
        return lambda: next_logits(token, caches, length), lambda: None

    return Variant(name, prefill, decoder, loss, model, scope=scope)


def transformers(name: str, model: Llama, optimized: bool) -> Variant:
    """LlamaForCausalLM with the same memory for its weights, torch's attention and a static cache."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    s = model.sizes
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.inner, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.key_heads, rms_norm_eps=s.eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.theta}, max_position_embeddings=model.longest,
    )  # fmt: skip
    with torch.device("meta"):
        hf: Any = LlamaForCausalLM(config)
    hf.load_state_dict(model.transformers_state(), assign=True)
    hf.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.embed.device)
    hf.set_attn_implementation("sdpa")

    def scope() -> AbstractContextManager[Any]:
        if not optimized:
            return nullcontext()
        from gemskit.compat.transformers import optimized as within

        context: AbstractContextManager[Any] = within(hf)
        return context

    def mode(training: bool) -> None:
        # It walks all modules, which a call should not pay for.
        if hf.training != training:
            hf.train(training)

    def logits(ids: Tensor, cache: Any) -> Tensor:
        mode(False)
        found: Tensor = hf(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return found

    def new(ids: Tensor) -> Any:
        return StaticCache(config=config, max_cache_len=ids.shape[1] + ROOM)

    def decoder(ids: Tensor) -> Step:
        cache, token = new(ids), ids[:, -1:].clone()
        logits(ids, cache)

        def back() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(ids.shape[1])

        return lambda: logits(token, cache), back

    def loss(ids: Tensor, target: Tensor) -> Tensor:
        mode(True)  # where the loss rule acts
        found: Tensor = hf(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    watched = ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
    return Variant(name, lambda ids: logits(ids, new(ids)), decoder, loss, hf, watched, scope, captured=False)


@contextmanager
def adapter() -> Iterator[None]:
    """What is no slower on this architecture, or everything where that was not measured."""
    try:
        handle = compat.enable_aten()
    except ArgumentError:
        handle = compat.enable_aten("all")
    try:
        yield
    finally:
        handle.disable()


def variants(model: Llama, compiled: bool) -> dict[str, Callable[[], Variant]]:
    """Those that can run here, torch eager first."""
    found: dict[str, Callable[[], Variant]] = {EAGER: lambda: own(EAGER, model)}
    if compiled:
        found["torch.compile"] = lambda: own("torch.compile", model, compiled=True)
    found["gemskit, explicit"] = lambda: own("gemskit, explicit", model.like(Gemskit()))
    found["gemskit, ATen adapter"] = lambda: own("gemskit, ATen adapter", model, scope=adapter)
    if importlib.util.find_spec("transformers") is not None:
        found["Transformers"] = lambda: transformers("Transformers", model, optimized=False)
        found["Transformers, compat"] = lambda: transformers("Transformers, compat", model, optimized=True)
    return found


# -- whether it is right --------------------------------------------------------------------------------------------------


def targets(ids: Tensor) -> Tensor:
    """The next tokens; the last has none."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


def observed(v: Variant, ids: Tensor) -> dict[str, Tensor]:
    """Logits after the prompt and of a decoded token, the loss and two gradients, in float64."""
    found = {}
    with torch.no_grad():
        found["logits after the prompt"] = v.prefill(ids).double()
        step, back = v.decoder(ids)
        back()
        found["logits of a decoded token"] = step().double()
    loss = v.loss(ids, targets(ids))
    found["loss"] = loss.detach().double()
    chosen = [v.weights.get_parameter(n) for n in v.watched]
    for n, grad in zip(("queries of the first layer", "head"), torch.autograd.grad(loss, chosen)):
        found[f"gradient of {n}"] = grad.double()
    return found


def distances(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of each observed tensor the norm of the difference relative to the norm."""
    return {n: float((found[n] - e).norm() / e.norm()) for n, e in exact.items()}


def wrong(mine: dict[str, float], eager: dict[str, float], dtype: torch.dtype) -> list[str]:
    """What is further from the wide run than 1.5 times torch eager, and than a few units: a loss may be right by luck."""
    least = (2 if dtype.itemsize == 2 else 32) * torch.finfo(dtype).eps
    bars = {n: max(1.5 * e, least) for n, e in eager.items()}
    return [f"{n} is off by {mine[n]:.2g}, torch eager by {eager[n]:.2g}" for n in bars if not mine[n] <= bars[n]]


# -- time -----------------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], Any], back: Callable[[], None], calls: int, rounds: int) -> float:
    """Of one call: the median of rounds of ``calls`` between two synchronisations."""
    found = []
    for _ in range(rounds):
        back()
        synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronise()
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def captured(step: Callable[[], Tensor], back: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    back()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def training_step(v: Variant, ids: Tensor, target: Tensor) -> None:
    """Forward, loss and every gradient; no optimizer."""
    v.loss(ids, target).backward()  # type: ignore[no-untyped-call]
    v.weights.zero_grad(set_to_none=True)


def timed(
    v: Variant, prompt: Tensor, batches: Sequence[int], tasks: Sequence[str], rounds: int
) -> Iterator[tuple[str, int, Callable[[], float]]]:
    """Task, tokens of a call, and what measures its seconds."""

    def prefill() -> float:
        with torch.no_grad():
            call = lambda: v.prefill(prompt)
            seconds(call, _nothing, 1, 3)
            return seconds(call, _nothing, 1, rounds)

    def decode(batch: int, graph: bool) -> float:
        with torch.no_grad():
            step, back = v.decoder(prompt.expand(batch, -1))
            seconds(step, back, 4, 1)
            calls = min(ROOM // 2, 32)
            if graph:
                return seconds(captured(step, back), back, calls, rounds)
            return seconds(step, back, calls, rounds)

    def training() -> float:
        call = lambda: training_step(v, prompt, targets(prompt))
        seconds(call, _nothing, 1, 3)
        return seconds(call, _nothing, 1, rounds)

    tokens = prompt.shape[1]
    if "prefill" in tasks:
        yield f"prefill of {tokens}", tokens, prefill
    for batch in batches if "decode" in tasks else ():
        yield f"decode, batch {batch}", batch, partial(decode, batch, False)
        if v.captured and torch.device(backends.device).type == "cuda":
            yield f"decode, batch {batch}, CUDA graph", batch, partial(decode, batch, True)
    if "training" in tasks:
        yield f"gradients of {tokens}", tokens, training


def _nothing() -> None: ...


# -- the report -----------------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """The Markdown page: a table a task."""
    rows, checks = report["rows"], report["checks"]
    facts = {k: v for k, v in report.items() if not isinstance(v, (dict, list))}
    lines = [f"# A model on {report['machine']}", "", *(f"- {k}: {v}" for k, v in facts.items())]
    lines.append(f"- model: {', '.join(f'{k} {v}' for k, v in report['sizes'].items())}")
    lines += [f"- {note}" for note in report["notes"]]
    lines += [
        "", "Milliseconds of a call by the wall clock, host included (medians), and tokens a second. A decoding step adds one "
        "token to every sequence behind the prompt, always at the same place; a CUDA graph holds one step, captured alike for "
        "all. Gradients are of all weights, with forward and loss, and without an optimizer.", "",
    ]  # fmt: skip
    for task in dict.fromkeys(r["task"] for r in rows):
        some = [r for r in rows if r["task"] == task]
        eager = next((r["ms"] for r in some if r["variant"] == EAGER and "ms" in r), None)
        lines += [
            f"## {task.capitalize()}",
            "",
            "| | ms | tokens/s | torch eager's time over this |",
            "|---|---|---|---|",
        ]
        for r in some:
            if "ms" in r:
                ratio = f"{eager / r['ms']:.2f}" if eager else ""
                lines.append(f"| {r['variant']} | {r['ms']:.3f} | {r['tokens_per_s']:,.0f} | {ratio} |")
            else:
                lines.append(f"| {r['variant']} | failed: {r['error']} | | |".replace("\n", " "))
        lines.append("")
    lines += [
        "## Agreement", "",
        "The distance to a float32 run of the torch model (float64 for float32), relative to its norm. More than 1.5 times torch "
        "eager's and a few units of the dtype is wrong.", "",
    ]  # fmt: skip
    names = list(dict.fromkeys(n for c in checks.values() for n in c["distances"]))
    lines += ["| | " + " | ".join(names) + " | |", "|---" * (len(names) + 2) + "|"]
    for variant, c in checks.items():
        cells = [f"{c['distances'][n]:.2g}" if n in c["distances"] else "" for n in names]
        lines.append(f"| {variant} | " + " | ".join(cells) + f" | {'; '.join(c['wrong']) or 'right'} |")
    return "\n".join(lines) + "\n"


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gemskit bench --model", description=__doc__)
    parser.add_argument("--report", type=Path, help="write JSON here, and a Markdown page beside it")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt (default: 4096)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 32], help="sequences decoded together (default: 1 32)"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="some of these (default: all)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each measurement (default: 7)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    for f in fields(Sizes):
        kind: Any = type(f.default)
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=f.default, help=f"(default: {f.default})")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The command; exit status 1 where a variant is wrong or fails."""
    options = _options(argv)
    gpu = backends.vendor.device_type != "cpu"
    machine = torch.get_device_module(backends.device).get_device_name(0) if gpu else "CPU"
    if gpu:
        settle()
    dtype: torch.dtype = getattr(torch, options.dtype)
    sizes = Sizes(**{f.name: getattr(options, f.name) for f in fields(Sizes)})
    notes = []
    if importlib.util.find_spec("transformers") is None:
        notes.append("Transformers is not installed: its rows are missing")
    if not gpu:
        notes.append("no accelerator: CPU tensors run the meaning, and there are no CUDA graphs")
    report: dict[str, Any] = environment(machine)
    report.update(dtype=options.dtype, sizes={f.name: getattr(sizes, f.name) for f in fields(Sizes)}, notes=notes)
    rows: list[dict[str, Any]] = []
    checks: dict[str, dict[str, Any]] = {}
    report.update(rows=rows, checks=checks)
    with torch.device("meta"):
        model = Llama(sizes, Torch(), options.prompt + ROOM)
    model = model.to(dtype).to_empty(device=backends.device).draw()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(sizes.vocab, (1, options.prompt), generator=generator).to(backends.device)
    exact = _exact(model, prompt)
    for name, make in variants(model, not options.no_compile).items():
        torch._dynamo.reset()
        check: dict[str, Any] = {"distances": {}, "wrong": []}
        todo: list[tuple[str, int, Callable[[], float]]] = []
        checks[name] = check
        with ExitStack() as stack:
            try:
                v = make()
                stack.enter_context(v.scope())
                check["distances"] = distances(observed(v, prompt), exact)
                check["wrong"] = wrong(check["distances"], checks[EAGER]["distances"], dtype)
                if not check["wrong"]:
                    todo += timed(v, prompt, options.batch, options.tasks, options.rounds)
            except Exception as e:  # one that fails does not cost the others
                check["wrong"] = [_said(e)]
            print(f"{name}: {'; '.join(check['wrong']) or 'right'}", flush=True)
            for task, tokens, measure in todo:
                rows.append(_row(name, task, tokens, measure))
                print(_line(rows[-1]), flush=True)
        _free()
        if options.report:
            _write(options.report, report)
    return int(any(c["wrong"] for c in checks.values()) or any("error" in r for r in rows))


def _exact(model: Llama, prompt: Tensor) -> dict[str, Tensor]:
    """The run in float32, or float64 for float32, whose memory is given back."""
    dtype = torch.float32 if model.embed.dtype.itemsize == 2 else torch.float64
    with torch.device("meta"):
        wide = Llama(model.sizes, Torch(), model.longest)
    wide.load_state_dict({n: t.to(dtype) for n, t in model.state_dict().items()}, assign=True)
    for p in wide.parameters():
        p.requires_grad_()
    found = observed(own("wide", wide.tables()), prompt)
    del wide
    _free()
    return found


def _row(variant: str, task: str, tokens: int, measure: Callable[[], float]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant, "task": task}
    try:
        took = measure()
        row.update(ms=took * 1e3, tokens_per_s=tokens / took)
    except Exception as e:
        row["error"] = _said(e)
    _free()
    return row


def _said(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def _line(row: dict[str, Any]) -> str:
    found = f"{row['ms']:9.3f} ms {row['tokens_per_s']:12,.0f} tokens/s" if "ms" in row else f"FAILED: {row['error']}"
    return f"  {row['task']:32} {found}"


def _free() -> None:
    if backends.vendor.device_type != "cpu":
        torch.get_device_module(backends.device).empty_cache()


def _write(path: Path, report: dict[str, Any]) -> None:
    replace(path, json.dumps(report, indent=0) + "\n")
    path.with_suffix(".md").write_text(page(report))
