"""Transformers models by gemskit.compat.transformers, against the same models in plain torch."""

from __future__ import annotations

import copy
import functools
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gemskit
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", reason='pip install "gemskit[transformers]"')
compat = pytest.importorskip("gemskit.compat.transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

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


def batch(name: str, padding: str) -> dict[str, Tensor]:
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
    given = batch(name, "right")
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
                **batch(name, "left"), max_new_tokens=5, do_sample=False, cache_implementation=cache
            )
            found[f"tokens, {cache} cache"] = tokens
    return found


def same(found: dict[str, Any], expected: dict[str, Any], atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.float().abs().max()))
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=atol * scale, msg=lambda m, k=key: f"{k}: {m}")


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
    ("norms", "layer_norm"),
    ("rope", "apply_rotary_pos_emb"),
    ("attention", "scaled_dot_product_attention"),
    ("attention", "softmax"),
    ("experts", "grouped_mm"),
    ("loss", "cross_entropy"),
]
if hasattr(gemskit, "linear_cross_entropy"):
    OPERATORS.append(("loss", "linear_cross_entropy"))


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

IDS = torch.randint(6, 128, (2, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, **kwargs: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False, **kwargs).loss
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}


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


# -- the loss without logits ----------------------------------------------------------------------------------------------


def test_loss_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat._loss, "_HELD", 128 * 5)
    monkeypatch.delattr(gemskit, "linear_cross_entropy", raising=False)
    model = tiny("llama").train()
    labels = IDS.masked_fill(IDS % 3 == 0, -100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(17)}, {"shift_labels": IDS.roll(-1, 1)}):
        expected = gradients(model, model(input_ids=IDS, labels=labels, **extra).loss)
        with compat.optimized(model):
            same(gradients(model, model(input_ids=IDS, labels=labels, **extra).loss), expected)


def test_deferred_logits_are_tensors_when_touched() -> None:
    model = tiny("llama").train()
    expected = model(input_ids=IDS).logits
    compat.optimize(model)
    uses: list[Callable[[Any], Any]] = [
        lambda x: x.argmax(-1),
        lambda x: x[:, :-1].float(),
        lambda x: torch.log_softmax(x, -1),
        lambda x: torch.stack([x, x]),
        lambda x: 2 * x / 4 + 1,
        lambda x: torch.tanh(x / 30.0) * 30.0,
        lambda x: x > 0.1,
        lambda x: x.shape,
        lambda x: (x.dtype, x.device, x.ndim, len(x)),
    ]
    for use in uses:
        logits = model(input_ids=IDS).logits
        assert isinstance(logits, compat.DeferredLogits)
        found, stock = use(logits), use(expected)
        if isinstance(stock, Tensor):
            torch.testing.assert_close(found, stock)
        else:
            assert found == stock
    same(
        gradients(model, model(input_ids=IDS).logits.logsumexp(-1).sum()),
        gradients(model, compat.restore(model)(input_ids=IDS).logits.logsumexp(-1).sum()),
    )


def test_deferred_logits_of_other_weights() -> None:
    """Read after the optimizer's step, they would be those of a model that gave other ones."""
    model = compat.optimize(tiny("llama")).train()
    logits = model(input_ids=IDS).logits
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match="weights have changed"):
        logits.argmax(-1)


def test_logits_where_nobody_trains() -> None:
    model = compat.optimize(tiny("llama")).train()
    with torch.no_grad():
        assert isinstance(model(input_ids=IDS).logits, Tensor)
    assert isinstance(model.eval()(input_ids=IDS).logits, Tensor)


