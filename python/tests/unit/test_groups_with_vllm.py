"""The scheduler side against vLLM's own KV cache manager, for models with several groups.

A block's content is simulated: which tokens of which group it holds. Requests that share prefixes
are run through in steps of all sizes, with vLLM's prefix cache on and off, while chunks vanish and
weights are replaced. No token may be computed before everything that it looks at is in place, of
the weights that vLLM has, whoever put it there, and nothing may be stored that is not what its name
says.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from fakes import step, watch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from kvrail.vllm import layout
from kvrail.vllm.boundary import BoundaryTicket
from kvrail.vllm.geometry import GroupGeometry
from kvrail.vllm.loaded_weights import WeightsReport
from kvrail.vllm.metadata import KvrailMetadata, KvrailWorkerMetadata
from kvrail.vllm.scheduler import ConnectorScheduler, SchedulerOptions

CHUNK = 32
MAX_TOKENS = 400


def full(block: int = 8) -> KVCacheSpec:
    return FullAttentionSpec(
        block_size=block, num_kv_heads=1, head_size=8, dtype=torch.half, dcp_sharded=False
    )


def window(size: int, block: int = 8) -> KVCacheSpec:
    return SlidingWindowSpec(
        block_size=block,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.half,
        sliding_window=size,
        dcp_sharded=False,
    )


def local(size: int, block: int = 8) -> KVCacheSpec:
    return ChunkedLocalAttentionSpec(
        block_size=block,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.half,
        attention_chunk_size=size,
        dcp_sharded=False,
    )


def state(checkpoints: int = 0, block: int = 8) -> KVCacheSpec:
    """A mamba state; with a checkpoint, one at a boundary inside a request's last prompt step."""
    return MambaSpec(
        block_size=block,
        shapes=((4, 4), (8,)),
        dtypes=(torch.float32, torch.half),
        mamba_cache_mode="align",
        num_prefill_checkpoint_blocks=checkpoints,
        prefill_checkpoint_alignment=1 if checkpoints else None,
    )


MODELS: dict[str, list[KVCacheSpec]] = {
    "full": [full()],
    "window of half a block": [window(4)],
    "window of a chunk": [window(33)],
    "long window": [window(100)],
    "full and window": [full(), window(20)],
    "as Gemma 3": [window(64), window(64), window(64), full()],
    "as gpt-oss": [window(16), full()],
    "blocks of two sizes": [full(16), window(40, 8)],
    "as Llama 4": [local(64), local(64), full()],
    "local only": [local(128)],
}
# vLLM keeps states for others to find only where its own prefix caching is on.
STATE_MODELS: dict[str, list[KVCacheSpec]] = {
    "state only": [state()],
    "as Falcon H1": [full(), state(1)],
    "as Qwen3 Next": [state(), state(), state(), full()],
    "state, window and full": [state(1), window(40), full()],
    "blocks as large as chunks": [full(CHUNK), state(0, CHUNK)],
}


