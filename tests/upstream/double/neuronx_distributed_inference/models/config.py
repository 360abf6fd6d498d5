"""What the user chooses (``NeuronConfig``) and what the model is (``InferenceConfig``)."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from neuronx_distributed.modules.moe.moe_configs import BlockwiseMatmulConfig, RouterConfig
from neuronx_distributed.quantization.quantization_config import QuantizedDtype

CONFIG_FILE = "neuron_config.json"
SHARD_ON_INTERMEDIATE_DIMENSION_PER_TP = 256

_DEFAULTS: dict[str, Any] = {
    "batch_size": 1,
    "padding_side": "right",
    "seq_len": 128,
    "on_cpu": False,
    "output_logits": False,
    "cast_type": "config",
    "fused_qkv": False,
    "sequence_parallel_enabled": False,
    "is_continuous_batching": False,
    "async_mode": False,
    "enable_bucketing": False,
    "context_encoding_buckets": None,
    "token_generation_batches": None,
    "is_prefix_caching": False,
    "chunked_prefill_config": None,
    "quantized": False,
    "quantized_checkpoints_path": None,
    "quantization_type": "per_tensor_symmetric",
    "quantization_dtype": "int8",
    "modules_to_not_convert": None,
    "draft_model_modules_to_not_convert": None,
    "quantized_mlp_kernel_enabled": False,
    "activation_quantization_type": None,
    "quantize_clamp_bound": float("inf"),
    "speculation_length": 0,
    "medusa_speculation_length": 0,
    "enable_fused_speculation": False,
    "enable_eagle_speculation": False,
    "is_medusa": False,
    "tp_degree": 1,
    "pp_degree": 1,
    "cp_degree": 1,
    "attention_dp_degree": 1,
    "ep_degree": 1,
    "save_sharded_checkpoint": False,
    "moe_fused_nki_kernel_enabled": None,
    "logical_nc_config": 2,
}


_BATCH_SIZES = (
    "ctx_batch_size",
    "tkg_batch_size",
    "spec_batch_size",
    "max_batch_size",
    "kv_cache_batch_size",
)
"""Each is ``batch_size``, where it is not named."""


def to_torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), f"Unsupported dtype: {name}"
    return dtype


def to_dict(value: Any) -> Any:
    """Everything that JSON can hold: attributes of objects, names of classes and of dtypes."""
    if isinstance(value, dict):
        return {name: to_dict(part) for name, part in value.items()}
    if isinstance(value, list):
        return [to_dict(part) for part in value]
    if isinstance(value, type):
        return {"__module__": value.__module__, "__name__": value.__name__}
    if hasattr(value, "__dict__"):
        return to_dict(vars(value))
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


class NeuronConfig:
    """Takes any keyword; one that it does not know is logged, and otherwise ignored."""

    def __init__(self, **kwargs: Any) -> None:
        for name, default in _DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in ("n_active_tokens", "n_positions", "max_context_length", "max_length"):
            setattr(self, name, kwargs.pop(name, self.seq_len))
        for name in _BATCH_SIZES:
            setattr(self, name, kwargs.pop(name, self.batch_size))
        self.buckets = kwargs.pop("buckets", [self.seq_len])
        self.is_prefill_stage = None
        overrides = "torch_dtype" in kwargs
        self.overrides_torch_dtype = kwargs.pop("overrides_torch_dtype", overrides)
        dtype = kwargs.pop("torch_dtype", torch.bfloat16)
        self.torch_dtype = to_torch_dtype(dtype) if isinstance(dtype, str) else dtype
        sampling = kwargs.pop("on_device_sampling_config", None)
        if isinstance(sampling, dict):
            sampling = OnDeviceSamplingConfig(**sampling)
        self.on_device_sampling_config = sampling
        degree = self.tp_degree * self.pp_degree * self.ep_degree
        self.world_size = kwargs.pop("world_size", degree)
        self._verify_quantized_config()
        if kwargs:
            logging.warning(f"NeuronConfig init: Unexpected keyword arguments: {kwargs}")

    def is_mlp_quantized(self) -> bool:
        return bool(self.quantized_mlp_kernel_enabled or self.activation_quantization_type)

    def _verify_quantized_config(self) -> None:
        if not self.quantized:
            return
        assert self.quantized_checkpoints_path is not None, "quantized_checkpoints_path is required"
        QuantizedDtype.has_dtype(self.quantization_dtype)
        if not self.modules_to_not_convert:
            warnings.warn(
                "modules_to_not_convert is not provided. Assuming all modules will be quantized.",
                UserWarning,
                stacklevel=2,
            )


class HybridShardingConfig:
    def __init__(self, **degrees: int) -> None:
        for stage in ("cte", "tkg"):
            for kind in ("tp", "ep"):
                name = f"moe_{stage}_{kind}_degree"
                setattr(self, name, degrees.get(name, 1))


class MoENeuronConfig(NeuronConfig):
    def __init__(
        self, capacity_factor: float | None = None, glu_mlp: bool = True, **kwargs: Any
    ) -> None:
        self.capacity_factor = None if capacity_factor is None else float(capacity_factor)
        self.glu_mlp = glu_mlp
        self.normalize_top_k_affinities = not kwargs.pop(
            "disable_normalize_top_k_affinities", False
        )
        hybrid = kwargs.pop("hybrid_sharding_config", None)
        if isinstance(hybrid, dict):
            hybrid = HybridShardingConfig(**hybrid)
        self.hybrid_sharding_config = hybrid
        self.moe_tp_degree = kwargs.pop("moe_tp_degree", 1)
        self.moe_ep_degree = kwargs.pop("moe_ep_degree", 1)
        blockwise = kwargs.pop("blockwise_matmul_config", {})
        if isinstance(blockwise, dict):
            blockwise = BlockwiseMatmulConfig.from_kwargs(**blockwise)
        self.blockwise_matmul_config = blockwise
        router = kwargs.pop("router_config", None)
        self.router_config = (
            RouterConfig(**router)
            if isinstance(router, dict)
            else RouterConfig.from_kwargs(**kwargs)
        )
        super().__init__(**kwargs)


class OnDeviceSamplingConfig:
    def __init__(self, **kwargs: Any) -> None:
        self.do_sample = kwargs.pop("do_sample", False)
        self.dynamic = kwargs.pop("dynamic", False)
        self.top_k = kwargs.pop("top_k", 1)


class FusedSpecNeuronConfig:
    def __init__(
        self,
        worker_cls: type,
        draft_config: InferenceConfig | None = None,
        draft_model_path: str | None = None,
        draft_model_cls: type | None = None,
    ) -> None:
        self.worker_cls = worker_cls
        self.draft_config = draft_config
        self.draft_model_path = draft_model_path
        self.draft_model_cls = draft_model_cls


class InferenceConfig:
    def __init__(
        self,
        neuron_config: NeuronConfig,
        fused_spec_config: FusedSpecNeuronConfig | None = None,
        load_config: Callable[[InferenceConfig], None] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.neuron_config = neuron_config
        self.fused_spec_config = fused_spec_config
        if load_config is not None:
            load_config(self)
        self.metadata = metadata
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.add_derived_config()
        self.validate_config()

    def add_derived_config(self) -> None:
        self.num_cores_per_group = 1

    def get_required_attributes(self) -> list[str]:
        return []

    def validate_config(self) -> None:
        missing = [name for name in self.get_required_attributes() if not hasattr(self, name)]
        assert not missing, f"Config must define {missing}"

    @classmethod
    def get_neuron_config_cls(cls) -> type[NeuronConfig]:
        return NeuronConfig

    def save(self, model_path: str) -> None:
        Path(model_path).mkdir(parents=True, exist_ok=True)
        self.to_json_file(str(Path(model_path) / CONFIG_FILE))

    def to_json_file(self, json_file: str) -> None:
        Path(json_file).write_text(self.to_json_string() + "\n", encoding="utf-8")

    def to_json_string(self) -> str:
        return json.dumps(to_dict(self), indent=2, sort_keys=True)

    @classmethod
    def load(cls, model_path: str, **kwargs: Any) -> InferenceConfig:
        return cls.from_json_file(str(Path(model_path) / CONFIG_FILE), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str, **kwargs: Any) -> InferenceConfig:
        return cls.from_json_string(Path(json_file).read_text(encoding="utf-8"), **kwargs)

    @classmethod
    def from_json_string(cls, json_string: str, **kwargs: Any) -> InferenceConfig:
        attributes = {**json.loads(json_string), **kwargs}
        neuron_config = attributes["neuron_config"]
        if isinstance(neuron_config, dict):
            attributes["neuron_config"] = cls.get_neuron_config_cls()(**neuron_config)
        if isinstance(attributes.get("fused_spec_config"), dict):
            attributes["fused_spec_config"] = cls._fused_spec_config(
                attributes["fused_spec_config"]
            )
        return cls(**attributes)

    @classmethod
    def _fused_spec_config(cls, attributes: dict[str, Any]) -> FusedSpecNeuronConfig:
        draft_model_cls = _class(attributes.get("draft_model_cls"))
        draft_cls = cls if draft_model_cls is None else draft_model_cls.get_config_cls()
        draft = dict(attributes["draft_config"])
        draft["neuron_config"] = draft_cls.get_neuron_config_cls()(**draft["neuron_config"])
        return FusedSpecNeuronConfig(
            worker_cls=_class(attributes["worker_cls"]),
            draft_config=draft_cls(**draft),
            draft_model_path=attributes["draft_model_path"],
            draft_model_cls=draft_model_cls,
        )


def _class(name: dict[str, str] | None) -> Any:
    if name is None:
        return None
    return getattr(importlib.import_module(name["__module__"]), name["__name__"])
