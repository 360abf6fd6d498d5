"""Stand-ins for the compiler, the runtime and the device, so that a server runs on a CPU.

NxDI builds a graph for each of a model's tasks (context encoding, token generation), has it
compiled for each bucket of lengths, saves the result as one TorchScript file, shards the weights
and hands them to the runtime. Here a *compiled model* is the recipe of those graphs: which module,
with which config, takes inputs of which shapes. The runtime builds the modules, loads the weights,
runs them eagerly, and keeps the key-value cache that the graphs share, as the device does.

What is replaced, each where it is looked up:

1. ``glob.glob("/dev/neuron*")``, by which vLLM-Neuron finds a device;
2. ``ModelBuilder.trace``, the compiler;
3. ``torch.jit.save`` and ``torch.jit.load`` of a compiled model;
4. the compiled model's ``nxd_model``: ``initialize`` (the runtime takes the weights) and the call;
5. ``ModelWrapper.is_neuron``, which asks whether the model is TorchScript;
6. the sampler's kernels: top-k, the largest, the cumulative sum, and random numbers;
7. the choice of a flash attention kernel for long contexts: none, which NxDI computes in torch;
8. a look-up beyond the end of a tensor, which the device takes for its last row.

Sharding is NxD's own.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import wrapt

DEVICES = "/dev/neuron*"
"""What vLLM-Neuron looks for."""

CPU_MODE = "NXD_CPU_MODE"
"""NxD's variable, read at each call."""

Shapes = tuple[tuple[int, ...], ...]
"""Of the inputs of one bucket of a graph."""

_NOT_IN_CHECKPOINTS = (
    # Not used by these graphs.
    "kv_mgr.global_rank.rank",
    # Second names of parameters that are loaded under their first.
    ".master_weight",
    ".moe_fused_tkg.",
    ".moe.rmsnorm.",
    ".mlp.rmsnorm.",
)


class DeviceError(Exception):
    """A compiled model cannot be run."""


@dataclass(frozen=True)
class Graph:
    """One graph of a model, not built yet.

    Attributes:
        instance: NxDI's ``DecoderModelInstance``, which builds the module.
        shapes: Of the inputs, for each bucket.
    """

    instance: Any
    shapes: tuple[Shapes, ...]


