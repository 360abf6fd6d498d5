"""The installed packages: their versions, and whether they belong together."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.releases import (
    RELEASES,
    VLLM_NEURON_RELEASES,
    WITHOUT_SOURCES,
    minor_version,
    release_of,
    vllm_neuron_release_of,
)
from nxdi_expertscale.version import __version__

NXDI = "neuronx-distributed-inference"
NXD = "neuronx-distributed"
TORCH = "torch"
TORCH_NEURONX = "torch-neuronx"
TORCH_XLA = "torch-xla"
VLLM = "vllm"
VLLM_NEURON = "vllm-neuron"
NEURON_INDEX = "https://pip.repos.neuron.amazonaws.com"

_DISTRIBUTIONS = (TORCH, "transformers", NXDI, NXD, TORCH_NEURONX, TORCH_XLA, VLLM, VLLM_NEURON)


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
    """Check that the packages are the real ones, and of releases that were tested.

    Args:
        versions: What :func:`installed_versions` gave.
    """
    for name in (NXDI, NXD, TORCH_NEURONX):
        if _is_placeholder(name):
            yield problem(
                f"{name} {versions[name]} is the public index's placeholder, not the real "
                f"package; pip uninstall {name}, and install it from {NEURON_INDEX}"
            )
    if versions[TORCH] is None:
        yield problem("torch is not installed; install the one that NxDI asks for")
    nxdi = versions[NXDI]
    if nxdi is not None and release_of(nxdi) is None:
        yield _of_no_tested_release(nxdi)


def find_mismatches(versions: Mapping[str, str | None]) -> Iterator[str]:
    """Which of Neuron's packages do not belong together, and the command that mends it.

    Args:
        versions: What :func:`installed_versions` gave.
    """
    nxd, release = versions[NXD], release_of(versions[NXDI])
    if release is not None and nxd is not None and minor_version(nxd) != release.nxd:
        yield (
            f"NxDI {versions[NXDI]} belongs to NxD {release.nxd} (Neuron SDK {release.sdk}), and "
            f"NxD {nxd} is installed; {install_command(NXD, versions)}"
        )
    torch = versions[TORCH]
    for name in (TORCH_NEURONX, TORCH_XLA):
        built = versions[name]
        # Both begin with the version of the torch that they were built for.
        if torch and built and minor_version(built) != minor_version(torch):
            # torch-neuronx asks for the torch and the torch-xla that it was built for.
            mending = TORCH_NEURONX if versions[TORCH_NEURONX] else name
            wanted = minor_version(versions[mending])
            yield (
                f"{name} {built} was built for torch {minor_version(built)}, and torch {torch} is "
                f"installed; pip install --extra-index-url {NEURON_INDEX} '{mending}=={wanted}.*'"
            )
            return


def install_command(name: str, versions: Mapping[str, str | None]) -> str:
    """The command that installs a package of Neuron's: of NxD, the one that NxDI belongs to.

    Args:
        name: The distribution's name.
        versions: What :func:`installed_versions` gave.
    """
    release = release_of(versions[NXDI])
    if name == NXD and release is not None:
        name = f"'{NXD}=={release.nxd}.*'"
    return f"pip install --extra-index-url {NEURON_INDEX} {name}"


def check_vllm(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """Check that vLLM, a vLLM-Neuron that uses NxDI, and NxDI belong together.

    Args:
        versions: What :func:`installed_versions` gave.
    """
    vllm, neuron, nxdi = versions[VLLM], versions[VLLM_NEURON], versions[NXDI]
    if vllm is None or neuron is None:
        return
    release = vllm_neuron_release_of(neuron)
    if release is None:
        tested = ", ".join(item.version for item in VLLM_NEURON_RELEASES)
        yield warning(f"vLLM-Neuron {neuron} is not a release that was tested ({tested})")
        return
    if minor_version(vllm) != minor_version(release.vllm):
        yield warning(
            f"vLLM-Neuron {neuron} belongs to vLLM {release.vllm} (Neuron SDK {release.sdk}), and "
            f"vLLM {vllm} is installed"
        )
    if nxdi is not None and minor_version(nxdi) not in release.nxdi:
        yield warning(
            f"vLLM-Neuron {neuron} belongs to NxDI {' or '.join(release.nxdi)} (Neuron SDK "
            f"{release.sdk}), and NxDI {nxdi} is installed"
        )


def _of_no_tested_release(nxdi: str) -> Finding:
    first, last = RELEASES[0].nxdi, RELEASES[-1].nxdi
    sdk = WITHOUT_SOURCES.get(minor_version(nxdi) or "")
    if sdk is not None:
        return warning(
            f"NxDI {nxdi} is of Neuron SDK {sdk}, whose sources are not public: it could not be "
            f"tested ({first} to {last} were), and what counts is whether its seams fit"
        )
    return warning(
        f"NxDI {nxdi} is not a release that was tested ({first} to {last}): what counts is "
        "whether its seams fit"
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
