"""The functions of the package as they are called at a prompt, in a program and in a notebook."""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import nxdi_expertscale
from nxdi_expertscale import (
    CheckpointError,
    ConfigurationError,
    inspect_checkpoint,
    neuron_settings,
    quantize_checkpoint,
    verify_checkpoint,
)
from nxdi_expertscale.display import progress
from nxdi_expertscale.display.results import MOST_LAYERS, Table, html_table
from nxdi_expertscale.errors import naming_options, parameter
from tests.harness import checkpoints, readme
from tests.harness.limits import PATIENCE
from tests.harness.processes import quantizing_context


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("original") / "<src>")


@pytest.fixture(scope="module")
def dst(src: Path) -> Path:
    return Path(quantize_checkpoint(src, src.parent / "dst").destination)


class Terminal(io.StringIO):
    """A terminal that keeps what is written on it."""

    def isatty(self) -> bool:
        return True


def test_results_are_one_readable_line(src: Path, dst: Path) -> None:
    made = quantize_checkpoint(src, src.parent / "again")
    found = verify_checkpoint(dst, src)
    inspected = inspect_checkpoint(src)

    for shown in map(repr, (made, found, inspected, nxdi_expertscale.status())):
        assert "\n" not in shown and len(shown) < 600
    assert repr(made).startswith(f"<QuantizationResult checkpoint: {made.destination}, before: ")
    assert f"checkpoint: {dst}, verdict: good, checked: " in repr(found)
    assert f"experts: {checkpoints.EXPERTS} in each of" in repr(inspected)
    assert "experts=" not in repr(inspected.layers[0])
    assert "'expert_wise_scale': True" in repr(neuron_settings(dst))


def test_a_notebook_shows_tables_in_which_names_are_no_markup(src: Path, dst: Path) -> None:
    inspected, found = inspect_checkpoint(src), verify_checkpoint(dst, src)

    assert "&lt;src&gt;" in inspected._repr_html_() and "<src>" not in inspected._repr_html_()
    for layer in inspected.layers:
        assert f">{layer.spread:.2f}</td>" in inspected._repr_html_()
    for error in found.layers:
        assert f">{error.snr_db:.1f} dB</td>" in found._repr_html_()
    assert ">expert_wise_scale</th>" in neuron_settings(dst)._repr_html_()
    nxdi_expertscale.activate()
    seams = nxdi_expertscale.status()
    assert f">{seams[0].seam}</td>" in seams._repr_html_()


def test_faults_are_listed(dst: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in dst.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "<stray>.bin").touch()

    found = verify_checkpoint(copy)

    assert "verdict: 1 fault," in repr(found) and "first fault: <stray>.bin: is no part" in repr(
        found
    )
    assert ">&lt;stray&gt;.bin</td>" in found._repr_html_()


def test_long_tables_are_cut() -> None:
    shown = html_table(Table("t", ("layer",), tuple((str(n),) for n in range(MOST_LAYERS + 3))))

    assert shown.count("<tr>") == MOST_LAYERS + 1
    assert "and 3 more" in shown


def test_everything_public_is_in_dir_and_in_all() -> None:
    assert sorted(nxdi_expertscale.__all__) == nxdi_expertscale.__all__ == dir(nxdi_expertscale)


def test_block_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path / "Qwen3-30B-A3B")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(readme.block("python", "from nxdi_expertscale import"), names)

    assert names["settings"].neuron_config["tp_degree"] == 4


