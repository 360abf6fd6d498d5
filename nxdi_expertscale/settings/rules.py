"""The combinations of settings that are refused, or warned of, as a table of rules.

Each rule is data: its name, where it applies, what is wrong and what to write instead. The texts
are templates for the values that the rule finds; the README's list of what is refused
(``tests/unit/rules_table.py``) is made of them.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.config_fields import first_int
from nxdi_expertscale.families.exclusions import (
    PartOfAttention,
    PartOfExperts,
    PartOfFused,
    are_experts_excluded,
    find_part_of_fused,
    is_name,
)
from nxdi_expertscale.families.limits import Effect, ReachedLimit
from nxdi_expertscale.families.lookup import HOW_TO_DECLARE
from nxdi_expertscale.families.unsupported import find_unsupported
from nxdi_expertscale.settings.expert_parallel import find_short_context, find_unrunnable_call
from nxdi_expertscale.settings.settings import FLAG, PER_CHANNEL, Settings, Upstream

_logger = logging.getLogger("nxdi_expertscale")

Values = Mapping[str, object]
"""What a rule's texts are filled with."""


class Severity(str, enum.Enum):
    """What comes of a rule that applies."""

    ERROR = "refused"
    WARNING = "warned of"


class Scope(str, enum.Enum):
    """The models that a rule is about."""

    ANY = "any model"
    FLAG_ON = f"{FLAG}=True"
    EXPERT_WISE = f"{FLAG}=True, quantized"
    SHARED_SCALE = f"{FLAG}=False, quantized"
    QUANTIZED = "quantized"

    def includes(self, settings: Settings) -> bool:
        """Whether a model with these settings is one of them."""
        return {
            Scope.ANY: True,
            Scope.FLAG_ON: settings.is_on,
            Scope.EXPERT_WISE: settings.is_on and settings.is_quantized,
            Scope.SHARED_SCALE: settings.is_quantized and not settings.keeps_scales_apart,
            Scope.QUANTIZED: settings.is_quantized,
        }[self]


@dataclass(frozen=True)
class Rule:
    """One combination of settings that gives no right model.

    Attributes:
        name: The rule's name, unique.
        scope: The models that it is about.
        find: The values for the texts, or None where the settings are none of this combination.
        problem: What is wrong, with ``{names}`` of the values.
        remedy: What to write instead.
        severity: What comes of it.
        needs_model: Whether it looks at the model's config, and not at the neuron config alone.
    """

    name: str
    scope: Scope
    find: Callable[[Settings], Values | None]
    problem: str
    remedy: str
    severity: Severity = Severity.ERROR
    needs_model: bool = True

    def message(self, settings: Settings) -> str | None:
        """What is wrong with these settings and what to write instead; None if nothing is."""
        if self.needs_model and settings.model is None:
            return None
        values = self.find(settings) if self.scope.includes(settings) else None
        if values is None:
            return None
        return f"{self.problem}; {self.remedy}".format_map(values)


def check(settings: Settings) -> None:
    """Refuse settings that cannot give a right model.

    Raises:
        ConfigurationError: They cannot; the message says what to write instead.
    """
    for message in _messages(settings, Severity.ERROR):
        raise ConfigurationError(message)


def warn(settings: Settings) -> None:
    """Warn of settings that have another effect than they seem to.

    Those that concern the neuron config alone are warned of where it is looked at alone.
    """
    for message in _messages(settings, Severity.WARNING):
        _logger.warning("%s", message)


def _messages(settings: Settings, severity: Severity) -> list[str]:
    is_alone = settings.model is None
    found = (
        rule.message(settings)
        for rule in RULES
        if rule.severity is severity
        and (severity is Severity.ERROR or rule.needs_model is not is_alone)
    )
    return [message for message in found if message is not None]


def _flag_that_is_no_boolean(settings: Settings) -> Values | None:
    return None if isinstance(settings.flag, bool) else {"value": repr(settings.flag)}