@dataclass
class CompiledModel:
    """What the compiler gives, and what is saved: the graphs, and how to make the ranks' groups.

    Attributes:
        graphs: By NxDI's tag, such as ``context_encoding_model``.
        ranks: Number of cores that share the model.
        make_groups: Makes NxDI's own process groups, once there is a tensor-parallel one.
        nxd_model: The runtime's side.
    """

    graphs: dict[str, Graph]
    ranks: int
    make_groups: Callable[[], None] | None
    nxd_model: Runtime = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.nxd_model = Runtime(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "nxd_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.nxd_model = Runtime(self)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Run the graph and the bucket that these inputs fit."""
        return self.nxd_model.forward(inputs)


class Runtime:
    """The device's side of a compiled model."""

    def __init__(self, compiled: CompiledModel) -> None:
        self._compiled = compiled
        self._cores: Core | RemoteCores | None = None

    def initialize(self, weights: Sequence[dict[str, torch.Tensor]], _start: torch.Tensor) -> None:
        """Put the weights on the cores.

        Args:
            weights: Each rank's, as NxD sharded them.
        """
        compiled = self._compiled
        if compiled.ranks == 1:
            _make_parallel_state(compiled)
            self._cores = Core(compiled.graphs, weights[0])
        else:
            self._cores = RemoteCores(compiled, weights)

    def forward(self, inputs: Sequence[torch.Tensor]) -> Any:
        """Run the graph and the bucket that have been compiled for inputs of these shapes."""
        if self._cores is None:
            raise RuntimeError("the model has no weights: NxDI did not call initialize")
        shapes = _shapes(inputs)
        for tag, graph in self._compiled.graphs.items():
            if shapes in graph.shapes:
                try:
                    return self._cores.run(tag, graph.shapes.index(shapes), inputs)
                except RuntimeError as failure:
                    # NxDI ignores a RuntimeError while it warms up.
                    raise DeviceError(
                        f"{tag} failed for inputs of the shapes {shapes}"
                    ) from failure
        raise DeviceError(f"nothing was compiled for inputs of the shapes {shapes}")


class Core:
    """One core: the built graphs, with one rank's weights."""

    def __init__(self, graphs: dict[str, Graph], weights: dict[str, torch.Tensor]) -> None:
        self._instances = {tag: graph.instance for tag, graph in graphs.items()}
        caches: dict[str, torch.nn.Parameter] = {}
        for instance in self._instances.values():
            instance.load_module()
            module, aliases = instance.get(0)
            names = _names_of(module, aliases)
            _load(module, weights, caches=names)
            _repeat_shared_scales(module)
            # The graphs write to one cache.
            for name in names:
                parameter = module.get_parameter(name)
                parameter.data = caches.setdefault(name, parameter).data

    def run(self, tag: str, bucket: int, inputs: Sequence[torch.Tensor]) -> Any:
        """Run a graph, and keep what it gives for the cache."""
        module, aliases = self._instances[tag].get(bucket)
        with torch.no_grad():
            outputs = list(_flatten(module(*inputs)))
            for parameter, number in aliases.items():
                parameter.copy_(outputs[number])
        results = outputs[: min(aliases.values())]
        return results[0] if len(results) == 1 else results


class RemoteCores:
    """A process for each core of a tensor-parallel model; they run in step."""

    def __init__(self, compiled: CompiledModel, weights: Sequence[dict[str, torch.Tensor]]) -> None:
        store = Path(tempfile.mkdtemp(prefix="cores-")) / "store"
        self._connections: list[Connection] = []
        for rank, weights_of_rank in enumerate(weights):
            here, there = socket.socketpair()
            # Not with multiprocessing, which would import the server's main module in each core.
            arguments = [str(rank), str(store), str(there.fileno())]
            command = [sys.executable, "-m", "tests.server.core", *arguments]
            subprocess.Popen(command, pass_fds=[there.fileno()])
            there.close()
            ours = Connection(here.detach())
            ours.send_bytes(_pack((compiled, weights_of_rank)))
            self._connections.append(ours)

    def run(self, tag: str, bucket: int, inputs: Sequence[torch.Tensor]) -> Any:
        """Run a graph on every core; the first one's outputs are the model's."""
        for connection in self._connections:
            connection.send_bytes(_pack((tag, bucket, inputs)))
        answers = [_unpack(connection.recv_bytes()) for connection in self._connections]
        return answers[0]


def serve_core(rank: int, store: Path, connection: Connection) -> None:
    """Be a core, until the server goes.

    Args:
        rank: Which of the model's.
        store: A file in which the cores find each other.
        connection: Where the model, the weights and the calls come from.
    """
    compiled, weights = _unpack(connection.recv_bytes())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=compiled.ranks
    )
    _make_parallel_state(compiled)
    core = Core(compiled.graphs, weights)
    with contextlib.suppress(EOFError):
        while True:
            call = _unpack(connection.recv_bytes())
            connection.send_bytes(_pack(core.run(*call)))


# Not with pickle alone, which cannot write a tensor of FP8.
def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)


def _make_parallel_state(compiled: CompiledModel) -> None:
    from neuronx_distributed.parallel_layers import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=compiled.ranks, skip_collective_init=True
    )
    # As NxD's trace does: the modules take their weights from the checkpoint alone.
    parallel_state.set_aot_mode(True)
    if compiled.make_groups is not None:
        compiled.make_groups()


def _load(module: Any, weights: dict[str, torch.Tensor], *, caches: Sequence[str]) -> None:
    result = module.load_state_dict(weights, strict=False)
    missing = [
        name
        for name in result.missing_keys
        if name not in caches and not any(part in name for part in _NOT_IN_CHECKPOINTS)
    ]
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"the weights do not fit the compiled model: missing {missing}, unexpected "
            f"{result.unexpected_keys}"
        )


def _repeat_shared_scales(module: Any) -> None:
    """Let a scale that all experts share be looked up by an expert's number.

    NxD does so where it computes single experts. On the device an index beyond the end means the
    last row; torch refuses it.
    """
    for layer in module.modules():
        scale, weight = getattr(layer, "scale", None), getattr(layer, "weight", None)
        if scale is not None and weight is not None and weight.ndim == 3 and scale.shape[0] == 1:
            scale.data = scale.data.expand(weight.shape[0], -1, -1)


def _names_of(module: Any, parameters: dict[torch.Tensor, int]) -> list[str]:
    wanted = {id(parameter) for parameter in parameters}
    return [name for name, parameter in module.named_parameters() if id(parameter) in wanted]


