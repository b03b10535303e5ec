"""``kvrail-explain``: from a prompt to what became of its chunks, with vLLM's own hashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from store_harness import LIMIT_SECONDS, Geometry, HostMemory, config, namespace

from kvrail._core import Store
from kvrail.vllm.explain import ExplainError, parse_tokens

pytest.importorskip("vllm", reason="its hash functions are what is tested")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from kvrail.vllm import explain
from kvrail.vllm.fingerprint import fingerprint_path
from kvrail.vllm.identity import prefix_hash
from kvrail.vllm.prompt_keys import HashRecipe, Prompt, UnknownAdapterError, UnknownHashError

BLOCK = 16
CHUNK = 64
PER_CHUNK = CHUNK // BLOCK
TOKENS = list(range(1000, 1000 + 5 * CHUNK + 7))
SPEC = {"spec": "FullAttentionSpec", "fields": {"block_size": BLOCK, "dcp_sharded": True}}


def identity(algorithm: str = "sha256", **changes: Any) -> dict[str, Any]:
    """The part of the connector's identity that hashes depend on, and what ``changes``."""
    known = {
        "engine": "vllm",
        "engine_version": "0.32.0",
        "chunk_size": CHUNK,
        "groups": [SPEC],
        "parallel": {"decode_context": 1},
        "prefix_hash": prefix_hash(algorithm),
    }
    return known | changes


def hashes(tokens: list[int], algorithm: str = "sha256", block: int = BLOCK, **request: Any):
    """The block hashes of a real request in a process that has set up vLLM's hashing."""
    function = get_hash_fn_by_name(algorithm)
    kv_cache_utils.init_none_hash(function)
    hasher = kv_cache_utils.get_request_block_hasher(block, function)
    made = Request("r", tokens, SamplingParams(), None, block_hasher=hasher, **request)
    return [bytes(each) for each in made.block_hashes]


def keys_of(tokens: list[int], count: int, **how: Any) -> list[bytes]:
    return hashes(tokens, **how)[PER_CHUNK - 1 :: PER_CHUNK][:count]


def fill(path: Path, keys: list[bytes], **known: Any) -> str:
    """Stores a chunk under each key; returns the name of the namespace's directory."""
    place = namespace("test/model", **known)
    store = Store(config(path), place)
    kv_cache = HostMemory(Geometry(), seed=1).attach(store)
    for index, key in enumerate(keys):
        parent = keys[index - 1] if index else None
        assert kv_cache.store([(key, parent, [0, 1, 2, 3])]).wait(LIMIT_SECONDS).stored == 1
    store.close(LIMIT_SECONDS)
    return place.directory_name


def run(*arguments: Any, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvrail.vllm.explain", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)


def manifest(known: dict[str, Any]) -> str:
    return json.dumps({"format_version": 1, "identity": known, "model": "m"})


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("salt", [None, "blue"])
def test_keys_are_those_of_the_connector(algorithm: str, salt: str | None) -> None:
    recipe = HashRecipe.of_manifest(manifest(identity(algorithm)))
    found = recipe.keys(Prompt(TOKENS, salt))
    assert found == keys_of(TOKENS, 5, algorithm=algorithm, cache_salt=salt)
    # Whose last token ends a chunk leaves that chunk to compute.
    assert len(recipe.keys(Prompt(TOKENS[: 2 * CHUNK], salt))) == 1
    assert recipe.keys(Prompt(TOKENS[:CHUNK], salt)) == []


def test_the_start_of_the_chains_is_the_namespace_s_and_not_this_process_s() -> None:
    other = get_hash_fn_by_name("sha256")("another seed")
    known = identity(prefix_hash={"algorithm": "sha256", "none_hash": bytes(other).hex()})
    kv_cache_utils.init_none_hash(get_hash_fn_by_name("sha256"))
    before = kv_cache_utils.NONE_HASH
    found = HashRecipe.of_manifest(manifest(known)).keys(Prompt(TOKENS))
    assert before == kv_cache_utils.NONE_HASH
    kv_cache_utils.NONE_HASH = kv_cache_utils.BlockHash(bytes(other))
    try:
        hasher = kv_cache_utils.get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))
        request = Request("r", TOKENS, SamplingParams(), None, block_hasher=hasher)
    finally:
        kv_cache_utils.NONE_HASH = before
    assert found == [bytes(each) for each in request.block_hashes][PER_CHUNK - 1 :: PER_CHUNK]
    assert found[0] != keys_of(TOKENS, 1)[0]


