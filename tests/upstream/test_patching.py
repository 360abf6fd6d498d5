"""The patches: put on, taken off again, and kept away from what does not fit."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nxdi_expertscale
from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.hooking.patch import SeamStatus
from tests.harness import models

CONVERTER = "convert_qwen3_moe_hf_to_neuron_state_dict"


@pytest.fixture(scope="session")
def fp8(nxdi: Any, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return nxdi.quantize(moe, tmp_path_factory.mktemp("fp8"))


@contextlib.contextmanager
def activated() -> Iterator[None]:
    nxdi_expertscale.activate()
    try:
        yield
    finally:
        nxdi_expertscale.deactivate()


def seams_of_nxdi() -> list[SeamStatus]:
    """The seams that NxDI's sources have: not those of vLLM-Neuron and of contributed models."""
    return [
        seam
        for seam in nxdi_expertscale.status()
        if not seam.module.startswith(("vllm_neuron.", "*."))
    ]


def places_of_seams() -> list[tuple[Any, str]]:
    """For each seam of NxDI's, the module or class that holds it, and its name there."""
    places = []
    for seam in seams_of_nxdi():
        owner: Any = importlib.import_module(seam.module)
        *path, name = seam.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        places.append((owner, name))
    return places


@pytest.mark.usefixtures("nxdi")
def test_every_seam_is_patched_and_deactivation_puts_back_the_very_objects() -> None:
    with activated():
        places = places_of_seams()
        states = {(seam.state, seam.reason) for seam in seams_of_nxdi()}
        contributed = [s for s in nxdi_expertscale.status() if s.module.startswith("*.")]
        patched = [vars(owner)[name] for owner, name in places]
        signatures = [inspect.signature(getattr(owner, name)) for owner, name in places]
        nxdi_expertscale.activate()
        assert all(
            vars(owner)[name] is patch for (owner, name), patch in zip(places, patched, strict=True)
        )

    assert states == {("applied", "")}
    # No contribution is imported here, and NxDI has nothing that could be taken for one.
    assert all(seam.state == "waiting" for seam in contributed)
    assert nxdi_expertscale.status() == ()
    for (owner, name), patch, signature in zip(places, patched, signatures, strict=True):
        original = vars(owner)[name]
        assert patch is not original
        assert patch.__wrapped__ is original
        assert signature == inspect.signature(getattr(owner, name))


def test_deactivated_nxdi_is_the_stock_one(
    nxdi: Any, moe: Path, fp8: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with activated():
        pass

    with pytest.raises(RuntimeError, match="Cannot find"):
        nxdi.load(moe, **fp8)
    nxdi.inference_config(moe, **fp8, expert_wise_scale=True)
    assert "Unexpected keyword arguments: {'expert_wise_scale': True}" in caplog.text


def test_unquantized_model_is_untouched(nxdi: Any, moe: Path) -> None:
    stock = nxdi.convert(moe)
    logits = nxdi.load(moe).logits(models.prompt())

    with activated():
        assert nxdi.different_tensors(nxdi.convert(moe), stock) == []
        assert torch.equal(nxdi.load(moe).logits(models.prompt()), logits)


def test_quantized_dense_model_is_untouched(nxdi: Any, tmp_path: Path) -> None:
    dense = models.save_qwen3(tmp_path / "dense")
    settings = nxdi.quantize(dense, tmp_path / "fp8", not_converted=["lm_head"])
    stock = nxdi.load(dense, **settings).logits(models.prompt())

    with activated():
        for flag in (True, False):
            loaded = nxdi.load(dense, **settings, expert_wise_scale=flag)
            assert torch.equal(loaded.logits(models.prompt()), stock)


Change = Callable[[pytest.MonkeyPatch], None]


def rename_converter(patch: pytest.MonkeyPatch) -> None:
    module, application = converter_module()
    converter = getattr(module, CONVERTER)
    patch.delattr(module, CONVERTER)
    patch.setattr(
        application,
        "convert_hf_to_neuron_state_dict",
        staticmethod(lambda state_dict, config: converter(state_dict, config)),  # noqa: PLW0108
    )


def add_argument_to_converter(patch: pytest.MonkeyPatch) -> None:
    module, application = converter_module()
    converter = getattr(module, CONVERTER)
    patch.setattr(module, CONVERTER, lambda state_dict, config, rank: converter(state_dict, config))
    patch.setattr(
        application,
        "convert_hf_to_neuron_state_dict",
        staticmethod(lambda state_dict, config: getattr(module, CONVERTER)(state_dict, config, 0)),
    )


def stop_calling_converter(patch: pytest.MonkeyPatch) -> None:
    module, application = converter_module()
    converter = getattr(module, CONVERTER)
    patch.setattr(
        application,
        "convert_hf_to_neuron_state_dict",
        staticmethod(lambda state_dict, config: converter(state_dict, config)),  # noqa: PLW0108
    )


def take_include_from_convert(patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("neuronx_distributed_inference.models.model_wrapper")
    convert = module.convert

    def without_include(
        module: Any, q_config: Any, inplace: bool, mapping: Any, modules_to_not_convert: Any
    ) -> Any:
        return convert(
            module,
            q_config=q_config,
            inplace=inplace,
            mapping=mapping,
            modules_to_not_convert=modules_to_not_convert,
        )

    patch.setattr(module, "convert", without_include)


def call_convert_by_another_name(patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("neuronx_distributed_inference.models.model_wrapper")
    load_module = module.DecoderModelInstance.load_module
    patch.setattr(module.DecoderModelInstance, "load_module", lambda self: load_module(self))  # noqa: PLW0108


def converter_module() -> tuple[Any, Any]:
    module: Any = importlib.import_module(
        "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe"
    )
    return module, module.NeuronQwen3MoeForCausalLM


CHANGES = [
    (rename_converter, "state_dict:qwen3_moe"),
    (add_argument_to_converter, "state_dict:qwen3_moe"),
    (stop_calling_converter, "state_dict:qwen3_moe"),
    (take_include_from_convert, "quantization"),
    (call_convert_by_another_name, "quantization"),
]


@pytest.mark.parametrize(
    ("change", "seam"), CHANGES, ids=[change.__name__ for change, _ in CHANGES]
)
def test_changed_seam_is_left_alone_and_refused_to_users_of_the_flag(
    nxdi: Any,
    moe: Path,
    fp8: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    seam: str,
) -> None:
    expected = nxdi.load(moe).logits(models.prompt())
    change(monkeypatch)
    with activated():
        assert torch.equal(nxdi.load(moe).logits(models.prompt()), expected)
        found = {status.seam: status for status in nxdi_expertscale.status()}
        assert found[seam].state == "incompatible"
        assert found[seam].reason
        with pytest.raises(IncompatibleUpstreamError, match=seam):
            nxdi.load(moe, **fp8, expert_wise_scale=True)


def test_config_that_has_the_flag_is_left_to_itself(
    nxdi: Any, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = nxdi.MoENeuronConfig.__init__

    def knows_the_flag(
        self: Any, *args: Any, expert_wise_scale: bool = False, **kwargs: Any
    ) -> None:
        self.expert_wise_scale = expert_wise_scale
        init(self, *args, **kwargs)

    monkeypatch.setattr(nxdi.MoENeuronConfig, "__init__", knows_the_flag)
    with activated():
        config = nxdi.inference_config(moe, expert_wise_scale=True)

        [seam] = [seam for seam in nxdi_expertscale.status() if seam.seam == "config"]
        assert seam.state == "native"
        assert nxdi.MoENeuronConfig.__init__ is knows_the_flag
        assert config.neuron_config.expert_wise_scale is True
