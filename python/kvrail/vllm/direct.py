"""Which layout of the KV cache the connector asks vLLM for.

With the block outermost all layers of a block lie one behind the other, so cuFile reads and writes
blocks in place, with no copy. That is worth asking for only where there is a direct way between
files and GPU memory: vLLM prefers the layer outermost.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvrail._core import Config
from kvrail.cufile import path_problems
from kvrail.vllm.config import effective_value

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger(f"vllm.{__name__}")

BLOCK_OUTERMOST = "BLNHC"


def in_place_problem(model: ModelConfig) -> str | None:
    """Why cuFile must not read and write this model's KV cache in place, or None.

    Sleep mode unmaps the KV cache while a store may still be reading blocks of requests that have
    ended, and maps other memory to the same addresses later, which cuFile has not registered.
    Blocks that are copied on the GPU first have been copied by then: vLLM waits for the device.
    """
    if not model.enable_cumem_allocator:
        return None
    return (
        "vLLM may take the KV cache's memory away while it runs (enable_sleep_mode or "
        "enable_cumem_allocator)"
    )


def wanted_layout(
    config: Config, is_cuda: bool, problem: str | None, system_root: str | None = None
) -> str | None:
    """The layout to ask for; None leaves the choice to vLLM.

    ``problem`` is why there is no transfer in place, or None. Without one ``extra_config.direct``
    decides: false never asks, true always, and without it the machine does: a path of ``gds_path``
    must pass what kvrail asks before it tries cuFile.
    """
    direct = effective_value(config, "extra_config.direct")
    uses_cufile = (
        effective_value(config, "use_gds")
        and effective_value(config, "extra_config.use_cufile")
        and effective_value(config, "gds_backend") == "cufile"
    )
    if not is_cuda or not uses_cufile or direct is False:
        return None
    if problem is not None:
        level = logging.INFO if direct is None else logging.WARNING
        logger.log(level, "kvrail: no block-outermost KV cache asked for: %s", problem)
        return None
    if direct is None:
        problems = path_problems(config.gds_path, system_root)
        if len(problems) == len(config.gds_path):
            logger.info(
                "kvrail: no block-outermost KV cache asked for: %s",
                "; ".join(f"{path}: {problem}" for path, problem in problems.items()),
            )
            return None
    return BLOCK_OUTERMOST
