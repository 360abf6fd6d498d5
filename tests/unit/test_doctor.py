"""How ``doctor`` judges what is installed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import pytest

from nxdi_expertscale.activation import status
from nxdi_expertscale.diagnostics import doctor, packages, probe
from nxdi_expertscale.diagnostics.model_check import ModelReport
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.diagnostics.releases import Release
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.patch import SeamStatus, State
from nxdi_expertscale.plugins.registry import families_in_force


@pytest.fixture(autouse=True)
def _no_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NXDI_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def healthy(nxdi: str, nxd: str = "0.18.0") -> Probe:
    """A probe that finds these versions, and everything in order."""
    seams = tuple(dataclasses.replace(seam, state=State.APPLIED) for seam in status())
    return Probe(seams=seams, versions={probe.NXDI: nxdi, probe.NXD: nxd}, has_nxdi=True)


def test_tested_release_has_no_warning() -> None:
    answer = doctor.judge(healthy("0.9.0"))

    assert (answer.works, answer.warnings) == (True, ())
    assert answer.verdict == "yes: expert_wise_scale works here, with NxDI 0.9.0"
    assert answer.release == Release("0.9", "0.18", "2.29")


def test_contributed_model_that_is_not_imported_is_no_finding() -> None:
    found = healthy("0.9.0")
    waiting = SeamStatus("state_dict:x", "*.modeling_x", "convert", State.WAITING, "no module")

    answer = doctor.judge(dataclasses.replace(found, seams=(*found.seams, waiting)))

    assert (answer.works, answer.warnings) == (True, ())


@pytest.mark.parametrize("version", ["0.11.1", "1.0", "0.4.2"])
def test_other_release_is_tried_with_a_warning(version: str) -> None:
    answer = doctor.judge(healthy(version))

    assert (answer.works, answer.release) == (True, None)
    (warning,) = answer.warnings
    assert f"NxDI {version} is not a release that was tested (0.5 to 0.9)" in warning


@pytest.mark.parametrize("version", ["0.10.17970", "0.10.18399"])
def test_release_without_public_sources_is_tried_seam_by_seam(version: str) -> None:
    answer = doctor.judge(healthy(version, nxd="0.19.0"))

    assert (answer.works, answer.release) == (True, None)
    (warning,) = answer.warnings
    assert f"NxDI {version} is of Neuron SDK 2.30 and 2.31" in warning
    assert answer.verdict.startswith("yes, with 1 warning")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let distributions of these versions be installed."""

    def install(**versions: str) -> None:
        found = {name.replace("_", "-"): version for name, version in versions.items()}
        before = packages.installed_versions

        def installed(from_sources: Mapping[str, str]) -> dict[str, str | None]:
            return {**before(from_sources), **found}

        monkeypatch.setattr(doctor, "installed_versions", installed)

    return install


@pytest.mark.parametrize(
    ("neuron", "vllm", "nxdi"),
    [
        ("0.2.0", "0.11.0", "0.7.1"),
        ("0.2.0", "0.11.0", "0.6.1"),
        ("0.2.2+lts", "0.11.0", "0.7.1"),
        ("0.4.1", "0.13.0", "0.8.1"),
        ("0.5.0", "0.16.0", "0.9.1"),
    ],
)
def test_releases_of_vllm_neuron_that_belong_to_these_have_no_warning(
    install: Callable[..., None], neuron: str, vllm: str, nxdi: str
) -> None:
    install(vllm=vllm, vllm_neuron=neuron)
    nxd = {"0.6": "0.15", "0.7": "0.16", "0.8": "0.17", "0.9": "0.18"}[nxdi[:3]]

    answer = doctor.judge(dataclasses.replace(healthy(nxdi, nxd), vllm_neuron_uses_nxdi=True))

    assert (answer.works, answer.warnings) == (True, ())


