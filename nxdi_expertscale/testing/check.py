"""A family's declaration held to the model itself: quantized, verified, loaded, and compared."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nxdi_expertscale.activation import activate
from nxdi_expertscale.checkpoint import neuron_settings, quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.families.declaration import DOWN, GATE_UP, MoEFamily
from nxdi_expertscale.loading import completeness
from nxdi_expertscale.loading.passes import find_expert_layers
from nxdi_expertscale.patches.decoder_model_instance import states_of
from nxdi_expertscale.testing.full_precision import in_full_precision
from nxdi_expertscale.testing.ranks import one_rank
from nxdi_expertscale.testing.running import (
    LoadedModel,
    MakeConfig,
    config_cls_of,
    find_class,
    load_application,
    make_config,
)
from nxdi_expertscale.testing.whole_model import (
    WITHIN_FP8,
    Call,
    dequantized,
    first_calls,
    relative_error,
    repeat,
)

WITHIN_BLOCK = 0.08
"""What FP8 may cost the output of a block, in which several weights follow one another."""

UNEXPLAINED = 1e-3
"""By how much logits may differ from those of the dequantized weights: the order of additions."""

SEQUENCE = 32
"""Tokens of a prompt, and of the bucket that they go through."""

PROMPTS = 8
"""Several, because a token whose choice of experts is a close one may go to others."""


@dataclass(frozen=True)
class FamilyCheck:
    """How a model of a family came through NxDI. Errors are norms of a difference over the norm.

    Attributes:
        family: Name of the family that the checkpoint belongs to.
        quantized: Parameters of NxDI's module that are quantized.
        parameters: Error of each parameter, dequantized, against the original's.
        moe: Error of each MoE block's output, given the same input, by its path.
        blocks: Error of each other part of a layer that has weights.
        logits: Error of the logits of some prompts' last tokens.
        logits_experts_alone: The same where only the experts are quantized.
        unexplained: How far the logits are from those of the dequantized weights.
        problems: What is wrong, one line each; none where the declaration is right.
        notes: What NxDI leaves wrong in the unquantized model as well.
    """

    family: str
    quantized: tuple[str, ...]
    parameters: Mapping[str, float]
    moe: Mapping[str, float]
    blocks: Mapping[str, float]
    logits: float
    logits_experts_alone: float
    unexplained: float
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check_family(
    checkpoint: str | os.PathLike[str],
    application: Any,
    *,
    config_cls: Any = None,
    make_config: MakeConfig | None = None,
    reference: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> FamilyCheck:
    """Quantize, verify, load and run a small model, and compare it with itself unquantized.

    NxDI has to be importable and run on a CPU (``NXD_CPU_MODE=1``), and nothing of the model has to
    be served in this process meanwhile. The model is loaded twice, in float32: take a few layers of
    small width, in the layout in which the model is published, with experts that differ.

    Args:
        checkpoint: Folder of the model, in the published layout, FP8 or not.
        application: Its application's class in NxDI, or ``"package.module:Class"``.
        config_cls: The class of its config, or its name, where the application does not say.
        make_config: Gives NxDI's config for ``(neuron config, folder)``; by default what that class
            makes of ``config.json``.
        reference: The model in full precision; by default ``checkpoint`` itself, dequantized if
            it is FP8.
        folder: Where the quantized checkpoint is written and kept; by default it is not kept.
        settings: Further keywords of the neuron config, such as ``seq_len``.

    Returns:
        What was found. Whoever writes a test asserts that ``problems`` is empty.

    Raises:
        ExpertScaleError: The checkpoint cannot be quantized, or NxDI cannot load it; the message
            says why.
    """
    os.environ.setdefault("NXD_CPU_MODE", "1")
    activate()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = Path(checkpoint)
        target = Path(folder) if folder is not None else scratch / "fp8"
        original = (
            Path(reference)
            if reference is not None
            else in_full_precision(source, scratch / "original")
        )
        quantize_checkpoint(source, target, progress=False)
        verification = verify_checkpoint(target, source, progress=False)
        stack.enter_context(one_rank())
        way = _Way(application, config_cls, make_config, {"seq_len": SEQUENCE, **settings})
        unquantized = way.load(original, quantized=False)
        loaded = way.load(source, **neuron_settings(target).neuron_config)
        family = open_model(source).family
        prompts = _prompts(way.vocab_size, way.settings["seq_len"])
        found = _compare(unquantized, loaded, family, prompts)
    faults = [f"{fault.where}: {fault.what}" for fault in verification.faults]
    return dataclasses.replace(found, problems=(*faults, *found.problems, *problems_of(found)))


class _Way:
    """How models of one application are configured and loaded."""

    def __init__(
        self,
        application: Any,
        config_cls: Any,
        make_config: MakeConfig | None,
        settings: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.vocab_size = 0
        self._application = _class_of(application)
        self._config_cls = _class_of(config_cls) or config_cls_of(self._application)
        self._make_config = make_config

    def load(self, checkpoint: Path, **settings: Any) -> LoadedModel:
        sequence = self.settings["seq_len"]
        neuron_config = self._config_cls.get_neuron_config_cls()(
            **{
                "batch_size": 1,
                "max_context_length": sequence,
                "torch_dtype": torch.float32,
                **self.settings,
                **settings,
            }
        )
        if self._make_config is not None:
            config = self._make_config(neuron_config, checkpoint)
        else:
            config = make_config(neuron_config, checkpoint, self._config_cls)
        self.vocab_size = config.vocab_size
        return load_application(self._application(str(checkpoint), config))


def _class_of(given: Any) -> Any:
    return find_class(given) if isinstance(given, str) else given


def _prompts(vocab_size: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, vocab_size, (1, length), generator=generator) for _ in range(PROMPTS)]


def _compare(
    unquantized: LoadedModel,
    loaded: LoadedModel,
    family: MoEFamily,
    prompts: Sequence[torch.Tensor],
) -> FamilyCheck:
    unquantized, notes = _completed(unquantized, loaded)
    ours, theirs = _weights(loaded), _weights(unquantized)
    values = dequantized(ours)
    parameters = {
        name: relative_error(values[name], theirs[name]) for name in values.keys() & theirs.keys()
    }
    experts = {path for layer in find_expert_layers(loaded.module) for path in layer.paths}
    expected, calls = _run(unquantized, experts, prompts)
    errors = {
        path: relative_error(repeat(loaded.module.get_submodule(path), call), call.output)
        for path, call in calls.items()
    }
    blocks_of_experts = set(map(_block_of, experts))
    logits = _logits(loaded, prompts)
    of_experts = {name: value for name, value in values.items() if _parent(name) in experts}
    with _restored(unquantized):
        alone = _logits_with(unquantized, of_experts, prompts)
        explained = _logits_with(unquantized, values, prompts)
    return FamilyCheck(
        family=family.name,
        quantized=tuple(name for name in values if ours[name].dtype.itemsize == 1),
        parameters=dict(sorted(parameters.items())),
        moe={path: error for path, error in errors.items() if path in blocks_of_experts},
        blocks={path: error for path, error in errors.items() if path not in blocks_of_experts},
        logits=relative_error(logits, expected),
        logits_experts_alone=relative_error(alone, expected),
        unexplained=relative_error(logits, explained),
        problems=tuple(_one_sided(values.keys(), theirs.keys())),
        notes=tuple(notes),
    )


def _completed(unquantized: LoadedModel, loaded: LoadedModel) -> tuple[LoadedModel, list[str]]:
    """The unquantized model with what its converter forgets, and what that is.

    With the flag on nothing is forgotten: it is refused, or carried as the family says.
    """
    module = unquantized.module
    faults = completeness.find_faults(module, unquantized.state_dict, states_of(module))
    given = {
        fault.name: value
        for fault in faults
        if (value := loaded.state_dict.get(fault.name)) is not None
    }
    module.load_state_dict(given, strict=False)
    complete = dataclasses.replace(unquantized, state_dict={**unquantized.state_dict, **given})
    return complete, [f"unquantized, NxDI leaves {fault.name} wrong: {fault}" for fault in faults]


def _weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    """The parameters of a model that its checkpoint has given it, and their scales."""
    state_dict: dict[str, torch.Tensor] = model.module.state_dict()
    return {
        name: value
        for name, value in state_dict.items()
        if name in model.state_dict and not name.endswith(".rank")
    }


def _one_sided(ours: Collection[str], theirs: Collection[str]) -> Iterator[str]:
    for name in sorted(set(theirs) - set(ours)):
        yield f"{name}: the unquantized model has this parameter from its checkpoint, and this not"
    for name in sorted(set(ours) - set(theirs)):
        yield f"{name}: a parameter that the unquantized model does not have from its checkpoint"


def _run(
    model: LoadedModel, experts: Collection[str], prompts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, Call]]:
    """The logits, and the first call of each block, by its path."""
    paths = _blocks(model.module, set(map(_block_of, experts)))
    with first_calls(model.module, paths) as calls:
        return _logits(model, prompts), calls


def _blocks(module: torch.nn.Module, of_experts: Collection[str]) -> Iterator[str]:
    """The MoE blocks, and the parts of each layer beside them that have weights."""
    yield from sorted(of_experts)
    for number, layer in enumerate(cast(Iterable[torch.nn.Module], module.layers)):
        for name, part in layer.named_children():
            path = f"layers.{number}.{name}"
            has_weights = any(parameter.dim() > 1 for parameter in part.parameters())
            if has_weights and not any(f"{block}.".startswith(f"{path}.") for block in of_experts):
                yield path


def _logits_with(
    model: LoadedModel, values: Mapping[str, torch.Tensor], prompts: Sequence[torch.Tensor]
) -> torch.Tensor:
    model.module.load_state_dict(values, strict=False)
    return _logits(model, prompts)


def _logits(model: LoadedModel, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits of each prompt's last token, ``[prompts, vocab]``."""
    return torch.cat([model.logits(prompt) for prompt in prompts])


