"""A small double of NxD, as much of it as a quantized MoE model meets on one or more CPU ranks.

Written from facts about NxD 0.18, without a line of it. Names, shapes, attributes and messages
are the real ones wherever this project's patches, or a user of them, would notice. It has no
expert parallelism, no kernels and no training.
"""
