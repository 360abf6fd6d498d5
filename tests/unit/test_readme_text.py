"""What the README says in words and numbers is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import picture, sizes
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.diagnostics.releases import (
    RELEASES,
    VLLM_NEURON_RELEASES,
    WITHOUT_SOURCES,
)
from tests.harness import checkpoints, readme

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
OF_UPSTREAM = ("NxDI", "vLLM")
"""Whose message a row of the list of messages is, if it is not ours."""


def section(title: str) -> str:
    """The text of a section, up to the next."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_there_are_no_links_that_only_work_in_a_checkout() -> None:
    targets = re.findall(r"\]\(([^)]*)\)", TEXT)

    assert [target for target in targets if not target.startswith("https://")] == []


def test_versions_that_belong_together_are_those_of_the_doctor() -> None:
    table = {row[0]: row[1:] for row in rows(section("Where to get it"))}

    for release in RELEASES:
        nxdi, nxd, neuron, vllm = table[release.sdk]
        of_vllm = [item for item in VLLM_NEURON_RELEASES if release.nxdi in item.nxdi]
        assert (nxdi, nxd) == (release.nxdi, release.nxd)
        assert neuron == (", ".join(item.version for item in of_vllm) or "—")
        assert {vllm} == ({item.vllm for item in of_vllm} or {"—"})
    for nxdi, sdk in WITHOUT_SOURCES.items():
        assert table[sdk][0].startswith(nxdi)


def test_sizes_are_those_that_are_computed() -> None:
    assert sizes.render() in section("Where to get it")


def test_sizes_are_those_of_the_tensors_that_are_read_and_written(tmp_path: Path) -> None:
    config = checkpoints.CONFIG
    model = sizes.Published(
        "tiny",
        *(
            config[name]
            for name in (
                "num_hidden_layers",
                "hidden_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "num_experts",
                "moe_intermediate_size",
                "vocab_size",
            )
        ),
    )
    src = checkpoints.save(tmp_path / "src")
    dst = quantize_checkpoint(src, tmp_path / "dst").destination

    stored = [
        sum(tensor.nbytes for tensor in open_model(folder).files.tensors.values())
        for folder in (src, dst)
    ]

    assert stored == [model.bfloat16_bytes, model.fp8_bytes]


@pytest.mark.parametrize(
    ("gigabytes", "degree"), [(1, 4), (4 * 18, 4), (4 * 18 + 1, 8), (16 * 18 + 1, 32)]
)
def test_degree_is_the_smallest_whose_cores_hold_the_weights(gigabytes: int, degree: int) -> None:
    assert sizes.MODELS[0].smallest_tp_degree(gigabytes * sizes.GB) == degree


def test_picture_is_as_it_is_drawn() -> None:
    drawn = readme.block("text", "with the mean as everyone's scale")
    ratios = [float(line.split()[2]) for line in drawn.splitlines()[1:]]

    assert len(ratios) == 16
    for line, again in zip(drawn.splitlines(), picture.render(ratios).splitlines(), strict=True):
        # The figures are rounded to two digits, so that a bar and a factor may be off by one.
        assert re.sub(r"#+ *|\d\.\d ", "", line) == re.sub(r"#+ *|\d\.\d ", "", again)


def test_messages_are_those_of_the_code() -> None:
    package = ROOT / "nxdi_expertscale"
    code = " ".join(file.read_text() for file in sorted(package.rglob("*.py")))
    # Texts are split over lines, and filled with values.
    texts = re.sub(r'"\s*f?"', "", code).replace("{FLAG}", "expert_wise_scale")
    texts = texts.replace("{MANIFEST}", "nxdi_expertscale.json").replace("%s", "expert_wise_scale")

    for message, *_ in rows(section("Troubleshooting, by message"))[1:]:
        quoted, whose = re.fullmatch(r"`(.*)`(?: \((\w+)\))?", message).groups()  # type: ignore[union-attr]
        assert whose in OF_UPSTREAM or quoted in texts, quoted


def test_every_block_is_one_that_a_test_runs() -> None:
    """Here is by which; what needs another index, or a device's host, is said to need it."""
    run = {
        "with the mean as everyone's scale": "test_picture_is_as_it_is_drawn",
        "pip install . ": "tests/packaging, the same in each Python",
        "pip wheel": "tests/harness/installed.py, build_wheel",
        "nxdi-expertscale demo": "tests/cli/test_demo.py, its command",
        "download.pytorch.org": "nothing: another index",
        "nxdi-expertscale evaluate": "tests/cli/test_readme.py",
        "nxdi-expertscale doctor": "tests/cli/test_readme.py",
        "vllm serve": "tests/server/test_serve.py",
        "loaded 2 layers": "tests/server/test_serve.py",
        "curl": "tests/cli/test_readme.py",
        "import nxdi_expertscale": "tests/cli/test_readme.py",
        "from nxdi_expertscale import": "tests/unit/test_results.py",
        "inference_demo --model-type": "tests/cli/test_readme.py",
        "NXDI_PLUGINS= ": "tests/cli/test_startup.py, the variable and the uninstallation",
        "cli          →": "tests/unit/test_rooms.py",
        "tox run": ".ci/run",
    }
    blocks = re.findall(r"^```\w*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

    for block in blocks:
        assert len([text for text in run if text in block]) == 1, block
    assert len(blocks) == len(run)
