"""Names and heads beside those of LMCache's own wheel, in both directions."""

import base64
import random
from typing import Any

import pytest

from kvrail import _core

SEED = 20_260
TENSORS = 300
KEYS = 300
# What a model's name and a tag may have, with all that is quoted; LMCache itself cannot read a key
# with an `@` in them.
LETTERS = "abcXYZ019_.-~/ %+:é漢"
ELEMENTS = {
    "F16": "half", "BF16": "bfloat16", "F32": "float", "F64": "double", "U8": "uint8",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8E4M3FN": "fp8_e4m3fn", "F8E5M2": "fp8_e5m2", "U16": None, "U32": None, "U64": None,
}  # fmt: skip
FORMATS = range(9)


def random_tensors(source: random.Random) -> list[tuple[str, list[int], int]]:
    tensors = [
        (
            source.choice(list(ELEMENTS)),
            [source.randint(1, 90) for _ in range(source.randint(1, 5))],
            source.choice(FORMATS),
        )
        for _ in range(TENSORS)
    ]
    return [("BF16", [2, 80, 256, 1024], 1), ("F8E4M3FN", [1, 61, 256, 576], 6), *tensors]


def random_keys(
    source: random.Random,
) -> list[tuple[str, int, int, int, str, dict[str, str], bool]]:
    def text(most: int) -> str:
        return "".join(source.choice(LETTERS) for _ in range(source.randint(0, most)))

    keys = []
    for _ in range(KEYS):
        number = source.choice(
            [
                source.randint(-(2**63), 2**63 - 1),
                source.randint(0, 2**64 - 1),
                source.randint(-99_999, 99_999),
                -(2**63),
                2**64 - 1,
            ]
        )
        # LMCache cannot tell a tag that is all digits from a layer, and takes no `%` in a name.
        tags = {f"t{text(3).replace('%', '')}": text(4) for _ in range(source.randint(0, 2))}
        dtype = source.choice([name for name in ELEMENTS.values() if name is not None])
        keys.append(
            (
                f"m{text(20)}m",
                source.randint(1, 64),
                source.randint(0, 63),
                number,
                dtype,
                tags,
                source.random() < 0.3,
            )
        )
    return keys


def test_types_and_formats_are_all_that_lmcache_has(ask_format: Any) -> None:
    (types,) = ask_format(("types", None))
    assert {name: key for name, (_, key) in types["heads"].items()} == ELEMENTS
    assert sorted(types["formats"].values()) == list(FORMATS)
    assert types["formats"]["KV_2LTD"] == 1
    assert types["formats"]["KV_MLA_FMT"] == 6


def test_heads_are_the_same_bytes_in_both_directions(ask_format: Any) -> None:
    tensors = random_tensors(random.Random(SEED))
    ours = [bytes(_core.lmcache_encode_head(*tensor)) for tensor in tensors]
    theirs, read = ask_format(
        ("pack", tensors), ("unpack", [base64.b64encode(page).decode() for page in ours])
    )
    (types,) = ask_format(("types", None))
    for tensor, page, text, found in zip(tensors, ours, theirs, read, strict=True):
        dtype, shape, number = tensor
        packed = base64.b64decode(text)
        assert packed == page, tensor
        assert _core.lmcache_decode_head(packed) == (dtype, shape, number)
        nbytes = types["heads"][dtype][0]
        for side in shape:
            nbytes *= side
        assert found == [dtype, shape, nbytes, number, {"lmcache_version": "1"}]


def test_keys_and_paths_are_the_same_in_both_directions(ask_format: Any) -> None:
    keys = random_keys(random.Random(SEED + 1))
    (theirs,) = ask_format(("paths", keys))
    names = []
    for key, (text, path) in zip(keys, theirs, strict=True):
        on_weka = key[-1]
        if len(path.rsplit("/", 1)[1].encode()) > 230:
            # Its metadata has no room for its name while it is written.
            with pytest.raises(_core.KvrailError, match="file name"):
                _core.lmcache_path(text, on_weka=on_weka)
            continue
        assert _core.lmcache_path(text, on_weka=on_weka) == path
        name = path.rsplit("/", 1)[1]
        assert _core.lmcache_key_of(name) == text
        names.append((text, key, _core.lmcache_path(text, on_weka=on_weka, metadata=True)))
    assert len(names) > KEYS / 2
    (read,) = ask_format(("parse", [path.rsplit("/", 1)[1] for _, _, path in names]))
    for (text, key, _), found in zip(names, read, strict=True):
        assert found == [text, key[3], None]


def test_what_lmcache_would_not_write_is_refused() -> None:
    page = bytearray(_core.lmcache_encode_head("BF16", [2, 4, 256, 128], 1))
    page[-1] = ord("x")
    with pytest.raises(_core.DamagedError):
        _core.lmcache_decode_head(bytes(page))
    with pytest.raises(_core.KvrailError, match="dtype"):
        _core.lmcache_encode_head("bfloat16", [1], 1)
    with pytest.raises(_core.KvrailError, match="fmt"):
        _core.lmcache_encode_head("BF16", [1], 9)
    assert _core.lmcache_key_of("m%401%400%40-1%40half.kvcache.safetensors.tmp01234567") is None
