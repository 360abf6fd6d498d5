"""Hugging Face's config into NxDI's."""

from __future__ import annotations

from collections.abc import Callable

from transformers import AutoConfig, PretrainedConfig

from neuronx_distributed_inference.models.config import InferenceConfig, to_torch_dtype


def load_pretrained_config(
    model_path_or_name: str | None = None, hf_config: PretrainedConfig | None = None
) -> Callable[[InferenceConfig], None]:
    def load_config(self: InferenceConfig) -> None:
        config = hf_config or AutoConfig.from_pretrained(model_path_or_name)
        attributes = config.to_dict()
        dtype = attributes.pop("dtype", None)
        if dtype is not None and not self.neuron_config.overrides_torch_dtype:
            self.neuron_config.torch_dtype = to_torch_dtype(str(dtype).removeprefix("torch."))
        vars(self).update(attributes)

    return load_config
