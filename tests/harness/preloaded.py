"""What a process of a target's tests is forked with: the stand-ins, torch and transformers.

Nothing of NxDI, of NxD or of this package: tests look at when these are imported.
"""

from __future__ import annotations

from tests.harness import targets

_target = targets.target_of_this_process()
if _target is not None:
    _target.prepare()

import torch  # noqa: E402, F401
from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM  # noqa: E402, F401
