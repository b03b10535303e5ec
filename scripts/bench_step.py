"""Measures what the connector adds to a vLLM step in which it has nothing to do.

Each run is a real vLLM in a process of its own, with a model of 32 layers that computes next to
nothing (`make_wide_model.py`): vLLM calls some hooks once for each layer. Requests decode, 1, 8 and
64 at a time; every hook that vLLM calls on either side of the connector is called on kvrail's and
on one that does nothing, and timed from outside (`timed_connector.py`). What is seen of the second
is the timing's own cost, and vLLM's base class. Their difference in the same step is the result:
between runs, and between steps, hooks without any work differ by more than kvrail adds.

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
SIDES = ("scheduler", "worker")
# Where a hook's record has the nanoseconds of each connector; in front of them is the calls.
KINDS = {"idle": 1, "kvrail": 2}
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

Step = tuple[dict[str, Any], dict[str, Any], float]
"""What the scheduler and the worker recorded, and the microseconds since the step before."""


def run_child(arguments: argparse.Namespace) -> None:
    """Decodes with each number of requests in this process."""
    from vllm import LLM, SamplingParams

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
            "kv_connector": "TimedKvrail",
            "kv_connector_module_path": "timed_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "gds_path": str(arguments.store),
                "cufile_buffer_size": 256,
            },
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
) -> list[Step]:
    """Steps of both sides with nothing to do."""
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


def measure(arguments: argparse.Namespace, forked: bool, seed: int) -> dict[str, Any]:
    """One run: for each number of requests the steps that count, and what else is known of it."""
    with scratch_folder("step-") as folder:
        (folder / "records").mkdir()
        command = ["--child", "--seed", str(seed), "--steps", str(arguments.steps)]
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


def side_microseconds(step: dict[str, Any], kind: str) -> float:
    """What all hooks of one connector took in a step on one side."""
    return sum(hook[KINDS[kind]] for hook in step["hooks"].values()) / 1e3


def by_side(steps: Sequence[Step], kind: str) -> list[list[float]]:
    """What one connector took in each step: of the scheduler, of the worker, and of both."""
    sides = [[side_microseconds(step[index], kind) for step in steps] for index in range(2)]
    return [*sides, [sum(pair) for pair in zip(*sides, strict=True)]]


def subtract(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Differences, one for each step."""
    return [a - b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median, 90th and 99th percentile."""
    parts = statistics.quantiles(values, n=100, method="inclusive")
    return f"{statistics.median(values):7.1f} {parts[89]:7.1f} {parts[98]:7.1f}"


def print_hooks(steps: Sequence[Step]) -> None:
    """One line for each hook: calls a step, medians of both, and their difference."""
    for index, side in enumerate(SIDES):
        for name in sorted({name for step in steps for name in step[index]["hooks"]}):
            calls = [step[index]["hooks"].get(name, (0, 0, 0)) for step in steps]
            count = statistics.fmean(call[0] for call in calls)
            idle, kvrail = ([call[place] / 1e3 for call in calls] for place in KINDS.values())
            print(
                f"    {side:9} {name:34} {count:5.1f} calls: idle {statistics.median(idle):6.1f}, "
                f"kvrail {statistics.median(kvrail):6.1f} | {spread(subtract(kvrail, idle))}"
            )


def report(results: dict[int, list[Step]], mode: str) -> bool:
    """Prints the figures of one mode; tells whether kvrail is below the target throughout."""
    reached = True
    for requests, steps in results.items():
        if len(steps) < 2:
            raise RuntimeError(f"{requests} requests: {len(steps)} steps count")
        whole = statistics.median(step[2] for step in steps)
        print(
            f"\n{mode}, {requests} requests, {len(steps)} steps of {whole / 1e3:.1f} ms: "
            "microseconds a step, median, p90, p99"
        )
        idle, kvrail = by_side(steps, "idle"), by_side(steps, "kvrail")
        added = [subtract(*pair) for pair in zip(kvrail, idle, strict=True)]
        for name, rows in (("idle", idle), ("kvrail", kvrail), ("kvrail - idle", added)):
            parts = zip((*SIDES, "both"), rows, strict=True)
            shown = " | ".join(f"{side} {spread(row)}" for side, row in parts)
            print(f"  {name:13} {shown}")
        print_hooks(steps)
        reached = reached and statistics.median(added[2]) < TARGET_MICROSECONDS
    return reached


def main() -> int:
    """Runs the benchmark, or one run of it as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=300, help="steps of each number of requests")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each mode")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("inside", "forked"),
        default=["inside", "forked"],
        help="where vLLM's engine core is: in the process that asks, or in one of its own",
    )
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
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
        runs = [measure(arguments, forked, number) for number in range(arguments.rounds)]
        results = {
            requests: [step for run in runs for step in run["steps"][requests]]
            for requests in BATCHES
        }
        where = "in processes of their own" if runs[0]["apart"] else "in the same process"
        reached = report(results, f"engine core {mode}, scheduler and worker {where}") and reached
        shown = ", ".join(
            f"{kind} {statistics.median(run['hand_over'][kind] for run in runs):.1f}"
            for kind in KINDS
        )
        print(f"\npickling a step's metadata and back, beside the hooks: microseconds {shown}")
    print(
        f"\nkvrail - idle below {TARGET_MICROSECONDS:.0f} microseconds (median) for each number of "
        f"requests: {'yes' if reached else 'NO'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
