"""Runs on a cluster, without one: Ray is stood in for. ``tox -e sources`` has the real Ray."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.write import cluster, cluster_node
from nxdi_expertscale.checkpoint.write.cluster_node import Job, Node, fingerprint
from nxdi_expertscale.checkpoint.write.destination import FolderDestination
from nxdi_expertscale.checkpoint.write.staging import RUN, WORK
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.sources.folder import Folder, open_folder
from nxdi_expertscale.sources.locate import address_of
from tests.harness import checkpoints

FAKE = Path(__file__).parents[1] / "harness" / "fake_ray"

SETTINGS: dict[str, Any] = {"max_shard_bytes": 20_000, "workers": 1}

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Stand in for Ray, and say what goes wrong."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    return lambda **wrong: monkeypatch.setenv("FAKE_RAY", json.dumps(wrong))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


def made_alone(src: Path, tmp_path: Path) -> dict[str, bytes]:
    quantize_checkpoint(src, tmp_path / "alone", **SETTINGS)
    return checkpoints.contents(tmp_path / "alone")


def test_nodes_make_what_one_machine_makes(
    script: Script, src: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script()
    seen: list[tuple[int, int]] = []

    result = quantize_checkpoint(
        src, tmp_path / "made", ray="auto", progress=lambda *done: seen.append(done), **SETTINGS
    )

    assert result.shards > 2
    assert checkpoints.contents(tmp_path / "made") == made_alone(src, tmp_path)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert capfd.readouterr() == ("", "")


def test_shards_of_a_lost_node_are_done_by_another(
    script: Script, src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script(lost={"1": "write"}, nodes=2)

    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(src, tmp_path / "made", ray="auto", **SETTINGS)

    assert caplog.messages == ["node host-1 is lost; others write its shards"]
    assert checkpoints.contents(tmp_path / "made") == made_alone(src, tmp_path)


def test_a_node_that_never_joins_is_done_without(
    script: Script, src: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script(lost={"1": "join"})

    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(src, tmp_path / "made", ray="auto", **SETTINGS)

    assert caplog.messages == []


def test_an_error_of_a_node_arrives_as_it_is(script: Script, tmp_path: Path) -> None:
    script(nodes=1)
    values = checkpoints.tensors()
    name = next(name for name in values if name.endswith("down_proj.weight"))
    values[name][1, 2] = torch.nan
    src = checkpoints.save(tmp_path / "src", values)

    with pytest.raises(CheckpointError, match=r"down_proj\.weight: has NaN or infinity"):
        quantize_checkpoint(src, tmp_path / "made", ray="auto", **SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init": "refuse"}, r"^ray auto: this host cannot join \(Version mismatch: .* 3\.9\.1\)"),
        ({"init": "abort"}, r"^ray auto: Ray ended on this host \(Ray prints this, .*again when"),
        ({"probe": {"1": "0.0.1"}}, r"^Ray: node host-1 has nxdi-expertscale 0\.0\.1, and this"),
        ({"probe": {"0": None}}, r"^Ray: node host-0 has no nxdi-expertscale, and this host"),
        ({"nodes": 0}, r"^Ray: the cluster's node on this host has ended"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_told_in_one_line(
    script: Script, src: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    script(**wrong)

    with pytest.raises((CheckpointError, ConfigurationError), match=message) as found:
        quantize_checkpoint(src, tmp_path / "made", ray="auto", **SETTINGS)

    assert "\n" not in str(found.value)
    assert not (tmp_path / "made").exists()


def test_a_cluster_that_does_not_answer_is_given_up(
    script: Script, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(init="hang")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)

    with pytest.raises(ConfigurationError, match="does not answer within"):
        quantize_checkpoint(src, tmp_path / "made", ray="auto")


@pytest.mark.parametrize(
    "address", ["", "host", "host:0", "host:99999", "ray://host:10001", "a b:1"]
)
def test_what_is_no_address_is_refused(src: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the address of a cluster"):
        quantize_checkpoint(src, tmp_path / "made", ray=address)


def test_extra_is_named_where_ray_is_missing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(ConfigurationError, match=r"pip install 'nxdi-expertscale\[ray\]'"):
        quantize_checkpoint(src, tmp_path / "made", ray="auto")


def test_a_head_that_is_not_there_is_told_at_once(
    script: Script, src: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"ray 127\.0\.0\.1:1: no cluster can be reached"):
        quantize_checkpoint(src, tmp_path / "made", ray="127.0.0.1:1")


class TestNode:
    """What runs on a node, in this process."""

    def job(self, src: Path, dst: Path, **differing: str) -> Job:
        (dst / WORK).mkdir(parents=True)
        (dst / WORK / RUN).write_text("this run")
        source = open_folder(src)
        names = ["model-00001-of-00003.safetensors"]
        found = {name: fingerprint(source, name) for name in names}
        return Job("this run", str(src), found | differing, FolderDestination(dst), None, 1)

    def test_it_writes_under_names_of_its_own(self, src: Path, tmp_path: Path) -> None:
        store = self.job(src, tmp_path / "dst").destination.node_store("this run")
        other = FolderDestination(tmp_path / "dst").node_store("this run")

        assert store.is_of_run()
        assert store.stored_as("model.safetensors") != other.stored_as("model.safetensors")
        store.close()
        other.close()

    def test_a_destination_that_is_not_shared_is_refused(
        self, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cluster_node, "SHARED_SECONDS", 0.0)
        job = self.job(src, tmp_path / "dst")
        for content in ("another run", None):
            run = tmp_path / "dst" / WORK / RUN
            run.write_text(content) if content else run.unlink()
            with pytest.raises(CheckpointError, match=r"dst: node \S+ does not see what this host"):
                Node(job, 1).join()

    def test_a_source_that_is_not_there_is_told_with_the_node(
        self, src: Path, tmp_path: Path
    ) -> None:
        job = self.job(src, tmp_path / "dst")
        src.rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=rf"^node \S+: {src}: is not a folder"):
            Node(job, 1).join()

    def test_a_source_that_is_another_one_is_refused(self, src: Path, tmp_path: Path) -> None:
        name = "model-00002-of-00003.safetensors"
        job = self.job(src, tmp_path / "dst", **{name: "1:2"})
        with pytest.raises(CheckpointError, match=rf"{name}: node \S+ does not have the file"):
            Node(job, 1).join()


def test_a_model_of_the_hub_is_named_by_its_commit(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src")
    name = "model-00001-of-00003.safetensors"
    cached = Folder(src, origin="hf://org/small@0123")

    assert address_of(cached) == "org/small@0123"
    assert address_of(open_folder(src)) == str(src)
    assert fingerprint(cached, name) == str((src / name).stat().st_size)