def _flag_on_model_config(settings: Settings) -> Values | None:
    model = settings.model
    return {"model": model.name} if model is not None and model.has_flag else None


def _plain_neuron_config(settings: Settings) -> Values | None:
    if settings.family is None or "MoENeuronConfig" in settings.neuron_config_classes:
        return None
    return {"found": settings.neuron_config_classes[0]}


def _exclusions_that_are_no_list(settings: Settings) -> Values | None:
    names = settings.modules_to_not_convert
    concerned = settings.is_on or settings.family is not None
    return {"names": repr(names)} if concerned and isinstance(names, str) else None


def _empty_exclusion(settings: Settings) -> Values | None:
    if settings.family is None or all(map(is_name, settings.exclusions)):
        return None
    return {}


def _exclusion_of_a_part(kind: type[PartOfFused]) -> Callable[[Settings], Values | None]:
    def find(settings: Settings) -> Values | None:
        if settings.family is None or not all(map(is_name, settings.exclusions)):
            return None
        part = find_part_of_fused(
            settings.exclusions, settings.num_layers, settings.family, fused_qkv=settings.fused_qkv
        )
        return dataclasses.asdict(part) if isinstance(part, kind) else None

    return find


def _unquantized_checkpoint(settings: Settings) -> Values | None:
    if settings.family is None or settings.quantized:
        return None
    return {}


def _other_quantization_type(settings: Settings) -> Values | None:
    found = settings.quantization_type
    return None if found == PER_CHANNEL else {"found": repr(found)}


def _unsupported_model(settings: Settings) -> Values | None:
    model = settings.model
    if model is None or settings.family is not None:
        return None
    found = find_unsupported(model.model_type, model.class_modules)
    if found is None:
        return None
    return {"model": repr(model.name), "reason": found.explanation, "remedy": found.remedy}


_COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What published models call the number of a layer's experts."""


def _unknown_model(settings: Settings) -> Values | None:
    model = settings.model
    if model is None or settings.family is not None or _unsupported_model(settings) is not None:
        return None
    experts = first_int(model.config, _COUNTS_OF_EXPERTS) or 0
    return {"model": repr(model.name)} if experts > 1 else None


def _reached_limit(counts: Callable[[Effect], bool]) -> Callable[[Settings], Values | None]:
    def find(settings: Settings) -> Values | None:
        reached = next((r for r in _reached_limits(settings) if counts(r.limit.effect)), None)
        if reached is None or settings.model is None:
            return None
        values = {"problem": reached.problem, "remedy": reached.remedy}
        return {"model": repr(settings.model.name), **values}

    return find


def _reached_limits(settings: Settings) -> list[ReachedLimit]:
    # The config of a model that also sees holds that of the language model, which is looked at by
    # itself.
    if settings.family is None or settings.model is None or not settings.num_layers:
        return []
    reached = settings.family.limits_of(settings.model.config)
    return [limit for limit in reached if settings.max_length >= limit.starts_at]


def _key_value_heads_on_ranks(settings: Settings) -> Values | None:
    # Upstream: modules/attention/gqa.py, determine_sharding_strategy, then gives every query head
    # key and value heads of its own, and pads these as if they were as few as before: their
    # shapes fit no rank, quantized or not (0.5 to 0.9).
    degree = settings.attention_tp_degree
    heads, pairs = settings.num_attention_heads, settings.num_key_value_heads
    if settings.family is None or degree is None or not heads or not pairs or heads == pairs:
        return None
    if degree % pairs == 0 or pairs % degree == 0:
        return None
    return {"degree": degree, "heads": heads, "pairs": pairs}


def _cast_weights(settings: Settings) -> Values | None:
    # Upstream: models/application_base.py, checkpoint_loader_fn, casts every float but for scales
    # and f8e4m3, and NxDI's layers expect f8e5m2.
    casts = settings.casts_weights and "float32" not in settings.torch_dtype
    if settings.family is None or not casts or settings.quantization_dtype != "f8e5m2":
        return None
    return {"torch_dtype": settings.torch_dtype}


