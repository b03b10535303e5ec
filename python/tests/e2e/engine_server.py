"""Forks one process for each engine, from a process that has imported vLLM already.

Importing vLLM takes 12 seconds on a machine of two cores, and an engine is three processes that
each do it. Here all of them are forked from this one, which runs nothing else and has no threads:
they stay three real processes that share nothing but what vLLM sends between them.

Reads the paths of jobs from standard input, one a line. Of the job `x.json` the process writes its
output to `x.log`, its result to `x.result`; this server writes the process id to `x.pid` and the
exit status to `x.exit`.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import engine_job

CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
PR_CAPBSET_DROP = 24
CAPABILITY_VERSION_3 = 0x20080522


def serve() -> None:
    """Serves jobs until standard input ends."""
    _import_engine()
    jobs: dict[int, Path] = {}

    def reap(signal_number: int, frame: Any) -> None:
        while jobs:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            _write(jobs.pop(process).with_suffix(".exit"), str(status))

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        job_path = Path(line.strip())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _run(job_path)
        jobs[process] = job_path
        _write(job_path.with_suffix(".pid"), str(process))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _import_engine() -> None:
    """Imports what an engine imports; nothing of kvrail, whose threads would not survive a fork."""
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401


def _run(job_path: Path) -> None:
    status = 1
    try:
        os.setsid()
        _redirect(job_path.with_suffix(".log"))
        job = json.loads(job_path.read_text())
        os.environ.update(job["environment"])
        if job["without_override"]:
            drop_override()
        # vLLM asks for spawned processes on a CPU; forked ones only save the imports.
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]
        _write(job_path.with_suffix(".result"), json.dumps(engine_job.run(job)))
        status = 0
    except BaseException:
        # The last frame of a forked process: nothing may fall through to the server's loop.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def drop_override() -> None:
    """Gives up root's right to ignore the modes of files, for this process and its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    dropped = (1 << CAP_DAC_OVERRIDE) | (1 << CAP_DAC_READ_SEARCH)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, first of the capabilities 0 to 31, then of 32 to 63.
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(ctypes.byref(header), ctypes.byref(sets)) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(3):
        sets[index] &= ~dropped & 0xFFFFFFFF
    if os.geteuid() == 0:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if libc.capset(ctypes.byref(header), ctypes.byref(sets)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


if __name__ == "__main__":
    serve()
