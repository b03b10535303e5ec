"""Shows kvrail at work: a long document is read once, and a second server takes it from disk.

Starts `vllm serve` with the configuration and the command that users of the LMCache GDS backend
know, asks about a document of several thousand tokens, stops the server, starts another one on the
same directory and asks again. Prints what each took. Exits with 1 if the answers differ or if the
second server took nothing from disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from island_document import QUESTION, chat_prompt, write_document
from make_model import cache_folder, make_model
from step_line import StepLine
from vllm_server import Answer, ServerError, VllmServer

CHUNK_SIZE = 256
BUFFER_MIB = 256
PROMPT_TOKENS = 4000
ANSWER_TOKENS = 48
DOCUMENT_SEED = 7
STORE_LIMIT_SECONDS = 60.0
# Shorter than a chunk, so that nothing of it is stored, and about something else.
WARM_UP_QUESTION = "Tell me in one sentence why the sea is salty."
SERVE_OPTIONS = (
    "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "8192",
    "--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}',
)  # fmt: skip
DISK_TOKENS = "vllm:prompt_tokens_cached_by_source_total"
LOAD_BYTES = "kvrail:bytes_loaded_total"
LOAD_SECONDS = "kvrail:load_seconds_total"


@dataclass(frozen=True)
class Run:
    """What one server did with the question about the document."""

    answer: Answer
    disk_tokens: int
    load_bytes: float
    load_seconds: float
    counters: Mapping[str, float]


def total(samples: Mapping[str, float], name: str, label: str = "") -> float:
    """Adds up the samples of the metric `name` whose labels hold `label`."""
    return sum(
        value
        for sample, value in samples.items()
        if sample.partition("{")[0] == name and label in sample
    )


def write_configuration(folder: Path, store: Path) -> Path:
    """Writes the YAML file as LMCache's documentation has it, and shows it."""
    file = folder / "gds-backend.yaml"
    file.write_text(
        f"local_cpu: false\nchunk_size: {CHUNK_SIZE}\n"
        f'gds_path: "{store}"\ncufile_buffer_size: {BUFFER_MIB}\n'
    )
    print(f"{file.name} (MiB of buffer: {BUFFER_MIB}, this model's chunks are small):")
    print("".join(f"    {line}\n" for line in file.read_text().splitlines()), end="")
    return file


def make_prompt(model: Path, tokens_wanted: int) -> str:
    """Writes the prompt: a document of about `tokens_wanted` tokens, then the question."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def token_count(text: str) -> int:
        return len(tokenizer.encode(chat_prompt(text, QUESTION)).ids)

    return chat_prompt(write_document(DOCUMENT_SEED, token_count, tokens_wanted), QUESTION)


def chunk_files(store: Path) -> list[Path]:
    """Lists the chunk files that are published in the store's directory."""
    return [file for file in store.rglob("*.safetensors") if not file.name.startswith(".")]


def wait_for_chunks(store: Path, count: int, progress: StepLine) -> list[Path]:
    """Waits until `count` chunk files are there; returns those there at the time limit."""
    deadline = time.monotonic() + STORE_LIMIT_SECONDS
    while len(files := chunk_files(store)) < count and time.monotonic() < deadline:
        progress()
        time.sleep(0.1)
    return files


