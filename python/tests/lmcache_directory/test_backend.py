"""Files of one side read by the other: kvrail's store and LMCache's `GdsBackend`."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvrail import _core
from kvrail.kv_cache import from_arrays

LIMIT_SECONDS = 60.0
MODEL = "meta-llama/Llama 3.1"
LAYERS, BLOCKS, TOKENS, HEADS, HEAD_SIZE = 3, 24, 16, 2, 32
BLOCKS_PER_CHUNK = 4
CHUNK_TOKENS = BLOCKS_PER_CHUNK * TOKENS
SIDE_SHAPE = (LAYERS, CHUNK_TOKENS, HEADS * HEAD_SIZE)
# Names that LMCache, numpy and torch have for a type. numpy has no bfloat16: the bytes are moved.
TYPES = {"float": ("F32", "float32", 4), "bfloat16": ("BF16", "bfloat16", 2)}


class Cache:
    """KV cache of random bytes with K and V beside each other, or of MLA."""

    def __init__(self, element: str, *, is_mla: bool = False) -> None:
        item = TYPES[element][2]
        self.element, self.is_mla = element, is_mla
        self.heads = 1 if is_mla else HEADS
        sides = 1 if is_mla else 2
        shape = (BLOCKS, TOKENS, self.heads, sides, HEAD_SIZE * item)
        source = np.random.default_rng(len(element) + sides)
        self.arrays = [source.integers(0, 256, shape, dtype=np.uint8) for _ in range(LAYERS)]
        size = HEAD_SIZE * item
        token, head = self.heads * sides * size, sides * size
        self.order = (
            TOKENS,
            self.heads,
            HEAD_SIZE,
            item,
            [(side * size, head, token, item) for side in range(sides)],
        )

    def attach(self, store: _core.Store) -> _core.KvCache:
        memory = from_arrays(self.arrays, BLOCKS)
        return memory.attach(store, blocks_per_chunk=BLOCKS_PER_CHUNK, order=self.order)

    def payload(self, blocks: list[int]) -> bytes:
        """The bytes of a chunk's tensor: side, layer, token, head and element."""
        taken = np.stack([array[blocks] for array in self.arrays])
        # layer, block, token, head, side, bytes -> side, layer, block, token, head, bytes
        return taken.transpose(4, 0, 1, 2, 3, 5).tobytes()


def open_store(path: Path, element: str, *, workers: int = 1) -> _core.Store:
    settings = {
        "gds_path": str(path),
        "layout": "lmcache",
        "chunk_size": CHUNK_TOKENS,
        "gds_buffer_size": 4,
        "min_free": 0.0001,
        "extra_config": {"lookup_hold_seconds": 0},
    }
    config = _core.Config.resolve(json.dumps(settings), {}, None)
    namespace = _core.Namespace("m", "{}")
    return _core.Store(config, namespace, lmcache=(MODEL, workers, element, True))


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big", signed=True)


def text_of(number: int, element: str) -> str:
    sign = "-" if number < 0 else ""
    return f"{MODEL}@1@0@{sign}{abs(number):x}@{element}"


def numbers(count: int) -> list[int]:
    source = random.Random(count)
    return [-(2**63), *(source.randint(-(2**63), 2**63 - 1) for _ in range(count - 1))]


@pytest.mark.parametrize("element", list(TYPES))
@pytest.mark.parametrize("is_mla", [False, True], ids=["k and v", "mla"])
def test_both_read_what_either_wrote(
    element: str, is_mla: bool, tmp_path: Path, ask_backend: Any
) -> None:
    cache = Cache(element, is_mla=is_mla)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    chosen = random.Random(7)
    chunks = {n: chosen.sample(range(BLOCKS), BLOCKS_PER_CHUNK) for n in numbers(12)}
    store = open_store(ours, element)
    kv_cache = cache.attach(store)
    for number, blocks in chunks.items():
        report = kv_cache.store([(key_of(number), None, blocks)]).wait(LIMIT_SECONDS)
        assert report.stored == 1
    store.close(LIMIT_SECONDS)

    texts = [text_of(number, element) for number in chunks]
    read, found, copied, again = ask_backend(
        ("read", str(ours)),
        ("contains", {"path": str(ours), "keys": texts}),
        ("copy", (str(ours), str(theirs))),
        ("read", str(theirs)),
    )
    expected = {
        text_of(number, element): [
            hashlib.sha256(cache.payload(blocks)).hexdigest(),
            [1 if is_mla else 2, LAYERS, CHUNK_TOKENS, cache.heads * HEAD_SIZE],
            f"torch.{TYPES[element][1]}",
            6 if is_mla else 1,
        ]
        for number, blocks in chunks.items()
    }
    assert read == again == expected
    assert all(found)
    assert copied == len(chunks)
    # Bit for bit: LMCache's own files are those that kvrail wrote.
    for path in ours.rglob("*.kvcache.safetensors*"):
        other = theirs / path.relative_to(ours)
        assert other.read_bytes() == path.read_bytes()

    store = open_store(theirs, element)
    keys = [key_of(number) for number in chunks]
    assert store.lookup(keys).wait(LIMIT_SECONDS) == len(keys)
    target = Cache(element, is_mla=is_mla)
    for array in target.arrays:
        array[:] = 0
    kv_cache = target.attach(store)
    for number, blocks in chunks.items():
        report = kv_cache.load([(key_of(number), None, 0, blocks)]).wait(LIMIT_SECONDS)
        assert report.errors == []
        assert target.payload(blocks) == cache.payload(blocks)
    store.close(LIMIT_SECONDS)


HASHES = """
import json, sys
from kvrail.vllm.lmcache_hash import LmcacheHasher
algorithms, tokens, size = json.load(sys.stdin)
answer = {}
for algorithm in algorithms:
    hasher = LmcacheHasher.of_process(algorithm)
    keys, previous = [], None
    for begin in range(0, len(tokens) - size + 1, size):
        previous = hasher.key(tokens[begin : begin + size], previous)
        keys.append(int.from_bytes(previous, "big", signed=hasher.has_sign))
    answer[algorithm] = keys
json.dump(answer, sys.stdout)
"""
ALGORITHMS = ["builtin", "sha256", "sha256_cbor", "xxhash", "xxhash_cbor"]


@pytest.fixture(scope="module")
def all_keys(
    ask_backend: Any, lmcache_environment: dict[str, str]
) -> dict[str, tuple[list[str], list[str]]]:
    """The keys of one prompt, ours and LMCache's, for each algorithm, from one process each."""
    tokens = [random.Random(3).randrange(150_000) for _ in range(1000)]
    prompt = {
        "model": MODEL,
        "world_size": 4,
        "worker_id": 2,
        "dtype": "bfloat16",
        "chunk_size": 64,
        "tokens": tokens,
    }
    theirs = ask_backend(*(("keys", prompt | {"algorithm": name}) for name in ALGORITHMS))
    done = subprocess.run(
        [sys.executable, "-c", HASHES],
        input=json.dumps([ALGORITHMS, tokens, 64]),
        env=lmcache_environment | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads(done.stdout)
    ours = [
        [
            f"{MODEL}@4@2@{'-' if number < 0 else ''}{abs(number):x}@bfloat16"
            for number in numbers[name]
        ]
        for name in ALGORITHMS
    ]
    return dict(zip(ALGORITHMS, zip(ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keys_are_lmcaches_for_the_same_tokens(
    algorithm: str, all_keys: dict[str, tuple[list[str], list[str]]]
) -> None:
    ours, theirs = all_keys[algorithm]
    assert ours == theirs
    assert len(ours) == 1000 // 64
