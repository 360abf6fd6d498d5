"""Imports NxDI in a process of its own, and reports what became of the seams.

``doctor`` outlives whatever an installation does when it is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from nxdi_expertscale import activation
from nxdi_expertscale.errors import one_line
from nxdi_expertscale.hooking.module_names import is_in_any_package
from nxdi_expertscale.hooking.patch import SeamStatus, State

NXDI = "neuronx_distributed_inference"
NXD = "neuronx_distributed"
VLLM_NEURON = "vllm_neuron"
_NXDI_LOADER = "vllm_neuron.worker.neuronx_distributed_model_loader"

_ROOT = Path(__file__).parents[2]
"""Where this package lies: a site-packages folder, or a source tree."""

# "python -c" puts the working directory on the path, and code of a folder that the user happens
# to be in is not what is examined.
_CHILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
started = "nxdi_expertscale" in sys.modules
sys.path.append(sys.argv[1])
from nxdi_expertscale.diagnostics import probe
probe.report(sys.argv[2], started)
"""

_TAIL_BYTES = 4096
"""What is read of a child's stderr, from its end."""


@dataclass(frozen=True)
class Probe:
    """What a new process found.

    Attributes:
        activated_at_start: Whether the package was active before anything was imported.
        plugins: Names of the plugins that were activated.
        plugin_problems: What is wrong with plugins, one line each.
        seams: The state of each seam, once the modules that hold them were imported.
        failures: Why modules could not be imported, by the module's name.
        versions: What the packages' sources say is their version; empty where they do not.
        has_nxdi: Whether a package of NxDI's name can be found.
        vllm_neuron_uses_nxdi: Whether vLLM-Neuron runs models through NxDI; None where it is
            absent or cannot be imported.
        ended: How the process ended, if it did not end well.
    """

    activated_at_start: bool = False
    plugins: tuple[str, ...] = ()
    plugin_problems: tuple[str, ...] = ()
    seams: tuple[SeamStatus, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    has_nxdi: bool = False
    vllm_neuron_uses_nxdi: bool | None = None
    ended: str | None = None


def run(time_limit: float) -> Probe:
    """Probe this environment in a child process.

    Args:
        time_limit: Seconds after which the child is ended.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        path = Path(folder) / "probe.json"
        command = [sys.executable, "-c", _CHILD, str(_ROOT), str(path)]
        ended = _run_child(command, errors, time_limit)
        if not path.is_file():
            return Probe(ended=f"{ended}{_last_line(errors)}")
        found = json.loads(path.read_text())
        if "seams" not in found:
            return Probe(ended=f"importing {found['importing']}: {ended}{_last_line(errors)}")
    return _from_json(found)


def _run_child(command: Sequence[str], errors: IO[bytes], time_limit: float) -> str:
    """Run a command to its end, and describe how it ended."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    try:
        status = child.wait(time_limit)
    except subprocess.TimeoutExpired:
        return f"did not end within {time_limit:g} seconds"
    finally:
        # With whatever it has started itself; also where doctor is interrupted.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if status < 0:
        return f"was ended by {_signal_name(-status)}"
    return f"ended with status {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _TAIL_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f" ({lines[-1].strip()})" if lines else ""


def report(path: str, activated_at_start: bool) -> None:
    """In the child: import what is patched, and write what was found to a file.

    Args:
        path: The file.
        activated_at_start: Whether the package was active before anything was imported.
    """
    file = Path(path)
    failures: dict[str, str] = {}
    for module in dict.fromkeys(seam.module for seam in activation.status()):
        # vLLM-Neuron's imports vLLM, which looks for devices; a contributed model is wherever its
        # user has put it.
        if is_of_vllm_neuron(module) or is_in_any_package(module):
            continue
        # Should this import be the end of the process, the file says which it was.
        _write_json(file, {"importing": module})
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            failures[module] = one_line(error)
    found = Probe(
        activated_at_start=activated_at_start,
        plugins=activation.active_plugins(),
        plugin_problems=activation.plugin_problems(),
        seams=activation.status(),
        failures=failures,
        versions={name: _version(name) for name in (NXDI, NXD)},
        has_nxdi=importlib.util.find_spec(NXDI) is not None,
        vllm_neuron_uses_nxdi=_vllm_neuron_uses_nxdi(failures),
    )
    _write_json(file, asdict(found))


def _write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a file at once: the process may end at any moment."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(file)


def is_of_vllm_neuron(module: str) -> bool:
    """Whether a module is one of vLLM-Neuron's, which need not be installed."""
    return module.partition(".")[0] == VLLM_NEURON


def _version(package: str) -> str:
    try:
        module = importlib.import_module(f"{package}._version")
    except (Exception, SystemExit):
        # Absent, or why it is broken is among the failures of its modules.
        return ""
    return str(getattr(module, "__version__", ""))


def _vllm_neuron_uses_nxdi(failures: dict[str, str]) -> bool | None:
    if importlib.util.find_spec(VLLM_NEURON) is None:
        return None
    try:
        # This imports the package, which is small, and not the module.
        return importlib.util.find_spec(_NXDI_LOADER) is not None
    except (Exception, SystemExit) as error:
        failures[VLLM_NEURON] = one_line(error)
        return None


def _from_json(found: dict[str, Any]) -> Probe:
    seams = [SeamStatus(**{**seam, "state": State(seam["state"])}) for seam in found["seams"]]
    lists: dict[str, Any] = {
        "seams": tuple(seams),
        "plugins": tuple(found["plugins"]),
        "plugin_problems": tuple(found["plugin_problems"]),
    }
    return Probe(**{**found, **lists})
