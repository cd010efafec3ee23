"""gemskit.compat.transformers: logits that are not computed, modules that are left alone, trainers and processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_parallel
from torch import Tensor, nn
from transformers_models import IDS, SIZES, compat, gradients, hf, loss_of, same, tiny

from gemskit.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore")


# -- the loss without logits ----------------------------------------------------------------------------------------------


def test_loss_of_shifted_and_counted_labels() -> None:
    model = tiny("llama").train()
    labels = IDS.masked_fill(IDS % 3 == 0, -100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(17)}, {"shift_labels": IDS.roll(-1, 1)}):
        expected = gradients(model, model(input_ids=IDS, labels=labels, **extra).loss)
        with compat.optimized(model):
            same(gradients(model, model(input_ids=IDS, labels=labels, **extra).loss), expected)


def test_capped_logits_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's ``cap * tanh(logits / cap)`` is a part of the loss."""
    model = tiny("gemma2", final_logit_softcapping=0.5).train()
    expected = gradients(model, loss_of(model))
    compat.optimize(model)
    with monkeypatch.context() as patched:
        patched.setattr(compat.DeferredLogits, "materialize", lambda self: pytest.fail("the logits were computed"))
        same(gradients(model, loss_of(model)), expected)


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
        lambda x: (torch.tanh(x / 30.0) * 30.0 / 2).sum(-1),
        lambda x: torch.tanh(torch.tanh(x)),
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


def test_two_processes(tmp_path: Path) -> None:
    for kind, (stock, ours) in transformers_parallel.trained(tmp_path).items():
        assert ours == pytest.approx(stock, rel=1e-4), kind


# -- attention without a mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True], ids=["meaning", "kernels"])
@pytest.mark.parametrize(("softcap", "sinks"), [(5.0, False), (None, True), (5.0, True)])
def test_soft_cap_and_sinks_without_a_mask_are_one_operator(softcap: float | None, sinks: bool, kernels: bool) -> None:
    """The same as with the causal mask spelled out, gradients too."""
    import gemskit
    from gemskit.compat.transformers._attention import attention_forward

    def run(mask: Tensor | None) -> tuple[list[Tensor], set[str]]:
        torch.manual_seed(0)
        leaves = [torch.randn(2, n, 9, 16, requires_grad=True) for n in (4, 2, 2)]
        leaves += [torch.randn(4, requires_grad=True)] * sinks
        with gemskit.record() as calls:
            out, _ = attention_forward(
                nn.Module(), *leaves[:3], mask, softcap=softcap, s_aux=leaves[3] if sinks else None, is_causal=True
            )  # fmt: skip
        grads = torch.autograd.grad(out.square().sum(), leaves)
        return [out.detach(), *grads], {c.op for c in calls}

    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    with gemskit.interpret() if kernels else contextlib.nullcontext():
        (found, ours), (expected, others) = run(None), run(causal[None, None])
    torch.testing.assert_close(found, expected)
    assert "flash_attention" in ours and "flash_attention" not in others
