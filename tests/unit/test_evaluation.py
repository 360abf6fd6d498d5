"""A quantized checkpoint against its original, and Hugging Face's own figures for both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.evaluation import small_model
from nxdi_expertscale.evaluation.evaluate import Evaluation, evaluate_checkpoint
from nxdi_expertscale.evaluation.stored_weights import StoredWeights

CONFIG = small_model.qwen3_moe_config(hidden_size=64, moe_intermediate_size=32)
TOKENS = 600
"""More than two sequences, and no multiple of their length."""

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def corpus() -> small_model.Corpus:
    return small_model.Corpus(
        training="def f(x):\n    return x\n" * 100, held_out="import f\n" * 99
    )


@pytest.fixture(scope="module")
def original(corpus: small_model.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    small_model.make(folder, CONFIG, corpus, small_model.Recipe(steps=12, batch=1))
    return folder


@pytest.fixture(scope="module")
def quantized(original: Path) -> Path:
    return _quantized(original)


def _quantized(original: Path) -> Path:
    folder = original.with_name(f"{original.name}-fp8")
    quantize_checkpoint(original, folder)
    return folder


@pytest.fixture(scope="module")
def text(corpus: small_model.Corpus, original: Path) -> Path:
    path = original.with_name("held-out.txt")
    path.write_text(corpus.held_out, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(original: Path, quantized: Path, text: Path) -> Evaluation:
    return evaluate_checkpoint(original, quantized, text=text, tokens=TOKENS)


def _hugging_face(original: Path) -> PreTrainedModel:
    # By its old name, which every transformers takes from 4.51 on.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        original, torch_dtype=torch.float32
    )
    return model.eval()


def _dequantized(original: Path, quantized: Path, folder: Path) -> PreTrainedModel:
    """The original with the weights that a quantized one stands for."""
    shutil.copytree(original, folder)
    with StoredWeights(open_model(quantized)) as weights:
        for file in folder.glob("*.safetensors"):
            names = load_file(file)
            changed = {name: weights(name.removeprefix("model.")).contiguous() for name in names}
            save_file(changed, file, {"format": "pt"})
    return _hugging_face(folder)


def _outputs(made: Any) -> torch.Tensor:
    """What a layer of experts gives; with it, transformers 4 gives the router's logits."""
    found: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return found


def test_figures_are_those_of_hugging_face(
    original: Path, quantized: Path, text: Path, found: Evaluation, tmp_path: Path
) -> None:
    data = torch.tensor(list(text.read_bytes()))[: 2 * small_model.CONTEXT + 1]
    batch = data.unfold(0, small_model.CONTEXT + 1, small_model.CONTEXT)
    reference = _hugging_face(original)
    changed = _dequantized(original, quantized, tmp_path / "dequantized")
    with torch.no_grad():
        expected = reference(batch[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
        logs = changed(batch[:, :-1]).logits.flatten(0, 1).log_softmax(-1)

    targets = batch[:, 1:].flatten()
    assert found.tokens == targets.numel() == 2 * found.sequence
    assert found.perplexity == pytest.approx(
        float(functional.nll_loss(expected, targets).exp()), rel=1e-4
    )
    assert found.expert_wise.perplexity == pytest.approx(
        float(functional.nll_loss(logs, targets).exp()), rel=1e-4
    )
    divergence = (expected.exp() * (expected - logs)).sum(-1).mean()
    assert found.expert_wise.kl_divergence == pytest.approx(float(divergence), rel=1e-2)
    agreeing = (expected.argmax(-1) == logs.argmax(-1)).float().mean()
    assert found.expert_wise.top1_agreement == pytest.approx(float(agreeing), abs=0.005)


def test_error_of_each_layer_is_given_the_originals_input(
    original: Path, quantized: Path, text: Path, found: Evaluation, tmp_path: Path
) -> None:
    data = torch.tensor(list(text.read_bytes()))[: 2 * small_model.CONTEXT + 1]
    batch = data.unfold(0, small_model.CONTEXT + 1, small_model.CONTEXT)
    reference = _hugging_face(original)
    changed = _dequantized(original, quantized, tmp_path / "dequantized")
    seen: dict[int, Any] = {}
    for number, layer in enumerate(reference.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, given, made, number=number: seen.update({number: (given[0], _outputs(made))})
        )
    with torch.no_grad():
        reference(batch[:, :-1])
        errors = {}
        for number, (given, made) in seen.items():
            difference = _outputs(changed.model.layers[number].mlp(given)) - made
            errors[number] = float(difference.norm() / made.norm())

    assert found.expert_wise.layer_errors == pytest.approx(errors, rel=1e-3)
    assert max(errors.values()) < 0.06


def test_averaged_scales_cost_what_the_experts_lie_apart(
    original: Path, text: Path, found: Evaluation, tmp_path: Path
) -> None:
    spread = tmp_path / "spread"
    spread.mkdir()
    small_model.spread_experts(original, spread, 16)
    apart = evaluate_checkpoint(spread, _quantized(spread), text=text, tokens=TOKENS)

    assert apart.perplexity == found.perplexity
    assert apart.expert_wise == found.expert_wise
    assert min(apart.averaged.layer_errors.values()) > 0.5
    assert max(found.averaged.layer_errors.values()) < 0.5
    assert apart.averaged.kl_divergence > found.averaged.kl_divergence


def test_one_scale_for_all_is_its_own_average(original: Path, text: Path, tmp_path: Path) -> None:
    alike = shutil.copytree(original, tmp_path / "alike")
    weights = load_file(alike / "model.safetensors")
    for name in weights:
        if ".mlp.experts." in name:
            weights[name] = weights[name].sign() * 0.01
    save_file(weights, alike / "model.safetensors")

    result = evaluate_checkpoint(alike, _quantized(alike), text=text, tokens=TOKENS)

    assert result.averaged.perplexity == pytest.approx(result.expert_wise.perplexity, rel=1e-6)
    assert result.averaged.kl_divergence == pytest.approx(result.expert_wise.kl_divergence)


def test_progress_ends_with_all_layers(original: Path, quantized: Path, text: Path) -> None:
    steps: list[tuple[int, int]] = []

    evaluate_checkpoint(
        original, quantized, text=text, tokens=8, progress=lambda *step: steps.append(step)
    )

    assert steps == sorted(set(steps))
    assert steps[-1] == (12, 12)


def test_without_a_text_pythons_documentation_is_used(original: Path, quantized: Path) -> None:
    result = evaluate_checkpoint(original, quantized, tokens=32)

    assert (result.text, result.tokens) == ("Python's documentation", 32)


def test_tokenizer_of_the_checkpoint_is_used(original: Path, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(original, tmp_path / "model")
    words = {"import": 7, "f": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="f"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))

    result = evaluate_checkpoint(model, _quantized(model), text=text, tokens=TOKENS)

    assert result.tokens == 2 * 99 - 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text(""), "is empty; name another file"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not text in UTF-8"),
        (lambda path: path.write_text("a"), "too few to predict any; give a longer text"),
    ],
)
def test_text_that_cannot_be_used(
    write: Callable[[Path], Any], message: str, original: Path, quantized: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    write(path)

    with pytest.raises((ConfigurationError, CheckpointError), match=message):
        evaluate_checkpoint(original, quantized, text=path)


def _config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def _weights(folder: Path, file: str, **tensors: torch.Tensor | None) -> None:
    weights = {**load_file(folder / file), **tensors}
    save_file({name: value for name, value in weights.items() if value is not None}, folder / file)


def _other_model(original: Path, _quantized: Path) -> None:
    _config(original, rope_theta=5e5)


def _no_tokenizer(original: Path, quantized: Path) -> None:
    table = torch.ones(300, 64)
    tables = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    _weights(original, "model.safetensors", **tables)
    _config(original, vocab_size=300)
    shutil.rmtree(quantized)
    shutil.copytree(original, quantized)


def _strange_tokenizer(original: Path, _quantized: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"f": 900}, unk_token="f"))
    tokenizer.save(str(original / "tokenizer.json"))