@pytest.mark.parametrize(
    ("neuron", "vllm", "nxdi", "expected"),
    [
        ("0.5.0", "0.13.0", "0.9.1", "vLLM-Neuron 0.5.0 belongs to vLLM 0.16.0"),
        ("0.4.1", "0.13.0", "0.9.1", r"vLLM-Neuron 0.4.1 belongs to NxDI 0.8 \(Neuron SDK 2.28\)"),
        ("0.6.0", "0.16.0", "0.9.1", "vLLM-Neuron 0.6.0 is not a release that was tested"),
    ],
)
def test_what_does_not_belong_together_is_a_warning(
    install: Callable[..., None], neuron: str, vllm: str, nxdi: str, expected: str
) -> None:
    install(vllm=vllm, vllm_neuron=neuron)

    answer = doctor.judge(dataclasses.replace(healthy(nxdi), vllm_neuron_uses_nxdi=True))

    assert answer.works
    (warning,) = answer.warnings
    assert re.match(expected, warning)


def test_native_vllm_neuron_is_a_verdict_of_its_own(install: Callable[..., None]) -> None:
    install(vllm="0.24.0", vllm_neuron="1.0.0")

    answer = doctor.judge(dataclasses.replace(healthy("0.9.1"), vllm_neuron_uses_nxdi=False))

    assert answer.verdict == (
        "no with vLLM: the native vLLM-Neuron has no NxDI, and refuses this checkpoint; yes "
        "without it, with NxDI 0.9.1"
    )
    (warning,) = answer.warnings
    assert "serve with vLLM-Neuron 0.2.0 to 0.5.0 (Neuron SDK 2.26 to 2.31)" in warning


def test_nxd_of_another_release_is_a_warning() -> None:
    answer = doctor.judge(healthy("0.9.0", nxd="0.17.3+abc"))

    assert answer.works
    (warning,) = answer.warnings
    assert "belongs to NxD 0.18" in warning


def unreachable(reasons: Mapping[str, str]) -> Probe:
    """A probe that could import nothing of NxDI, for these reasons by the start of a module."""
    modules = {
        "config": f"{probe.NXDI}.models.config",
        "load_module": f"{probe.NXDI}.models.model_wrapper",
        "trace": f"{probe.NXD}.trace.trace",
    }
    failures = {
        module: next(why for start, why in reasons.items() if module.startswith(start))
        for module in modules.values()
    }
    waiting = tuple(
        SeamStatus(seam, module, "f", State.WAITING, "") for seam, module in modules.items()
    )
    versions = {probe.NXDI: "0.9.0", probe.NXD: "0.18.0"}
    return Probe(seams=waiting, failures=failures, versions=versions, has_nxdi=True)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("torch_xla", "torch_xla is not installed; pip install --extra-index-url"),
        ("torch_neuronx.xla_impl", "repos.neuron.amazonaws.com torch-neuronx"),
        ("neuronx_distributed", "neuron.amazonaws.com 'neuronx-distributed==0.18.*'"),
        ("nkilib.core", "neuron.amazonaws.com neuronx-cc"),
        ("neuronx_distributed.trace", "parts of neuronx_distributed are missing; pip install"),
        ("scipy", "scipy is not installed; pip install scipy"),
    ],
)
def test_missing_package_is_one_problem_with_the_command(missing: str, says: str) -> None:
    reason = f"ModuleNotFoundError: No module named '{missing}'"

    answer = doctor.judge(unreachable({"": reason}))

    (found,) = (problem for problem in answer.problems if "torch is not" not in problem)
    assert says in found
    assert "models.config (and 2 more) cannot be imported: " in found


def test_two_causes_are_two_findings() -> None:
    reasons = {
        probe.NXDI: "ModuleNotFoundError: No module named 'torch_xla.core'",
        "": "ImportError: undefined symbol",
    }

    answer = doctor.judge(unreachable(reasons))

    findings = [*answer.problems, *answer.warnings]
    assert sum("cannot be imported" in finding for finding in findings) == 2


def test_nxd_of_another_release_has_the_command_that_mends_it() -> None:
    (warning,) = doctor.judge(healthy("0.9.0", nxd="0.17.3+abc")).warnings

    assert warning.endswith("'neuronx-distributed==0.18.*'")


def test_mismatch_is_the_cause_of_what_cannot_be_imported() -> None:
    """One problem, and not one for each module and seam that it breaks."""
    reasons = {
        probe.NXDI: "ImportError: cannot import name 'KVQuantizationConfig'",
        "": "AttributeError: no convert",
    }
    found = unreachable(reasons)
    misfit = SeamStatus("quantization", "m", "f", State.INCOMPATIBLE, "other arguments")
    versions = {probe.NXDI: "0.9.0", probe.NXD: "0.14.0"}

    answer = doctor.judge(
        dataclasses.replace(found, seams=(*found.seams, misfit), versions=versions)
    )

    (told,) = answer.problems
    assert told.startswith("NxDI 0.9.0 belongs to NxD 0.18 (Neuron SDK 2.29), and NxD 0.14.0 is")
    assert "'neuronx-distributed==0.18.*' (seen in this: " in told
    assert answer.warnings == ()


