"""Runs a checkpoint's tokenizer in a process of its own, with a bound on its memory and time.

A ``tokenizer.json`` is a program of a kind: a normalizer in it may replace each space by a
megabyte, and a table that is damaged makes the package ``tokenizers``, which is written in Rust,
panic or abort. None of it is more than an error here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from nxdi_expertscale.errors import (
    CheckpointError,
    ConfigurationError,
    damaged,
    one_line,
    printable,
    shorten,
)

CPU_SECONDS = 300
"""The largest tokenizers take some seconds."""

MEMORY = 1 << 30
"""Bytes of address space, beside what the tokenizer and the text take."""

MEMORY_PER_BYTE = 32
"""For each byte of ``tokenizer.json``; 13 bytes were measured, of one with 256,000 tokens."""

MEMORY_PER_CHARACTER = 1024
"""For each character of the text; 300 bytes were measured, where most characters are a token."""

_ROOT = Path(__file__).parents[2]
"""Where this package lies."""

# "python -c" puts the working directory on the path.
_CHILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
sys.path.append(sys.argv[1])
from nxdi_expertscale.evaluation import tokenizer
sys.exit(tokenizer.serve(sys.stdin.buffer, sys.stdout.buffer, *map(int, sys.argv[2:])))
"""

_DONE, _REFUSED, _NOT_INSTALLED = 0, 3, 4
"""Exit statuses of the child. After the others its output is a message."""

_LENGTH_BYTES = 8


def encode(text: str, tokenizer_json: bytes, where: str, *, limit: int) -> Sequence[int]:
    """Encode a text in the tokens of a checkpoint, without special tokens.

    What the tokenizer says of truncation and padding is left out.

    Args:
        text: The text.
        tokenizer_json: What ``tokenizer.json`` holds.
        where: The file, for messages.
        limit: The most tokens that are wanted; those after are left out.

    Returns:
        The numbers of the tokens.

    Raises:
        CheckpointError: It is not a tokenizer, or takes more memory or time than any real one.
        ConfigurationError: The package ``tokenizers`` cannot be imported.
    """
    memory = MEMORY + MEMORY_PER_BYTE * len(tokenizer_json) + MEMORY_PER_CHARACTER * len(text)
    length = len(tokenizer_json).to_bytes(_LENGTH_BYTES, "little")
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(_ROOT), str(limit), str(memory), str(CPU_SECONDS)],
        input=length + tokenizer_json + text.encode(errors="replace"),
        stdout=subprocess.PIPE,
        # A panic of Rust prints several lines on its own.
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "NXDI_PLUGINS": "",
            # Threads take address space, and a single text is encoded by one.
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        check=False,
    )
    if child.returncode == _DONE:
        return array("I", child.stdout)
    message = shorten(printable(child.stdout.decode(errors="replace")))
    if child.returncode == _NOT_INSTALLED:
        raise ConfigurationError(
            f"a checkpoint's tokenizer is read with the package tokenizers, which cannot be "
            f"imported ({message}): pip install 'nxdi-expertscale[evaluate]'"
        )
    if child.returncode == _REFUSED:
        raise damaged(where, f"is not a tokenizer ({message})")
    raise CheckpointError(
        f"{where}: cannot be run within {memory >> 20} MB and {CPU_SECONDS} seconds: its process "
        f"{_describe_end(child.returncode)}; put the model's own tokenizer there"
    )


def _describe_end(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def serve(requests: BinaryIO, answers: BinaryIO, limit: int, memory: int, cpu_seconds: int) -> int:
    """In the child: read a tokenizer and a text, and write the text's tokens.

    Args:
        requests: Holds the length of the tokenizer (8 bytes, little-endian), the tokenizer, and
            the text, in UTF-8.
        answers: Gets the tokens, 4 bytes each in the machine's order, or a message.
        limit: The most tokens that are written.
        memory: The most bytes of address space that the process may have.
        cpu_seconds: The most seconds of a core that the process may take.

    Returns:
        The process's exit status.
    """
    _limit_resources(memory, cpu_seconds)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        answers.write(one_line(error).encode())
        return _NOT_INSTALLED
    length = int.from_bytes(requests.read(_LENGTH_BYTES), "little")
    try:
        tokenizer = Tokenizer.from_buffer(requests.read(length))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        encoding = tokenizer.encode(requests.read().decode(), add_special_tokens=False)
        ids = array("I", encoding.ids[:limit])
    except BaseException as error:  # A panic of Rust is no Exception.
        answers.write(one_line(error).encode())
        return _REFUSED
    answers.write(ids)
    return _DONE


def _limit_resources(memory: int, cpu_seconds: int) -> None:
    import resource

    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # macOS does not limit the address space.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (soft, hard))
