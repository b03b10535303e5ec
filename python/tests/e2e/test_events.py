"""KV events of a real vLLM: what routers are told is in storage."""

from pathlib import Path

from harness import Engines, Job, chunk_keys, chunk_path, step
from prompts import BLOCK_TOKENS, CHUNK_TOKENS, random_prompt


def test_stored_chunks_are_announced_and_lost_ones_taken_back(
    engines: Engines, llama: Path, store: Path
) -> None:
    prompt = random_prompt("events", 700)
    control = store.parent / "lost"
    steps = [
        step("generate", "first", prompts={"a": prompt}),
        step("wait_for_chunks", directory=str(store), files=2),
        # Events are handed over with steps; the workers learn of published files a step later.
        step("generate", "more", prompts={"x": [1, 2, 3]}),
        step("make_file", path=str(control)),
        step("wait_for_file", path=str(control) + ".done"),
        step("generate", "second", prompts={"a": prompt}),
    ]
    engine = {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}
    # What is there is asked for each time.
    settings = {"extra_config": {"lookup_hold_seconds": 0}}
    running = engines.start(Job(llama, steps, store, engine=engine, settings=settings))
    while not control.exists():
        assert not running.files.with_suffix(".exit").exists(), running.log()
    keys = chunk_keys(running, prompt)
    chunk_path(store, keys[1]).unlink()
    Path(f"{control}.done").touch()
    running.wait()

    hashes = next(r["hashes"] for r in running.records("request") if len(r["hashes"]) == 5)
    # As vLLM publishes hashes unless told otherwise: the last 64 bits.
    hashes = [str(int(block, 16) & ((1 << 64) - 1)) for block in hashes]
    events = running.records("kv event")
    for record in events:
        print(record["kind"], [block[:8] for block in record["hashes"]], record["fields"])
    assert [record["kind"] for record in events] == [
        "BlockStored",
        "BlockStored",
        "BlockRemoved",
    ]
    per_chunk = CHUNK_TOKENS // BLOCK_TOKENS
    chunks = [hashes[:per_chunk], hashes[per_chunk : 2 * per_chunk]]
    assert [record["hashes"] for record in events] == [chunks[0], chunks[1], chunks[1]]
    assert {record["fields"]["medium"] for record in events} == {"STORAGE"}
    tokens = [record["fields"].get("token_ids") for record in events]
    ends = [prompt[:CHUNK_TOKENS], prompt[CHUNK_TOKENS : 2 * CHUNK_TOKENS]]
    assert tokens == [ends[0], ends[1], None]
