"""The text that models are evaluated on, as tokens."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from nxdi_expertscale.checkpoint.read.files import read_auxiliary_file
from nxdi_expertscale.errors import CheckpointError, ConfigurationError, damaged
from nxdi_expertscale.sources.folder import Folder

TOKENIZER = "tokenizer.json"

_BYTES = 256
_CHARACTERS_PER_TOKEN = 32
"""More than any text has on average: what is read of a long file."""


def read_text(path: Path, tokens: int) -> str:
    """The beginning of a text file, enough of it for a number of tokens.

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


def python_documentation() -> str:
    """Python's documentation of itself: English prose and code that every machine has.

    Raises:
        ConfigurationError: This Python was installed without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ConfigurationError(
            "this Python was installed without its documentation (pydoc_data), which is the text "
            "that is measured on if none is given; name a file with --text"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, folder: Folder, vocab_size: int) -> torch.Tensor:
    """A text in the tokens of a checkpoint.

    Args:
        text: The text.
        folder: The checkpoint's folder, with ``tokenizer.json``. A model of 256 tokens needs
            none: its tokens are bytes.
        vocab_size: Number of tokens that the model knows.

    Returns:
        ``[length]``, ``torch.int64``.

    Raises:
        CheckpointError: There is no tokenizer, or it is another model's.
        ConfigurationError: The package ``tokenizers`` is not installed.
    """
    where = folder.location(TOKENIZER)
    if folder.has(TOKENIZER):
        found = _encode(text, read_auxiliary_file(folder, TOKENIZER), where)
    elif vocab_size == _BYTES:
        found = list(text.encode())
    else:
        raise CheckpointError(f"{where}: is missing; put the model's tokenizer there")
    tokens = torch.tensor(found, dtype=torch.int64)
    if tokens.numel() and int(tokens.max()) >= vocab_size:
        raise CheckpointError(
            f"{where}: has a token {int(tokens.max())}, and the model has {vocab_size}; it is "
            "another model's"
        )
    return tokens


def _encode(text: str, tokenizer_json: bytes, where: str) -> list[int]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigurationError(
            "a checkpoint's tokenizer is read with the package tokenizers, which is not "
            "installed: pip install 'nxdi-expertscale[evaluate]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # tokenizers raises Exception itself
        raise damaged(where, f"is not a tokenizer ({error})") from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
