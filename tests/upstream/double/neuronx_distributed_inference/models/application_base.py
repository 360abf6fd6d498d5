"""An application: a model's config and checkpoint, and the graphs it is compiled to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from neuronx_distributed.quantization.quantization_config import QuantizationType, QuantizedDtype
from neuronx_distributed.quantization.quantization_utils import (
    quantize_pytorch_model_per_channel_symmetric,
)
from neuronx_distributed.trace.model_builder import ModelBuilder

from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig
from neuronx_distributed_inference.modules.checkpoint import (
    load_state_dict,
    save_state_dict_safetensors,
)


def init_custom_process_group_fn(config: InferenceConfig) -> None:
    """Nothing to do: in the double, a draft's group is that of its target."""


class NeuronApplicationBase(torch.nn.Module):
    _STATE_DICT_MODEL_PREFIX = "model."
    _NEW_STATE_DICT_MODEL_PREFIX = ""
    _FUSED_PREFIX: ClassVar[str] = ""

    def __init__(
        self,
        model_path: str,
        config: InferenceConfig | None = None,
        neuron_config: NeuronConfig | None = None,
    ) -> None:
        super().__init__()
        config = self.get_config_cls().load(model_path) if config is None else config
        if neuron_config is not None:
            config.neuron_config = neuron_config
        self.validate_config(config)
        self.config = config
        self.neuron_config = config.neuron_config
        self.fused_spec_config = config.fused_spec_config
        self.model_path = model_path
        self.models: list[Any] = []
        self._builder: ModelBuilder | None = None

    def get_builder(self) -> ModelBuilder:
        if self._builder is None:
            self._builder = ModelBuilder(self.checkpoint_loader_fn, self.neuron_config.tp_degree)
            for model in self.models:
                self._builder.add(model.tag, model.get_model_instance())
        return self._builder

    @classmethod
    def validate_config(cls, config: InferenceConfig) -> None:
        if not hasattr(config, "neuron_config"):
            raise ValueError("Config must include a NeuronConfig")

    @classmethod
    def get_config_cls(cls) -> type[InferenceConfig]:
        raise NotImplementedError("get_config_cls is not implemented")

    @classmethod
    def get_neuron_config_cls(cls) -> type[NeuronConfig]:
        return cls.get_config_cls().get_neuron_config_cls()

    @staticmethod
    def load_hf_model(model_path: str) -> Any:
        raise NotImplementedError("load_hf_model is not implemented")

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: dict[str, Any], config: InferenceConfig
    ) -> dict[str, Any]:
        return state_dict

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("State-dict update not implemented")

    def compile(self, compiled_model_path: str) -> None:
        self.config.save(compiled_model_path)
        torch.jit.save(torch.jit.script(torch.nn.Identity()), Path(compiled_model_path, "model.pt"))

    def load(
        self,
        compiled_model_path: str,
        start_rank_id: int | None = None,
        local_ranks_size: int | None = None,
        skip_warmup: bool = False,
    ) -> None:
        self.traced_model = torch.jit.load(str(Path(compiled_model_path, "model.pt")))
        self.checkpoint_loader_fn()

    def checkpoint_loader_fn(self, mmap: bool = False) -> dict[str, torch.Tensor]:
        model_path = self.model_path
        if self.neuron_config.quantized:
            model_path = self.neuron_config.quantized_checkpoints_path
            if not Path(model_path).exists():
                raise FileNotFoundError(f"Quantized checkpoint file not found: {model_path}")
        if not self.neuron_config.enable_fused_speculation:
            return self._cast(self.get_state_dict(model_path, self.config))
        speculation = self.fused_spec_config
        draft_cls = speculation.draft_model_cls or type(self)
        draft_cls._FUSED_PREFIX = "draft_model"
        state_dict = draft_cls.get_state_dict(
            speculation.draft_model_path, speculation.draft_config
        )
        type(self)._FUSED_PREFIX = "target_model"
        state_dict.update(self.get_state_dict(model_path, self.config))
        return self._cast(state_dict)

    def _cast(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = self.neuron_config.torch_dtype
        if dtype is not torch.float32 and self.neuron_config.cast_type == "config":
            for name, value in state_dict.items():
                kept = name.endswith("scale") or value.dtype is torch.float8_e4m3fn
                if value.is_floating_point() and not kept:
                    state_dict[name] = value.to(dtype)
        return state_dict

    @classmethod
    def get_state_dict(
        cls, model_name_or_path: str, config: InferenceConfig
    ) -> dict[str, torch.Tensor]:
        if Path(model_name_or_path).is_dir():
            state_dict = load_state_dict(model_name_or_path)
        else:
            state_dict = torch.load(model_name_or_path)
        for name in list(state_dict):
            renamed = name
            if name.startswith(cls._STATE_DICT_MODEL_PREFIX):
                renamed = name.replace(
                    cls._STATE_DICT_MODEL_PREFIX, cls._NEW_STATE_DICT_MODEL_PREFIX, 1
                )
            if name.endswith(".weight_scale"):
                renamed = renamed.replace(".weight_scale", ".scale")
            if renamed != name:
                state_dict[renamed] = state_dict.pop(name)
        state_dict = cls.convert_hf_to_neuron_state_dict(state_dict, config)
        if getattr(config, "tie_word_embeddings", False):
            cls.update_state_dict_for_tied_weights(state_dict)
        if cls._FUSED_PREFIX:
            state_dict = {f"{cls._FUSED_PREFIX}.{name}": v for name, v in state_dict.items()}
        return state_dict

    @classmethod
    def save_quantized_state_dict(cls, model_path: str, config: InferenceConfig) -> None:
        state_dict = cls.generate_quantized_state_dict(model_path, config)
        destination = config.neuron_config.quantized_checkpoints_path
        if Path(destination).is_dir():
            save_state_dict_safetensors(state_dict, destination)
        else:
            torch.save(state_dict, destination)

    @classmethod
    def generate_quantized_state_dict(
        cls, model_path: str, config: InferenceConfig
    ) -> dict[str, torch.Tensor]:
        settings = config.neuron_config
        kind = QuantizationType(settings.quantization_type)
        if kind is not QuantizationType.PER_CHANNEL_SYMMETRIC:
            raise RuntimeError(f"{settings.quantization_type} not supported")
        quantized = quantize_pytorch_model_per_channel_symmetric(
            float_model=cls.load_hf_model(model_path),
            inplace=True,
            dtype=QuantizedDtype.get_dtype(settings.quantization_dtype),
            modules_to_not_convert=settings.modules_to_not_convert,
        )
        return cls.prepare_quantized_state_dict(quantized)

    @classmethod
    def prepare_quantized_state_dict(cls, hf_model_quant: Any) -> dict[str, torch.Tensor]:
        """The names are those of the inner model, without ``model.`` before them."""
        state_dict = hf_model_quant.model.state_dict()
        for name, value in hf_model_quant.lm_head.state_dict().items():
            state_dict[f"lm_head.{name}"] = value
        return state_dict
