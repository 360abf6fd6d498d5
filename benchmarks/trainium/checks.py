"""What can be known before an hour on the device is spent."""

from __future__ import annotations

import enum
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.trainium.plan import Setup, Variant, variants
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.errors import ExpertScaleError

PROGRAMS = ("vllm", "lm_eval", "nxdi-expertscale")

_MEMINFO = Path("/proc/meminfo")


class Outcome(enum.Enum):
    """What a check says."""

    GOOD = "good"
    ABSENT = "absent"
    """Needed on the device, and not here: a dry run goes on."""
    BAD = "bad"


@dataclass(frozen=True)
class Check:
    """A check and what it found."""

    name: str
    outcome: Outcome
    detail: str


def check_configuration(setup: Setup, variant: Variant) -> Check:
    """Whether NxDI, with this package in force, makes the configuration of a variant."""
    name = f"{variant.name}: configuration"
    try:
        from neuronx_distributed_inference.models.config import MoENeuronConfig
        from neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe import (
            Qwen3MoeInferenceConfig,
        )
        from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
    except ImportError:
        return Check(name, Outcome.ABSENT, "NxDI is not installed")
    try:
        neuron_config = MoENeuronConfig(
            tp_degree=setup.tp_degree,
            batch_size=1,
            seq_len=setup.max_model_len,
            logical_nc_config=2,
            **variant.override,
        )
        Qwen3MoeInferenceConfig(neuron_config, load_config=load_pretrained_config(str(setup.model)))
    except (ExpertScaleError, ValueError, TypeError, AssertionError) as error:
        return Check(name, Outcome.BAD, " ".join(str(error).split()))
    wanted = variant.override.get("expert_wise_scale", False)
    if getattr(neuron_config, "expert_wise_scale", False) != wanted:
        return Check(name, Outcome.BAD, "nxdi_expertscale is not in force; see NXDI_PLUGINS")
    return Check(name, Outcome.GOOD, f"expert_wise_scale={wanted}")


@dataclass(frozen=True)
class Needs:
    """What the runs need of a host.

    Attributes:
        device: A file that is there where a device is.
        packages: Distributions that have to be installed.
        compiled_bytes: Room for what the compiler leaves, for all variants; measured by no one,
            on the safe side.
        check_configuration: Whether NxDI makes the configuration of a variant.
    """

    device: Path = Path("/dev/neuron0")
    packages: tuple[str, ...] = (
        "vllm",
        "vllm-neuron",
        "neuronx-distributed-inference",
        "neuronx-distributed",
        "lm_eval",
    )
    compiled_bytes: int = 10 << 30
    check_configuration: Callable[[Setup, Variant], Check] = check_configuration


def examine(setup: Setup, needs: Needs) -> Iterator[Check]:
    """Check all that can be checked here.

    Raises:
        CheckpointError: The model is not a checkpoint of a supported family.
    """
    model = open_model(setup.model)
    nbytes = model.files.nbytes
    found = f"{model.family.name}, {nbytes / 1e9:.1f} GB"
    if model.scheme is None:
        yield Check("model", Outcome.GOOD, found)
    else:
        yield Check("model", Outcome.BAD, f"{found}: {model.scheme.name}; name the one in bfloat16")
    yield _disk(setup, nbytes // 2 + needs.compiled_bytes)
    yield _memory(nbytes)
    for name in needs.packages:
        yield _package(name)
    for name in PROGRAMS:
        found = shutil.which(name)
        yield Check(name, Outcome.GOOD if found else Outcome.ABSENT, found or "not on PATH")
    device = Outcome.GOOD if needs.device.exists() else Outcome.ABSENT
    yield Check("device", device, str(needs.device))
    for variant in variants(setup):
        yield needs.check_configuration(setup, variant)


def _disk(setup: Setup, needed: int) -> Check:
    folder = next(path for path in (setup.work, *setup.work.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    outcome = Outcome.GOOD if free >= needed else Outcome.BAD
    return Check("disk", outcome, f"{free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")


def _memory(nbytes: int) -> Check:
    # NxDI holds the whole checkpoint in the host's memory while it converts it.
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    outcome = Outcome.GOOD if available >= nbytes else Outcome.ABSENT
    return Check("memory", outcome, f"{available / 1e9:.0f} GB, {nbytes / 1e9:.0f} GB needed")


def _package(name: str) -> Check:
    try:
        return Check(name, Outcome.GOOD, version(name))
    except PackageNotFoundError:
        return Check(name, Outcome.ABSENT, "not installed")
