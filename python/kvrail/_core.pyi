"""The store of kvrail, compiled from Rust.

Times are in seconds, lengths in bytes unless a name says otherwise. Every error is a subclass of
``KvrailError``; wrong Python types raise ``TypeError`` and numbers that do not fit raise
``OverflowError``. The GIL is released while a call may block.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias, final

# A rank, or a pipeline stage with its first KV head and the one behind its last.
_Part: TypeAlias = int | tuple[int, int, int]

__all__ = [
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
    "SlabStore",
    "Store",
    "StoreIoError",
    "StoreReport",
    "StoreTicket",
    "WaitTimeoutError",
    "__version__",
    "answer_cufile_probe",
    "debug_build",
    "direct_path_problem",
    "lmcache_decode_head",
    "lmcache_encode_head",
    "lmcache_key_of",
    "lmcache_path",
    "namespaces",
]

__version__: str
debug_build: bool

class KvrailError(Exception):
    """The base of all errors of this package."""

class ConfigError(KvrailError, ValueError):
    """A setting or an argument cannot work; the message says what was expected."""

class DamagedError(KvrailError):
    """Bytes on disk are not what was stored."""

class StoreIoError(KvrailError, OSError):
    """The operating system refused an operation; ``errno`` says why where it is known."""

class NoSpaceError(StoreIoError):
    """The file system or a quota is full."""

class WaitTimeoutError(KvrailError, TimeoutError):
    """A bounded wait ended before the work did; the work goes on."""

class ClosedError(KvrailError):
    """The store was closed."""

class GpuError(KvrailError):
    """The GPU, its driver or cuFile refused an operation."""

class MismatchError(KvrailError):
    """A directory holds another namespace than its name says."""

@final
class Config:
    """A resolved configuration; immutable. Made by ``Config.resolve``."""

    @staticmethod
    def resolve(
        connector_json: str | None,
        environment: Mapping[str, str],
        file: tuple[str, str] | None,
    ) -> Config:
        """Resolves the sources of the settings, highest rank first.

        ``connector_json`` is a JSON object, ``environment`` holds variables of which only those
        named ``KVRAIL_*`` and ``LMCACHE_*`` count, ``file`` is the path and the text of a YAML
        file. Nothing else is read.

        Raises ``ConfigError`` that names key, value and what was expected: an unknown key, a wrong
        type, a value out of range, no ``gds_path``.
        """

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""

    @property
    def gds_path(self) -> list[str]:
        """The directories that hold the chunks; at least one."""

    @property
    def buffer_mib(self) -> int:
        """Staging memory in MiB (``cufile_buffer_size``)."""

    @property
    def save_decode_cache(self) -> bool:
        """Whether chunks that fill up while decoding are stored too."""

    @property
    def lmcache_hash(self) -> str | None:
        """LMCache's hash algorithm where chunk keys are its hashes, else None."""

    @property
    def load_failure_policy(self) -> str:
        """What happens to a request whose load failed: ``"recompute"`` or ``"fail"``."""

    @property
    def warnings(self) -> list[str]:
        """One sentence for each setting that has no effect, for the log."""

    def as_dict(self) -> dict[str, Any]:
        """Returns every key with its effective value and where it came from.

        Each key maps to ``{"value": ..., "origin": ...}``. Keys are named as in the documentation
        (``chunk_size``, ``extra_config.use_cufile``). None stands for "unlimited" in ``max_size``
        and for "auto" in ``extra_config.use_direct_io``, ``extra_config.direct`` and
        ``min_load_tokens``; ``min_free`` is a float when it is a share
        and an int when it is bytes. The origin is ``"default"``, a variable's name, the file's path
        or ``"kv_connector_extra_config"``.
        """

@final
class Namespace:
    """All that must be equal for stored bytes to be interchangeable; immutable."""

    def __new__(cls, model: str, identity_json: str) -> Namespace:
        """Makes the namespace of a model's name and a JSON object with the rest of the identity.

        Raises ``ConfigError`` when ``identity_json`` is not a JSON object, or too long.
        """

    @property
    def id(self) -> str:
        """16 hex digits that follow from model and identity."""

    @property
    def directory_name(self) -> str:
        """The name of the namespace's directory below each ``gds_path``."""

