"""Which blocks of a request go to which chunk file, for one KV cache group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvrail.vllm.geometry import NULL_BLOCK, GroupGeometry
from kvrail.vllm.metadata import LoadChunk, StoreChunk


def load_chunks(
    keys: Sequence[bytes],
    start: int,
    end: int,
    group: GroupGeometry,
    block_ids: Sequence[int],
    *,
    with_parents: bool = True,
) -> tuple[LoadChunk, ...]:
    """What of the tokens from `start` on is needed at the boundary `end`, chunk by chunk.

    `with_parents` says that files name the chunk before theirs.
    """
    per_chunk = group.blocks_per_chunk
    first = max(start, group.needed_from(end)) // group.block_tokens
    chunks = []
    for index in range(first // per_chunk, len(keys)):
        chunk_end = (index + 1) * per_chunk
        file_begin = chunk_end - group.kept_blocks
        begin = max(first, file_begin)
        chunks.append(
            LoadChunk(
                keys[index],
                keys[index - 1] if index and with_parents else None,
                begin - file_begin,
                tuple(block_ids[begin:chunk_end]),
            )
        )
    return tuple(chunks)


def store_chunks(
    keys: Sequence[bytes],
    first: int,
    group: GroupGeometry,
    block_ids: Sequence[int],
    *,
    with_parents: bool = True,
) -> Iterator[tuple[int, StoreChunk]]:
    """The chunks from `first` on, by index, as far as the group still has what their files hold.

    A window lets go of blocks as a request proceeds. Those of a chunk that was completed in this
    step are all there: the next token looks at them, or vLLM has not freed any since.
    """
    for index in range(first, len(keys)):
        if not group.is_ever_needed(index):
            continue
        end = (index + 1) * group.blocks_per_chunk
        blocks = tuple(block_ids[end - group.kept_blocks : end])
        if group.is_windowed and NULL_BLOCK in blocks:
            continue
        parent = keys[index - 1] if index and with_parents else None
        yield index, StoreChunk(keys[index], parent, blocks)


def store_states(
    keys: Sequence[bytes], first: int, group: GroupGeometry, states: Mapping[int, int]
) -> Iterator[tuple[int, StoreChunk]]:
    """The chunks from `first` on, by index, at whose end there is a state when this step is done.

    `states` has the block of each state by its number of tokens, as vLLM hands them over
    (``KVConnectorBlockState.boundary_state_offloads``). From a request's table they cannot be
    known: a block in it may hold a state that is still changing.
    """
    for index in range(first, len(keys)):
        block = states.get((index + 1) * group.chunk_size)
        if block is not None and block != NULL_BLOCK:
            yield index, StoreChunk(keys[index], keys[index - 1] if index else None, (block,))
