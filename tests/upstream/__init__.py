"""Tests through NxDI: on a small double of it always, on the real sources of each release if named.

The real sources are named by ``NXDI_EXPERTSCALE_UPSTREAM``, a folder with one folder for each
release, and in it the sources of NxDI and of the NxD that belongs to it::

    0.9/nxdi/src/neuronx_distributed_inference/    aws-neuron/neuronx-distributed-inference
    0.9/nxd/src/neuronx_distributed/               aws-neuron/neuronx-distributed

Nothing of it has to be installed, and no device is needed; what the sources import of Neuron's
closed packages is stood in for (:mod:`tests.harness.standins`). A folder ``pr35/nxdi`` beside the
releases, if there is one, is the pull request that this project started from (on NxDI 0.7): its
results are compared with ours bit for bit.
Folders ``vllm-neuron-0.5.0/vllm_neuron`` and so on, one for each release of vLLM-Neuron, are tested
with each release of NxDI, and real servers are made of them (:mod:`tests.server`).

Two releases cannot be imported in one process. So a test runs in a process that belongs to its
target, and its reports are replayed here (:mod:`tests.upstream.workers`). To run a target's tests
in this process instead, for a debugger, name it: ``NXDI_EXPERTSCALE_TARGET=0.9 pytest -k "0.9"``.
"""