# -- what is left alone ---------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """An RMS norm unless told otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.kind, self.eps = nn.Parameter(torch.ones(16)), kind, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        square = wide.pow(2).mean(-1, keepdim=True)
        if self.kind == "outside":
            y = wide / (square.sqrt() + self.eps)
        elif self.kind == "centred":
            y = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(square + self.eps)
        else:
            y = wide * torch.rsqrt(square + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class Gated(nn.Module):
    """A gated perceptron unless told otherwise, by names of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.w2, self.w1 = nn.Linear(24, 16), nn.Linear(16, 24)
        self.w3 = nn.Linear(16, 24)
        self.act, self.kind = nn.GELU() if kind == "gelu" else nn.SiLU(), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.w1(x)) * self.w3(x)
        if self.kind == "dropout":
            y = nn.functional.dropout(y, 0.1, self.training)
        return self.w2(y.clamp(max=0.5) if self.kind == "clamp" else y)


@pytest.mark.parametrize("made, rule", [
    (Norm("plain"), True), (Norm("outside"), False), (Norm("centred"), False),
    (Gated("plain"), True), (Gated("gelu"), True), (Gated("dropout"), False), (Gated("clamp"), False),
])  # fmt: skip
def test_numbers_decide(made: nn.Module, rule: bool) -> None:
    x = torch.randn(3, 16)
    expected = made.eval()(x)
    compat.optimize(made)
    assert bool(compat.report(made).applied) is rule, str(compat.report(made))
    assert bool(compat.report(made).skipped) is not rule
    torch.testing.assert_close(made(x), expected)


def test_families_that_differ() -> None:
    """Dropout between the projections; attention that relies on masks of its own kind; logits without a known loss."""
    kinds = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)
    seed_oss = hf.SeedOssForCausalLM(
        hf.SeedOssConfig(**kinds, num_key_value_heads=2, head_dim=16, residual_dropout=0.1)
    )
    assert "mlp" not in compat.report(compat.optimize(seed_oss)).applied
    pegasus = hf.BigBirdPegasusForCausalLM(hf.BigBirdPegasusConfig(
        vocab_size=128, d_model=64, decoder_layers=1, encoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=64,
    ))  # fmt: skip
    assert "attention" not in compat.report(compat.optimize(pegasus)).applied


def test_rules() -> None:
    model = tiny("llama")
    compat.optimize(model, rules=["mlp", "rope"])
    assert set(compat.report(compat.optimize(model, rules=["mlp", "rope"])).applied) == {"mlp", "rope"}
    assert "mlp        LlamaMLP x 2" in str(compat.report(model))
    with pytest.raises(ArgumentError, match="did you mean 'norms'"):
        compat.optimize(model, rules=["norm"])
    compat.restore(compat.restore(model))
    assert str(compat.report(model)) == "nothing"


def test_another_patch_is_kept() -> None:
    """A forward that somebody else has put into a module is neither replaced nor, later, lost."""
    model = tiny("llama")
    theirs = model.model.norm.forward = lambda x: x
    compat.optimize(model)
    assert model.model.norm.forward is theirs
    assert "replaced already" in compat.report(model).skipped["norms"]["LlamaRMSNorm"]
    model.model.layers[0].mlp.forward = theirs
    with pytest.warns(UserWarning, match="LlamaMLP.forward was replaced after"):
        compat.restore(model)
    assert model.model.norm.forward is model.model.layers[0].mlp.forward is theirs


def test_probes_leave_no_trace() -> None:
    model = tiny("deepseek_v3")
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    compat.optimize(model)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_models_without_memory() -> None:
    """On the meta device, before weights are loaded."""
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    found = compat.report(compat.optimize(model)).applied
    assert {"norms", "mlp", "attention", "loss"} <= set(found)


# -- trainers -------------------------------------------------------------------------------------------------------------


def test_callback() -> None:
    model = tiny("llama")
    callback = compat.GemskitCallback(rules=["mlp"])
    callback.on_init_end(None, None, None, model=model)
    assert set(compat.report(model).applied) == {"mlp"}
    wrapped = nn.Sequential(model)
    callback.on_train_begin(None, None, None, model=wrapped)
    assert not compat.report(wrapped).applied


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(6, 128, (12,), generator=torch.Generator().manual_seed(i))
        return dict(input_ids=ids, labels=ids)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the trainer of Transformers needs accelerate")

    def losses(*callbacks: Any) -> list[float]:
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, report_to=[], logging_steps=1,
            save_strategy="no", disable_tqdm=True, use_cpu=True, gradient_accumulation_steps=2, seed=0,
            gradient_checkpointing=True,
        )  # fmt: skip
        trainer = hf.Trainer(
            tiny("llama"), arguments, train_dataset=Data(), eval_dataset=Data(), callbacks=[*callbacks]
        )
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*history, trainer.evaluate()["eval_loss"]]

    assert losses(compat.GemskitCallback()) == pytest.approx(losses(), abs=2e-4)


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(compat.optimize(tiny("llama")), config).train()
    found = gradients(model, loss_of(model))
    compat.restore(model.get_base_model())
    same(found, gradients(model, loss_of(model)))


def test_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that times a model end to end, on a small one."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import end_to_end

    for row in ("optimize", "explicit"):
        assert set(end_to_end.measure(row, "cpu", True, 1)) == {"prefill", "decode 1", "decode 32", "train"}


# -- two processes --------------------------------------------------------------------------------------------------------


def _train(rank: int, port: int, folder: str) -> None:
    """One step of plain and of optimized models, by both kinds of data parallelism; rank 0 writes what it found."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    ids = torch.randint(6, 128, (2, 12), generator=torch.Generator().manual_seed(rank))
    found: dict[str, list[tuple[float, float]]] = {}
    for kind in ("ddp", "fsdp2", "fsdp2 head"):
        for optimizes in (False, True):
            model = tiny("llama").train()
            if optimizes:
                compat.optimize(model)
            wrapped = DistributedDataParallel(model) if kind == "ddp" else model
            if kind != "ddp":
                for layer in model.model.layers:
                    fully_shard(layer)
                if kind == "fsdp2 head":
                    fully_shard(model.lm_head)
                fully_shard(model)
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            squares = [getattr(p.grad, "_local_tensor", p.grad).double().square().sum() for p in model.parameters()]
            total = torch.stack(squares).sum()
            dist.all_reduce(total)
            found.setdefault(kind, []).append((loss.item(), total.item()))
            if optimizes:
                compat.restore(model)
    if rank == 0:
        torch.save(found, os.path.join(folder, "found"))
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (port, str(tmp_path)), nprocs=2)
    for kind, (stock, ours) in torch.load(tmp_path / "found").items():
        assert ours == pytest.approx(stock, rel=1e-4), kind
