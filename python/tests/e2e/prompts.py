"""The prompts of the end-to-end tests: fixed random tokens, so no two of them share a chunk."""

import random
from collections.abc import Iterable

import tiny_model
from damage import DAMAGES

BLOCK_TOKENS = 128
CHUNK_TOKENS = 256

# Of each length that behaves in its own way: shorter than a chunk, a chunk exactly, several chunks
# exactly, several and a tail, and thousands of tokens, which also is more than one prefill step
# takes and more than the staging memory of these tests holds.
MAIN_LENGTHS = {
    "short": 100,
    "one_chunk": CHUNK_TOKENS,
    "boundary": 3 * CHUNK_TOKENS,
    "tail": 2 * CHUNK_TOKENS + 188,
    "long": 3500,
}

# Tokens that each prompt of the crowd decodes: enough to need one block more than the prompt did.
CROWD_TOKENS = 100


def random_prompt(seed: str, length: int) -> list[int]:
    """Tokens drawn from the bytes of the vocabulary; the same `seed` gives the same tokens."""
    generator = random.Random(seed)
    return [generator.randrange(tiny_model.BOS_ID) for _ in range(length)]


def main_prompts() -> dict[str, list[int]]:
    """One prompt for each of `MAIN_LENGTHS`."""
    return {name: random_prompt(f"main {name}", n) for name, n in MAIN_LENGTHS.items()}


def damage_prompts() -> dict[str, list[int]]:
    """One prompt for each way to damage a chunk: two chunks and a tail."""
    return _alike("damage", DAMAGES, 700)


def directory_prompts() -> dict[str, list[int]]:
    """Prompts for directories in trouble: one known before, and new ones during it."""
    return _alike("directory", ["known", "new", "newer"], 700) | _alike(
        "directory", ["large"], 3500
    )


def reuse_prompts() -> dict[str, list[int]]:
    """Prompts for salts, roles and the negative controls."""
    return _alike("reuse", ["salted", "first", "second", "third", "zero", "swap"], 1500)


def abort_prompts() -> dict[str, list[int]]:
    """Prompts of which some are aborted; long enough that an abort meets a load or a prefill."""
    return _alike("abort", [f"gone {index}" for index in range(3)], 3500) | _alike(
        "abort", [f"kept {index}" for index in range(3)], 900
    )


def crowd_prompts() -> dict[str, list[int]]:
    """Prompts that together need more KV cache than the engine gets, so that some are preempted."""
    return _alike("crowd", [str(index) for index in range(6)], 600)


def other_prompts() -> dict[str, list[int]]:
    """All prompts but the main ones and the crowd."""
    return damage_prompts() | directory_prompts() | reuse_prompts() | abort_prompts()


def select(prompts: dict[str, list[int]], *names: str) -> dict[str, list[int]]:
    """The prompts whose name ends with one of `names`."""
    return {name: tokens for name, tokens in prompts.items() if name.endswith(names)}


def _alike(kind: str, names: Iterable[str], length: int) -> dict[str, list[int]]:
    return {f"{kind} {name}": random_prompt(f"{kind} {name}", length) for name in names}


def loadable_tokens(length: int) -> int:
    """Tokens of a prompt that can be loaded: whole chunks that leave one token to compute."""
    return (length - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def chunks_in(prompts: dict[str, list[int]]) -> int:
    """Chunks that all these prompts fill."""
    return sum(len(tokens) // CHUNK_TOKENS for tokens in prompts.values())