class TestBars:
    """Who looks on sees how far a call has come, if it is not told otherwise."""

    def test_a_terminal_has_one_by_default(
        self, src: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", Terminal())
        inspect_checkpoint(src)
        assert "reading" in sys.stderr.getvalue()  # type: ignore[attr-defined]

    def test_not_where_it_is_unwanted_or_is_a_log(
        self, src: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for stream, wanted in ((Terminal(), False), (io.StringIO(), True)):
            monkeypatch.setattr(sys, "stderr", stream)
            inspect_checkpoint(src, progress=wanted)
            assert stream.getvalue() == ""

    def test_an_error_before_the_work_shows_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", Terminal())
        with pytest.raises(CheckpointError):
            quantize_checkpoint(tmp_path / "none", tmp_path / "dst")
        assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]

    def test_a_function_is_called_instead(self, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", Terminal())
        steps: list[tuple[int, int]] = []
        inspect_checkpoint(src, progress=lambda *step: steps.append(step))
        assert steps[-1][0] == steps[-1][1] > 0
        assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]

    def test_a_notebooks_bar_is_updated_in_place_and_not_too_often(self) -> None:
        shown: list[Any] = []

        class Handle:
            def update(self, content: Any, raw: bool) -> None:
                shown.append(content)

        def display(content: Any, raw: bool, display_id: bool) -> Handle:
            shown.append(content)
            return Handle()

        now = [0.0]
        bar = progress.NotebookBar("work", in_bytes=False, display=display, clock=lambda: now[0])
        for now[0], done in ((0.1, 1), (0.2, 2), (1.0, 50), (1.1, 100)):
            bar(done, 100)

        assert [content["text/plain"] for content in shown] == [
            "work: 1%, 1 of 100, 10 a second, 0:00:10 left",
            "work: 50%, 50 of 100, 50 a second, 0:00:01 left",
            "work: 100%, 100 of 100, 91 a second, 0:00:00 left",
        ]
        assert '<progress value="50" max="100">' in shown[1]["text/html"]


def run_in_notebook(src: Path, dst: Path) -> str:
    """Run cells in IPython's shell, with what a kernel adds to it: what it sends, as JSON."""
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.kernel = object()
    shell.display_pub = CapturingDisplayPublisher()
    cell = (
        "from nxdi_expertscale import *\n"
        f"result = quantize_checkpoint({str(src)!r}, {str(dst)!r})\n"
        f"verify_checkpoint({str(dst)!r}, progress=False)"
    )
    done = shell.run_cell(cell)
    done.raise_error()
    formatted, _ = shell.display_formatter.format(done.result)
    return json.dumps([shell.display_pub.outputs, formatted])


def test_in_a_notebook_the_bar_is_below_the_cell_and_the_result_a_table(
    src: Path, tmp_path: Path
) -> None:
    pytest.importorskip("IPython")
    with ProcessPoolExecutor(1, quantizing_context()) as pool:
        sent = json.loads(pool.submit(run_in_notebook, src, tmp_path / "dst").result(PATIENCE))

    bars, shown = sent
    assert bars[0]["update"] is False and all(bar["update"] for bar in bars[1:])
    assert {bar["transient"]["display_id"] for bar in bars} == {bars[0]["transient"]["display_id"]}
    assert bars[-1]["data"]["text/plain"].startswith("quantizing: 100%, ")
    assert "<progress " in bars[-1]["data"]["text/html"]
    assert ">good</td>" in shown["text/html"] and "verdict: good" in shown["text/plain"]


class TestTerms:
    """Messages name parameters to whoever calls functions, and options to whoever types them."""

    @pytest.mark.parametrize(
        ("arguments", "error", "of_function", "of_command"),
        [
            ({}, CheckpointError, "overwrite=True", "--overwrite"),
            ({"workers": 0}, ConfigurationError, "workers: 0", "--workers: 0"),
            (
                {"modules_to_not_convert": [""]},
                ConfigurationError,
                "modules_to_not_convert: an empty name",
                "--modules-to-not-convert: an empty name",
            ),
            (
                {"modules_to_not_convert": ["layers.0.mlp.experts.1"], "overwrite": True},
                ConfigurationError,
                "modules_to_not_convert: '",
                "--modules-to-not-convert: '",
            ),
        ],
    )
    def test_they_do(
        self,
        arguments: dict[str, Any],
        error: type[Exception],
        of_function: str,
        of_command: str,
        src: Path,
        dst: Path,
    ) -> None:
        with pytest.raises(error) as in_python:
            quantize_checkpoint(src, dst, **arguments)
        with pytest.raises(error) as on_command_line, naming_options():
            quantize_checkpoint(src, dst, **arguments)

        assert of_function in str(in_python.value) and "--" not in str(in_python.value)
        assert of_command in str(on_command_line.value)

    def test_only_as_long_as_the_command_line_runs(self) -> None:
        with naming_options():
            assert parameter("keep_mtp", "True") == "--keep-mtp"
        assert parameter("keep_mtp", "True") == "keep_mtp=True"
