"""docs/format.md is enough to read a chunk without kvrail: a reader written from it alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import blake3
import pytest
import xxhash

PAGE = 4096
FIXTURE = Path(__file__).parents[3] / "crates/kvrail/tests/fixtures/v1"


class BadChunkError(Exception):
    """The file is not what docs/format.md says."""


def canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_chunk(path: Path, shape: list[int], tokens: int, parent: str) -> bytes:
    """The payload of a chunk, verified, from what docs/format.md says."""
    directory = path.parents[2]
    namespace = directory.name.rsplit("-", 1)[1]
    group, rank = path.parents[1].name.removeprefix("g").split("r")
    size = shape[0] * shape[1] * shape[2]
    pages = -(-size // PAGE)
    padded, entries = pages * PAGE, -(-pages // 512) * 512
    data = path.read_bytes()
    if len(data) != PAGE + padded + 8 * entries:
        raise BadChunkError("length")
    table = data[PAGE + padded :]
    root = f"{xxhash.xxh3_64_intdigest(table):016x}"
    head: dict[str, object] = {
        "__metadata__": {
            "format": "kvrail",
            "version": "1",
            "namespace": namespace,
            "group": group,
            "rank": rank,
            "tokens": str(tokens),
            "chunk_key": path.stem,
            "parent": parent,
            "root_xxh3": root,
        },
        "kvcache": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]},
    }
    if padded > size:
        head["pad"] = {
            "dtype": "U8",
            "shape": [padded - size],
            "data_offsets": [size, padded],
        }
    head["page_xxh3"] = {
        "dtype": "U64",
        "shape": [entries],
        "data_offsets": [padded, padded + 8 * entries],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    if data[:PAGE] != (PAGE - 8).to_bytes(8, "little") + text.ljust(PAGE - 8):
        raise BadChunkError("head")
    payload = data[PAGE : PAGE + padded]
    for page in range(entries):
        entry = int.from_bytes(table[8 * page : 8 * page + 8], "little")
        part = payload[page * PAGE : (page + 1) * PAGE]
        if entry != (xxhash.xxh3_64_intdigest(part) if page < pages else 0):
            raise BadChunkError(f"page {page}")
    return payload[:size]


def chunk_files() -> list[Path]:
    files = sorted(FIXTURE.rglob("*.safetensors"))
    assert len(files) == 2
    return files


def test_the_fixture_reads_by_the_text_alone() -> None:
    first, second = chunk_files()
    payloads = [
        read_chunk(first, [2, 2, 3000], 256, ""),
        read_chunk(second, [2, 2, 3000], 256, first.stem),
    ]
    assert payloads[0] != payloads[1]
    assert all(len(set(payload)) == 256 for payload in payloads)


def test_the_directory_is_named_by_the_hash_of_its_manifest() -> None:
    manifests = list(FIXTURE.glob("*/manifest.json"))
    assert len(manifests) == 1
    document = json.loads(manifests[0].read_text())
    expected = blake3.blake3(canonical(document)).hexdigest()[:16]
    assert manifests[0].parent.name == f"test-model-{expected}"


@pytest.mark.parametrize("at", [0, 100, PAGE, 3 * PAGE, 4 * PAGE - 1, 4 * PAGE, 5 * PAGE - 1])
def test_the_reader_sees_a_flipped_bit(tmp_path: Path, at: int) -> None:
    source = chunk_files()[0]
    path = tmp_path / source.relative_to(FIXTURE)
    path.parent.mkdir(parents=True)
    shutil.copyfile(source, path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadChunkError):
        read_chunk(path, [2, 2, 3000], 256, "")