def _broken_tokenizer(original: Path, _quantized: Path) -> None:
    (original / "tokenizer.json").write_text("{}")


def _weights_that_are_no_numbers(original: Path, _quantized: Path) -> None:
    _weights(original, "model.safetensors", **{"model.norm.weight": torch.full((64,), torch.nan)})


def _bias(original: Path, _quantized: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(4)]
    _weights(original, "model.safetensors", **{name: torch.ones(64) for name in names})


def _unknown_weight(original: Path, _quantized: Path) -> None:
    names = [f"model.layers.{layer}.mlp.shared_expert_gate.weight" for layer in range(4)]
    _weights(original, "model.safetensors", **{name: torch.ones(1, 64) for name in names})


def _some_experts_unquantized(_original: Path, quantized: Path) -> None:
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    _weights(quantized, SHARD, **{expert: torch.ones(32, 64), f"{expert}_scale": None})
    index = quantized / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"][f"{expert}_scale"]
    index.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_model, r"fp8/config.json: describes another model than .*original/config.json"),
        (_no_tokenizer, r"tokenizer.json: is missing; put the model's tokenizer there"),
        (_strange_tokenizer, r"has a token 900, and the model has 256; it is another model's"),
        (_broken_tokenizer, r"tokenizer.json: is not a tokenizer .*; download it again"),
        (_weights_that_are_no_numbers, r"the perplexity is nan; download it again"),
        (_bias, r"q_proj.bias: is a weight that .* does not know"),
        (_unknown_weight, r"shared_expert_gate.weight: is a weight that .* does not know"),
        (_some_experts_unquantized, r"layers.1.mlp.experts.3.up_proj.weight: does not have one"),
    ],
)
def test_checkpoints_that_cannot_be_compared(
    damage: Callable[[Path, Path], None],
    message: str,
    original: Path,
    quantized: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    src = shutil.copytree(original, tmp_path / "original")
    dst = shutil.copytree(quantized, tmp_path / "fp8")
    damage(src, dst)

    with pytest.raises(CheckpointError, match=message):
        evaluate_checkpoint(src, dst, text=text, tokens=TOKENS)


def test_checkpoint_that_is_not_quantized(original: Path, text: Path) -> None:
    with pytest.raises(CheckpointError, match="has no quantized experts; make the checkpoint with"):
        evaluate_checkpoint(original, original, text=text, tokens=8)
