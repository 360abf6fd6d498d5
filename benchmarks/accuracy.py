"""How good is FP8 with one scale per expert, on a model that was trained?

Trains a small Qwen3 MoE (transformers' own class) on the sources of Python's library, quantizes
it, and measures it on files that were kept from training::

    python -m benchmarks.accuracy WORK [--json FILE]

What an earlier run left in WORK is used again, the trained model above all. Beside the model as
it was trained stand two that compute the same, bit for bit, and whose experts lie apart in
magnitude (:func:`nxdi_expertscale.evaluation.small_model.spread_experts`). With
``NXDI_EXPERTSCALE_UPSTREAM`` naming the real sources (see ``tests/upstream``), the model goes
through each release of NxDI on a CPU too; where ``lm_eval`` is installed, through that as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks import through_nxdi
from benchmarks.lm_eval_task import TASKS, write_tasks, write_tokenizer
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.cli import tables
from nxdi_expertscale.evaluation import decoder, small_model
from nxdi_expertscale.evaluation.architecture import derive_architecture
from nxdi_expertscale.evaluation.evaluate import Evaluation, evaluate_checkpoint
from nxdi_expertscale.evaluation.stored_weights import StoredWeights, with_averaged_scales
from nxdi_expertscale.families.built_in import QWEN3_MOE
from nxdi_expertscale.numerics import scales
from tests.harness import targets

MODEL = small_model.qwen3_moe_config(hidden_size=128, moe_intermediate_size=128)
RECIPE = small_model.Recipe(steps=800, batch=16, learning_rate=3e-3)
SPREADS = (1, 4, 16)
"""Factors between the experts' magnitudes."""

TOKENS = 32768
PASSAGE = 256
"""Tokens that are predicted one by one through NxDI."""
WINDOW = 64
"""Tokens before each of them."""

_KINDS = ("original", "expert_wise", "averaged")


