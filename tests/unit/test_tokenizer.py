"""A tokenizer is a program of a kind, and may be anyone's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.evaluation.tokenizer import encode

TEXT = "hello a " * 1000
TOKENS = [1, 2, 1, 2]


def tokenizer(**parts: Any) -> bytes:
    """A tokenizer of two words, with some parts replaced."""
    words = Tokenizer(models.WordLevel({"?": 0, "hello": 1, "a": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return json.dumps({**json.loads(words.to_str()), **parts}).encode()


def test_text_is_encoded_up_to_the_limit() -> None:
    assert list(encode(TEXT, tokenizer(), "tokenizer.json", limit=4)) == TOKENS
    assert len(encode(TEXT, tokenizer(), "tokenizer.json", limit=10**9)) == 2000


@pytest.mark.parametrize(
    "part",
    [
        {
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "?",
            }
        },
        {
            "truncation": {
                "direction": "Right",
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 5,
            }
        },
    ],
    ids=["padding", "truncation"],
)
def test_padding_and_truncation_are_left_out(part: dict[str, Any]) -> None:
    assert list(encode(TEXT, tokenizer(**part), "tokenizer.json", limit=4)) == TOKENS


@pytest.mark.parametrize(
    "charsmap",
    ["AAAA", "/////////w==", "BAAAAP////8A"],
    ids=["panics", "aborts", "is out of range"],
)
def test_table_that_makes_the_library_panic_is_an_error(charsmap: str) -> None:
    damaged = tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})

    with pytest.raises(CheckpointError, match=r"^folder/tokenizer.json: ") as error:
        encode(TEXT, damaged, "folder/tokenizer.json", limit=4)

    assert len(str(error.value)) < 500


def test_normalizer_that_makes_much_of_a_text_is_bounded() -> None:
    blown_up = tokenizer(
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**7}
    )

    with pytest.raises(CheckpointError, match=r"tokenizer.json: .*cannot be run within \d+ MB"):
        encode(TEXT, blown_up, "tokenizer.json", limit=4)


def test_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    with pytest.raises(ConfigurationError, match=r"ImportError: broken.*pip install '.*\[evaluate"):
        encode(TEXT, tokenizer(), "tokenizer.json", limit=4)


def test_code_of_the_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ImportError('hostile')")
    monkeypatch.chdir(tmp_path)

    assert list(encode(TEXT, tokenizer(), "tokenizer.json", limit=4)) == TOKENS
