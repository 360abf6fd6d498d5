"""A model's way through NxDI on a CPU: its config, its modules, its weights, its logits.

The steps are those that NxDI takes on the device, called one by one because its own CPU mode
(``to_cpu``) leaves out the quantization of the modules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.read.files import CONFIG
from nxdi_expertscale.errors import ConfigurationError, one_line
from nxdi_expertscale.sources.folder import open_folder

MakeConfig = Callable[[Any, Path], Any]
"""Makes NxDI's config of a model from its neuron config and its folder."""


@dataclass(frozen=True)
class LoadedModel:
    """A model as NxDI would trace it, with its weights.

    Attributes:
        module: NxDI's module, as one rank has it.
        state_dict: What was loaded into it, cut for the rank.
        missing: Names of the module that have no tensor there, its own states among them.
        unexpected: Tensors that the module has no name for.
    """

    module: Any
    state_dict: Mapping[str, torch.Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the last token, ``[1, vocab]``, for tokens as long as the bucket."""
        tokens = tokens.to(torch.int32)
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        with torch.no_grad():
            outputs = self.module(
                tokens,
                torch.ones_like(tokens),
                positions,
                torch.zeros(1, dtype=torch.int32),
                torch.ones(1, 3),
            )
        logits: torch.Tensor = outputs[0]
        return logits[:, -1]


def find_class(name: str) -> Any:
    """Import a class.

    Args:
        name: ``"package.module:Class"``.

    Raises:
        ConfigurationError: There is none.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{name}: {one_line(error)}; name a class as 'package.module:Class', of a module that "
            "can be imported (PYTHONPATH)"
        ) from error


def config_cls_of(application: Any) -> Any:
    """The class of an application's config.

    Raises:
        ConfigurationError: The application does not say, or is none.
    """
    try:
        return application.get_config_cls()
    except (AttributeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{application.__name__}: has no get_config_cls; name the class that is derived from "
            "NeuronBaseForCausalLM as the application, and that of its config beside it"
        ) from error


def make_config(neuron_config: Any, checkpoint: Path, config_cls: Any) -> Any:
    """Make NxDI's config of a model in the way that its class has.

    That is ``from_pretrained``, which many contributed models define, or what ``config.json`` has,
    read as transformers reads it.
    """
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    if hasattr(config_cls, "from_pretrained"):
        return config_cls.from_pretrained(str(checkpoint), neuron_config=neuron_config)
    return config_cls(neuron_config, load_config=load_pretrained_config(*_to_load(checkpoint)))


def _to_load(checkpoint: Path) -> tuple[Any, ...]:
    """What NxDI's ``load_pretrained_config`` is called with: a path, or the config itself."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    fields = read_json(open_folder(checkpoint), CONFIG)
    if fields.get("model_type") in CONFIG_MAPPING:
        return (str(checkpoint),)
    # transformers knows the model by its own code alone, which is not run here.
    return (None, PretrainedConfig(**fields))


def load_application(application: Any, *, rank: int = 0) -> LoadedModel:
    """Convert, build, cut for a rank and load what an application holds.

    Args:
        application: NxDI's application of a model, made with its config.
        rank: Which of the ``tp_degree`` ranks this process is.
    """
    instance = first_instance(application)
    shard = dict(application.checkpoint_loader_fn())
    return _load_weights(instance.module, shard, rank, application.neuron_config.tp_degree)


def _load_weights(
    module: Any, state_dict: dict[str, torch.Tensor], rank: int, ranks: int
) -> LoadedModel:
    from neuronx_distributed.trace.trace import get_sharded_checkpoint

    get_sharded_checkpoint(state_dict, module, rank, ranks)
    result = module.load_state_dict(state_dict, strict=False)
    return LoadedModel(
        module, state_dict, tuple(result.missing_keys), tuple(result.unexpected_keys)
    )


def first_instance(application: Any) -> Any:
    """NxDI's instance of an application's first graph, its modules built."""
    from neuronx_distributed_inference.models.application_base import init_custom_process_group_fn

    init_custom_process_group_fn(application.config)
    # The graph's own kind: some contributed models tell of further states in it.
    instance = application.models[0].get_model_instance()
    instance.load_module()
    # As NxD's ModelBuilder does: it tells which parameters the model writes itself.
    instance.get(None)
    return instance
