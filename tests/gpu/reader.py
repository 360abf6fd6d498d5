"""What a vLLM for GPUs makes of a checkpoint, on a CPU: a program of its own.

    python -m tests.gpu.reader FOLDER

The platform says that it is a GPU with FP8 (compute capability 9.0), which is what vLLM looks at to
choose a scheme; its schemes, layers and loader are real, and nothing is computed. One line of JSON
is printed: the schemes, the experts' parameters with their shapes, the parameters that got no
weight, and the experts whose bytes differ.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def make_platform() -> Any:
    """A platform that runs on this machine, and says that it has what an H100 has."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    class Gpu(CpuPlatform):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            return True

    return Gpu()


def load(folder: Path) -> tuple[Any, set[str]]:
    """vLLM's model with the weights of a folder, and the names of the parameters that got one."""
    from vllm import platforms

    platforms._current_platform = make_platform()
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model

    model_config = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=64,
        enforce_eager=True,
    )
    config = VllmConfig(
        model_config=model_config,
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(),
        cache_config=CacheConfig(block_size=16),
    )
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{_free_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(vllm_config=config)
        torch.set_default_dtype(torch.float32)
        return model, model.load_weights(iter(stored(folder).items()))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def experts_of(layer: Any) -> Any:
    """The module that holds a layer's experts, which releases put at different depths."""
    return next(module for module in layer.mlp.modules() if hasattr(module, "w13_weight"))


def different_experts(model: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The experts' parameters of vLLM that are not, bit for bit, the tensors of the folder."""
    different = []
    for number, layer in enumerate(model.model.layers):
        experts = experts_of(layer)
        for suffix in ("weight", "weight_scale"):
            w13, w2 = getattr(experts, f"w13_{suffix}"), getattr(experts, f"w2_{suffix}")
            for expert in range(w13.shape[0]):
                prefix = f"model.layers.{number}.mlp.experts.{expert}."
                gate, up, down = (
                    tensors[f"{prefix}{projection}_proj.{suffix}"]
                    for projection in ("gate", "up", "down")
                )
                fused = torch.cat([_bits(gate), _bits(up)])
                if not torch.equal(_bits(w13[expert]), fused):
                    different.append(f"{prefix}w13_{suffix}")
                if not torch.equal(_bits(w2[expert]), _bits(down)):
                    different.append(f"{prefix}w2_{suffix}")
    return different


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(folder: Path) -> None:
    """Load the folder and print what became of it."""
    try:
        model, loaded = load(folder)
    except ValueError as error:
        print(json.dumps({"refused": str(error)}))
        return
    layer = model.model.layers[0]
    names = (name for name, _ in model.named_parameters())
    found = {
        "experts": type(experts_of(layer).quant_method).__name__,
        "shapes": {name: list(p.shape) for name, p in experts_of(layer).named_parameters()},
        "attention": type(layer.self_attn.qkv_proj.scheme).__name__,
        # Scales of the cache and of attention's products are vLLM's own, and 1 by themselves.
        "without_weight": [
            name for name in names if name not in loaded and ".self_attn.attn." not in name
        ],
        "different": different_experts(model, stored(folder)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
