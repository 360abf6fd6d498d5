from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nxdi_expertscale.checkpoint.read.config import read_config
from nxdi_expertscale.evaluation import decoder, small_model
from nxdi_expertscale.evaluation.architecture import derive_architecture
from nxdi_expertscale.families.built_in import QWEN3_MOE

CONFIG = small_model.qwen3_moe_config(hidden_size=32, moe_intermediate_size=16)
CORPUS = small_model.Corpus(training="for x in y:\n" * 80, held_out="for x in y:\n" * 40)


def _make(folder: Path, steps: int) -> Path:
    folder.mkdir()
    small_model.make(folder, CONFIG, CORPUS, small_model.Recipe(steps=steps, batch=1))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("trained") / "model", steps=40)


def test_library_is_split_into_different_texts() -> None:
    corpus = small_model.python_library()

    excerpts = [corpus.held_out[start : start + 200] for start in range(0, 20_000, 2_000)]
    assert len(corpus.held_out) > 30_000
    assert len(corpus.training) > 100 * len(corpus.held_out)
    assert not any(excerpt in corpus.training for excerpt in excerpts)


def test_unigram_perplexity_of_even_bytes_is_their_number() -> None:
    corpus = small_model.Corpus(training="abcd" * 100_000, held_out="dcba")

    assert small_model.unigram_perplexity(corpus) == pytest.approx(4, rel=1e-2)


def test_training_learns(trained: Path) -> None:
    model = derive_architecture(read_config(CONFIG, QWEN3_MOE, ""), QWEN3_MOE)
    weights = {
        name.removeprefix("model."): value.float()
        for name, value in load_file(trained / "model.safetensors").items()
    }
    tokens = small_model.as_bytes(CORPUS.held_out).long()[None, :100]
    with torch.no_grad():
        logits = decoder.forward(tokens[:, :-1], weights.__getitem__, model)
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])

    assert loss < math.log(small_model.unigram_perplexity(CORPUS)) - 0.5


def test_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    with small_model.one_thread():
        one, other = (
            _make(tmp_path / name, steps=3) / "model.safetensors" for name in ("one", "other")
        )

    assert one.read_bytes() == other.read_bytes()


def test_transformers_loads_it(trained: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)

    assert model.config.model_type == "qwen3_moe"
    assert not any(report.values())


def test_spread_experts_compute_the_same(trained: Path, tmp_path: Path) -> None:
    spread = tmp_path / "spread"
    spread.mkdir()
    small_model.spread_experts(trained, spread, 16)
    model = derive_architecture(read_config(CONFIG, QWEN3_MOE, ""), QWEN3_MOE)
    before, after = (
        {
            name.removeprefix("model."): value.float()
            for name, value in load_file(path / "model.safetensors").items()
        }
        for path in (trained, spread)
    )
    tokens = torch.arange(64)[None]

    logits = [decoder.forward(tokens, w.__getitem__, model) for w in (before, after)]

    assert torch.equal(*logits)
    key = QWEN3_MOE.expert_key(0, 0, "up_proj"), QWEN3_MOE.expert_key(0, 15, "up_proj")
    first, last = (float(after[k].norm() / before[k].norm()) for k in key)
    assert last / first == 16


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), small_model.one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
