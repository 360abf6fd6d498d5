"""The script for the device, with small programs in place of vLLM and lm_eval."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT_"])), Health).serve_forever()
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


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int) -> Path:
    """A host that has all that is asked for; gives the file in which calls are noted."""
    programs = tmp_path / "bin"
    programs.mkdir()
    _program(programs, "vllm", VLLM)
    _program(programs, "lm_eval", LM_EVAL)
    _program(programs, "nxdi-expertscale", "from nxdi_expertscale.cli import main; main()")
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("PORT_", str(unused_port))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(run, "PORT", unused_port)
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(checks, "DEVICE", tmp_path)
    monkeypatch.setattr(checks, "PACKAGES", ())
    good = checks.Outcome.GOOD
    monkeypatch.setattr(
        checks, "_configuration", lambda _, variant: checks.Check(variant.name, good, "")
    )
    return calls


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _calls(device: Path) -> list[str]:
    return device.read_text().splitlines()


def test_all_three_are_measured_one_after_the_other(
    model: Path, device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run.main([str(model), str(tmp_path / "work"), "--json", str(tmp_path / "f.json")])

    table = capsys.readouterr().out
    assert status == 0
    assert _calls(device) == ALL_CALLS
    assert table.count("0.5 / ") == 3 and "0.5 / 0.405" in table and "50 / 58.7" in table
    assert (tmp_path / "f.json").read_text().count("0.25") == 3


def test_what_is_done_is_not_done_again(
    model: Path,
    device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = str(tmp_path / "work")
    with monkeypatch.context() as broken:
        broken.setenv("BROKEN", "lm_eval")
        assert run.main([str(model), work]) == 1
    assert _calls(device) == ALL_CALLS[:2]
    assert "bfloat16: answers: status 1" in capsys.readouterr().err

    assert run.main([str(model), work]) == 0
    assert _calls(device) == ALL_CALLS[:2] + ALL_CALLS
    assert run.main([str(model), work]) == 0
    assert _calls(device) == ALL_CALLS[:2] + ALL_CALLS


def test_server_that_ends_is_told(
    model: Path,
    device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BROKEN", "serve")

    assert run.main([str(model), str(tmp_path / "work")]) == 1
    assert "the server ended with status 3" in capsys.readouterr().err


def test_dry_run_prints_every_command_and_starts_none(
    model: Path, device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"

    assert run.main([str(model), str(work), "--dry-run"]) == 0

    printed = capsys.readouterr().out
    setup = Setup(model, work)
    assert all(" ".join(step.command[:3]) in printed for step in steps(setup))
    assert printed.count("vllm serve") == 3
    assert '"expert_wise_scale": true' in printed and '"expert_wise_scale": false' in printed
    assert not work.exists() and _calls(device) == []


def test_dry_run_goes_on_without_a_device_and_a_run_does_not(
    model: Path,
    device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checks, "DEVICE", tmp_path / "no-device")

    assert run.main([str(model), str(tmp_path / "work"), "--dry-run"]) == 0
    assert "absent" in capsys.readouterr().out
    assert run.main([str(model), str(tmp_path / "work")]) == 1
    assert _calls(device) == []


def test_too_little_disk_is_bad(
    model: Path, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_COMPILED_BYTES", 1 << 60)

    assert run.main([str(model), str(tmp_path / "work"), "--dry-run"]) == 1


def test_model_that_is_quantized_already_is_bad(
    model: Path, device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_checkpoint(model, tmp_path / "fp8")

    assert run.main([str(tmp_path / "fp8"), str(tmp_path / "work"), "--dry-run"]) == 1
    assert "compressed-tensors FP8; name the one in bfloat16" in capsys.readouterr().out


def test_no_model_is_a_bad_request(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([str(tmp_path / "none"), str(tmp_path / "work"), "--dry-run"]) == 2
    assert "is not a folder" in capsys.readouterr().err