@final
class Store:
    """A store of chunks in the directories of a configuration; any thread may use it.

    Several stores, also of other processes and machines, may be open on the same directories.
    """

    def __new__(
        cls,
        config: Config,
        namespace: Namespace,
        *,
        read_only: bool = False,
        quiet: bool = False,
        cpus: Sequence[int] | None = None,
        cuda_library: str | PathLike[str] | None = None,
        cufile_libraries: Sequence[str | PathLike[str]] | None = None,
        cufile_probe: Sequence[str] | None = None,
        no_in_place: str | None = None,
        system_root: str | PathLike[str] | None = None,
        lmcache: tuple[str, int, str, bool] | None = None,
    ) -> Store:
        """Opens a store: makes its directories, probes each mount, starts the threads.

        ``read_only`` never creates or writes anything. ``quiet`` leaves out the notice of how the
        namespace differs from the nearest other one. ``cpus`` are the CPUs that the store's threads
        are pinned to; None leaves them alone. ``cuda_library`` is what the CUDA driver is loaded
        from when a KV cache lies in the memory of a GPU; None searches as the system does.
        ``cufile_libraries`` are the same for cuFile, in order. ``cufile_probe`` is the command line
        of a program that calls ``answer_cufile_probe``: it tries cuFile before this process does,
        and without it cuFile is not used. ``no_in_place`` is why cuFile must not read and write KV
        cache in place, where its memory may be taken away; None leaves it to the settings.
        ``system_root`` is the folder that holds /proc, /sys, /run and /dev, for what is asked
        before cuFile is tried; None is this machine. ``lmcache`` goes with the setting ``layout:
        lmcache``: the model's name, the number of workers, LMCache's name of the elements' type,
        and whether its hashes are numbers with a sign.

        Raises ``ConfigError`` for a path that cannot work, ``StoreIoError`` for one that the system
        refuses, ``MismatchError`` when a directory belongs to another namespace.
        """

    def lookup(
        self, keys: Sequence[bytes], *, group: int = 0, ranks: Sequence[_Part] = ...
    ) -> LookupTicket:
        """Counts the leading chunks of ``keys`` that are present for ``group`` on all ``ranks``.

        ``keys`` are chunk keys of 8 to 32 bytes, in the order of the prompt; ``ranks`` is rank 0
        unless given. A range of heads also counts when files of other ranges hold it.
        Answered in the background.

        Raises ``ConfigError`` for a key of another length.
        """

    def lookup_each(
        self, keys: Sequence[bytes], *, group: int = 0, ranks: Sequence[_Part] = ...
    ) -> PresenceTicket:
        """Tells which of ``keys`` are present for ``group`` on all ``ranks``, missing ones or not.

        As ``lookup`` otherwise. A lookup that takes too long finds nothing.

        Raises ``ConfigError`` for a key of another length.
        """

    def attach(
        self,
        layers: Sequence[tuple[int, int, int, int]],
        regions: Sequence[tuple[int, int]],
        owner: object,
        *,
        block_count: int,
        blocks_per_chunk: int,
        group: int = 0,
        rank: _Part = ...,
        device: str = "cpu",
        order: tuple[int, int, int, int, Sequence[tuple[int, int, int, int]]] | None = None,
    ) -> KvCache:
        """Attaches the KV cache of one group on one rank.

        Each layer is ``(region index, offset, block_stride, block_bytes)``: its block ``b`` lies
        ``offset + b * block_stride`` bytes into its region and is ``block_bytes`` long. Each region
        is ``(address, bytes)`` of memory on ``device``: ``cpu``, or ``cuda:<ordinal>`` with
        addresses as the GPU knows them. ``owner`` must keep all of it valid for reads and writes
        while it lives; it is kept alive as long as the store may touch the memory, and let
        go by the next call into this module after that. Wrong addresses are not detected and crash
        the process. ``order`` goes with ``layout: lmcache``, of which a file holds KV by tokens: a
        block's tokens, heads, elements of a head, bytes of an element, and for K and V, or for both
        in one, the offset in a layer's block and the strides of head, token and element in bytes.

        Raises ``ConfigError`` when a block lies outside its region, blocks overlap, or a chunk does
        not fit into the staging memory; ``GpuError`` when the GPU cannot be used or has no memory
        left for staging.
        """

    def metrics(self) -> dict[str, float]:
        """Returns the counters since the store was opened, which only grow, and the gauges.

        The gauges are ``usage_bytes``, ``janitor_paths``, ``local_cpu_bytes`` and
        ``uring_requests_held``.
        """

    def take_notices(self) -> list[tuple[str, str]]:
        """Takes what there is to log since the last call: ``("warning" | "info", message)``."""

    def describe(self) -> list[dict[str, Any]]:
        """Returns for each directory how bytes move there, and why."""

    def flush(self, limit_seconds: float) -> None:
        """Waits until all stores that were accepted are done.

        Raises ``WaitTimeoutError`` after ``limit_seconds``.
        """

    def close(self, limit_seconds: float) -> None:
        """Waits for the stores that were accepted, then stops; waiting loads end as failed.

        Chunks of later stores and loads are reported failed. Raises ``WaitTimeoutError`` after
        ``limit_seconds``; stores that were not done then are given up.
        """

