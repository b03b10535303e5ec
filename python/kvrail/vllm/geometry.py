"""Chunks, blocks and tokens: how they relate, and what each KV cache group needs at a boundary.

A boundary is a number of tokens, a multiple of the chunk size, after which a request can go on
computing. A group that looks back over all tokens needs all of them there, one with a window only
the last few. Formulas are those of ``get_num_skipped_tokens`` of vLLM's cache managers
(``v1/core/single_type_kv_cache_manager.py``, 0.32), which say what vLLM itself keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

# vLLM's placeholder for blocks that a group does not need any more (`BlockPool.null_block`, the
# first block of the pool).
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class GroupGeometry:
    """One KV cache group; sizes are in tokens."""

    index: int
    """The group's place in vLLM's lists of groups, and its number in files."""
    block_tokens: int
    chunk_size: int
    look_back: int | None = None
    """Tokens before a boundary that later tokens look at; None looks at all of them."""
    segment: int | None = None
    """Tokens look back to the last multiple of this only (chunked local attention)."""
    holds_state: bool = False
    """A block holds what a state was after its last token, for the layers that keep no KV of
    tokens (mamba and its kin). A boundary needs the block before it, as a window of one token does.
    """

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for sizes that do not fit."""
        if self.block_tokens <= 0 or self.chunk_size % self.block_tokens:
            raise ValueError(
                f"a chunk of {self.chunk_size} tokens is no multiple of the block's "
                f"{self.block_tokens}"
            )
        if self.look_back is not None and self.look_back <= 0:
            raise ValueError(f"a window that looks back over {self.look_back} tokens")
        if self.holds_state and (self.look_back != 1 or self.segment is not None):
            raise ValueError("of states the last one is needed, and nothing else")
        if self.segment is not None and (self.segment <= 0 or self.segment % self.chunk_size):
            raise ValueError(
                f"attention chunks of {self.segment} tokens are no multiple of a chunk's "
                f"{self.chunk_size}"
            )

    @property
    def is_windowed(self) -> bool:
        """Whether old tokens are not needed any more."""
        return self.look_back is not None or self.segment is not None

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks that one chunk's tokens fill."""
        return self.chunk_size // self.block_tokens

    @property
    def kept_blocks(self) -> int:
        """The last blocks of a chunk, which its file holds: what any boundary can ask of it."""
        if self.look_back is None:
            return self.blocks_per_chunk
        return min(self.blocks_per_chunk, -(-self.look_back // self.block_tokens))

    def needed_from(self, boundary: int) -> int:
        """The first token that is needed at a boundary; the boundary itself where none is."""
        if self.segment is not None:
            return boundary // self.segment * self.segment
        return 0 if self.look_back is None else max(0, boundary - self.look_back)

    def first_needed_chunk(self, chunks: int) -> int:
        """The first of the leading `chunks` chunks that is needed at their end."""
        return self.needed_from(chunks * self.chunk_size) // self.chunk_size

    def is_ever_needed(self, chunk: int) -> bool:
        """Whether any boundary needs the chunk with this index."""
        end = (chunk + 1) * self.chunk_size
        return self.segment is None or end % self.segment != 0


@dataclass(frozen=True, slots=True)
class ChunkGeometry:
    """Sizes in tokens: of a chunk, of what one block and one block hash stand for."""

    chunk_size: int
    block_tokens: int
    """What vLLM's scheduler rounds to: the least common multiple over the groups."""
    hash_tokens: int
    groups: tuple[GroupGeometry, ...] = ()
    """All groups of the model; one that looks at all tokens unless something else is said."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for sizes that do not fit."""
        for name, size in (("block", self.block_tokens), ("block hash", self.hash_tokens)):
            if size <= 0 or self.chunk_size % size:
                raise ValueError(
                    f"a chunk of {self.chunk_size} tokens is no multiple of the {name}'s {size}"
                )
        if not self.groups:
            whole = GroupGeometry(0, self.block_tokens, self.chunk_size)
            object.__setattr__(self, "groups", (whole,))

    @property
    def hashes_per_chunk(self) -> int:
        """Block hashes in one chunk."""
        return self.chunk_size // self.hash_tokens
