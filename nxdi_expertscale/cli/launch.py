"""What serves a finished checkpoint, to be typed or pasted: vLLM's command, NxDI's Python."""

from __future__ import annotations

import json
import shlex

from nxdi_expertscale.checkpoint.neuron_config import NeuronSettings

SEQ_LEN = 2048
"""Tokens of the longest sequence, where none is named: vLLM-Neuron does not start without it."""

BATCH_SIZE = 4
"""Requests at once, where no number is named."""


def vllm_command(settings: NeuronSettings, model: str) -> str:
    """The command that serves a checkpoint with vLLM-Neuron.

    Args:
        settings: The checkpoint's.
        model: What vLLM is to read the config and the tokenizer from: the FP8 folder has both, so
            that the original need not be there.
    """
    sizes = settings.neuron_config
    arguments = ["vllm", "serve", model]
    if "tp_degree" in sizes:
        arguments += ["--tensor-parallel-size", str(sizes["tp_degree"])]
    arguments += ["--max-model-len", str(sizes.get("seq_len", SEQ_LEN))]
    arguments += ["--max-num-seqs", str(sizes.get("batch_size", BATCH_SIZE))]
    override = {"override_neuron_config": settings.override_neuron_config}
    # Prefix caching, vLLM's default, needs a block size of vLLM-Neuron.
    arguments += ["--no-enable-prefix-caching", "--additional-config", json.dumps(override)]
    return shlex.join(arguments)


def nxdi_program(settings: NeuronSettings, model: str) -> str:
    """Python that makes NxDI's config for a checkpoint.

    Args:
        settings: The checkpoint's.
        model: The folder from which NxDI is to read the model's config.
    """
    keywords = "".join(f"    {name}={value!r},\n" for name, value in settings.neuron_config.items())
    return (
        "import nxdi_expertscale\n"
        "from neuronx_distributed_inference.models.config import MoENeuronConfig\n"
        "from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config\n"
        "\n"
        f"neuron_config = MoENeuronConfig(\n{keywords})\n"
        f"load_config = load_pretrained_config({model!r})\n"
        "# Then, with the model's own classes, such as NeuronQwen3MoeForCausalLM:\n"
        "#     config = Application.get_config_cls()(neuron_config, load_config=load_config)\n"
        f"#     model = Application({model!r}, config)"
    )
