"""A real server on a CPU: real vLLM, real vLLM-Neuron and real NxDI answer requests.

Run by ``tox -e server``, which installs three vLLMs. The sources are named by
``NXDI_EXPERTSCALE_UPSTREAM`` (:mod:`tests.harness.targets` says what that folder looks like); here
it has to hold at least one release of vLLM-Neuron and the NxDI that belongs to it
(:mod:`tests.server.releases`).

Real are vLLM with its scheduler, worker and HTTP server, vLLM-Neuron's platform, loader and model
runner, and NxDI with NxD. What has no public source or needs the device is stood in for, in every
process that a server starts (:mod:`tests.server.device`).
"""
