"""What the scheduler makes of the workers' handshakes."""

from __future__ import annotations

import json

import pytest

from kvrail.vllm.lookup import DisagreementError, agree, differing_keys
from kvrail.vllm.metadata import KvrailHandshake

IDENTITY = {"layout": "LBNHC", "dtype": "bf16", "prefix_hash": {"none_hash": "ab"}}


def shake(rank: int, reason: str | None = None, **changes) -> KvrailHandshake:
    identity = "" if reason else json.dumps({**IDENTITY, **changes})
    return KvrailHandshake("m", identity, () if reason else (rank,), 2, reason)


def test_all_ranks_count():
    agreement = agree({(0, 1): shake(1), (0, 0): shake(0)}, 2)
    assert (agreement.parts, agreement.none_hash, agreement.model) == (((0, 1),), "ab", "m")


def test_replicas_share_files():
    assert agree({(0, 0): shake(0), (0, 1): shake(0)}, 2).parts == ((0,),)


def test_each_group_has_parts_of_its_own():
    identity = json.dumps(IDENTITY)
    parts = [((0, 0, 2), (0, 0, 1)), ((0, 2, 4), (0, 0, 1))]
    shakes = {(0, rank): KvrailHandshake("m", identity, parts[rank], 2) for rank in (1, 0)}
    assert agree(shakes, 2).parts == (((0, 0, 2), (0, 2, 4)), ((0, 0, 1),))


def test_one_reason_is_enough():
    assert agree({(0, 0): shake(0), (0, 1): shake(1, "mamba")}, 2) == "mamba"


def test_a_difference_is_named():
    other = shake(1, layout="BLNHC", dtype="fp8")
    with pytest.raises(DisagreementError, match=r"\(0, 0\) and \(0, 1\) differ in dtype, layout"):
        agree({(0, 0): shake(0), (0, 1): other}, 2)


@pytest.mark.parametrize("handshakes", [{}, {(0, 0): shake(0)}, {(0, 0): shake(0), (0, 1): None}])
def test_a_missing_worker_is_named(handshakes):
    with pytest.raises(DisagreementError, match="of 2 workers"):
        agree(handshakes, 2)


def test_differing_keys():
    assert differing_keys('{"a": 1, "b": 2}', '{"b": 2, "a": 1}') == []
    assert differing_keys('{"a": 1, "b": 2}', '{"b": 3, "c": 1}') == ["a", "b", "c"]
