"""A run on the nodes of a Ray cluster: the bytes of one machine, whatever ends meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.write import cluster as cluster_module
from nxdi_expertscale.checkpoint.write.staging import WORK
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from tests.harness import checkpoints, loopback_s3
from tests.harness.limits import PATIENCE
from tests.harness.loopback_s3 import S3, Stored

Cluster = pytest.importorskip("ray.cluster_utils").Cluster

FILES = 12
LAST = {f"model-{number:05d}-of-{FILES:05d}.safetensors" for number in range(FILES // 2, FILES + 1)}
"""The files of the second half of the source; what is made from them waits where they are held."""

SRC = "s3://bucket/src"
SETTINGS: dict[str, Any] = {"max_shard_bytes": 8_000, "workers": 1}

Files = dict[str, bytes]


class Nodes:
    """A cluster whose nodes are killed as a machine is: with all of their processes."""

    def __init__(self) -> None:
        self._settings = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self._cluster = Cluster(initialize_head=True, head_node_args=self._settings)
        self.address: str = self._cluster.address
        self._second: Any = None

    def add(self, **environment: str) -> Any:
        return self._cluster.add_node(**self._settings, env_vars=environment)

    def two(self) -> None:
        """See to it that there is a second node."""
        if self._second is None:
            self._second = self.add()

    def kill_second(self) -> None:
        raylet = self._second.all_processes["raylet"][0].process.pid
        for pid in (raylet, *children_of(raylet)):
            os.kill(pid, signal.SIGKILL)
        self.remove(self._second)
        self._second = None

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def writers(self) -> list[int]:
        """The processes that write shards on any node."""
        raylets = [
            node.all_processes["raylet"][0].process.pid for node in self._cluster.list_all_nodes()
        ]
        return [
            pid
            for raylet in raylets
            for pid in children_of(raylet)
            if "ray::Node" in Path(f"/proc/{pid}/cmdline").read_text()
        ]

    def shutdown(self) -> None:
        self._cluster.shutdown()


def children_of(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return list(map(int, text.split()))


def wait_for(state: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not state():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 that this process and all nodes find in their environment."""
    none = str(tmp_path_factory.getbasetemp() / "none")
    with pytest.MonkeyPatch.context() as patch, loopback_s3.serve() as served:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": served.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": none,
            "AWS_SHARED_CREDENTIALS_FILE": none,
            "RAY_USAGE_STATS_ENABLED": "0",
        }.items():
            patch.setenv(name, value)
        yield served


@pytest.fixture(scope="module")
def cluster(server: S3) -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture
def nodes(cluster: Nodes, server: S3) -> Iterator[Nodes]:
    """Two nodes, and a server that gives everything."""
    cluster.two()
    yield cluster
    server.held.clear()
    server.objects.clear()


@pytest.fixture
def src(tmp_path: Path, server: S3) -> Path:
    """A source of many files, in a folder and in S3."""
    folder = checkpoints.save(tmp_path / "src", shards=FILES)
    for path in folder.iterdir():
        server.objects["bucket", f"src/{path.name}"] = Stored(path.read_bytes(), {})
    return folder


def expected(source: Any, tmp_path: Path) -> Files:
    quantize_checkpoint(source, tmp_path / "expected", **SETTINGS)
    return checkpoints.contents(tmp_path / "expected")


def stored(server: S3, prefix: str) -> Files:
    return {
        key.removeprefix(f"{prefix}/"): found.content
        for (_, key), found in list(server.objects.items())
        if key.startswith(f"{prefix}/")
    }


