"""Of a checkpoint the data is copied, and the code is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

REMOTE = {"AutoConfig": "evil/code--configuration_x.Config"}
LOCAL = {"AutoTokenizer": ["tokenization_x.Tokenizer", None]}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


def quantized(src: Path) -> tuple[Path, tuple[str, ...]]:
    result = quantize_checkpoint(src, src.with_name("dst"))
    assert verify_checkpoint(result.destination, src).faults == ()
    return result.destination, result.code_left_out


def add_to_json(path: Path, **values: Any) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


def test_auto_map_is_taken_out_of_configs_and_told(src: Path) -> None:
    add_to_json(src / "config.json", auto_map=REMOTE)
    add_to_json(src / "tokenizer_config.json", auto_map=LOCAL, model_max_length=8)
    add_to_json(src / "processor_config.json", parts=[{"auto_map": REMOTE, "size": 3}])

    dst, left_out = quantized(src)

    assert "auto_map" not in (dst / "config.json").read_text()
    assert json.loads((dst / "tokenizer_config.json").read_text()) == {"model_max_length": 8}
    assert json.loads((dst / "processor_config.json").read_text()) == {"parts": [{"size": 3}]}
    assert left_out == (
        "config.json: auto_map (of evil/code)",
        "processor_config.json: auto_map (of evil/code)",
        "tokenizer_config.json: auto_map",
    )


def test_auto_map_that_is_spelled_with_an_escape_is_found(src: Path) -> None:
    (src / "tokenizer_config.json").write_text(r'{"auto_\u006dap": {"A": "evil/code--x.Y"}}')

    dst, left_out = quantized(src)

    assert json.loads((dst / "tokenizer_config.json").read_text()) == {}
    assert left_out == ("tokenizer_config.json: auto_map (of evil/code)",)


def test_scripts_and_binaries_are_not_copied(src: Path) -> None:
    refused = {
        "modeling_x.py": b"print()",
        "run.sh": b"true",
        "setup.txt": b"#!/bin/sh\n",
        "LICENSE.txt": b"\x7fELF\0",
        "tokenizer.model": b"\x80\x04pickled",
        "x.tiktoken": b"MZ\0\0",
        "LICENSE.sh": b"true",
    }
    copied = {
        "LICENSE": b"Apache\n",
        "merges.txt": "é ü\n".encode(),
        "spiece.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0",
        "tiktoken.model": b"IQ== 0\n",
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, content in {**refused, **copied}.items():
        (src / name).write_bytes(content)

    dst, left_out = quantized(src)

    assert set(left_out) == set(refused)
    assert {name: (dst / name).read_bytes() for name in copied} == copied
    assert not set(refused) & {path.name for path in dst.iterdir()}


def test_a_file_without_code_is_copied_as_it_is(src: Path) -> None:
    content = b'{"b": 1,\n\n  "a": "\\ud800", "c": 1e400}'
    (src / "tokenizer_config.json").write_bytes(content)

    dst, left_out = quantized(src)

    assert (dst / "tokenizer_config.json").read_bytes() == content
    assert left_out == ()


def test_what_is_no_whole_character_is_kept_beside_auto_map(src: Path) -> None:
    (src / "tokenizer_config.json").write_bytes(b'{"auto_map": {}, "a": "\\ud800"}')

    dst, _ = quantized(src)

    assert json.loads((dst / "tokenizer_config.json").read_text()) == {"a": "\ud800"}


def test_json_that_is_nested_too_deeply_is_refused(src: Path) -> None:
    (src / "tokenizer_config.json").write_text("[" * 900 + "]" * 900)

    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: is not valid JSON"):
        quantized(src)