def _flatten(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from _flatten(output)


def _shapes(inputs: Sequence[torch.Tensor]) -> Shapes:
    return tuple(tuple(one.shape) for one in inputs)


def _find_device(glob_of_files: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def find(pathname: str, *arguments: Any, **keywords: Any) -> list[str]:
        if pathname == DEVICES:
            return ["/dev/neuron0"]
        return glob_of_files(pathname, *arguments, **keywords)

    return find


def _trace(builder: Any, *_: Any, **__: Any) -> CompiledModel:
    """Compile: note which graphs there are."""
    graphs = {
        tag: Graph(container.model_instance, tuple(map(_shapes, container.example_inputs)))
        for tag, container in builder.model_collection.items()
    }
    return CompiledModel(graphs, builder.tp_degree, builder.init_custom_process_group_fn)


def _save(save: Callable[..., None]) -> Callable[..., None]:
    def save_compiled(model: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        if isinstance(model, CompiledModel):
            Path(path).write_bytes(pickle.dumps(model))
        else:
            save(model, path, *arguments, **keywords)

    return save_compiled


def _load_compiled(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_compiled(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(path).read_bytes()[:2] == b"PK":  # TorchScript
            return load(path, *arguments, **keywords)
        return pickle.loads(Path(path).read_bytes())

    return load_compiled


def _shard_for_device(shard: Callable[..., Any]) -> Callable[..., Any]:
    """NxD's own sharding, which is written for a host with a device: not in its CPU mode."""

    def shard_checkpoint(*arguments: Any, **keywords: Any) -> Any:
        os.environ[CPU_MODE] = "0"
        try:
            return shard(*arguments, **keywords)
        finally:
            os.environ[CPU_MODE] = "1"

    return shard_checkpoint


def _replace_compiler(model_builder: Any) -> None:
    builder = model_builder.ModelBuilder
    builder.trace = _trace
    builder.shard_checkpoint = _shard_for_device(builder.shard_checkpoint)


def _replace_question(model_wrapper: Any) -> None:
    model_wrapper.ModelWrapper.is_neuron = lambda self: isinstance(self.model, CompiledModel)


def _replace_flash_attention(attention_base: Any) -> None:
    none = attention_base.FlashAttentionStrategy.NONE
    attention_base.NeuronAttentionBase.get_flash_attention_strategy = lambda *_, **__: none


class _TopK:
    """``torch_neuronx.xla_impl.ops.TopK``."""

    @staticmethod
    def apply(tensor: torch.Tensor, k: int, *, dim: int) -> Any:
        return torch.topk(tensor, k, dim=dim)


class _TopKKernel:
    """``nkilib``'s top-k over the last axis; later releases call ``kernel[logical_nc](…)``."""

    def __getitem__(self, _logical_nc: int) -> _TopKKernel:
        return self

    def __call__(self, tensor: torch.Tensor, k: int, **_whether_sorted: bool) -> Any:
        return torch.topk(tensor, k)


def _replace_top_k(topk: Any) -> None:
    topk.TopK = _TopK
    topk.nki_topk = _TopKKernel()


class _Argmax:
    """``torch_neuronx.xla_impl.ops.Argmax``, by which a draft samples."""

    @staticmethod
    def apply(tensor: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
        return torch.argmax(tensor, dim=dim, keepdim=keepdim)


class _MaxKernel:
    """The kernel for the largest of the last axis and its index: ``kernel[logical_nc](…)``."""

    def __getitem__(self, _logical_nc: Any) -> _MaxKernel:
        return self

    def __call__(self, tensor: torch.Tensor) -> Any:
        return torch.max(tensor, dim=-1, keepdim=True)


def _replace_argmax(argmax: Any) -> None:
    argmax.Argmax = _Argmax
    argmax.nki_max = _MaxKernel()


def _replace_sampling(sampling: Any) -> None:
    sampling.cumsum = lambda tensor_in, dim, on_cpu=True: torch.cumsum(tensor_in, dim=dim)
    sampling.rand_like = torch.rand_like


def install() -> None:
    """Replace it all, in this interpreter; the closed packages have to be importable already."""
    os.environ[CPU_MODE] = "1"
    # NxD's builder asks for a version that begins so.
    importlib.import_module("torch_neuronx").__version__ = "2"  # type: ignore[attr-defined]
    glob.glob = _find_device(glob.glob)  # type: ignore[assignment]
    torch.jit.save = _save(torch.jit.save)
    torch.jit.load = _load_compiled(torch.jit.load)
    for module, replace in (
        ("neuronx_distributed.trace.model_builder", _replace_compiler),
        ("neuronx_distributed.operators.argmax", _replace_argmax),
        ("neuronx_distributed.operators.topk", _replace_top_k),
        ("neuronx_distributed_inference.models.model_wrapper", _replace_question),
        ("neuronx_distributed_inference.modules.generation.sampling", _replace_sampling),
        (
            "neuronx_distributed_inference.modules.attention.attention_base",
            _replace_flash_attention,
        ),
    ):
        wrapt.register_post_import_hook(replace, module)
