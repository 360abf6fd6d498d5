"""``vllm serve`` with the README's command, as it stands there, and what a user sees of it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import read_manifest
from nxdi_expertscale.cli.commands import cli
from tests.harness import readme
from tests.server.conftest import Answers, Host
from tests.server.served import PROMPTS, TOKENS, state, tokens_of
from tests.server.serving import serve

COMMAND = shlex.split(readme.block("bash", "vllm serve").replace("\\\n", " "))
QUESTION = readme.block("bash", "/v1/completions")
MODEL = COMMAND[2]
ARTIFACTS = "neuron-compiled-artifacts"
"""Where vLLM-Neuron compiles to, in the folder of the model."""
FOLDER = readme.vllm_override()["quantized_checkpoints_path"]


@pytest.fixture
def place(host: Host, moe: Path) -> Path:
    """A folder that holds the model under the README's name, and nothing that was compiled."""
    shutil.copytree(moe, host.folder / MODEL, ignore=shutil.ignore_patterns(ARTIFACTS))
    return host.folder


def test_readmes_command(host: Host, place: Path, answers: Answers) -> None:
    """The first start makes the folder, a second one uses it as it is."""
    expected = answers.of("expert-wise", "float32")  # As the model's config has it.

    with serve(COMMAND, host.environment(), place, MODEL) as server:
        assert server.complete_at_once(PROMPTS, TOKENS) == expected
        pieces = server.stream(PROMPTS[1], TOKENS)
        asked = QUESTION.replace("http://localhost:8000", server.address)
        said = subprocess.run(["bash", "-c", asked], check=True, capture_output=True, text=True)
        assert tokens_of(json.loads(said.stdout)["choices"][0]["text"])
        (line,) = server.lines("FP8 experts")
    made = state(place / FOLDER)
    (compiled,) = (place / MODEL / ARTIFACTS).iterdir()

    assert len(pieces) > 1
    assert tokens_of("".join(pieces)) == expected[1]
    assert "nxdi_expertscale.json" in made
    assert "loaded 2 layers of 8 FP8 experts with 8 scales per channel, one for each" in line
    assert f"from {FOLDER} (digest {read_manifest(place / FOLDER).digest[:16]})" in line

    # As a production server does: what has been compiled is loaded again.
    artifacts = shutil.copytree(compiled, place / "artifacts")
    reload = host.environment(NEURON_COMPILED_ARTIFACTS=str(artifacts))
    with serve(COMMAND, reload, place, MODEL) as server:
        assert server.complete_at_once(PROMPTS, TOKENS) == expected
        assert server.lines("Successfully loaded pre-compiled model artifacts")
    assert state(place / FOLDER) == made


def test_command_that_neuron_config_prints_serves_the_folder_alone(
    host: Host, fp8: Path, answers: Answers
) -> None:
    """Without the original, and with nothing added."""
    folder = shutil.copytree(fp8, host.folder / "fp8")
    printed = CliRunner().invoke(
        cli, ["neuron-config", str(folder), "--format", "vllm", "--seq-len", "128"]
    )

    with serve(shlex.split(printed.stdout), host.environment(), host.folder, str(folder)) as server:
        assert server.complete_at_once(PROMPTS, TOKENS) == answers.of("expert-wise", "float32")
        assert server.lines("FP8 experts")
