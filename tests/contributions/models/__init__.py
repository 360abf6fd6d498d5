"""The contributed models, each in a file of its own: where its code is, and what its layout is."""

from __future__ import annotations

from tests.contributions.contribution import Contribution
from tests.contributions.models.deepseek_v3 import DEEPSEEK_V3
from tests.contributions.models.glm4_moe import GLM_4_5
from tests.contributions.models.kimi_k2 import KIMI_K2
from tests.contributions.models.mimo_v2 import MIMO_V2
from tests.contributions.models.minicpm_moe import MINICPM_MOE
from tests.contributions.models.minimax_m2 import MINIMAX_M2
from tests.contributions.models.mixtral import MIXTRAL
from tests.contributions.models.olmoe import OLMOE
from tests.contributions.models.qwen3_coder import QWEN3_CODER
from tests.contributions.models.qwen3_coder_480b import QWEN3_CODER_480B
from tests.contributions.models.qwen3_next import QWEN3_CODER_NEXT
from tests.contributions.models.qwen3_omni import QWEN3_OMNI
from tests.contributions.models.sarvam import SARVAM
from tests.contributions.models.solar_open import SOLAR_OPEN

ALL: tuple[Contribution, ...] = (
    QWEN3_CODER,
    MIXTRAL,
    OLMOE,
    GLM_4_5,
    DEEPSEEK_V3,
    MINIMAX_M2,
    SOLAR_OPEN,
    MINICPM_MOE,
    SARVAM,
    MIMO_V2,
    QWEN3_CODER_NEXT,
    QWEN3_CODER_480B,
    QWEN3_OMNI,
    KIMI_K2,
)
