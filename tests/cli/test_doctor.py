"""``nxdi-expertscale doctor``: will it work here, and if not why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import targets
from tests.harness.installed import Environment
from tests.harness.limits import PATIENCE


def diagnosis(
    environment: Environment, *, target: str | None = None, **variables: str
) -> tuple[int, dict[str, Any]]:
    """The status and the answer of ``doctor --json``."""
    result = environment.command("doctor", "--json", target=target, **variables)
    assert "Traceback" not in result.stderr
    return result.returncode, json.loads(result.stdout)


def add_nxdi(environment: Environment, source: str) -> None:
    """Install an NxDI whose package has this source."""
    folder = environment.site_packages / "neuronx_distributed_inference"
    folder.mkdir()
    (folder / "__init__.py").write_text(source)


def add_placeholder(environment: Environment, name: str, package: str) -> None:
    """Install what the public index has under a name of Neuron's."""
    folder = environment.site_packages / package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('WRONG PACKAGE')")
    metadata = environment.site_packages / f"{name.replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (metadata / "RECORD").write_text(f"{package}/__init__.py,,\n{metadata.name}/METADATA,,\n")


@pytest.mark.parametrize("target", list(targets.all_targets()))
def test_yes_on_every_release(installed: Environment, target: str) -> None:
    status, answer = diagnosis(installed, target=target, NXDI_PLUGINS="expertscale")

    assert (status, answer["works"], answer["problems"]) == (0, True, [])
    assert answer["verdict"].startswith("yes")
    states = {seam["seam"]: seam["state"] for seam in answer["seams"]}
    needed = {"config", "inference_config", "quantization", "load_module", "state_dict:qwen3_moe"}
    assert {states[name] for name in needed} == {"applied"}
    assert answer["activation"]["at interpreter start"] == "yes: NXDI_PLUGINS=expertscale"
    if target != targets.DOUBLE:
        assert answer["release"]["nxdi"] == target
        # Contributed models and vLLM-Neuron are not there to be imported.
        elsewhere = ("*.", "vllm_neuron.")
        assert {
            seam["state"] for seam in answer["seams"] if not seam["module"].startswith(elsewhere)
        } == {"applied"}


def test_no_where_nxdi_is_absent_with_the_verdict_last(installed: Environment) -> None:
    result = installed.command("doctor")

    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == "no: expert_wise_scale will not work here (1 problem)"
    assert "NxDI is not installed" in result.stdout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os._exit(3)", "ended with status 3"),
        ("print('noise', flush=True)", "cannot be imported"),
    ],
    ids=["raises", "exits", "crashes", "ends", "is empty"],
)
def test_no_where_nxdi_is_broken(own_installation: Environment, source: str, said: str) -> None:
    add_nxdi(own_installation, source)

    status, answer = diagnosis(own_installation)

    assert (status, answer["works"]) == (1, False)
    assert said in " ".join(answer["problems"])


def test_no_where_importing_nxdi_hangs(own_installation: Environment) -> None:
    module = "neuronx_distributed_inference.models.config"
    add_nxdi(own_installation, "import time; time.sleep(600)")
    # Until the time is enough for this machine to come to that import.
    code = (
        "from nxdi_expertscale.diagnostics.doctor import examine\n"
        "for seconds in (1, 4, 16, 64):\n"
        "    problems = str(examine(seconds).problems)\n"
        f"    if 'importing {module}' in problems: break\n"
        "print(problems)"
    )

    printed = own_installation.prints(code)

    assert f"importing {module}: did not end within" in printed


def test_no_where_a_needed_seam_does_not_fit(own_installation: Environment) -> None:
    double = targets.all_targets()[targets.DOUBLE].paths[0]
    for package in ("neuronx_distributed_inference", "neuronx_distributed"):
        shutil.copytree(double / package, own_installation.site_packages / package)
    config = own_installation.site_packages / "neuronx_distributed_inference/models/config.py"
    config.write_text(config.read_text().replace("class MoENeuronConfig", "class OtherConfig", 1))

    status, answer = diagnosis(own_installation)

    assert status == 1
    assert "the seam 'config' does not fit" in " ".join(answer["problems"])


@pytest.mark.parametrize("name", ["neuronx-distributed-inference", "torch-neuronx"])
def test_placeholder_of_the_public_index_is_named(own_installation: Environment, name: str) -> None:
    # The index's torch-neuronx can be found by its name, the others are folders with a dash.
    package = "torch_neuronx" if name == "torch-neuronx" else name
    add_placeholder(own_installation, name, package)

    status, answer = diagnosis(own_installation)

    assert status == 1
    assert f"{name} 0.1.0 is the public index's placeholder" in answer["problems"][0]