@final
class KvCache:
    """The KV cache of one group on one rank, attached to a store."""

    @property
    def chunk_file_bytes(self) -> int:
        """Bytes of a chunk's file."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of a chunk's payload: its blocks over all layers."""

    @property
    def routes(self) -> list[str]:
        """The way that chunks go now, for each path of the configuration.

        ``posix`` through a staging buffer by POSIX calls, ``slot`` through a VRAM slot by cuFile,
        ``in_place`` between the blocks themselves and the file by cuFile.
        """

    def store(
        self, chunks: Sequence[tuple[bytes, bytes | None, Sequence[int]]], *, stream: int = 0
    ) -> StoreTicket:
        """Stores chunks: each is ``(key, parent's key, block ids)``.

        A chunk has exactly ``blocks_per_chunk`` block ids; the parent is the chunk before it in the
        prompt, or None. The blocks are copied before the call returns and may be reused then; the
        files are written in the background. A chunk for which no staging buffer is free is dropped.
        In the memory of a GPU the copy is put on ``stream`` (a ``CUstream`` as a number, 0 for the
        default stream): the blocks may be changed by what is put there afterwards.

        Raises ``ConfigError`` for a wrong key, number of blocks or block id; nothing is done then.
        """

    def load(
        self,
        chunks: Sequence[tuple[bytes, bytes | None, int, Sequence[int]]],
        *,
        stream: int = 0,
    ) -> LoadTicket:
        """Loads chunks: each is ``(key, parent's key, first_block, block ids)``.

        ``first_block`` counts from the start of the chunk; the block ids are the targets of the
        chunk's blocks from there to its end, and nothing else is written to. They must be left
        alone until the ticket is done. Every byte is verified before it is copied. In the memory of
        a GPU they are written after all that was on ``stream`` at the time of the call.

        Raises ``ConfigError`` for a wrong key, number of blocks or block id; nothing is done then.
        """

@final
class LookupTicket:
    """A lookup in the background; dropping it changes nothing about the work."""

    def poll(self) -> int | None:
        """Returns the number of leading chunks present, or None while it is not known."""

    def wait(self, limit_seconds: float) -> int:
        """Waits for the number of leading chunks present.

        Raises ``WaitTimeoutError`` after ``limit_seconds``; the ticket stays good.
        """

@final
class PresenceTicket:
    """A lookup of each of several chunks in the background."""

    def poll(self) -> list[bool] | None:
        """Returns which chunks are present, in the order of the keys, or None while unknown."""

    def wait(self, limit_seconds: float) -> list[bool]:
        """Waits for which chunks are present.

        Raises ``WaitTimeoutError`` after ``limit_seconds``; the ticket stays good.
        """

@final
class StoreTicket:
    """A store in the background; dropping it changes nothing about the work."""

    def poll(self) -> StoreReport | None:
        """Returns the report, or None while chunks are on their way."""

    def wait(self, limit_seconds: float) -> StoreReport:
        """Waits for the report.

        Raises ``WaitTimeoutError`` after ``limit_seconds``; the ticket stays good.
        """

@final
class LoadTicket:
    """A load in the background; dropping it changes nothing about the work."""

    def poll(self) -> LoadReport | None:
        """Returns the report, or None while chunks are on their way."""

    def wait(self, limit_seconds: float) -> LoadReport:
        """Waits for the report.

        Raises ``WaitTimeoutError`` after ``limit_seconds``; the ticket stays good and the blocks
        stay the load's until it is done.
        """

@final
class StoreReport:
    """What became of the chunks of one ``KvCache.store``; the four numbers add up to them."""

    @property
    def stored(self) -> int:
        """Chunks written and published."""

    @property
    def already_present(self) -> int:
        """Chunks that were there already, or are being written."""

    @property
    def dropped(self) -> int:
        """Chunks given up for want of staging memory, space, or a path that is well."""

    @property
    def failed(self) -> int:
        """Chunks that failed with an error."""

@final
class LoadReport:
    """What became of the chunks of one ``KvCache.load``."""

    @property
    def loaded(self) -> int:
        """Chunks verified and copied."""

    @property
    def failed(self) -> list[int]:
        """Indices of the other chunks, ascending: their blocks hold no valid KV."""

    @property
    def errors(self) -> list[str]:
        """Why, one for each of ``failed``."""

