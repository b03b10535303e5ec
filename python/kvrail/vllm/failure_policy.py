"""What vLLM does with a request whose load failed: it is computed, unless the user wants it failed.

vLLM's default fails the request. Its scheduler reads the policy right after it made the connector,
from the outermost configuration. Under ``MultiConnector`` a connector has a copy with its own part
only (see outer.py). A cache that fails requests is worse than a look at the stack.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvrail.vllm.outer import outer_connectors

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

logger = logging.getLogger(f"vllm.{__name__}")


def compute_what_fails(connector: KVConnectorBase_V1) -> None:
    """Has vLLM compute failed loads. To be called while vLLM makes the scheduler's connector."""
    changed = False
    for config in _transfer_configs(connector):
        if config.kv_load_failure_policy != "recompute":
            config.kv_load_failure_policy = "recompute"
            changed = True
    if changed:
        logger.info(
            "kvrail: a failed load is computed again (kv_load_failure_policy = recompute); set "
            "extra_config.load_failure_policy to fail to have such requests fail"
        )


def _transfer_configs(connector: KVConnectorBase_V1) -> list[KVTransferConfig]:
    """The connector's configuration, and those of the connectors that are making it."""
    # One that makes another before it was made itself has none yet.
    outer = (vars(maker).get("_kv_transfer_config") for maker in outer_connectors(connector))
    return [connector._kv_transfer_config, *(config for config in outer if config is not None)]
