"""Several stores on one directory: in two processes, and in one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from store_harness import (
    LIMIT_SECONDS,
    Geometry,
    HostMemory,
    key,
    load_chunks,
    lookup,
    namespace,
    open_store,
    store_chunks,
)
from store_process import StoreProcess

from kvrail._core import ConfigError, MismatchError


def test_two_processes_read_what_the_other_wrote(tmp_path: Path) -> None:
    ours = HostMemory(Geometry(), seed=1)
    with StoreProcess(tmp_path, seed=2) as other, open_store(tmp_path) as store:
        kv_cache = ours.attach(store)
        assert lookup(store, range(4)) == 0
        theirs = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
        answer = other.do({"action": "store", "chunks": theirs})
        assert answer["stored"] == 2
        # No wait and no new store: what is published is seen at once.
        assert lookup(store, range(4)) == 2
        into = {0: [31, 30, 29, 28], 1: [20, 21, 22, 23]}
        assert load_chunks(kv_cache, into).loaded == 2
        for index, blocks in into.items():
            assert ours.blocks(blocks).hex() == answer["blocks"][str(index)]

        mine = {2: [1, 3, 5, 7], 3: [0, 2, 4, 6]}
        expected = {str(index): ours.blocks(blocks).hex() for index, blocks in mine.items()}
        assert other.do({"action": "lookup", "indices": [0, 1, 2, 3]})["found"] == 2
        assert store_chunks(kv_cache, mine).stored == 2
        assert other.do({"action": "lookup", "indices": [0, 1, 2, 3]})["found"] == 4
        answer = other.do({"action": "load", "chunks": {2: [8, 9, 10, 11], 3: [12, 13, 14, 15]}})
        assert (answer["loaded"], answer["failed"]) == (2, [])
        assert answer["blocks"] == expected


def test_many_threads_share_a_store(tmp_path: Path) -> None:
    """Each thread stores, looks up and loads chunks of its own in blocks of its own."""
    geometry = Geometry(block_count=8 * 8)
    source, target = HostMemory(geometry, seed=1), HostMemory(geometry, seed=2)
    failures: list[str] = []
    with open_store(tmp_path, cufile_buffer_size=64) as store:
        writer, reader = source.attach(store), target.attach(store)

        def work(thread: int) -> None:
            for half in range(2):
                index = thread * 2 + half
                blocks = list(range(index * 4, index * 4 + 4))
                stored = store_chunks(writer, {index: blocks}).stored
                found = lookup(store, [index])
                loaded = load_chunks(reader, {index: blocks}).loaded
                if (stored, found, loaded) != (1, 1, 1):
                    failures.append(f"chunk {index}: {stored} {found} {loaded}")

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert source.blocks(range(64)) == target.blocks(range(64))


def test_a_new_namespace_says_how_it_differs_from_its_relative(tmp_path: Path) -> None:
    with open_store(tmp_path, chunk_size=16):
        pass
    manifest = tmp_path / namespace().directory_name / "manifest.json"
    text = manifest.read_text()
    with open_store(tmp_path):
        assert manifest.read_text() == text
    manifest.write_text(text.replace("test/model", "another/model"))
    with pytest.raises(MismatchError, match="another/model"), open_store(tmp_path):
        pass


def test_each_of_several_chunks_is_looked_up(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    with open_store(tmp_path) as store:
        store_chunks(memory.attach(store), {index: [0, 1, 2, 3] for index in (1, 3)})
        ticket = store.lookup_each([key(index) for index in range(5)])
        assert ticket.wait(LIMIT_SECONDS) == [False, True, False, True, False]
        assert ticket.poll() == [False, True, False, True, False]
        assert store.lookup_each([key(1)], group=1).wait(LIMIT_SECONDS) == [False]
        with pytest.raises(ConfigError, match="expected 8 to 32"):
            store.lookup_each([b"short"])
