"""Failed loads are computed, also where another connector makes kvrail's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvrail.vllm.failure_policy import compute_what_fails


class Connector(KVConnectorBase_V1):
    """As vLLM makes one, without what an engine needs."""

    def __init__(self, policy: str = "fail", make_inner: bool = False) -> None:
        self._kv_transfer_config = SimpleNamespace(kv_load_failure_policy=policy)
        self.inner = Connector() if make_inner else None
        if not make_inner:
            compute_what_fails(self)

    @property
    def policy(self) -> str:
        return self._kv_transfer_config.kv_load_failure_policy


Connector.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_alone(policy):
    assert Connector(policy).policy == "recompute"


def test_under_another_connector_vllm_reads_the_outer_policy():
    outer = Connector(make_inner=True)
    assert outer.inner is not None
    assert (outer.policy, outer.inner.policy) == ("recompute", "recompute")


def test_a_maker_that_is_not_made_itself_is_no_obstacle():
    class Hasty(Connector):
        def __init__(self) -> None:
            self.inner = Connector()

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

    assert Hasty().policy == "recompute"


def test_connectors_that_have_nothing_to_do_with_it_keep_theirs():
    bystander = Connector(make_inner=True)
    bystander._kv_transfer_config.kv_load_failure_policy = "fail"
    assert Connector().policy == "recompute"
    assert bystander.policy == "fail"
