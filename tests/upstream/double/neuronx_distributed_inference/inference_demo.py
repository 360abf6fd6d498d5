"""The command line of NxDI's demo: its arguments, and the config made of them."""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

from neuronx_distributed.quantization.quantization_config import QuantizationType

from neuronx_distributed_inference.models.config import NeuronConfig, to_torch_dtype
from neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe import (
    NeuronQwen3MoeForCausalLM,
)
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

MODEL_TYPES = {"qwen3_moe": {"causal-lm": NeuronQwen3MoeForCausalLM}}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-type", type=str, choices=MODEL_TYPES.keys(), required=True)
    parser.add_argument("--task-type", type=str, required=True)
    setup_run_parser(parser.add_subparsers().add_parser("run"))
    return parser.parse_args()


def setup_run_parser(run_parser: argparse.ArgumentParser) -> None:
    run_parser.add_argument("--model-path", type=str, required=True)
    run_parser.add_argument("--compiled-model-path", type=str, required=True)
    run_parser.add_argument("--prompt", dest="prompts", action="append", required=True)
    run_parser.add_argument("--torch-dtype", type=to_torch_dtype)
    for name in ("batch-size", "seq-len", "max-context-length", "tp-degree", "logical-nc-config"):
        run_parser.add_argument(f"--{name}", type=int)
    for name in ("fused-qkv", "skip-compile", "compile-only"):
        run_parser.add_argument(f"--{name}", action="store_true")
    run_parser.add_argument("--quantized", action="store_true")
    run_parser.add_argument("--quantized-checkpoints-path", type=str)
    run_parser.add_argument(
        "--quantization-type", type=str, choices=[kind.value for kind in QuantizationType]
    )
    run_parser.add_argument("--quantization-dtype", type=str)
    run_parser.add_argument(
        "--modules-to-not-convert-file", type=_read_exclusions, dest="modules_to_not_convert_lists"
    )
    run_parser.add_argument("--moe-tp-degree", type=int, default=1)
    run_parser.add_argument("--moe-ep-degree", type=int, default=1)


def _read_exclusions(path: str) -> list[str]:
    return json.loads(Path(path).read_text())["modules_to_not_convert"]


def create_neuron_config(model_cls: Any, args: argparse.Namespace) -> tuple[None, NeuronConfig]:
    """Make the config of every argument that has a value, also of those it does not know."""
    settings = {
        name: value for name, value in vars(copy.deepcopy(args)).items() if value is not None
    }
    if args.quantized and args.quantization_dtype == "f8e4m3":
        os.environ["XLA_HANDLE_SPECIAL_SCALAR"] = "1"
        os.environ["UNSAFE_FP8FNCAST"] = "1"
    if args.modules_to_not_convert_lists:
        settings["modules_to_not_convert"] = args.modules_to_not_convert_lists
    return None, model_cls.get_neuron_config_cls()(**settings)


def run_inference(model_cls: Any, args: argparse.Namespace) -> None:
    _, neuron_config = create_neuron_config(model_cls, args)
    config = model_cls.get_config_cls()(
        neuron_config, load_config=load_pretrained_config(args.model_path)
    )
    model_cls(args.model_path, config)
    if neuron_config.quantized:
        model_cls.save_quantized_state_dict(args.model_path, config)
    if not (args.skip_compile and args.compile_only):
        raise NotImplementedError("the double has no compiler and no device")


def main() -> None:
    args = parse_args()
    run_inference(MODEL_TYPES[args.model_type][args.task_type], args)


if __name__ == "__main__":
    main()