def start(nodes: Nodes, src: object, dst: object) -> subprocess.Popen[str]:
    """Run the command, with many small files, in a session of its own as in a terminal."""
    program = (
        "import sys, functools\n"
        "import nxdi_expertscale.checkpoint.quantize as module\n"
        "from nxdi_expertscale import checkpoint, cli\n"
        f"checkpoint.quantize_checkpoint = functools.partial(module.quantize_checkpoint, "
        f"max_shard_bytes={SETTINGS['max_shard_bytes']})\n"
        "cli.main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, "quantize", str(src), str(dst), "--ray", nodes.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(dst: Path) -> list[str]:
    return [path.name for path in (dst / WORK).glob("*")]


def begun(dst: Path) -> set[str]:
    """Who writes: each node's files begin with a name of its own until they are adopted."""
    return {
        name.split("-")[0]
        for name in names(dst)
        if name.endswith(".safetensors") and not name.startswith("model-")
    }


def recorded(dst: Path) -> int:
    return sum(name.endswith(".record") for name in names(dst))


@pytest.mark.parametrize("source", ["folder", "s3"])
def test_two_nodes_make_what_one_machine_makes(
    nodes: Nodes, src: Path, tmp_path: Path, source: str
) -> None:
    place = str(src) if source == "folder" else SRC
    seen: list[tuple[int, int]] = []

    result = quantize_checkpoint(
        place,
        tmp_path / "made",
        ray=nodes.address,
        progress=lambda *done: seen.append(done),
        **SETTINGS,
    )

    assert checkpoints.contents(tmp_path / "made") == expected(place, tmp_path)
    assert result.shards > 5
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_two_nodes_write_to_s3_what_one_machine_writes(
    nodes: Nodes, src: Path, server: S3, tmp_path: Path
) -> None:
    quantize_checkpoint(SRC, "s3://bucket/made", ray=nodes.address, spool=tmp_path, **SETTINGS)

    assert stored(server, "made") == expected(SRC, tmp_path)
    assert server.uploads == {}


def test_what_a_lost_node_had_is_done_by_the_other(
    nodes: Nodes, src: Path, server: S3, tmp_path: Path
) -> None:
    server.held |= LAST
    dst = tmp_path / "made"
    run = start(nodes, SRC, dst)
    wait_for(lambda: len(begun(dst)) == 2)

    nodes.kill_second()
    server.held.clear()
    output, errors = run.communicate(timeout=PATIENCE)

    assert run.returncode == 0, errors
    assert "is lost; others write its shards" in errors
    assert all(line.startswith("nxdi-expertscale: ") for line in errors.splitlines())
    assert output.startswith(str(dst))
    assert checkpoints.contents(dst) == expected(SRC, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on(
    nodes: Nodes, src: Path, server: S3, tmp_path: Path, number: signal.Signals
) -> None:
    server.held |= LAST
    dst = tmp_path / "made"
    run = start(nodes, SRC, dst)
    wait_for(lambda: len(begun(dst)) == 2 and recorded(dst) > 0)

    run.send_signal(number)
    _, errors = run.communicate(timeout=PATIENCE)

    if number is signal.SIGINT:
        assert run.returncode == 130
        assert errors.splitlines()[-1] == (
            "nxdi-expertscale: interrupted; the same command goes on from here"
        )
        assert begun(dst) == set()
    finished = recorded(dst)
    assert finished > 0
    # Nothing of it goes on by itself.
    wait_for(lambda: not nodes.writers())
    server.held.clear()
    result = quantize_checkpoint(SRC, dst, ray=nodes.address, **SETTINGS)
    assert result.resumed_shards == finished
    assert checkpoints.contents(dst) == expected(SRC, tmp_path)


def test_an_error_of_a_node_is_that_of_one_machine(nodes: Nodes, tmp_path: Path) -> None:
    values = checkpoints.tensors()
    name = next(name for name in values if name.endswith("down_proj.weight"))
    values[name][1, 2] = torch.nan
    src = checkpoints.save(tmp_path / "src", values)
    with pytest.raises(CheckpointError, match="has NaN or infinity") as alone:
        quantize_checkpoint(src, tmp_path / "alone", **SETTINGS)

    with pytest.raises(CheckpointError) as found:
        quantize_checkpoint(src, tmp_path / "made", ray=nodes.address, **SETTINGS)

    assert type(found.value) is CheckpointError
    assert str(found.value) == str(alone.value)


def test_a_node_with_another_version_is_named(nodes: Nodes, src: Path, tmp_path: Path) -> None:
    package = tmp_path / "other" / "nxdi_expertscale"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text("__version__ = '0.0.1'\n")
    other = nodes.add(PYTHONPATH=str(package.parent))
    try:
        with pytest.raises(ConfigurationError, match=r"Ray: node \S+ has nxdi-expertscale 0\.0\.1"):
            quantize_checkpoint(src, tmp_path / "made", ray=nodes.address, **SETTINGS)
    finally:
        nodes.remove(other)
    assert not (tmp_path / "made").exists()


def test_what_is_no_cluster_is_given_up(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match="does not answer within 3 seconds"):
            quantize_checkpoint(src, tmp_path / "made", ray=address)

    assert not (tmp_path / "made").exists()


def test_the_command_prints_nothing_of_ray(nodes: Nodes, src: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "nxdi_expertscale", "quantize", str(src)),
            *(str(tmp_path / "made"), "--ray", nodes.address, "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(run.stdout)["shards"] == 1
    assert run.stderr == ""
