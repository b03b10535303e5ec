"""A connector that has something to say at its start, and takes nobody else's word for it.

As vLLM's NIXL connector, which raises an error for what it is not.
"""

from dataclasses import dataclass

from idle_connector import IdleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata


@dataclass
class StrictHandshake(KVConnectorHandshakeMetadata):
    """What its workers say."""

    word: str


class StrictConnector(IdleConnector):
    """Loads and stores nothing."""

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Says the word."""
        return StrictHandshake("strict")

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Raises ValueError unless every worker said it."""
        if not metadata or any(
            not isinstance(found, StrictHandshake) for found in metadata.values()
        ):
            raise ValueError(f"StrictConnector expects StrictHandshake, not {metadata}")