@dataclass
class Simulation:
    """vLLM's manager, the memory of its blocks, and chunk files."""

    specs: Sequence[KVCacheSpec]
    caching: bool
    chance: random.Random
    memory: dict[int, dict[int, object]] = field(default_factory=dict)
    """By block: what each of its slots holds."""
    files: dict[tuple[int, bytes], list[dict[int, object]]] = field(default_factory=dict)
    loaded_tokens: int = 0
    weights: int = 0
    """Which weights vLLM has; those of its start are 0."""

    def __post_init__(self) -> None:
        kv_cache_utils.init_none_hash(sha256)
        groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(self.specs)]
        blocks = [spec.block_size for spec in self.specs]
        config = KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=groups)
        self.hash_tokens = min(blocks)
        self.manager = KVCacheManager(
            config,
            max_model_len=MAX_TOKENS,
            scheduler_block_size=max(blocks),
            hash_block_size=self.hash_tokens,
            max_in_flight_tokens=MAX_TOKENS,
            enable_caching=self.caching,
        )
        stored = layout.select_groups(config, CHUNK, 1)
        self.geometry = layout.chunk_geometry(stored, CHUNK, max(blocks), self.hash_tokens)
        weights = watch()
        weights.follow(self.manager.block_pool)
        self.scheduler = ConnectorScheduler(
            self.geometry, SchedulerOptions(min_load_tokens=0), weights
        )
        self.scheduler.enable(self.look_up)

    # The store.

    def look_up(self, keys: Sequence[bytes]) -> BoundaryTicket:
        return BoundaryTicket(self._prefix, self._each, self.geometry.groups, keys)

    def _prefix(self, keys: Sequence[bytes], group: int) -> Answer:
        missing = (i for i, key in enumerate(keys) if (group, key) not in self.files)
        return Answer(next(missing, len(keys)))

    def _each(self, keys: Sequence[bytes], group: int) -> Answer:
        return Answer([(group, key) in self.files for key in keys])

    def lose_some(self) -> None:
        for name in self.chance.sample(sorted(self.files), k=len(self.files) // 5):
            del self.files[name]

    # Weights.

    def reset(self) -> None:
        """vLLM resets its prefix cache, perhaps because its weights are others now.

        It tells connectors of it, or only its own block pool shows it.
        """
        if self.chance.random() < 0.7:
            self.weights = self.chance.randrange(3)
        assert self.manager.reset_prefix_cache()
        if self.chance.random() < 0.5:
            self.scheduler.weights_may_have_changed()

    def _answer(self, metadata: KvrailMetadata) -> None:
        """Does what the worker does with the question which weights it has."""
        if metadata.weights_question is None:
            return
        digest = hashlib.sha256(bytes([self.weights])).hexdigest()
        report = WeightsReport(digest, is_as_loaded=self.weights == 0)
        self.scheduler.update_connector_output(
            KvrailWorkerMetadata(weights={(metadata.weights_question, 0): report})
        )

    # One request.

    def run(self, name: str, tokens: list[int], *, may_preempt: bool = False) -> None:
        request = Request(
            name,
            tokens,
            SamplingParams(max_tokens=4),
            None,
            block_hasher=kv_cache_utils.get_request_block_hasher(self.hash_tokens, sha256),
        )
        self.scheduler.on_new_request(request)
        admitted = self._admit(request)
        is_new = True
        while request.num_computed_tokens < len(tokens):
            if may_preempt and self.chance.random() < 0.2:
                self.manager.free(request)
                request.num_computed_tokens = 0
                self.reset()
                admitted = self._admit(request)
            before = request.num_computed_tokens
            if admitted:
                count, admitted = admitted, 0
            else:
                self.manager.new_step_starts()
                count = self._split(request, before)
                assert self.manager.allocate_slots(request, count) is not None
            output = step(**{"new" if is_new else "cached": [(request, before, count)]})
            self._offer_tables(output, request)
            metadata = self.scheduler.build_connector_meta(output)
            self._compute(request, before, count)
            for part in metadata.stores:
                for chunk in part.chunks:
                    self._store(request, self.geometry.groups[part.group], chunk)
            self._answer(metadata)
            request.num_computed_tokens += count
            is_new = False
        self.scheduler.request_finished(name)
        self.manager.free(request)

    def _split(self, request: Request, before: int) -> int:
        """A step's tokens; where there are states it ends where vLLM's scheduler lets it end."""
        count = self.chance.choice([1, 5, 8, 30, 64, 200])
        length = len(request.prompt_token_ids)
        end = min(before + count, length)
        sizes = [spec.block_size for spec in self.specs if isinstance(spec, MambaSpec)]
        if not sizes:
            return end - before
        size, last = sizes[0], (length - 1) // sizes[0] * sizes[0]
        if end < length:
            end = max(end // size * size, (before // size + 1) * size)
        has_checkpoint = any(
            isinstance(spec, MambaSpec) and spec.num_prefill_checkpoint_blocks
            for spec in self.specs
        )
        if before < last < end and not has_checkpoint:
            end = last
        return min(end, length) - before

    def _admit(self, request: Request) -> int:
        """Begins with a load, or with a step of as many tokens as are returned."""
        self.manager.new_step_starts()
        blocks, local_tokens, _ = self.manager.get_computed_blocks(request)
        extra, is_async = self.scheduler.get_num_new_matched_tokens(request, local_tokens)
        if extra is None:
            self._answer(self.scheduler.build_connector_meta(step()))
            extra, is_async = self.scheduler.get_num_new_matched_tokens(request, local_tokens)
        assert extra is not None and is_async == (extra > 0)
        count = 0 if extra else self._split(request, local_tokens)
        allocated = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=local_tokens,
            new_computed_blocks=blocks,
            num_external_computed_tokens=extra,
            delay_cache_blocks=is_async,
        )
        assert allocated is not None
        self.scheduler.update_state_after_alloc(
            request, self.manager.get_blocks(request.request_id), extra
        )
        metadata = self.scheduler.build_connector_meta(step())
        self._answer(metadata)
        for load in metadata.loads:
            for part in load.parts:
                for chunk in part.chunks:
                    content = self.files[self.geometry.groups[part.group].index, chunk.key]
                    wanted = content[chunk.first_block :]
                    assert len(wanted) == len(chunk.block_ids)
                    for block, slots in zip(chunk.block_ids, wanted, strict=True):
                        assert block != 0, "vLLM's null block is written to"
                        self.memory[block] = dict(slots)
        request.num_computed_tokens = local_tokens + extra
        self.loaded_tokens += extra
        if extra:
            self.manager.cache_blocks(request, request.num_computed_tokens)
            self._check_in_sight(request, request.num_computed_tokens)
        return count

    def _offer_tables(self, output: SchedulerOutput, request: Request) -> None:
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids={request.request_id},
            resolve_block_ids=self.manager.get_block_ids,
            boundary_state_offloads=self.manager.take_boundary_state_offloads(),
        )

    def _compute(self, request: Request, first: int, count: int) -> None:
        tables = self.manager.get_block_ids(request.request_id)
        for index, spec in enumerate(self.specs):
            if isinstance(spec, MambaSpec):
                self._advance_state(request, index, first, first + count)
        for position in range(first, first + count):
            self._check_in_sight(request, position)
            for index, spec in enumerate(self.specs):
                if isinstance(spec, MambaSpec):
                    continue
                block = tables[index][position // spec.block_size]
                assert block != 0
                slots = self.memory.setdefault(block, {})
                if position % spec.block_size == 0:
                    slots.clear()
                slots[position % spec.block_size] = self._value(request, index, position)

    def _advance_state(self, request: Request, index: int, first: int, end: int) -> None:
        """Goes on from the state after `first` tokens, as vLLM's ``preprocess_mamba`` does."""
        size = self.specs[index].block_size
        table = self.manager.get_block_ids(request.request_id)[index]
        if first:
            found = self.memory.get(table[(first - 1) // size])
            assert found == {0: self._value(request, index, first - 1)}, (index, first)
        checkpoint = self.manager.coordinator.single_type_managers[index]._checkpoints.get(
            request.request_id
        )
        if checkpoint is not None:
            tokens, place = checkpoint
            assert table[place] != 0
            self.memory[table[place]] = {0: self._value(request, index, tokens - 1)}
        running = table[(end - 1) // size]
        assert running != 0
        self.memory[running] = {0: self._value(request, index, end - 1)}

    def _check_in_sight(self, request: Request, position: int) -> None:
        """What the token at `position` looks at is there, by the definition of each kind."""
        tables = self.manager.get_block_ids(request.request_id)
        for index, spec in enumerate(self.specs):
            if isinstance(spec, MambaSpec):
                continue
            begin = 0
            if isinstance(spec, SlidingWindowSpec):
                begin = max(0, position - spec.sliding_window + 1)
            elif isinstance(spec, ChunkedLocalAttentionSpec):
                begin = position - position % spec.attention_chunk_size
            # The nearest and the farthest, and one between: all of them would take minutes.
            seen = {begin, position - 1, self.chance.randrange(begin, position + 1)}
            for token in seen:
                if not begin <= token < position:
                    continue
                block = tables[index][token // spec.block_size]
                found = self.memory.get(block, {}).get(token % spec.block_size)
                assert found == self._value(request, index, token), (index, token, position)

    def _store(self, request: Request, group: GroupGeometry, chunk) -> None:
        state = self.scheduler._states[request.request_id]
        keys = state.chunk_keys(self.geometry, len(request.block_hashes))
        end = (keys.index(chunk.key) + 1) * CHUNK
        size = group.block_tokens
        begin = end - group.kept_blocks * size
        assert len(chunk.block_ids) == group.kept_blocks
        content = [dict(self.memory[block]) for block in chunk.block_ids]
        if group.holds_state:
            begin = end
            assert content == [{0: self._value(request, group.index, end - 1)}]
        for token in range(begin, end):
            place, offset = divmod(token - begin, size)
            assert content[place][offset] == self._value(request, group.index, token)
        self.files.setdefault((group.index, chunk.key), content)

    def _value(self, request: Request, group: int, token: int) -> object:
        return self.weights, group, token, hash(tuple(request.prompt_token_ids[: token + 1]))


@dataclass
class Answer:
    value: object

    def poll(self):
        return self.value

    def wait(self, limit_seconds: float):
        return self.value


CASES = [(model, caching) for model in MODELS for caching in (False, True)] + [
    (model, True) for model in STATE_MODELS
]


@pytest.mark.parametrize(("model", "caching"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_sees_what_it_must(model, caching, seed):
    chance = random.Random(f"{model} {caching} {seed}")
    simulation = Simulation((MODELS | STATE_MODELS)[model], caching, chance)
    stems = [[chance.randrange(1000) for _ in range(MAX_TOKENS)] for _ in range(2)]
    for number in range(14):
        stem = chance.choice(stems)[: chance.randrange(20, 330)]
        tail = [chance.randrange(1000) for _ in range(chance.randrange(1, 40))]
        simulation.run(f"request {number}", stem + tail)
        if chance.random() < 0.3:
            simulation.lose_some()
        if chance.random() < 0.3:
            simulation.manager.reset_prefix_cache()
    assert simulation.loaded_tokens > 0, "nothing was ever loaded"


@pytest.mark.parametrize(("model", "caching"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_sees_kv_cache_of_the_weights_that_vllm_has(model, caching, seed):
    """Between requests and in the midst of them: vLLM preempts what runs when it resets."""
    chance = random.Random(f"weights {model} {caching} {seed}")
    simulation = Simulation((MODELS | STATE_MODELS)[model], caching, chance)
    stem = [chance.randrange(1000) for _ in range(MAX_TOKENS)]
    loaded: dict[int, int] = {}
    for number in range(60):
        before = simulation.loaded_tokens
        simulation.run(
            f"request {number}",
            stem[: chance.randrange(100, 330)] + [chance.randrange(1000) for _ in range(20)],
            may_preempt=number % 3 == 2,
        )
        tokens = simulation.loaded_tokens - before
        loaded[simulation.weights] = loaded.get(simulation.weights, 0) + tokens
        if chance.random() < 0.25:
            simulation.reset()
    assert loaded[0] > 0, "nothing of the first weights was loaded"
    assert sum(loaded.values()) > loaded[0], "nothing of other weights was ever loaded"
