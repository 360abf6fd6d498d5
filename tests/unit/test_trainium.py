"""The script for the device, with small programs in place of vLLM and lm_eval."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainium import checks, run
from benchmarks.trainium.plan import Setup, steps
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.evaluation import small_model

VLLM = """
import http.server, json, os, pathlib, sys
arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    kind = json.loads(arguments[arguments.index("--additional-config") + 1]) \
        if arguments[0] == "serve" else {}
    flag = kind.get("override_neuron_config", {}).get("expert_wise_scale")
    calls.write(f"vllm {arguments[0]} {flag} {os.environ.get('UNSAFE_FP8FNCAST')}\\n")
if arguments[0] == "bench":
    folder = pathlib.Path(arguments[arguments.index("--result-dir") + 1])
    (folder / "throughput.json").write_text(json.dumps({"output_throughput": 50.0}))
    sys.exit(0)
if os.environ.get("BROKEN") == "serve":
    sys.exit(3)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""

LM_EVAL = """
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write("lm_eval\\n")
if os.environ.get("BROKEN") == "lm_eval":
    sys.exit(1)
out = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "model"
out.mkdir(parents=True)
(out / "results_2026.json").write_text(json.dumps({"results": {
    "ifeval": {"inst_level_strict_acc,none": 0.5}, "truthfulqa_gen": {"bleu_acc,none": 0.25}}}))
"""

ALL_CALLS = [
    "vllm serve None None",
    "lm_eval",
    "vllm bench None None",
    "vllm serve True 1",
    "lm_eval",
    "vllm bench None None",
    "vllm serve False 1",
    "lm_eval",
    "vllm bench None None",
]


def _program(folder: Path, name: str, source: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = small_model.qwen3_moe_config(hidden_size=32, moe_intermediate_size=16)
    corpus = small_model.Corpus(training="x = 1\n" * 200, held_out="")
    small_model.make(folder, config, corpus, small_model.Recipe(steps=12, batch=1))
    return folder


@dataclass(frozen=True)
class Host:
    """A host that has all that is asked for.

    Attributes:
        file: In which the programs note their calls.
        port: An unused one.
        needs: What is asked for.
    """

    file: Path
    port: int
    needs: checks.Needs

    def run(self, *arguments: object, **needs: Any) -> int:
        """Run the script; ``needs`` is what differs from :attr:`needs`."""
        command = [*map(str, arguments), "--port", str(self.port)]
        return run.main(command, replace(self.needs, **needs))

    def calls(self) -> list[str]:
        return self.file.read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    programs = tmp_path / "bin"
    programs.mkdir()
    _program(programs, "vllm", VLLM)
    _program(programs, "lm_eval", LM_EVAL)
    _program(programs, "nxdi-expertscale", "from nxdi_expertscale.cli import main; main()")
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("COLUMNS", "200")
    needs = checks.Needs(
        device=tmp_path,
        packages=(),
        check_configuration=lambda _, variant: checks.Check(variant.name, checks.Outcome.GOOD, ""),
    )
    return Host(calls, _unused_port(), needs)


def _unused_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_all_three_are_measured_one_after_the_other(
    model: Path, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = host.run(model, tmp_path / "work", "--json", tmp_path / "f.json")

    table = capsys.readouterr().out
    assert status == 0
    assert host.calls() == ALL_CALLS
    assert table.count("0.5 / ") == 3 and "0.5 / 0.405" in table and "50 / 58.7" in table
    assert (tmp_path / "f.json").read_text().count("0.25") == 3


def test_what_is_done_is_not_done_again(
    model: Path,
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    with monkeypatch.context() as broken:
        broken.setenv("BROKEN", "lm_eval")
        assert host.run(model, work) == 1
    assert host.calls() == ALL_CALLS[:2]
    assert "bfloat16: answers: status 1" in capsys.readouterr().err

    assert host.run(model, work) == 0
    assert host.calls() == ALL_CALLS[:2] + ALL_CALLS
    assert host.run(model, work) == 0
    assert host.calls() == ALL_CALLS[:2] + ALL_CALLS


def test_server_that_ends_is_told(
    model: Path,
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BROKEN", "serve")

    assert host.run(model, tmp_path / "work") == 1
    assert "the server ended with status 3" in capsys.readouterr().err


def test_dry_run_prints_every_command_and_starts_none(
    model: Path, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"

    assert host.run(model, work, "--dry-run") == 0

    printed = capsys.readouterr().out
    setup = Setup(model, work)
    assert all(" ".join(step.command[:3]) in printed for step in steps(setup))
    assert printed.count("vllm serve") == 3
    assert '"expert_wise_scale": true' in printed and '"expert_wise_scale": false' in printed
    assert not work.exists() and host.calls() == []


def test_dry_run_goes_on_without_a_device_and_a_run_does_not(
    model: Path, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "no-device"

    assert host.run(model, tmp_path / "work", "--dry-run", device=nowhere) == 0
    assert "absent" in capsys.readouterr().out
    assert host.run(model, tmp_path / "work", device=nowhere) == 1
    assert host.calls() == []


def test_too_little_disk_is_bad(model: Path, host: Host, tmp_path: Path) -> None:
    assert host.run(model, tmp_path / "work", "--dry-run", compiled_bytes=1 << 60) == 1


def test_model_that_is_quantized_already_is_bad(
    model: Path, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_checkpoint(model, tmp_path / "fp8")

    assert host.run(tmp_path / "fp8", tmp_path / "work", "--dry-run") == 1
    assert "compressed-tensors FP8; name the one in bfloat16" in capsys.readouterr().out


def test_no_model_is_a_bad_request(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host.run(tmp_path / "none", tmp_path / "work", "--dry-run") == 2
    assert "is not a folder" in capsys.readouterr().err