@contextmanager
def _restored(model: LoadedModel) -> Iterator[None]:
    """Give a model its weights back at the end."""
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    try:
        yield
    finally:
        model.module.load_state_dict(before)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _block_of(experts: str) -> str:
    """The MoE block of fused experts ``layers.0.mlp.expert_mlps.mlp_op.down_proj``."""
    return _parent(_parent(_parent(experts)))


def problems_of(found: FamilyCheck) -> Iterator[str]:
    """What is further off than FP8 explains."""
    if not any(_parent(name).rpartition(".")[2] in (GATE_UP, DOWN) for name in found.quantized):
        yield "no expert is quantized: the family's paths are not those of this model"
    for name, error in found.parameters.items():
        if not error < WITHIN_FP8:
            yield (
                f"{name}: the parameter is {error:.1%} off, more than FP8 rounds: its scale is "
                "lost or misplaced on the way; keep it in full precision (full_precision of the "
                "family)"
            )
    for path, error in {**found.moe, **found.blocks}.items():
        if not error < WITHIN_BLOCK:
            yield (
                f"{path}: its output is {error:.1%} off, given the same input: NxDI computes with "
                "something else than its weights and their scales"
            )
    if not found.unexplained < UNEXPLAINED:
        yield (
            f"the logits are {found.unexplained:.1%} off those of the dequantized weights: a "
            "quantized layer is not applied with its scale"
        )
