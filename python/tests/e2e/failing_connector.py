"""A connector that promises the KV cache of each prompt, and fails to load it inside the step.

As vLLM's LMCache connector loads: vLLM learns with the step's output which blocks are of no use.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from idle_connector import IdleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

# What the blocks hold when the load has failed.
RUBBISH = 3.0


@dataclass
class FailingMetadata(KVConnectorMetadata):
    """The blocks to load in this step."""

    blocks: list[int] = field(default_factory=list)


class FailingConnector(IdleConnector):
    """Each request's first promise is all blocks of its prompt but the last."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """For a model with one KV cache group."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._blocks = kv_cache_config.num_blocks
        self._tensors: list[torch.Tensor] = []
        self._promised: set[str] = set()
        self._to_load: list[int] = []
        self._failed: set[int] = set()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keeps the tensors."""
        self._tensors = list(kv_caches.values())

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Promises to load inside the step."""
        end = (request.num_tokens - 1) // self._block_size * self._block_size
        if request.request_id in self._promised or end <= num_computed_tokens:
            return 0, False
        return end - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes the blocks."""
        self._promised.add(request.request_id)
        if num_external_tokens:
            end = (request.num_tokens - 1) // self._block_size
            count = num_external_tokens // self._block_size
            self._to_load += blocks.get_block_ids()[0][end - count : end]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Hands the blocks to the worker."""
        blocks, self._to_load = self._to_load, []
        return FailingMetadata(blocks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fills the blocks with rubbish."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FailingMetadata)
        ids = torch.tensor(metadata.blocks, dtype=torch.int64)
        for tensor in self._tensors if metadata.blocks else []:
            tensor.index_fill_(tensor.shape.index(self._blocks), ids, RUBBISH)
        self._failed.update(metadata.blocks)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """All of them."""
        failed, self._failed = self._failed, set()
        return failed