def test_missing_package_is_told_beside_a_mismatch() -> None:
    found = unreachable({"": "ModuleNotFoundError: No module named 'torch_xla'"})
    versions = {probe.NXDI: "0.9.0", probe.NXD: "0.14.0"}

    answer = doctor.judge(dataclasses.replace(found, versions=versions))

    assert [text.partition(";")[0][-26:] for text in answer.problems] == [
        "torch_xla is not installed"
    ]
    assert "belongs to NxD 0.18" in answer.warnings[0]


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        (
            {"torch": "2.13.0+cpu", "torch-neuronx": "2.8.0.2.10.13553", "torch-xla": "2.8.1"},
            "torch-neuronx 2.8.0.2.10.13553 was built for torch 2.8, and torch 2.13.0+cpu is "
            "installed; pip install --extra-index-url https://pip.repos.neuron.amazonaws.com "
            "'torch-neuronx==2.8.*'",
        ),
        (
            {"torch": "2.8.0", "torch-neuronx": "2.8.0.2.10", "torch-xla": "2.7.0"},
            "torch-xla 2.7.0 was built for torch 2.7, and torch 2.8.0 is installed; pip install "
            "--extra-index-url https://pip.repos.neuron.amazonaws.com 'torch-neuronx==2.8.*'",
        ),
        ({"torch": "2.8.0", "torch-neuronx": "2.8.0.2.10", "torch-xla": "2.8.1"}, None),
        ({"torch": "2.8.0", "torch-neuronx": None, "torch-xla": None}, None),
    ],
)
@pytest.mark.parametrize("is_broken", [False, True])
def test_closed_packages_of_another_torch_are_one_finding(
    install: Callable[..., None], installed: dict[str, str], says: str | None, is_broken: bool
) -> None:
    install(**{name.replace("-", "_"): version for name, version in installed.items()})
    broken = unreachable({"": "ImportError: _XLAC.so: undefined symbol: _ZN2at"})

    answer = doctor.judge(broken if is_broken else healthy("0.9.0"))

    if says is None:
        assert answer.works != is_broken and answer.warnings == ()
    elif is_broken:
        (problem,) = answer.problems
        assert problem.startswith(f"{says} (seen in this: ")
        assert "undefined symbol" in problem
    else:
        assert (answer.works, answer.warnings) == (True, (says,))


def model_of(family: MoEFamily) -> ModelReport:
    return ModelReport({}, (), family)


def family_named(name: str) -> MoEFamily:
    return next(family for family in families_in_force() if family.name == name)


def test_nxdi_without_the_model_is_a_no_for_this_model_alone() -> None:
    module = f"{probe.NXDI}.models.llama4.modeling_llama4_text"
    qwen = SeamStatus("state_dict:qwen3_moe", "m", "convert", State.APPLIED, "")
    llama = SeamStatus("state_dict:llama4", module, "convert", State.WAITING, "")
    failures = {module: f"ModuleNotFoundError: No module named '{module}'"}
    found = dataclasses.replace(healthy("0.9.0"), seams=(qwen, llama), failures=failures)

    of_llama, of_qwen = (
        doctor.judge(found, model_of(family_named(name))) for name in ("llama4", "qwen3_moe")
    )

    assert (of_llama.works, of_qwen.works) == (False, True)
    assert f"{module} cannot be imported" in of_llama.problems[0]


def test_contributed_model_has_to_bring_its_code() -> None:
    seam = SeamStatus("state_dict:glm4_moe", "*.modeling_glm4_moe", "f", State.WAITING, "")
    found = dataclasses.replace(healthy("0.9.0"), seams=(seam,))

    answer = doctor.judge(found, model_of(family_named("glm4_moe")))

    assert answer.works
    (warning,) = answer.warnings
    assert "modeling_glm4_moe.py of its contribution" in warning
