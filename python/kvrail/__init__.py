"""A KV-cache store for LLM serving on any file system.

``Store`` keeps chunks of KV cache as files, ``kvrail.kv_cache`` registers the memory they come from
and go to, ``kvrail.vllm`` is the connector for vLLM. Importing this package needs neither vLLM nor
torch nor numpy.
"""

import os
import warnings

# Recorded before anything else runs: vLLM pins its worker's main thread to one OpenMP core later,
# and threads that a store starts after that would inherit the single core.
STARTUP_CPUS: tuple[int, ...] | None = (
    tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None
)

from kvrail._core import (  # noqa: E402
    ClosedError,
    Config,
    ConfigError,
    DamagedError,
    GpuError,
    KvCache,
    KvrailError,
    LoadReport,
    LoadTicket,
    LookupTicket,
    MismatchError,
    Namespace,
    NoSpaceError,
    PresenceTicket,
    Store,
    StoreIoError,
    StoreReport,
    StoreTicket,
    WaitTimeoutError,
    __version__,
    debug_build,
)

__all__ = [
    "STARTUP_CPUS",
    "ClosedError",
    "Config",
    "ConfigError",
    "DamagedError",
    "GpuError",
    "KvCache",
    "KvrailError",
    "LoadReport",
    "LoadTicket",
    "LookupTicket",
    "MismatchError",
    "Namespace",
    "NoSpaceError",
    "PresenceTicket",
    "Store",
    "StoreIoError",
    "StoreReport",
    "StoreTicket",
    "WaitTimeoutError",
    "__version__",
    "debug_build",
]

if debug_build:
    warnings.warn(
        "kvrail._core is a debug build and many times slower than a release build",
        RuntimeWarning,
        stacklevel=2,
    )
