"""A connector that has something to say at its start, and takes nobody else's word for it.

As vLLM's NIXL connector, which raises an error for what it is not.
"""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)


@dataclass
class StrictHandshake(KVConnectorHandshakeMetadata):
    """What its workers say."""

    word: str


class StrictConnector(KVConnectorBase_V1, SupportsHMA):
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

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing."""

    def wait_for_save(self) -> None:
        """Nothing."""

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """No tokens."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Nothing in it."""
        return KVConnectorMetadata()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Lets the blocks go."""
        return False, None
