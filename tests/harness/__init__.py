"""What the tests and the benchmarks both need.

- :mod:`~tests.harness.targets`: what NxDI there is (the double, releases); makes one importable.
- :mod:`~tests.harness.standins`: stand-ins for Neuron's closed packages.
- :mod:`~tests.harness.running`: a model's way through NxDI; imports it, so a target comes first.
- :mod:`~tests.harness.compiling`: the same through NxD's ``ModelBuilder``, as on a device.
- :mod:`~tests.harness.expert_groups`: NxD's parallel state where ranks share the experts.
- :mod:`~tests.harness.processes`: functions in a process of their own for each rank.
- :mod:`~tests.harness.models`: small Hugging Face models, on disk.
- :mod:`~tests.harness.checkpoints`: tiny checkpoints in every form that ``quantize`` reads.
- :mod:`~tests.harness.installed`: the wheel, and environments that it is installed in.
- :mod:`~tests.harness.limits`: how long a test waits for what should come.
- :mod:`~tests.harness.readme`: the blocks of the README that users copy.
"""