def trained(folder: Path, corpus: small_model.Corpus) -> Path:
    """The trained model in bfloat16: that of an earlier run, or a new one."""
    if folder.is_dir():
        return folder
    torch.manual_seed(RECIPE.seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).to(torch.float32)
    with small_model.one_thread():
        small_model.train(
            lambda tokens: model(tokens).logits, list(model.parameters()), corpus, RECIPE, _say
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _say(step: int, steps: int) -> None:
    if step % 25 == 0:
        print(f"training: step {step} of {steps}", file=sys.stderr, flush=True)


def measured(work: Path, spread: int, text: Path) -> Evaluation:
    """The trained model with its experts spread, quantized, against itself."""
    model, quantized = _folders(work, spread)
    if spread > 1:
        model.mkdir(exist_ok=True)
        small_model.spread_experts(work / "model", model, spread)
    write_tokenizer(model)
    quantize_checkpoint(model, quantized, overwrite=True)
    return evaluate_checkpoint(model, quantized, text=text, tokens=TOKENS)


def _folders(work: Path, spread: int) -> tuple[Path, Path]:
    name = "model" if spread == 1 else f"model-spread-{spread}"
    return work / name, work / f"{name}-fp8"


def _run(command: Sequence[str], log: Path) -> None:
    """Run a program that talks much.

    Raises:
        RuntimeError: It failed; the message names the file with what it said.
    """
    with log.open("w") as file:
        status = subprocess.run(command, check=False, stdout=file, stderr=file).returncode
    if status:
        raise RuntimeError(f"{command[2]} ended with status {status}; see {log}")


def reference_logits(model: Path, quantized: Path, windows: torch.Tensor) -> dict[str, Any]:
    """Logits of the token after each window, by the reference: what NxDI's are compared with."""
    original, fp8 = open_model(model), open_model(quantized)
    architecture = derive_architecture(original.config, original.family)
    with (
        torch.inference_mode(),
        StoredWeights(original) as full,
        StoredWeights(fp8) as expert_wise,
    ):
        averaged = with_averaged_scales(expert_wise)
        return {
            kind: decoder.forward(windows, weights, architecture)[:, -1]
            for kind, weights in zip(_KINDS, (full, expert_wise, averaged), strict=True)
        }


def through_releases(work: Path, spread: int, text: str) -> list[dict[str, Any]]:
    """A passage, token by token, through each release of NxDI whose sources are at hand."""
    model, quantized = _folders(work, spread)
    tokens = small_model.as_bytes(text)[: PASSAGE + WINDOW].long()
    windows, next_tokens = tokens.unfold(0, WINDOW, 1)[:-1], tokens[WINDOW:]
    given = work / "windows.safetensors"
    save_file({through_nxdi.WINDOWS: windows.contiguous()}, given)
    reference = reference_logits(model, quantized, windows)
    rows = []
    for release, target in targets.all_targets().items():
        if target.is_double:
            continue
        out = work / f"nxdi-{release}.safetensors"
        command = [sys.executable, "-m", "benchmarks.through_nxdi", release]
        command += map(str, (model, quantized, given, out))
        _run(command, out.with_suffix(".log"))
        found = load_file(out)
        for kind in _KINDS:
            difference = (found[kind] - reference[kind]).norm() / reference[kind].norm()
            rows.append(
                {
                    "release": release,
                    "spread": spread,
                    "scales": kind,
                    "from_reference": float(difference),
                    **_predictions(found[kind], reference["original"], next_tokens),
                }
            )
    return rows


def _predictions(
    logits: torch.Tensor, original: torch.Tensor, next_tokens: torch.Tensor
) -> dict[str, float]:
    logs, expected = logits.log_softmax(-1), original.log_softmax(-1)
    divergence = functional.kl_div(logs, expected, reduction="batchmean", log_target=True)
    return {
        "perplexity": float(functional.nll_loss(logs, next_tokens).exp()),
        "kl_divergence": float(divergence),
        "top1_agreement": float((logs.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def averaged_checkpoint(quantized: Path, folder: Path) -> None:
    """A quantized checkpoint in which each layer's experts have their mean scale."""
    folder.mkdir(exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for source in quantized.iterdir():
        if source.suffix == ".safetensors":
            tensors |= load_file(source)
        elif source.is_file():
            (folder / source.name).write_bytes(source.read_bytes())
    alike: dict[tuple[int, str], list[str]] = {}
    for name in tensors:
        place = QWEN3_MOE.names.parse_expert_key(name)
        if place is not None and place.suffix == "weight_scale":
            alike.setdefault((place.layer, place.projection), []).append(name)
    for names in alike.values():
        mean = scales.average(torch.stack([tensors[name].T for name in names]))[0].T
        tensors |= {name: mean.clone() for name in names}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        part = {name: tensors[name] for name, of in index["weight_map"].items() if of == file}
        save_file(part, folder / file, metadata={"format": "pt"})


def through_lm_eval(work: Path, spread: int, text: str) -> list[dict[str, Any]]:
    """Held-out text through EleutherAI's harness, which loads the folders with transformers."""
    model, quantized = _folders(work, spread)
    averaged = work / f"{quantized.name}-averaged"
    averaged_checkpoint(quantized, averaged)
    tasks = write_tasks(work / "lm_eval", text)
    rows = []
    for kind, folder in zip(_KINDS, (model, quantized, averaged), strict=True):
        out = work / "lm_eval" / f"{kind}-{spread}"
        arguments = f"pretrained={folder},dtype=float32,max_length={small_model.CONTEXT}"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", arguments]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", "16"]
        _run([*command, "--output_path", str(out)], work / "lm_eval" / "log")
        newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
        results = json.loads(newest.read_text())["results"]
        rows.append({"spread": spread, "scales": kind} | {name: results[name] for name in TASKS})
    return rows


def evaluation_rows(found: dict[int, Evaluation]) -> Table:
    """Everything that ``evaluate`` measured, as one table."""
    table = Table("experts apart", "FP8 scales", "perplexity", "KL, nats", "same top-1", "error")
    for spread, result in found.items():
        table.add_row(_apart(spread), "none (bfloat16)", f"{result.perplexity:.4f}", "", "", "")
        for name, kind in tables.scale_kinds(result).items():
            errors = kind.layer_errors.values()
            table.add_row(
                "",
                name,
                f"{kind.perplexity:.4f} ({kind.perplexity / result.perplexity - 1:+.2%})",
                f"{kind.kl_divergence:.2g}",
                f"{kind.top1_agreement:.1%}",
                f"{min(errors):.1%} to {max(errors):.1%}",
            )
    return table


def nxdi_rows(rows: list[dict[str, Any]]) -> Table:
    """What came out of NxDI, as a table."""
    table = Table("NxDI", "experts apart", "FP8 scales", "perplexity", "KL, nats", "same top-1")
    table.add_column("from reference")
    for row in rows:
        table.add_row(
            row["release"],
            _apart(row["spread"]),
            _named(row["scales"]),
            f"{row['perplexity']:.4f}",
            f"{row['kl_divergence']:.2g}",
            f"{row['top1_agreement']:.1%}",
            f"{row['from_reference']:.1e}",
        )
    return table


def lm_eval_rows(rows: list[dict[str, Any]]) -> Table:
    """What lm_eval found, as a table."""
    table = Table("experts apart", "FP8 scales", "byte perplexity", "next line, accuracy")
    for row in rows:
        rolling, choice = (row[name] for name in TASKS)
        table.add_row(
            _apart(row["spread"]),
            _named(row["scales"]),
            f"{rolling['byte_perplexity,none']:.4f}",
            f"{choice['acc,none']:.3f} ± {choice['acc_stderr,none']:.3f}",
        )
    return table


def _apart(spread: int) -> str:
    return "as trained" if spread == 1 else f"{spread}-fold"


def _named(kind: str) -> str:
    names = ("none", "one per expert", "one, averaged")
    return dict(zip(_KINDS, names, strict=True))[kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for models and results")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = small_model.python_library()
    text = work / "held-out.txt"
    text.write_text(corpus.held_out, encoding="utf-8")
    trained(work / "model", corpus)
    console = Console(width=100)
    found = {spread: measured(work, spread, text) for spread in SPREADS}
    unigram = small_model.unigram_perplexity(corpus)
    console.print(f"Held-out bytes, by how often each occurs: perplexity {unigram:.2f}")
    console.print(evaluation_rows(found))
    ends = (SPREADS[0], SPREADS[-1])
    nxdi = [row for spread in ends for row in through_releases(work, spread, corpus.held_out)]
    if nxdi:
        console.print(nxdi_rows(nxdi))
    harness: list[dict[str, Any]] = []
    if importlib.util.find_spec("lm_eval") is not None:
        harness = [row for spread in ends for row in through_lm_eval(work, spread, corpus.held_out)]
        console.print(lm_eval_rows(harness))
    if options.json is not None:
        evaluations = {spread: asdict(result) for spread, result in found.items()}
        figures = {"unigram": unigram, "evaluate": evaluations, "nxdi": nxdi, "lm_eval": harness}
        options.json.write_text(json.dumps(figures, indent=2, default=str))


if __name__ == "__main__":
    main()