def forget_cached_pages(files: list[Path]) -> None:
    """Asks the kernel to drop the files from memory, so that the second server reads the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Only clean pages can be dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def run_server(arguments: argparse.Namespace, number: int, prompt: str, folder: Path) -> Run:
    """Starts a server, asks the question, and stops the server."""
    environment = {
        "LMCACHE_CONFIG_FILE": str(folder / "gds-backend.yaml"),
        "LMCACHE_USE_EXPERIMENTAL": "True",
    }
    log = folder / f"server-{number}.log"
    server = VllmServer(arguments.model, SERVE_OPTIONS, environment, log)
    print(
        f"\nServer {number}: LMCACHE_CONFIG_FILE=gds-backend.yaml LMCACHE_USE_EXPERIMENTAL=True \\"
    )
    print(f"  {server.shown_command()}")
    with server:
        with StepLine("starting vLLM") as line:
            server.wait_until_healthy(line)
        with StepLine("warming up with a short prompt about something else") as line:
            server.ask(chat_prompt("", WARM_UP_QUESTION), 8, line)
        before = server.metrics()
        with StepLine("asking about the document") as line:
            answer = server.ask(prompt, ANSWER_TOKENS, line)
        after = server.metrics()
        print(f"    {answer.prompt_tokens} tokens of prompt, answer: {answer.text.strip()!r}")
        if number == 1:
            # The last tokens of the prompt fill no chunk and are not stored.
            expected = answer.prompt_tokens // CHUNK_SIZE
            with StepLine(f"waiting for {expected} chunk files") as line:
                files = wait_for_chunks(folder / "store", expected, line)
            size = sum(file.stat().st_size for file in files)
            print(f"    {len(files)} chunk files, {size / 1e6:.1f} MB in {folder / 'store'}")
            counters = server.metrics()
        else:
            counters = after
        with StepLine("stopping vLLM"):
            in_time = server.stop()
        if not in_time:
            print("    it did not end by itself and was killed")
    kvrail = {
        name: value
        for name, value in counters.items()
        if name.startswith("kvrail:") and "_created" not in name
    }

    def moved(name: str, label: str = "") -> float:
        return total(after, name, label) - total(before, name, label)

    disk_tokens = int(moved(DISK_TOKENS, 'source="disk"'))
    return Run(answer, disk_tokens, moved(LOAD_BYTES), moved(LOAD_SECONDS), kvrail)


def print_table(cold: Run, warm: Run, chunk_count: int) -> bool:
    """Prints what was measured; tells whether the demo shows what it should."""
    ratio = warm.answer.first_token_seconds / cold.answer.first_token_seconds
    # The connector adds up the time of the chunks, which several threads load side by side.
    speed = "not measured"
    if warm.load_seconds > 0:
        speed = f"{warm.load_bytes / 1e9 / warm.load_seconds:.2f} GB/s"
    same = warm.answer.text == cold.answer.text
    prompt_tokens = warm.answer.prompt_tokens
    rows = [
        ("time to first token, cold", f"{cold.answer.first_token_seconds:.3f} s"),
        ("time to first token, warm", f"{warm.answer.first_token_seconds:.3f} s"),
        ("warm / cold", f"{ratio:.3f}"),
        ("chunk files written", f"{chunk_count}"),
        ("tokens taken from disk, cold", f"{cold.disk_tokens} of {cold.answer.prompt_tokens}"),
        ("tokens taken from disk, warm", f"{warm.disk_tokens} of {prompt_tokens}"),
        ("bytes loaded, warm", f"{warm.load_bytes / 1e6:.1f} MB"),
        ("speed of the load, per I/O thread", speed),
        ("both answers the same text", "yes" if same else "NO"),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    if not same:
        print(f"\nerror: the answers differ:\n  {cold.answer.text!r}\n  {warm.answer.text!r}")
    if warm.disk_tokens == 0:
        print("\nerror: the second server took no token from disk")
    return same and warm.disk_tokens > 0


def demonstrate(arguments: argparse.Namespace, folder: Path) -> bool:
    """Runs both servers on one store in `folder`."""
    prompt = make_prompt(arguments.model, arguments.tokens)
    write_configuration(folder, folder / "store")
    cold = run_server(arguments, 1, prompt, folder)
    files = chunk_files(folder / "store")
    forget_cached_pages(files)
    print("    dropped the chunk files from the page cache")
    warm = run_server(arguments, 2, prompt, folder)
    if arguments.counters:
        print()
        for name, value in sorted(warm.counters.items()):
            print(f"  {name.partition('{')[0]} {value:g}")
    return print_table(cold, warm, len(files))


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=PROMPT_TOKENS, help="length of the prompt")
    parser.add_argument("--keep", action="store_true", help="keep the store and the logs")
    parser.add_argument(
        "--counters", action="store_true", help="print all kvrail counters of the second server"
    )
    return parser.parse_args()


def main() -> int:
    """Runs the demo in a fresh folder of the cache, on the disk rather than in a tmpfs."""
    arguments = parse_arguments()
    # Unwinding on SIGTERM stops the server and removes the folder, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    cache = cache_folder().absolute()
    arguments.model = arguments.model or make_model(cache)
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=cache))
    try:
        passed = demonstrate(arguments, folder)
    except ServerError as error:
        print(f"\nerror: {error}")
        passed = False
    finally:
        if arguments.keep:
            print(f"\nkept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\nThe demo took {time.monotonic() - start:.0f} s.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
