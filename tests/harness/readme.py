"""The blocks of the README that users copy, to be run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

_TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """All blocks in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", _TEXT, re.MULTILINE | re.DOTALL)


def block(language: str, containing: str) -> str:
    """The one block in a language that contains a text."""
    (found,) = (text for text in blocks(language) if containing in text)
    return found


def command(containing: str) -> list[str]:
    """The words of the one shell command that contains a text."""
    lines = block("bash", containing).replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if containing in line)
    return shlex.split(line, comments=True)


def vllm_override() -> dict[str, Any]:
    """What the README gives vLLM as ``override_neuron_config``."""
    words = shlex.split(block("bash", "vllm serve"))
    settings = json.loads(words[words.index("--additional-config") + 1])
    override: dict[str, Any] = settings["override_neuron_config"]
    return override
