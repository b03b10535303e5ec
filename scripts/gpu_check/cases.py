"""KV caches as vLLM lays them out: one storage of bytes, one strided view for each layer.

A view has the axes block, head, token and content, in this order, whatever lies where: the name of
a layout gives the order in memory, the outermost axis first (``LBNHC``: layer, block, token, head,
content). K and V of a head follow each other in the content; MLA has one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC")
# Bytes of an element, by the name that PyTorch has for the type.
TYPES = {"bfloat16": 2, "float8_e4m3fn": 1}
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One KV cache."""

    layout: str
    dtype: str
    model: str
    layers: int
    blocks: int
    heads: int
    content: int
    blocks_per_chunk: int

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"{self.layout} {self.dtype} {self.model}"

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis in elements."""
        return {
            "L": self.layers,
            "B": self.blocks,
            "H": self.heads,
            "N": BLOCK_TOKENS,
            "C": self.content,
        }

    @property
    def strides(self) -> dict[str, int]:
        """Elements from one index of an axis to the next."""
        strides, step = {}, 1
        for axis in reversed(self.layout):
            strides[axis] = step
            step *= self.sizes[axis]
        return strides

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a layer's view."""
        return (self.blocks, self.heads, BLOCK_TOKENS, self.content)

    @property
    def view_strides(self) -> tuple[int, int, int, int]:
        """The strides of a layer's view in elements."""
        strides = self.strides
        return (strides["B"], strides["H"], strides["N"], strides["C"])

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return TYPES[self.dtype]

    @property
    def storage_bytes(self) -> int:
        """Bytes of the whole KV cache."""
        elements = self.layers * self.blocks * self.heads * BLOCK_TOKENS * self.content
        return elements * self.item_bytes

    @property
    def is_block_outermost(self) -> bool:
        """Whether a block's bytes of all layers follow each other."""
        return self.layout.startswith("B")

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's payload."""
        return self.storage_bytes // self.blocks * self.blocks_per_chunk

    @property
    def has_large_chunks(self) -> bool:
        """Whether it is checked with large chunks, too: that takes seconds, so few are."""
        return (self.dtype, self.model) == ("bfloat16", "GQA") and self.layout.endswith("NHC")

    def with_large_chunks(self) -> Case:
        """The same with four chunks in all blocks."""
        return replace(self, blocks_per_chunk=self.blocks // 4)

    def spans(self, block: int) -> Iterator[tuple[int, int]]:
        """Offset and length in bytes of a block in each layer."""
        strides = self.strides
        length = self.heads * BLOCK_TOKENS * self.content * self.item_bytes
        for layer in range(self.layers):
            offset = layer * strides["L"] + block * strides["B"]
            yield offset * self.item_bytes, length


def cases(small: bool) -> list[Case]:
    """All layouts, types and kinds of attention; `small` ones where memory is slow."""
    # Blocks of all layers fill whole pages, as the way in place needs them.
    # Head size 128 as Llama 3.1; 576 is what MLA keeps of a token in DeepSeek V3.
    layers, blocks, heads = (4, 48, 2) if small else (8, 128, 8)
    # Models differ in heads and content.
    models = {"GQA": (heads, 2 * 128), "MLA": (1, 576)}
    return [
        Case(layout, dtype, model, layers, blocks, count, content, 4)
        for layout in LAYOUTS
        for dtype in TYPES
        for model, (count, content) in models.items()
    ]
