"""Models that users of NxDI run and that are not in its packages: its contributions, for real.

Their sources are in a folder that ``NXDI_EXPERTSCALE_CONTRIBUTIONS`` names, and that a clone of
NxDI's repository with its pull requests fills::

    python -m tests.contributions.extract GIT_DIR FOLDER

Nothing of them is copied into this repository. For each there is a tiny random model in the layout
in which the model is published, experts a factor of 16 apart in magnitude. It is quantized,
verified, and loaded through the contribution's own application on each release of NxDI that
``NXDI_EXPERTSCALE_UPSTREAM`` names and the contribution runs on, in a process of its own. Right is
what :func:`nxdi_expertscale.testing.check_family` calls right: every parameter within FP8's
rounding of the original, every block, and the logits what the dequantized weights give::

    tox -e contributions

``python -m tests.contributions.table`` writes the README's table of models from the same run.
"""
