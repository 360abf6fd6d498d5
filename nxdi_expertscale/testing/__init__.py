"""For the author of a family: is a model right through NxDI, as a whole and in every part?

    python -m nxdi_expertscale.testing CHECKPOINT --application modeling_mine:NeuronMineForCausalLM

or :func:`check_family` in a test. Both need NxDI, and no device.
"""

from nxdi_expertscale.testing.check import FamilyCheck, check_family

__all__ = ["FamilyCheck", "check_family"]
