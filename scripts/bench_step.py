"""Measures what the connector adds to a vLLM step in which it has nothing to do.

Each run is a real vLLM in a process of its own, with a model of 32 layers that computes next to
nothing (`make_wide_model.py`): vLLM calls some hooks once for each layer. Requests decode, 1, 8 and
64 at a time; every hook that vLLM calls on either side of the connector is timed from outside
(`timed_connector.py`). kvrail's connector and one that does nothing take turns, timed in the same
way: what is seen of the second is the timing's own cost, and vLLM's base class.

A step counts when it hands the workers no load and no store, when every request in it decodes one
token, when vLLM announced, asked about, or ended no request since the step before, and when the
counters of stores and loads had stopped moving before it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_run import print_result, random_tokens, run_apart, scratch_folder
from make_model import cache_folder
from make_wide_model import DEEP, VOCABULARY, make_wide_model

PROMPT_TOKENS = 300
BATCHES = (1, 8, 64)
KINDS = ("idle", "kvrail")
CONNECTORS = {"idle": "TimedIdle", "kvrail": "TimedKvrail"}
# Steps in which vLLM's scheduler calls one of these are about a request that comes or goes.
REQUEST_HOOKS = frozenset(
    {
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "request_finished",
        "request_finished_all_groups",
    }
)
RUN_LIMIT_SECONDS = 900.0
TARGET_MICROSECONDS = 50.0


def run_child(arguments: argparse.Namespace) -> None:
    """Decodes with each number of requests in this process."""
    from vllm import LLM, SamplingParams

    extra = {"gds_path": str(arguments.store), "cufile_buffer_size": 256}
    engine = LLM(
        str(arguments.model),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=1024,
        # Hooks are called per step whether or not there are statistics; with them vLLM serves.
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": CONNECTORS[arguments.child],
            "kv_connector_module_path": "timed_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra if arguments.child == "kvrail" else {},
        },
    )
    source = random.Random(arguments.seed)
    for requests in BATCHES:
        prompts = [
            {"prompt_token_ids": random_tokens(source, PROMPT_TOKENS, VOCABULARY)}
            for _ in range(requests)
        ]
        # Prompts are computed in several steps, in which those that came first decode already.
        answer = arguments.steps + requests // 2
        sampling = SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
        )
        engine.generate(prompts, sampling, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    print_result("done")


def read_side(folder: Path, side: str) -> dict[str, Any]:
    """What one side of the connector recorded."""
    files = list(folder.glob(f"{side}-*.json"))
    if len(files) != 1:
        raise RuntimeError(f"{len(files)} records of the side {side!r} in {folder}, expected one")
    record: dict[str, Any] = json.loads(files[0].read_text())
    return record


def moves_chunks(step: dict[str, Any]) -> bool:
    """Whether the connector reported in this step that the store had done anything."""
    return any(not name.endswith("_tokens_per_second") for name in step.get("moved", ()))


def counted_steps(
    scheduler: Sequence[dict[str, Any]], worker: Sequence[dict[str, Any]], requests: int
) -> list[tuple[dict[str, Any], dict[str, Any], float]]:
    """Steps of both sides with nothing to do, with the microseconds since the step before."""
    counted = []
    for before, ours, theirs in zip(scheduler, scheduler[1:], worker[1:], strict=False):
        if moves_chunks(ours) or moves_chunks(theirs):
            # Chunks of the prompts were still being written up to here.
            counted = [] if ours["requests"] == requests else counted
            continue
        if (
            ours["requests"] == ours["tokens"] == requests
            and before["requests"] == requests
            and ours["loads"] == ours["stores"] == 0
            and not REQUEST_HOOKS & ours["hooks"].keys()
        ):
            counted.append((ours, theirs, (ours["ended"] - before["ended"]) / 1e3))
    return counted


def measure(arguments: argparse.Namespace, kind: str, forked: bool, seed: int) -> dict[str, Any]:
    """One run: for each number of requests the steps that count, and what else is known of it."""
    with scratch_folder("step-") as folder:
        (folder / "records").mkdir()
        command = ["--child", kind, "--seed", str(seed), "--steps", str(arguments.steps)]
        command += ["--model", str(arguments.model), "--store", str(folder / "store")]
        environment = {
            "BENCH_STEP_RECORDS": str(folder / "records"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if forked else "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
            # The plugin registers a name that these runs do not use.
            "VLLM_PLUGINS": "",
        }
        run_apart(__file__, command, environment, RUN_LIMIT_SECONDS)
        scheduler = read_side(folder / "records", "scheduler")
        worker = read_side(folder / "records", "worker")
    steps = scheduler["steps"], worker["steps"]
    if len(steps[0]) != len(steps[1]):
        raise RuntimeError(f"{len(steps[0])} steps of the scheduler, {len(steps[1])} of the worker")
    return {
        "steps": {requests: counted_steps(*steps, requests) for requests in BATCHES},
        "apart": scheduler["process"] != worker["process"],
        "hand_over": scheduler["hand_over_microseconds"],
    }


def side_microseconds(step: dict[str, Any]) -> float:
    """What all hooks of one side took in a step."""
    return sum(nanoseconds for _, nanoseconds in step["hooks"].values()) / 1e3


def spread(values: Sequence[float]) -> str:
    """Median, 90th and 99th percentile."""
    parts = statistics.quantiles(values, n=100, method="inclusive")
    return f"{statistics.median(values):7.1f} {parts[89]:7.1f} {parts[98]:7.1f}"


def print_hooks(steps: Sequence[tuple[dict[str, Any], dict[str, Any], float]]) -> None:
    """One line for each hook: calls and microseconds a step."""
    for index, side in enumerate(("scheduler", "worker")):
        names = sorted({name for step in steps for name in step[index]["hooks"]})
        for name in names:
            calls = [step[index]["hooks"].get(name, (0, 0)) for step in steps]
            took = [nanoseconds / 1e3 for _, nanoseconds in calls]
            count = statistics.fmean(number for number, _ in calls)
            print(f"      {side:9} {name:34} {count:5.1f} calls {spread(took)}")


def report(results: dict[str, dict[int, Any]], mode: str) -> bool:
    """Prints the figures of one mode; tells whether kvrail is below the target throughout."""
    reached = True
    for requests in BATCHES:
        print(f"\n{mode}, {requests} requests: microseconds a step, median, p90, p99")
        medians = {}
        for kind in KINDS:
            steps = results[kind][requests]
            if len(steps) < 2:
                raise RuntimeError(f"{kind}, {requests} requests: {len(steps)} steps count")
            sides = [[side_microseconds(step[index]) for step in steps] for index in (0, 1)]
            both = [sum(pair) for pair in zip(*sides, strict=True)]
            medians[kind] = statistics.median(both)
            whole = statistics.median(step[2] for step in steps)
            print(
                f"  {kind:7} {len(steps):4} steps of {whole / 1e3:.1f} ms: scheduler "
                f"{spread(sides[0])} | worker {spread(sides[1])} | both {spread(both)}"
            )
            print_hooks(steps)
        reached = reached and medians["kvrail"] < TARGET_MICROSECONDS
        print(f"  kvrail - idle: {medians['kvrail'] - medians['idle']:.1f} (medians of both sides)")
    return reached


def main() -> int:
    """Runs the benchmark, or one run of it as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=300, help="steps of each number of requests")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each connector and mode")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("inside", "forked"),
        default=["inside", "forked"],
        help="where vLLM's engine core is: in the process that asks, or in one of its own",
    )
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Unwinding on SIGTERM removes the folder of the run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.model = arguments.model or make_wide_model(cache_folder().absolute(), DEEP)
    if arguments.child:
        run_child(arguments)
        return 0
    reached = True
    for mode in arguments.mode:
        forked = mode == "forked"
        results: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
        hand_over: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(arguments.rounds):
            # Which comes first changes, so that a machine that slows down favours none.
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                run = measure(arguments, kind, forked, number)
                hand_over[kind].append(run["hand_over"])
                for requests, steps in run["steps"].items():
                    results[kind].setdefault(requests, []).extend(steps)
        where = "in processes of their own" if run["apart"] else "in the same process"
        reached = report(results, f"engine core {mode}, scheduler and worker {where}") and reached
        shown = ", ".join(f"{kind} {statistics.median(hand_over[kind]):.1f}" for kind in KINDS)
        print(f"\npickling a step's metadata and back, beside the hooks: microseconds {shown}")
    print(
        f"\nbelow {TARGET_MICROSECONDS:.0f} microseconds throughout: {'yes' if reached else 'NO'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
