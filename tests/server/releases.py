"""The releases of vLLM-Neuron that use NxDI, and the environment of a server of each.

The sources are the folders ``vllm-neuron-0.5.0/vllm_neuron`` and so on beside those of NxDI. Each
vLLM is a folder of its own, made by ``pip install --target`` (:mod:`tests.server.install`), because
two versions cannot be in one environment.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.harness import targets
from tests.harness.installed import ROOT

VLLM_VARIABLE = "NXDI_EXPERTSCALE_VLLM"
"""Names the folder that holds the vLLMs, each in a folder with its version as the name."""

LM_EVAL = "lm_eval"
"""The folder there that holds EleutherAI's lm_eval."""

_SITE = Path(__file__).parent / "site"


@dataclass(frozen=True)
class Release:
    """What is served with what.

    Attributes:
        vllm_neuron: Version of vLLM-Neuron, as its sources' folder has it.
        vllm: The vLLM that it pins.
        nxdi: The NxDI of its SDK.
    """

    vllm_neuron: str
    vllm: str
    nxdi: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """What has to be importable for it: vLLM, vLLM-Neuron, NxDI and NxD."""
        upstream = targets.upstream_folder() or Path("not-named")
        vllms = Path(os.environ.get(VLLM_VARIABLE, "not-named"))
        return (
            vllms / self.vllm,
            upstream / f"{targets.VLLM_NEURON}-{self.vllm_neuron}",
            upstream / self.nxdi / "nxdi" / "src",
            upstream / self.nxdi / "nxd" / "src",
        )

    @property
    def missing(self) -> list[Path]:
        """What of it is not at hand."""
        return [path for path in self.paths if not path.is_dir()]

    def write_metadata(self, folder: Path) -> None:
        """Write what pip would: the distributions' names, versions and entry points.

        Args:
            folder: A folder that is on the server's path, not there yet.
        """
        folder.mkdir()
        for name, version in (
            ("vllm-neuron", self.vllm_neuron),
            ("neuronx-distributed-inference", self.nxdi),
            ("neuronx-distributed", self.nxdi),
        ):
            metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
        (folder / f"vllm_neuron-{self.vllm_neuron}.dist-info" / "entry_points.txt").write_text(
            "[vllm.platform_plugins]\nneuron = vllm_neuron:register\n"
        )

    def environment(self, folder: Path) -> dict[str, str]:
        """The variables of a process in which it is installed, on a host with a device.

        Args:
            folder: What the process may write to; made if it is not there.
        """
        metadata = folder / "metadata"
        if not metadata.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            self.write_metadata(metadata)
        vllm = self.paths[0]
        lm_eval = vllm.parent / LM_EVAL
        programs = (vllm / "bin", lm_eval / "bin", Path(sys.executable).parent)
        packages = (_SITE, ROOT, metadata, *self.paths, lm_eval)
        return {
            **{name: value for name, value in os.environ.items() if name not in _CLEARED},
            "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(map(str, packages)),
            "BASE_COMPILE_WORK_DIR": f"{folder / 'compiler'}/",
            "HF_HUB_OFFLINE": "1",
            # The models are too small for threads to be of use.
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
            "VLLM_CONFIG_ROOT": str(folder / "vllm-config"),
        }


_CLEARED = ("NXDI_PLUGINS", "VLLM_PLUGINS", "PYTHONPATH", "NEURON_COMPILED_ARTIFACTS")

RELEASES = (
    Release("0.2.0", vllm="0.11.0", nxdi="0.7"),
    Release("0.2.2", vllm="0.11.0", nxdi="0.7"),
    Release("0.4.1", vllm="0.13.0", nxdi="0.8"),
    Release("0.5.0", vllm="0.16.0", nxdi="0.9"),
)
