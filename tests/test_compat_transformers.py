"""Transformers models by gemskit.compat.transformers, against the same models in plain torch."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_models import EXPECTED, IDS, MODELS, SIZES, batch, compat, gradients, hf, loss_of, results, same, tiny

import gemskit
from gemskit._interpret import interpret

pytestmark = pytest.mark.filterwarnings("ignore")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a restored model must have as it was: the very objects in every module, and the configurations."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            # Transformers' own notes of a first call.
            if key not in ("training", "_output_capturing_hooks_installed"):
                found[f"{path}.{key}"] = value if isinstance(value, (dict, bool, int, float, str)) else id(value)
        found[f"{path} forward"] = id(getattr(module.forward, "__func__", module.forward))
        if "config" in module.__dict__:
            config = module.__dict__["config"]
            found[f"{path} config"] = (id(config), config._attn_implementation, config._experts_implementation)
    return {**found, "state": [(k, v.data_ptr()) for k, v in model.state_dict().items()]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the operators that modules call."""
    counted: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for rule, name in OPERATORS:
        monkeypatch.setattr(gemskit, name, counting(rule, getattr(gemskit, name)))
    gates = compat._mlp._GATES
    monkeypatch.setattr(compat._mlp, "_GATES", {k: counting("mlp", v) for k, v in gates.items()})
    compat._mlp._forward.cache_clear()
    return counted


OPERATORS = [
    ("norms", "rms_norm"),
    ("norms", "gemma_rms_norm"),
    ("norms", "layer_norm"),
    ("rope", "apply_rotary_pos_emb"),
    ("attention", "scaled_dot_product_attention"),
    ("attention", "flash_attention"),
    ("attention", "softmax"),
    ("experts", "grouped_mm"),
    ("loss", "cross_entropy"),
    ("loss", "linear_cross_entropy"),
]


@pytest.fixture(autouse=True)
def _fresh_gates() -> Iterator[None]:
    yield
    compat._mlp._forward.cache_clear()


@pytest.mark.parametrize("name", MODELS)
def test_family(name: str, calls: Counter[str]) -> None:
    """Optimized and restored: the same numbers, then the same objects; every rule took part."""
    model = tiny(name)
    expected = results(name, model)
    before = state(model)
    calls.clear()
    compat.optimize(model)
    found = results(name, model)
    used, rules = set(calls), compat.report(model)
    compat.restore(model)
    same(found, expected)
    assert set(rules.applied) == set(EXPECTED[name].split()), str(rules)
    assert used == set(rules.applied), str(rules)
    assert state(model) == before
    calls.clear()
    given = batch(name, "left")
    model(**given)
    assert not calls
    assert not compat.report(model).applied


def test_halves() -> None:
    """Rounded once where the stock modules round several times."""
    model = tiny("gemma3").bfloat16()
    expected = model(**batch("gemma3", "right")).logits
    torch.testing.assert_close(compat.optimize(model)(**batch("gemma3", "right")).logits, expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_kernels(name: str) -> None:
    """The kernels themselves, interpreted."""
    pytest.importorskip("numpy")
    model = tiny(name, num_hidden_layers=1)
    given = {k: v[:, :6] for k, v in batch(name, "left").items()}

    def step() -> dict[str, Tensor]:
        model.train()
        found = model(**given, labels=given["input_ids"], use_cache=False)
        found.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return {**gradients, "loss": found.loss.detach()}

    given["attention_mask"][:] = 1
    expected = step()
    with compat.optimized(model), interpret():
        found = step()
    same(found, expected)


# -- what else a model goes through ---------------------------------------------------------------------------------------


def test_compile_without_breaks() -> None:
    model = tiny("mixtral", num_hidden_layers=1).train()
    expected = gradients(model, loss_of(model))
    compat.optimize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(gradients(model, loss_of(compiled)), expected)


def test_layers_compile_once() -> None:
    """Layers share their functions, so one graph serves all of them."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = compat.optimize(tiny("llama", num_hidden_layers=4))
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert counter.frame_count == 1


def test_a_configuration_serves_another_model(calls: Counter[str]) -> None:
    """What is set in one model's configuration is not set in the other's, and what a trainer sets survives."""
    config = hf.LlamaConfig(**SIZES)
    first, second = hf.LlamaForCausalLM(config), hf.LlamaForCausalLM(config)
    compat.optimize(first)
    second(input_ids=IDS)
    assert not calls and config._attn_implementation == "sdpa"
    first.config.use_cache = False
    compat.restore(first)
    assert first.config is config and config.use_cache is False and config._attn_implementation == "sdpa"


def test_copies_restore_themselves(calls: Counter[str]) -> None:
    model = tiny("mixtral")
    expected = model(input_ids=IDS).logits
    before = state(model)
    compat.optimize(model)
    twin = copy.deepcopy(model)
    compat.restore(twin)
    calls.clear()
    torch.testing.assert_close(twin(input_ids=IDS).logits, expected)
    assert not calls
    model(input_ids=IDS)
    assert calls
    compat.restore(model)
    assert state(model) == before


def test_saved_as_it_was(tmp_path: Path) -> None:
    model = compat.optimize(tiny("llama"))
    model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_chosen_at_load(calls: Counter[str]) -> None:
    compat.register()
    model = hf.MixtralForCausalLM._from_config(
        hf.MixtralConfig(**SIZES, num_local_experts=4), attn_implementation="gemskit", experts_implementation="gemskit"
    ).eval()
    found = model(input_ids=IDS).logits
    assert set(calls) == {"attention", "experts"}
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing() -> None:
    model = tiny("llama").train()
    expected = gradients(model, loss_of(model))
    compat.optimize(model).gradient_checkpointing_enable()
    same(gradients(model, loss_of(model)), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_autocast(name: str) -> None:
    """The dtypes of torch, and its numbers up to the rounding of bfloat16."""
    model = tiny(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(input_ids=IDS, labels=IDS, use_cache=False)
        ours = compat.optimize(model)(input_ids=IDS, labels=IDS, use_cache=False)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=2e-2, atol=2e-2)
    logits = ours.logits.materialize() if isinstance(ours.logits, compat.DeferredLogits) else ours.logits
    torch.testing.assert_close(logits, stock.logits, rtol=5e-2, atol=5e-2)


def test_hooks_of_accelerate(calls: Counter[str]) -> None:
    """They stand in for forward: set before, the true forward is replaced; set after, it is put back behind them."""
    model = tiny("llama")
    norm = model.model.norm
    expected = model(input_ids=IDS).logits

    def hook(module: Any) -> None:
        module._hf_hook, module._old_forward = object(), module.forward
        module.forward = lambda *args: module._old_forward(*args)

    hook(norm)
    stock = norm._old_forward
    compat.optimize(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert calls["norms"] == 5
    compat.restore(model)
    assert norm._old_forward is stock and "forward" in norm.__dict__
    model = compat.optimize(tiny("llama"), rules="norms")
    hook(model.model.norm)
    compat.restore(model)
    calls.clear()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert not calls