def test_context_parallelism_makes_blocks_longer() -> None:
    recipe = HashRecipe.of_manifest(manifest(identity(parallel={"decode_context": 2})))
    expected = hashes(TOKENS, block=2 * BLOCK)[1::2][:5]
    assert recipe.keys(Prompt(TOKENS)) == expected


def test_with_several_groups_the_identity_says_how_long_a_hash_is() -> None:
    known = identity(groups=[SPEC, SPEC], prefix_hash=prefix_hash("sha256") | {"block_tokens": 32})
    expected = hashes(TOKENS, block=32)[1::2][:5]
    assert HashRecipe.of_manifest(manifest(known)).keys(Prompt(TOKENS)) == expected


def test_an_adapter_s_keys_hold_its_weights(tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    recipe = HashRecipe.of_manifest(manifest(identity()))
    lora = LoRARequest(lora_name="a", lora_int_id=7, lora_path=str(folder))
    plain = keys_of(TOKENS, 5, lora_request=lora)
    fingerprint = bytes.fromhex(fingerprint_path(folder))
    expected = [hashlib.sha256(fingerprint + key).digest() for key in plain]
    assert recipe.keys(Prompt(TOKENS, adapter=("a", str(folder)))) == expected
    with pytest.raises(UnknownAdapterError):
        recipe.keys(Prompt(TOKENS, adapter=("a", str(tmp_path / "gone"))))


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"prefix_hash": {}},
        identity(chunk_size=True),
        identity(chunk_size="64"),
        identity(groups=[]),
        identity(groups=[SPEC, SPEC]),
        identity(groups=[{"fields": {"block_size": 0}}]),
        identity(groups=[{"fields": {"block_size": 48}}]),
        identity(prefix_hash={"algorithm": "sha256", "none_hash": "xyz"}),
    ],
)
def test_an_identity_that_does_not_say_how_is_refused(known: dict[str, Any]) -> None:
    with pytest.raises(UnknownHashError):
        HashRecipe.of_manifest(manifest(known))


def test_an_algorithm_that_vllm_has_not_is_refused() -> None:
    known = identity(prefix_hash={"algorithm": "sha1", "none_hash": "00" * 32})
    with pytest.raises(UnknownHashError, match="sha1"):
        HashRecipe.of_manifest(manifest(known)).keys(Prompt(TOKENS))


@pytest.mark.parametrize(
    "text", ["1,2,3", "1 2\n3", "[1, 2, 3]", '{"count": 3, "tokens": [1, 2, 3]}']
)
def test_tokens_are_read_in_each_form(text: str) -> None:
    assert parse_tokens(text) == [1, 2, 3]


@pytest.mark.parametrize(
    "text", ["", "a,b", "[1.5]", "[-1]", '{"tokens": "1"}', "{}", "[[1]]", "1e3"]
)
def test_what_is_no_list_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ExplainError):
        parse_tokens(text)


@pytest.fixture
def quiet_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back with the test what the command sets for vLLM's log in this process."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def run_here(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Runs the command in this process, which has imported vLLM: exit code, stdout, stderr."""
    try:
        code = explain.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    told = capfd.readouterr()
    return code, told.out, told.err


