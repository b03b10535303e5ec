"""LMCache's own code, asked over standard input: one JSON request, one JSON answer.

Runs in a process of its own, since kvrail must never import LMCache.
"""

import base64
import json
import sys
import urllib.parse
from typing import Any

import torch
from lmcache.utils import TORCH_DTYPE_TO_STR_DTYPE, CacheEngineKey, parse_cache_key
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend import gds_backend

STR_TO_DTYPE = {name: dtype for dtype, name in TORCH_DTYPE_TO_STR_DTYPE.items()}


def types(_: Any) -> dict[str, Any]:
    """All that LMCache has a name for: types of heads, types of keys, memory formats."""
    heads = {
        name: [torch.empty(0, dtype=dtype).element_size(), TORCH_DTYPE_TO_STR_DTYPE.get(dtype)]
        for dtype, name in gds_backend.torch_dtypes.items()
    }
    return {"heads": heads, "formats": {format.name: format.value for format in MemoryFormat}}


def pack(tensors: list[tuple[str, list[int], int]]) -> list[str]:
    """The metadata of tensors: type, shape, number of the format."""
    pages = []
    for dtype, shape, number in tensors:
        tensor = torch.empty(shape, dtype=gds_backend.torch_dtypes_inverse[dtype], device="meta")
        page = gds_backend.pack_metadata(
            tensor,
            fmt=MemoryFormat(number),
            lmcache_version=str(gds_backend._METADATA_VERSION),
        )
        pages.append(base64.b64encode(page).decode())
    return pages


def unpack(pages: list[str]) -> list[list[Any]]:
    """What LMCache reads in metadata: type, shape, bytes, number of the format, the rest."""
    found = []
    for page in pages:
        shape, dtype, nbytes, fmt, extra = gds_backend.unpack_metadata(base64.b64decode(page))
        found.append([gds_backend.torch_dtypes[dtype], list(shape), nbytes, fmt.value, extra])
    return found


def _backend(on_weka: bool) -> Any:
    backend = object.__new__(gds_backend.GdsBackend)
    backend.gds_path = "/base"
    backend.data_suffix = (
        gds_backend._WEKA_DATA_FILE_SUFFIX if on_weka else gds_backend._DATA_FILE_SUFFIX
    )
    return backend


def paths(keys: list[tuple[str, int, int, int, str, dict[str, str], bool]]) -> list[list[str]]:
    """Text and path of keys."""
    found = []
    for model, world, worker, number, dtype, tags, on_weka in keys:
        configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
        key = CacheEngineKey(model, world, worker, number, STR_TO_DTYPE[dtype], configs)
        path = _backend(on_weka)._key_to_path(key)[0]
        found.append([key.to_string(), path.removeprefix("/base/")])
    return found


def parse(names: list[str]) -> list[list[Any]]:
    """What LMCache reads in the names of metadata files: text, hash, layer."""
    found = []
    for name in names:
        for suffix in (gds_backend._DATA_FILE_SUFFIX, gds_backend._WEKA_DATA_FILE_SUFFIX):
            name = name.removesuffix(suffix + gds_backend._METADATA_FILE_SUFFIX)
        key = parse_cache_key(urllib.parse.unquote(name))
        found.append([key.to_string(), key.chunk_hash, getattr(key, "layer_id", None)])
    return found


ANSWERS = {"types": types, "pack": pack, "unpack": unpack, "paths": paths, "parse": parse}


def main() -> None:
    """Answers what is asked, each question with its argument."""
    # LMCache logs to standard output.
    out, sys.stdout = sys.stdout, sys.stderr
    json.dump([ANSWERS[name](argument) for name, argument in json.load(sys.stdin)], out)


if __name__ == "__main__":
    main()