def _whole_model_expert_parallel(settings: Settings) -> Values | None:
    if settings.experts is None:
        return None
    degree = settings.experts.parallelism.ep_degree
    return None if degree in (None, 1) else {"ep_degree": degree}


def _unrunnable_call(settings: Settings) -> Values | None:
    num_experts, top_k = settings.num_experts, settings.num_experts_per_tok
    if settings.experts is None or num_experts is None or top_k is None:
        return None
    call = find_unrunnable_call(settings.experts.parallelism, num_experts, top_k)
    if call is None:
        return None
    return {**dataclasses.asdict(call), "top_k": top_k, "num_experts": num_experts}


def _short_context(settings: Settings) -> Values | None:
    top_k = settings.num_experts_per_tok
    if settings.experts is None or top_k is None:
        return None
    context = find_short_context(settings.experts.parallelism, top_k)
    return None if context is None else dataclasses.asdict(context)


def _other_logical_nc(settings: Settings) -> Values | None:
    # Upstream: neuronx_distributed/modules/moe/expert_mlps_v2.py, forward_blockwise, asserts 2 for
    # expert-wise scales. Contexts run through the kernel unless it is told otherwise.
    experts, upstream = settings.experts, settings.upstream
    if experts is None or not upstream.reads_moe_settings:
        return None
    if not experts.glu_mlp or experts.use_torch_block_wise:
        return None
    cores = {"logical_nc_config": experts.logical_nc_config}
    if experts.blockwise_logical_nc_config is not None:
        name = "blockwise_matmul_config.logical_nc_config"
        cores = {name: experts.blockwise_logical_nc_config, **cores}
    return _other_than_two(cores, upstream)


def _other_logical_nc_without_settings(settings: Settings) -> Values | None:
    # Upstream: modules/moe.py hands none of the settings for experts on; the kernel runs unless
    # tokens may be dropped.
    experts, upstream = settings.experts, settings.upstream
    if experts is None or upstream.reads_moe_settings:
        return None
    if not experts.glu_mlp or experts.capacity_factor is not None:
        return None
    return _other_than_two({"logical_nc_config": experts.logical_nc_config}, upstream)


def _other_than_two(cores: Mapping[str, int], upstream: Upstream) -> Values | None:
    """The first number of cores that is not two; the first one chooses the kernel."""
    if next(iter(cores.values())) not in upstream.kernel_cores:
        return None
    others = ({"setting": name, "found": found} for name, found in cores.items() if found != 2)
    return next(others, None)


def _has_quantized_experts(settings: Settings) -> bool:
    """Whether any layer's experts are not kept in full precision."""
    if settings.family is None:
        return False
    return not all(
        are_experts_excluded(layer, settings.exclusions, settings.family)
        for layer in range(settings.num_layers)
    )


def _shared_scale_on_ranks(settings: Settings) -> Values | None:
    # Upstream: neuronx_distributed/trace/trace.py, shard_children, takes a rank's experts out of
    # each of a layer's tensors, and this one has one row. It says so after compilation.
    if settings.experts is None or not settings.upstream.reads_moe_settings:
        return None
    degree = settings.experts.parallelism.degree
    return {"degree": degree} if degree > 1 and _has_quantized_experts(settings) else None


def _shared_scale_in_kernel(settings: Settings) -> Values | None:
    # Upstream: neuronx_distributed/modules/moe/moe_fused_tkg.py views it as [E, 2, I].
    experts = settings.experts
    if experts is None or not experts.is_token_generation_fused:
        return None
    return {} if _has_quantized_experts(settings) else None


def _flag_without_effect(settings: Settings) -> Values | None:
    return None if settings.is_quantized else {}


