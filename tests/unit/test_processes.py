"""Patches in other processes: forked, spawned, and started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.limits import PATIENCE

Run = Callable[..., list[str]]

CONFIG = """
class NeuronConfig:
    def __init__(self, **kwargs):
        self.quantized = kwargs.pop("quantized", False)

class MoENeuronConfig(NeuronConfig):
    def __init__(self, glu_mlp=True, **kwargs):
        self.glu_mlp = glu_mlp
        super().__init__(**kwargs)

class InferenceConfig:
    def __init__(self, neuron_config):
        self.neuron_config = neuron_config
"""

_HELPERS = """
import nxdi_expertscale
from neuronx_distributed_inference.models.config import MoENeuronConfig, NeuronConfig

def is_patched():
    return hasattr(MoENeuronConfig.__init__, "__wrapped__")
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a program that finds a small NxDI; what it prints is given back."""
    package = tmp_path / "neuronx_distributed_inference" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "config.py").write_text(CONFIG)
    (tmp_path / "helpers.py").write_text(_HELPERS)

    def run(source: str, *before: str, **environment: str) -> list[str]:
        program = tmp_path / "program.py"
        program.write_text(textwrap.dedent(source))
        done = subprocess.run(
            [sys.executable, *before, str(program)],
            env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
            capture_output=True,
            check=False,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.split())

    return run


def test_forked_child_is_patched_and_undoes_its_own_patches_alone(run: Run) -> None:
    assert run(
        """
        import os
        from helpers import is_patched, nxdi_expertscale

        child = os.fork()
        if child == 0:
            before = is_patched()
            nxdi_expertscale.deactivate()
            print("child", before, is_patched(), sep=":", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print("parent", is_patched(), sep=":")
        """
    ) == ["child:True:False", "parent:True"]


def test_fork_while_other_threads_activate_does_not_hang_the_child(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not measured: a child may wait for a lock of coverage's own that another thread held.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    assert run(
        """
        import os, signal, threading
        from helpers import is_patched, nxdi_expertscale

        go_on = True

        def keep_activating():
            while go_on:
                nxdi_expertscale.activate()
                nxdi_expertscale.status()

        threads = [threading.Thread(target=keep_activating, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(300)  # for a child that hangs, not for one that is slow
                nxdi_expertscale.activate()
                nxdi_expertscale.status()
                nxdi_expertscale.deactivate()
                os._exit(1 if is_patched() else 0)
            _, status = os.waitpid(child, 0)
            assert status == 0, status
        go_on = False
        for thread in threads:
            thread.join()
        print(is_patched())
        """
    ) == ["True"]


def test_configs_classes_and_patched_functions_reach_a_spawned_child(run: Run) -> None:
    assert run(
        """
        import multiprocessing, sys

        def child(config, kind, function):
            # Nothing here has imported us: a patched function is that of upstream.
            print("nxdi_expertscale" in sys.modules, config.quantized, sep=":", end=":")
            print(kind().quantized, hasattr(function, "__wrapped__"), sep=":", flush=True)

        if __name__ == "__main__":
            from helpers import MoENeuronConfig
            config = MoENeuronConfig(quantized=True)
            arguments = (config, MoENeuronConfig, MoENeuronConfig.__init__)
            process = multiprocessing.get_context("spawn").Process(target=child, args=arguments)
            process.start()
            process.join()
        """
    ) == ["False:True:False:False"]


def test_every_rank_of_torchrun_is_patched(run: Run) -> None:
    assert run(
        """
        import os
        from helpers import is_patched
        print(os.environ["RANK"], is_patched(), sep=":", flush=True)
        """,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ) == ["0:True", "1:True"]
