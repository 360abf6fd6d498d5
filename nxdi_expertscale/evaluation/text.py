"""The text that models are evaluated on, as tokens."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from nxdi_expertscale.checkpoint.read.auxiliary import read_auxiliary_file
from nxdi_expertscale.errors import CheckpointError, ConfigurationError, parameter
from nxdi_expertscale.evaluation.tokenizer import encode
from nxdi_expertscale.sources.source import Source

TOKENIZER = "tokenizer.json"

_BYTES = 256
_CHARACTERS_PER_TOKEN = 16
"""More than any text has on average: what is read of a long one."""


def read_text(path: Path, tokens: int) -> str:
    """The beginning of a text file, enough of it for a number of tokens.

    Args:
        path: The file.
        tokens: How many tokens are wanted.

    Raises:
        ConfigurationError: It is not UTF-8, or is empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(tokens * _CHARACTERS_PER_TOKEN)
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not text in UTF-8; name another file") from None
    if not text:
        raise ConfigurationError(f"{path}: is empty; name another file")
    return text


def python_documentation(tokens: int) -> str:
    """Python's documentation of itself: English prose and code that every machine has.

    Args:
        tokens: How many tokens are wanted; no more of it is given than they take.

    Raises:
        ConfigurationError: This Python was installed without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ConfigurationError(
            "this Python was installed without its documentation (pydoc_data), which is the text "
            f"that is measured on if none is given; name a file with {parameter('text')}"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics))
    return text[: tokens * _CHARACTERS_PER_TOKEN]


def tokenize(text: str, folder: Source, vocab_size: int, tokens: int) -> torch.Tensor:
    """A text in the tokens of a checkpoint.

    Args:
        text: The text.
        tokens: How many tokens are wanted at most.
        folder: The checkpoint's folder, with ``tokenizer.json``. A model of 256 tokens needs
            none: its tokens are bytes.
        vocab_size: Number of tokens that the model knows.

    Returns:
        ``[length]``, ``torch.int64``.

    Raises:
        CheckpointError: There is no tokenizer, or it is another model's.
        ConfigurationError: The package ``tokenizers`` cannot be imported.
    """
    where = folder.location(TOKENIZER)
    if folder.has(TOKENIZER):
        found = encode(text, read_auxiliary_file(folder, TOKENIZER), where, limit=tokens)
    elif vocab_size == _BYTES:
        found = text.encode()[:tokens]
    else:
        raise CheckpointError(f"{where}: is missing; put the model's tokenizer there")
    token_ids = torch.tensor(list(found), dtype=torch.int64)
    if token_ids.numel() and int(token_ids.max()) >= vocab_size:
        raise CheckpointError(
            f"{where}: has a token {int(token_ids.max())}, and the model has {vocab_size}; it is "
            "another model's"
        )
    return token_ids