@pytest.mark.parametrize("value", ["", "other"])
def test_no_where_the_variable_turns_it_off(installed: Environment, value: str) -> None:
    _, answer = diagnosis(installed, NXDI_PLUGINS=value)

    assert any(
        f"NXDI_PLUGINS={value!r} turns the plugin off" in line for line in answer["problems"]
    )


def test_vllm_that_leaves_it_out(own_installation: Environment) -> None:
    metadata = own_installation.site_packages / "vllm-0.11.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.11.0\n")

    _, blocked = diagnosis(own_installation, VLLM_PLUGINS="another")
    _, variable = diagnosis(own_installation, VLLM_PLUGINS="another", NXDI_PLUGINS="expertscale")
    _, found = diagnosis(own_installation)

    assert "VLLM_PLUGINS='another' keeps vLLM from activating it" in " ".join(blocked["problems"])
    assert "VLLM_PLUGINS" not in " ".join(variable["problems"])
    assert found["activation"]["by vLLM"] == "yes"
    assert found["packages"]["vllm"] == "0.11.0"


def test_environment_of_the_device_is_shown_and_judged(installed: Environment) -> None:
    _, answer = diagnosis(installed, UNSAFE_FP8FNCAST="0", NEURON_LOGICAL_NC_CONFIG="1")

    warnings = " ".join(answer["warnings"])
    assert "UNSAFE_FP8FNCAST='0'" in warnings
    assert "NEURON_LOGICAL_NC_CONFIG='1'" in warnings
    assert answer["device"]["UNSAFE_FP8FNCAST"] == "0"
    assert ("none" in answer["device"]["Neuron devices"]) == (
        not list(Path("/dev").glob("neuron*"))
    )


@pytest.mark.parametrize("uses_nxdi", [False, True])
def test_vllm_neuron_without_nxdi_is_said(own_installation: Environment, uses_nxdi: bool) -> None:
    worker = own_installation.site_packages / "vllm_neuron" / "worker"
    worker.mkdir(parents=True)
    for folder in (worker.parent, worker):
        (folder / "__init__.py").touch()
    if uses_nxdi:
        (worker / "neuronx_distributed_model_loader.py").write_text("raise RuntimeError")

    _, answer = diagnosis(own_installation)

    assert ("the native one" in " ".join(answer["warnings"])) == (not uses_nxdi)


def test_start_up_file_that_is_not_read_is_said(own_installation: Environment) -> None:
    (own_installation.site_packages / "nxdi_expertscale_startup.pth").unlink()

    _, answer = diagnosis(own_installation, NXDI_PLUGINS="expertscale")

    assert "nothing is activated at interpreter start" in " ".join(answer["warnings"])


def test_distribution_whose_uninstallation_was_cut_off_is_absent(
    own_installation: Environment,
) -> None:
    (own_installation.site_packages / "vllm-0.11.0.dist-info").mkdir()

    _, answer = diagnosis(own_installation)

    assert answer["packages"]["vllm"] is None


def test_noise_without_end_on_stderr_is_told_by_its_last_line(
    own_installation: Environment,
) -> None:
    add_nxdi(
        own_installation,
        "import os, sys; sys.stderr.write('noise\\n' * 100_000); print('\\x1b[2Jlast', "
        "file=sys.stderr); sys.stderr.flush(); os._exit(3)",
    )

    result = own_installation.command("doctor")

    assert result.returncode == 1
    assert r"ended with status 3 (\x1b[2Jlast)" in " ".join(result.stdout.split())
    assert "noise" not in result.stdout


def test_interrupt_ends_the_process_that_imports_nxdi(
    own_installation: Environment, tmp_path: Path
) -> None:
    file = tmp_path / "pid"
    add_nxdi(
        own_installation,
        "import os, pathlib, time\n"
        f"pathlib.Path({str(file)!r} + '.new').write_text(str(os.getpid()))\n"
        f"os.rename({str(file)!r} + '.new', {str(file)!r})\n"
        "time.sleep(600)",
    )
    process = subprocess.Popen(
        [own_installation.python, own_installation.folder / "bin" / "nxdi-expertscale", "doctor"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)

    _, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, err) == (130, "nxdi-expertscale: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
