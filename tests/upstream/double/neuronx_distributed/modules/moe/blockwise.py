"""Which blockwise kernels there are."""

from __future__ import annotations

import enum
from typing import NamedTuple


class LogicalNCConfig(enum.IntEnum):
    LNC_1 = 1
    LNC_2 = 2


class KernelConfig(NamedTuple):
    logical_nc_config: LogicalNCConfig
    use_block_parallel: bool


class KernelAvailabilityError(Exception):
    pass


def check_kernel_availability(config: KernelConfig) -> None:
    if config.logical_nc_config is LogicalNCConfig.LNC_1:
        raise KernelAvailabilityError("no kernel for one logical core")
