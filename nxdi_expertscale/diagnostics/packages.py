"""The installed packages: their versions, and whether they belong together."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.releases import RELEASES, minor_version, release_of
from nxdi_expertscale.version import __version__

NXDI = "neuronx-distributed-inference"
NXD = "neuronx-distributed"
TORCH_NEURONX = "torch-neuronx"
VLLM = "vllm"
NEURON_INDEX = "https://pip.repos.neuron.amazonaws.com"

_DISTRIBUTIONS = ("torch", "transformers", NXDI, NXD, TORCH_NEURONX, VLLM, "vllm-neuron")


def installed_versions(from_sources: Mapping[str, str]) -> dict[str, str | None]:
    """Versions of the packages that matter here, by name; None where one is absent.

    Args:
        from_sources: What the sources of NxDI and NxD say of their version, by module. It counts
            where a source tree without metadata is what is imported.
    """
    versions: dict[str, str | None] = {
        "nxdi-expertscale": __version__,
        "python": platform.python_version(),
    }
    for name in _DISTRIBUTIONS:
        distribution = _distribution(name)
        versions[name] = None if distribution is None else distribution.version
    for name, module in ((NXDI, probe.NXDI), (NXD, probe.NXD)):
        if versions[name] is None:
            versions[name] = from_sources.get(module) or None
    return versions


def check_packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """Check that the packages are the real ones, and belong together.

    Args:
        versions: What :func:`installed_versions` gave.
    """
    for name in (NXDI, NXD, TORCH_NEURONX):
        if _is_placeholder(name):
            yield problem(
                f"{name} {versions[name]} is the public index's placeholder, not the real "
                f"package; pip uninstall {name}, and install it from {NEURON_INDEX}"
            )
    if versions["torch"] is None:
        yield problem("torch is not installed; install the one that NxDI asks for")
    nxdi, nxd = versions[NXDI], versions[NXD]
    if nxdi is None:
        return
    release = release_of(nxdi)
    if release is None:
        first, last = RELEASES[0].nxdi, RELEASES[-1].nxdi
        yield warning(
            f"NxDI {nxdi} is not a release that was tested ({first} to {last}): what counts is "
            "whether its seams fit"
        )
    elif nxd is not None and minor_version(nxd) != release.nxd:
        yield warning(
            f"NxDI {nxdi} belongs to NxD {release.nxd} (Neuron SDK {release.sdk}), and NxD {nxd} "
            "is installed"
        )


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    """The installed distribution of a name, if there is one whose metadata can be read."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # An uninstallation that was cut off leaves a folder without metadata.
    is_whole = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    return distribution if is_whole else None


def _is_placeholder(name: str) -> bool:
    """Whether a distribution is the public index's, whose only module says that it is wrong."""
    distribution = _distribution(name)
    files = distribution.files if distribution is not None else None
    return [file.name for file in files or () if file.suffix == ".py"] == ["__init__.py"]