RULES: tuple[Rule, ...] = (
    Rule(
        name="flag_type",
        scope=Scope.ANY,
        find=_flag_that_is_no_boolean,
        problem=f"{FLAG} must be true or false, not {{value}}",
        remedy=f"write {FLAG}=True (in JSON: true)",
        needs_model=False,
    ),
    Rule(
        name="flag_place",
        scope=Scope.ANY,
        find=_flag_on_model_config,
        problem=f"{FLAG} is set on the model's config ({{model}}), where it has no effect",
        remedy=f"give it to the neuron config: MoENeuronConfig({FLAG}=True)",
    ),
    Rule(
        name="neuron_config_class",
        scope=Scope.FLAG_ON,
        find=_plain_neuron_config,
        problem="NxDI needs a MoENeuronConfig for this model's experts, and finds a {found}",
        remedy=f"write MoENeuronConfig({FLAG}=True, …)",
    ),
    Rule(
        name="unsupported_model",
        scope=Scope.EXPERT_WISE,
        find=_unsupported_model,
        problem=f"{FLAG}=True is not supported for {{model}}: {{reason}}",
        remedy="{remedy}",
    ),
    Rule(
        name="unknown_model",
        scope=Scope.EXPERT_WISE,
        find=_unknown_model,
        problem=(
            f"{FLAG}=True is not supported for {{model}}: it has experts, and no plugin declares "
            "its family"
        ),
        remedy=f"turn {FLAG} off. {HOW_TO_DECLARE}",
    ),
    Rule(
        name="quantization_type",
        scope=Scope.EXPERT_WISE,
        find=_other_quantization_type,
        problem=f"{FLAG}=True needs quantization_type={PER_CHANNEL!r}, not {{found}}",
        remedy=f"set it to {PER_CHANNEL!r}: the experts then get one scale per expert, everything "
        "else stays per-channel",
        needs_model=False,
    ),
    Rule(
        name="quantized_checkpoint",
        scope=Scope.EXPERT_WISE,
        find=_unquantized_checkpoint,
        problem="quantized=False beside quantized_mlp_kernel_enabled or "
        "activation_quantization_type: NxDI makes quantized layers, and reads the model's own "
        "checkpoint for them, which has no scales",
        remedy="set quantized=True and quantized_checkpoints_path",
    ),
    Rule(
        name="exclusions_type",
        scope=Scope.QUANTIZED,
        find=_exclusions_that_are_no_list,
        problem="modules_to_not_convert is {names}, and each letter of a text would be taken for a "
        "name",
        remedy="write a list: modules_to_not_convert=[{names}]",
    ),
    Rule(
        name="exclusions_empty",
        scope=Scope.QUANTIZED,
        find=_empty_exclusion,
        problem="modules_to_not_convert has an empty name, which is a part of every module's",
        remedy="remove it",
    ),
    Rule(
        name="exclusion_of_an_expert",
        scope=Scope.QUANTIZED,
        find=_exclusion_of_a_part(PartOfExperts),
        problem=PartOfExperts.problem,
        remedy=PartOfExperts.remedy,
    ),
    Rule(
        name="exclusion_of_a_projection",
        scope=Scope.QUANTIZED,
        find=_exclusion_of_a_part(PartOfAttention),
        problem=PartOfAttention.problem,
        remedy=PartOfAttention.remedy,
    ),
    Rule(
        name="upstream_limit",
        scope=Scope.EXPERT_WISE,
        find=_reached_limit(lambda effect: effect is not Effect.INEXACT),
        problem="{model}: {problem}",
        remedy="{remedy}",
    ),
    Rule(
        name="key_value_heads",
        scope=Scope.EXPERT_WISE,
        find=_key_value_heads_on_ranks,
        problem="tp_degree={degree} for {heads} heads with {pairs} heads of keys and values: NxDI "
        "cannot spread these over so many ranks, without FP8 as well",
        remedy="use a tp_degree that divides {pairs}, or a multiple of {pairs}",
    ),
    Rule(
        name="cast_weights",
        scope=Scope.QUANTIZED,
        find=_cast_weights,
        problem="quantization_dtype='f8e5m2': NxDI casts such weights to {torch_dtype} when it "
        "reads a checkpoint, and not back",
        remedy="use quantization_dtype='f8e4m3', or cast_type='as-declared'",
    ),
    Rule(
        name="ep_degree",
        scope=Scope.EXPERT_WISE,
        find=_whole_model_expert_parallel,
        problem=f"{FLAG}=True with ep_degree={{ep_degree}}: no release of NxDI generates tokens "
        "with it",
        remedy="use moe_ep_degree, where the release has it, or ep_degree=1",
    ),
    Rule(
        name="expert_parallel_call",
        scope=Scope.EXPERT_WISE,
        find=_unrunnable_call,
        problem="expert parallelism (degree {degree}): {name} with {batch} x {length} tokens and "
        "{top_k} of {num_experts} experts per token chooses {chosen} experts, and NxD needs at "
        "least {needed} for it",
        remedy="use {larger}, or moe_ep_degree=1",
    ),
    Rule(
        name="logical_nc",
        scope=Scope.EXPERT_WISE,
        find=_other_logical_nc,
        problem=f"{FLAG}=True needs {{setting}}=2, not {{found}}: the blockwise kernel knows one "
        "scale per expert on two logical cores only",
        remedy="set it to 2 (also NEURON_LOGICAL_NC_CONFIG, if it is set), or set "
        'blockwise_matmul_config={{"use_torch_block_wise": True}}',
    ),
    Rule(
        name="logical_nc_without_settings",
        scope=Scope.EXPERT_WISE,
        find=_other_logical_nc_without_settings,
        problem=f"{FLAG}=True needs {{setting}}=2, not {{found}}: the blockwise kernel knows one "
        "scale per expert on two logical cores only, and this release has no way round it",
        remedy="set it to 2 (also NEURON_LOGICAL_NC_CONFIG, if it is set)",
    ),
    Rule(
        name="shared_scale_on_ranks",
        scope=Scope.SHARED_SCALE,
        find=_shared_scale_on_ranks,
        problem="expert parallelism (degree {degree}): a scale that the experts share cannot be "
        "spread over ranks",
        remedy=f"set {FLAG}=True, or moe_ep_degree=1",
    ),
    Rule(
        name="shared_scale_in_kernel",
        scope=Scope.SHARED_SCALE,
        find=_shared_scale_in_kernel,
        problem="moe_fused_nki_kernel_enabled=True: the kernel reads one scale per expert, and "
        "here the experts share one",
        remedy=f"set {FLAG}=True, or moe_fused_nki_kernel_enabled=False",
    ),
    Rule(
        name="without_effect",
        scope=Scope.FLAG_ON,
        find=_flag_without_effect,
        problem=f"{FLAG} has no effect: the model is not quantized (quantized=False)",
        remedy=f"set quantized=True, or leave {FLAG} out",
        severity=Severity.WARNING,
        needs_model=False,
    ),
    Rule(
        name="short_context",
        scope=Scope.EXPERT_WISE,
        find=_short_context,
        problem="expert parallelism (degree {degree}): contexts of {batch} x {length} tokens are "
        "shorter than a block (block_size {block_size}), and NxD cannot run them over all experts",
        remedy="use contexts of at least {needed} tokens, or a smaller block_size in "
        "blockwise_matmul_config",
        severity=Severity.WARNING,
    ),
    Rule(
        name="inexact_upstream",
        scope=Scope.EXPERT_WISE,
        find=_reached_limit(lambda effect: effect is Effect.INEXACT),
        problem="{model}: {problem}",
        remedy="{remedy}",
        severity=Severity.WARNING,
    ),
)
"""Every rule; the first error that applies is raised."""
