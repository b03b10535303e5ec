"""The place of a worker in its engine, and what its files are named by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvrail.vllm.heads import HeadShare
    from kvrail.vllm.metadata import Part


@dataclass(frozen=True, slots=True)
class WorkerRank:
    """The place of a worker in its engine."""

    global_rank: int
    storage_rank: int
    """The rank whose files are read: this one, or that of the rank it is a replica of."""
    world_size: int
    tensor_rank: int = 0
    stage: int = 0
    """The pipeline stage."""

    def part(self, share: HeadShare | None) -> Part:
        """What this rank's files of a KV cache group are named by."""
        return self.storage_rank if share is None else (self.stage, share.first, share.end)

    def stores(self, share: HeadShare | None) -> bool:
        """Whether this rank writes; replicas hold the same bytes, so one of them does."""
        return self.global_rank == self.storage_rank if share is None else share.is_first

    @classmethod
    def current(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> WorkerRank:
        """The rank of this process."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        parallel = vllm_config.parallel_config
        tensor_rank = get_tp_group().rank_in_group
        stage = get_pp_group().rank_in_group
        first = stage * parallel.tensor_parallel_size
        replica = tensor_rank % max(1, kv_cache_config.kv_tp_replicas)
        return cls(
            global_rank=first + tensor_rank,
            storage_rank=first + tensor_rank - replica,
            world_size=parallel.pipeline_parallel_size * parallel.tensor_parallel_size,
            tensor_rank=tensor_rank,
            stage=stage,
        )

    def in_files_of_lmcache(self, workers: int) -> WorkerRank:
        """The place of this worker where each has files, or all the files of the first."""
        return replace(self, storage_rank=self.global_rank if workers == self.world_size else 0)
