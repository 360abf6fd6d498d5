"""A virtual environment with the package installed, and processes in it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.limits import PATIENCE

ROOT = Path(__file__).parents[2]
TARGET_VARIABLE = "NXDI_EXPERTSCALE_INSTALLED_TARGET"
"""Names the NxDI that can be imported in an environment's process; unset, there is none."""

_CLEARED = (
    "NXDI_PLUGINS",
    "VLLM_PLUGINS",
    "PYTHONPATH",
    "XLA_HANDLE_SPECIAL_SCALAR",
    "UNSAFE_FP8FNCAST",
    "NEURON_LOGICAL_NC_CONFIG",
    "NXD_CPU_MODE",
)

_UPSTREAM = f"""\
import os
from tests.harness import targets
targets.all_targets()[os.environ["{TARGET_VARIABLE}"]].prepare()
"""

_MEASURED = (
    'import os; os.environ.get("COVERAGE_PROCESS_CONFIG") '
    'and __import__("coverage").process_startup()'
)
"""Coverage's own path file is in the tests' environment alone."""


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder: Path, *, system_site_packages: bool = False) -> None:
        """Make the environment, or take the one that is there."""
        if not folder.exists():
            venv.create(folder, system_site_packages=system_site_packages)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site_packages = next((folder / "lib").glob("python3*/site-packages"))

    def pip(self, *arguments: str) -> None:
        """Run the tests' own pip for it."""
        run([sys.executable, "-m", "pip", "--python", str(self.python), *arguments])

    def add_dependencies(self) -> None:
        """Make what the tests can import importable, through path files read after ours."""
        paths = [path for path in sys.path if Path(path).name == "site-packages"]
        (self.site_packages / "zz_dependencies.pth").write_text(
            "\n".join([*paths, str(ROOT), _MEASURED])
        )
        (self.site_packages / "upstream_of_the_tests.py").write_text(_UPSTREAM)
        (self.site_packages / "zz_upstream.pth").write_text(
            f'import os; os.environ.get("{TARGET_VARIABLE}") '
            'and __import__("upstream_of_the_tests")\n'
        )

    def add_plugin(self, name: str, source: str) -> None:
        """Install a distribution with a plugin ``name``, the module of the same name."""
        (self.site_packages / f"{name}.py").write_text(source)
        metadata = self.site_packages / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[nxdi.plugins]\n{name} = {name}\n")

    def files(self) -> set[str]:
        """Every file and folder of site-packages."""
        return {str(path.relative_to(self.site_packages)) for path in self.site_packages.rglob("*")}

    def run(
        self, *arguments: str, target: str | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python; nothing that this package reads is inherited.

        Args:
            arguments: Arguments of ``python``.
            target: The NxDI that can be imported (see :mod:`tests.harness.targets`).
            variables: Environment variables.
        """
        if target is not None:
            variables[TARGET_VARIABLE] = target
        return run([str(self.python), *arguments], variables, check=False)

    def command(
        self, *arguments: str, target: str | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the console script ``nxdi-expertscale``, as :meth:`run` does."""
        script = str(self.folder / "bin" / "nxdi-expertscale")
        return self.run(script, *arguments, target=target, **variables)

    def prints(self, code: str, *, target: str | None = None, **variables: str) -> str:
        """What a program prints that is to end well, and to print nothing on stderr."""
        result = self.run("-c", code, target=target, **variables)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.strip()


def run(
    command: Sequence[str], variables: Mapping[str, str] | None = None, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command outside the source tree."""
    inherited = {name: value for name, value in os.environ.items() if name not in _CLEARED}
    result = subprocess.run(
        command,
        cwd="/",
        env={**inherited, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build_wheel(folder: Path, source: Path = ROOT) -> Path:
    """Build the wheel of a source tree, by default this package's own."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", str(folder), str(source)])
    (wheel,) = folder.glob("*.whl")
    return wheel