@final
class SlabStore:
    """Objects of one piece of host memory, stored and loaded in tasks; any thread may use it.

    For caches that keep objects of a few fixed lengths in a slab. An object's name is ``(kind,
    group, rank, key)``: kind as ``kind`` returned it, ``key`` 8 to 32 bytes. Submitting never
    waits. A task always ends, and what did not go well in it is missed: also all of it when 1,024
    tasks of its sort wait, or after ``close``.
    """

    def __new__(
        cls, config: Config, address: int, bytes: int, owner: object, *, align: int
    ) -> SlabStore:
        """Makes the store of the ``bytes`` bytes of host memory at ``address``. Opens no directory.

        Every object lies a multiple of ``align`` bytes into it. ``owner`` is kept alive, and the
        memory must stay valid, until ``close`` has returned without an error. Wrong addresses are
        not detected and crash the process.

        Raises ``ConfigError`` for settings or memory that cannot work.
        """

    def kind(self, namespace: Namespace, object_bytes: int) -> int:
        """The kind of objects of ``object_bytes`` bytes each in a namespace.

        Its store is opened by the first task that needs it. Raises ``ConfigError`` for a length
        that does not fit, or for more than 64 kinds.
        """

    @property
    def events(self) -> tuple[int, int, int]:
        """Eventfds that become readable when a store, a lookup, a load is done; of this object."""

    def submit_store(self, objects: Sequence[tuple[int, int, int, bytes, int]]) -> int:
        """Stores objects, each its name and its address; returns the task.

        They must stay as they are until the task is done. Raises ``ConfigError`` for a wrong key.
        """

    def submit_lookup(self, names: Sequence[tuple[int, int, int, bytes]]) -> int:
        """Looks up which objects are there; returns the task.

        Raises ``ConfigError`` for a wrong key.
        """

    def submit_load(self, objects: Sequence[tuple[int, int, int, bytes, int]]) -> int:
        """Loads objects, each its name and the address where it goes; returns the task.

        Each page is verified before it is copied; the memory of an object that is missed may hold
        pages before the bad one. It is the task's until that is done. Raises ``ConfigError`` for a
        wrong key.
        """

    def take_stores(self) -> list[tuple[int, list[str]]]:
        """Takes the stores that are done, each with ``stored``, ``present`` or ``missed`` for each
        object.
        """

    def take_lookup(self, task: int) -> list[bool] | None:
        """Takes which objects are there; None while that is not known, or when it was taken."""

    def take_load(self, task: int) -> list[bool] | None:
        """Takes which objects were loaded; None while that is not known, or when it was taken."""

    def wait_for_lookup(self, task: int, limit_seconds: float) -> list[bool]:
        """Waits for which objects are there.

        Raises ``WaitTimeoutError`` after ``limit_seconds``; the answer can be taken later.
        """

    def wait_for_load(self, task: int, limit_seconds: float) -> list[bool]:
        """Waits for which objects were loaded.

        Raises ``WaitTimeoutError`` after ``limit_seconds``; the memory is the task's until it is
        done.
        """

    def remove(
        self, names: Sequence[tuple[int, int, int, bytes]], limit_seconds: float
    ) -> list[int]:
        """Removes objects; returns the bytes of each file, 0 where there was none.

        Raises ``ConfigError`` for a wrong key, ``WaitTimeoutError`` after ``limit_seconds``.
        """

    def metrics(self) -> dict[str, dict[str, float]]:
        """Returns what ``Store.metrics`` does for each kind in use, by its directory's name."""

    def take_notices(self) -> list[tuple[str, str]]:
        """Takes what there is to log since the last call: ``("warning" | "info", message)``."""

    def close(self, limit_seconds: float) -> None:
        """Waits for the stores that have begun and ends everything; what waits is missed.

        Raises ``WaitTimeoutError`` after ``limit_seconds``: the memory may still be in use then.
        """

def answer_cufile_probe() -> None:
    """Tries cuFile as standard input says, and answers on standard output. It may never return.

    For the program that ``Store`` is given as ``cufile_probe``, which ends after it.
    """

def direct_path_problem(
    directory: str | PathLike[str], *, system_root: str | PathLike[str] | None = None
) -> str | None:
    """Why cuFile has no direct path to an existing directory, in words; None where it may have one.

    Reads what the machine says and touches nothing. ``system_root`` is as for ``Store``.
    """

def lmcache_encode_head(dtype: str, shape: Sequence[int], fmt: int) -> bytes:
    """The 4096 bytes before a tensor in a file of LMCache's, as its head has ``dtype``: ``"BF16"``.

    Raises ``KvrailError`` for a type, shape or format that is none.
    """

def lmcache_decode_head(page: bytes) -> tuple[str, list[int], int]:
    """Type, shape and format in the first page of a file of LMCache's.

    Raises ``DamagedError`` unless the page is byte for byte what LMCache writes for them.
    """

def lmcache_path(key: str, *, on_weka: bool = False, metadata: bool = False) -> str:
    """Where the file of a key of LMCache's lies below the path; raises ``KvrailError``."""

def lmcache_key_of(name: str) -> str | None:
    """The key in the name of one of LMCache's files, None for any other name."""

def namespaces(directory: str | PathLike[str]) -> list[tuple[str, str | None, str | None]]:
    """The namespaces in a directory of ``gds_path``, by name.

    For each its directory's name, its manifest as JSON, and why that cannot be read: one of the two
    is None.
    """
