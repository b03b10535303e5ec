"""The connectors that are making this one, such as vLLM's ``MultiConnector``.

A connector is handed a copy of the configuration with its own part only, and nothing leads from
there to the others; those that are making it are found on the call stack.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1


def outer_connectors(connector: KVConnectorBase_V1) -> list[KVConnectorBase_V1]:
    """The connectors whose making led to this call, the nearest first, without ``connector``."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    found: list[KVConnectorBase_V1] = []
    frame = sys._getframe().f_back
    while frame is not None:
        maker = frame.f_locals.get("self")
        if (
            isinstance(maker, KVConnectorBase_V1)
            and maker is not connector
            and not any(maker is known for known in found)
        ):
            found.append(maker)
        frame = frame.f_back
    return found