def test_a_prompt_is_explained_chunk_by_chunk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], quiet_vllm: None
) -> None:
    """One chunk lost, one set aside, the rest there; another namespace has what is missing."""
    keys = keys_of(TOKENS, 5)
    ours = fill(tmp_path, keys, **identity())
    # Another algorithm: the same tokens have other keys there.
    cbor = keys_of(TOKENS, 3, algorithm="sha256_cbor")
    theirs = fill(tmp_path, cbor, **identity("sha256_cbor"))
    fill(tmp_path, [bytes(32)], something="else")
    path = next((tmp_path / ours).glob(f"*/*/{keys[2].hex()}.safetensors"))
    path.unlink()
    path = next((tmp_path / ours).glob(f"*/*/{keys[3].hex()}.safetensors"))
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)

    tokens = ",".join(map(str, TOKENS))
    told = run(tmp_path, "--tokens", tokens, "--namespace", ours)
    assert told.returncode == 1, told.stderr
    answer = told.stdout.splitlines()[-1]
    expected = (
        "  2 of 5 chunks can be loaded; the first miss is chunk 2 (tokens 128..192): absent: not "
        f"stored here yet, or removed without a record; {theirs} has it, and differs in "
    )
    assert answer.startswith(expected), told.stdout
    assert 'identity.prefix_hash.algorithm: "sha256" here, "sha256_cbor" there' in answer
    assert "something" not in told.stdout
    assert told.stderr.count("warning: test-model-") == 1
    assert "does not say how prompts are hashed" in told.stderr

    tokens_file = tmp_path / "tokens.json"
    tokens_file.write_text(json.dumps({"tokens": TOKENS}))
    found = json.loads(run_here(capfd, tmp_path, "--tokens-file", tokens_file, "--json")[1])
    assert found["prompt_tokens"] == len(TOKENS)
    by_name = {each["name"]: each for each in found["namespaces"]}
    assert by_name.keys() == {ours, theirs}
    verdicts = [chunk["verdict"] for chunk in by_name[ours]["chunks"]]
    assert verdicts == ["hit", "hit", "never seen", "damaged", "hit"]
    assert (by_name[ours]["usable"], by_name[ours]["usable_tokens"]) == (2, 2 * CHUNK)
    assert [chunk["key"] for chunk in by_name[ours]["chunks"]] == [key.hex() for key in keys]
    assert (by_name[theirs]["usable"], by_name[theirs]["usable_tokens"]) == (3, 3 * CHUNK)
    elsewhere = by_name[theirs]["chunks"][4]["elsewhere"]
    assert [other["namespace"] for other in elsewhere] == [ours]

    # Nothing is read, so the damage is not seen; another salt has nothing here.
    quick = run(tmp_path, "--tokens-file", "-", "--namespace", ours, "--quick", text=tokens)
    assert quick.returncode == 0 and "damaged" not in quick.stdout, quick.stdout
    arguments = (tmp_path, "--tokens", tokens, "--namespace", ours, "--cache-salt", "red")
    code, salted, _ = run_here(capfd, *arguments)
    assert code == 0
    assert "0 of 5 chunks can be loaded; the first miss is chunk 0" in salted
    assert "has it" not in salted

    # The keys alone can be taken to where the store is.
    _, only, _ = run_here(capfd, tmp_path, "--tokens", tokens, "--keys-only")
    assert json.loads(only)["namespaces"][theirs]["keys"][:3] == [key.hex() for key in cbor]


def test_what_cannot_be_explained_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], quiet_vllm: None
) -> None:
    fill(tmp_path, keys_of(TOKENS, 1), **identity())
    whole = ",".join(map(str, TOKENS))
    for arguments, expected in [
        ((tmp_path, "--tokens", "1,2,3"), "a prompt of 3 tokens has no chunk to load"),
        ((tmp_path, "--text", "hello"), "--model"),
        ((tmp_path, "--tokens", "x"), "expected token ids"),
        ((tmp_path / "gone", "--tokens", "1"), "gone"),
        ((tmp_path, "--tokens", whole, "--namespace", "x"), "no namespace `x`"),
        ((tmp_path,), "required"),
    ]:
        code, output, errors = run_here(capfd, *arguments)
        assert code == 2, arguments
        assert expected in errors and "Traceback" not in errors, errors
        assert output == ""
    empty = tmp_path / "empty"
    empty.mkdir()
    told = run(empty, "--tokens", "1,2")
    assert told.returncode == 2 and "no namespace" in told.stderr
