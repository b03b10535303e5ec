"""Counters on their way to vLLM's log line and to Prometheus."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from kvrail.vllm.stats import COUNTERS, KvrailPromMetrics, KvrailStats, StatsCollector


def test_the_log_line():
    stats = KvrailStats(
        data={"hit_tokens": 512.0, "bytes_loaded": 2e9, "load_seconds": 0.5, "chunks_loaded": 2.0}
    )
    assert stats.reduce() == {
        "hit_tokens": 512,
        "miss_tokens": 0,
        "MB_loaded": 2000.0,
        "chunks_loaded": 2,
        "GB_per_second_loaded": 4.0,
    }


def test_aggregation_adds_and_reset_clears():
    stats = KvrailStats(data={"chunks_stored": 1.0})
    merged = stats.aggregate(KvrailStats(data={"chunks_stored": 2.0, "stores_failed": 1.0}))
    assert merged.data == {"chunks_stored": 3.0, "stores_failed": 1.0}
    assert not merged.is_empty()
    merged.reset()
    assert merged.is_empty()


def test_increments_of_totals():
    totals = {"chunks_stored": 0.0, "store_seconds": 0.0}
    collector = StatsCollector()
    assert not collector.due(1e9)
    collector.follow(lambda: totals)
    assert collector.due(1e9)
    assert collector.take() is None
    totals["chunks_stored"] = 4.0
    assert collector.take({"hit_tokens": 7.0}).data == {"chunks_stored": 4.0, "hit_tokens": 7.0}
    assert collector.take() is None
    assert not collector.due(0.0)
    collector.touch()
    assert collector.due(0.0)


def test_what_happened_before_the_store_opened_is_due_with_it():
    collector = StatsCollector()
    collector.touch()
    assert not collector.due(0.0), "there are no totals"
    collector.follow(dict)
    assert collector.due(0.0)
    assert collector.take({"hit_tokens": 1.0}).data == {"hit_tokens": 1.0}
    assert not collector.due(0.0)
    collector.touch()
    collector.unfollow()
    assert not collector.due(1e9)
    assert collector.take() is None


def test_a_total_that_falls_is_no_increment():
    totals = {"chunks_stored": 3.0, "chunks_loaded": 0.0}
    collector = StatsCollector()
    collector.follow(lambda: totals)
    assert collector.take().data == {"chunks_stored": 3.0}
    totals["chunks_stored"] = 2.0
    assert collector.take() is None
    totals |= {"chunks_stored": 4.0, "chunks_loaded": 1.0}
    assert collector.take().data == {"chunks_stored": 1.0, "chunks_loaded": 1.0}


def test_gauges_are_values_and_no_increments():
    totals = {"usage_bytes": 100.0, "janitor_paths": 0.0}
    collector = StatsCollector()
    collector.follow(lambda: totals)
    assert collector.take().data == {"usage_bytes": 100.0}
    assert collector.take() is None
    totals["usage_bytes"] = 60.0
    stats = collector.take()
    assert stats.data == {"usage_bytes": 60.0}
    # Another worker on the same directory looked at another moment.
    merged = stats.aggregate(KvrailStats(data={"usage_bytes": 80.0, "chunks_stored": 1.0}))
    assert merged.data == {"usage_bytes": 80.0, "chunks_stored": 1.0}


def test_prometheus():
    registry = CollectorRegistry()

    def counter(**arguments):
        return Counter(registry=registry, **arguments)

    def gauge(**arguments):
        return Gauge(registry=registry, **arguments)

    metrics = KvrailPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {Counter: counter, Gauge: gauge, Histogram: Histogram},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    metrics.observe({"hit_tokens": 5.0, "a_counter_of_a_later_version": 1.0}, engine_idx=1)
    metrics.observe({"hit_tokens": 2.0}, engine_idx=1)
    labels = {"model_name": "m", "engine": "1"}
    assert registry.get_sample_value("kvrail:hit_tokens_total", labels) == 7.0
    for usage in (900.0, 500.0):
        metrics.observe({"usage_bytes": usage}, engine_idx=1)
        assert registry.get_sample_value("kvrail:usage_bytes", labels) == usage
    for name in COUNTERS:
        value = registry.get_sample_value(
            f"kvrail:{name}_total", {"model_name": "m", "engine": "0"}
        )
        assert value == 0.0


def test_a_second_engine_in_one_process_registers_its_metrics():
    for _ in range(2):
        metrics = KvrailPromMetrics(
            SimpleNamespace(kv_transfer_config=None),
            {Counter: Counter, Gauge: Gauge, Histogram: Histogram},
            ["engine"],
            {0: ["0"]},
        )
        metrics.observe({"hit_tokens": 2.0})
        assert REGISTRY.get_sample_value("kvrail:hit_tokens_total", {"engine": "0"}) == 2.0
