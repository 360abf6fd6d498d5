"""Held-out text as tasks for EleutherAI's lm_eval, and the tokenizer that it needs."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

TASKS = ("held_out_bytes", "held_out_continuation")

GENERATION = "held_out_generation"
"""What a server can be asked that gives tokens and no logits, as vLLM-Neuron's."""

_DOCUMENT = 2048
"""Characters of a document whose bytes are predicted."""
_DOCUMENTS = 16
_QUESTIONS = 200
_CONTEXT = 160
_ANSWER = 24
"""Characters of a question, and of each of its four answers, of which one really follows."""


def write_tokenizer(folder: Path) -> None:
    """Put a tokenizer beside a model: a token is a byte, and byte 0 ends a text."""
    characters = bytes_to_unicode()
    vocabulary = {characters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = characters[0]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tasks(folder: Path, text: str) -> Path:
    """Write the tasks and their data.

    ``held_out_bytes`` predicts every byte of documents; ``held_out_continuation`` asks which of
    four pieces of the text follows a piece of it; ``held_out_generation`` asks for the next
    characters.

    Args:
        folder: The folder to write.
        text: The text.

    Returns:
        The folder, for ``--include_path``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)

    def piece(length: int) -> str:
        start = chance.randrange(len(text) - length)
        return text[start : start + length]

    documents = [{"text": piece(_DOCUMENT)} for _ in range(_DOCUMENTS)]
    questions = []
    for _ in range(_QUESTIONS):
        whole = piece(_CONTEXT + _ANSWER)
        right = chance.randrange(4)
        answers = [piece(_ANSWER) for _ in range(4)]
        answers[right] = whole[_CONTEXT:]
        questions.append({"query": whole[:_CONTEXT], "choices": answers, "gold": right})
    _write(folder, TASKS[0], documents, _ROLLING)
    _write(folder, TASKS[1], questions, _CHOICE)
    _write(folder, GENERATION, questions, _GENERATION)
    return folder


_ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""

_CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""

_GENERATED = 3

_GENERATION = f"""\
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[gold][:{_GENERATED}]}}}}"
target_delimiter: ""
generation_kwargs:
  until: []
  max_gen_toks: {_GENERATED}
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
"""


def _write(folder: Path, task: str, documents: list[dict[str, object]], how: str) -> None:
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    head = f"""\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data.absolute()}
test_split: test
"""
    (folder / f"{task}.yaml").write_text(head + how)
