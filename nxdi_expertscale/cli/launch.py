"""What serves a finished checkpoint, to be typed or pasted: vLLM's command, NxDI's Python."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.errors import ConfigurationError

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import NeuronSettings
    from nxdi_expertscale.checkpoint.read.model import Model

SEQ_LEN = 2048
"""Tokens of the longest sequence, where none is named: vLLM-Neuron does not start without it."""

BATCH_SIZE = 4
"""Requests at once, where no number is named."""


def sizes(settings: NeuronSettings) -> dict[str, Any]:
    """Keywords of ``MoENeuronConfig`` as vLLM-Neuron sets them, where none is named.

    vLLM-Neuron takes the two lengths from ``--max-model-len``, and encodes contexts one by one.
    """
    given = settings.neuron_config
    length = given.get("seq_len", SEQ_LEN)
    usual = {"seq_len": length, "max_context_length": length, "ctx_batch_size": 1}
    return {"batch_size": BATCH_SIZE, "enable_bucketing": True, **usual, **given}


def check_vllm(settings: NeuronSettings, model: Model) -> None:
    """Refuse what vLLM itself refuses when it starts.

    Args:
        settings: The checkpoint's.
        model: The checkpoint.

    Raises:
        ConfigurationError: vLLM would not start; the message says what to write instead.
    """
    degree, heads = settings.neuron_config.get("tp_degree", 1), model.config.num_attention_heads
    # vLLM: config/model.py, verify_with_parallel_config.
    if heads is not None and heads % degree:
        raise ConfigurationError(
            f"--tp-degree {degree} for {heads} heads: vLLM takes degrees alone that divide the "
            f"model's heads; use one of {', '.join(map(str, _divisors(heads)))}"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def vllm_command(settings: NeuronSettings, model: str) -> str:
    """The command that serves a checkpoint with vLLM-Neuron.

    Args:
        settings: The checkpoint's.
        model: What vLLM is to read the config and the tokenizer from: the FP8 folder has both, so
            that the original need not be there.
    """
    keywords = sizes(settings)
    arguments = ["vllm", "serve", model]
    if "tp_degree" in keywords:
        arguments += ["--tensor-parallel-size", str(keywords["tp_degree"])]
    arguments += ["--max-model-len", str(keywords["seq_len"])]
    arguments += ["--max-num-seqs", str(keywords["batch_size"])]
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
