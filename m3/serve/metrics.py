"""GET /metrics: what Prometheus reads. Each application has a registry of its own; the engine is asked when it is read.

Times are taken where the answer leaves the backend: a client that reads slowly makes them longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from m3.engine.engine import Stats
    from m3.serve.backend import CountedBackend

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)  # seconds a token
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds a request


class Metrics:
    """The counters of one application."""

    def __init__(self, engine: CountedBackend | None = None) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        own = self.registry
        path = ("path",)
        self.first = prometheus_client.Histogram(
            "m3_time_to_first_token_seconds", "Until the first piece of an answer", path, buckets=LONG, registry=own
        )
        self.between = prometheus_client.Histogram(
            "m3_inter_token_latency_seconds", "Between tokens; those that come together share it", path,
            buckets=SHORT, registry=own,
        )  # fmt: skip
        self.whole = prometheus_client.Histogram(
            "m3_request_seconds", "From a request's head to the end of its answer", path, buckets=LONG, registry=own
        )
        self.requests = prometheus_client.Counter(
            "m3_requests", "Requests that were answered", ("path", "status"), registry=own
        )
        self.left = prometheus_client.Counter("m3_clients_gone", "Requests whose client left", path, registry=own)
        self.under_way = prometheus_client.Gauge("m3_requests_under_way", "Requests inside the server", registry=own)
        self.prompt = prometheus_client.Counter("m3_prompt_tokens", "Tokens of prompts", registry=own)
        self.cached = prometheus_client.Counter(
            "m3_cached_prompt_tokens", "Tokens of prompts, found in the cache", registry=own
        )
        self.generated = prometheus_client.Counter("m3_generation_tokens", "Tokens of answers", registry=own)
        if engine is not None:
            self.registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)


class _EngineCollector(prometheus_client.registry.Collector):
    """The numbers of an engine, asked for when they are read."""

    def __init__(self, backend: CountedBackend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        stats = self._backend.stats()
        queue = GaugeMetricFamily("m3_engine_requests", "Requests: outside, waiting, running", labels=["state"])
        for state in ("outside", "waiting", "running"):
            queue.add_metric([state], getattr(stats, state))
        yield queue
        pages = GaugeMetricFamily("m3_cache_pages", "Pages of the cache", labels=["state"])
        for state in ("total", "used", "cached"):
            pages.add_metric([state], getattr(stats, f"pages_{state}"))
        yield pages
        ended = CounterMetricFamily("m3_engine_finished", "Requests that ended, by reason", labels=["reason"])
        for reason, count in stats.finished.items():
            ended.add_metric([reason], count)
        yield ended
        yield from _counters(stats)
        yield GaugeMetricFamily(
            "m3_acceptance_length",
            "Tokens that a verified tree brings a request, on average; 0 before the first",
            value=_length(stats),
        )
        yield GaugeMetricFamily("m3_engine_up", "Whether the engine runs", value=float(stats.state == "running"))

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: the engine need not be there yet."""
        return iter(())


def _counters(stats: Stats) -> Iterator[Metric]:
    told = {
        "m3_engine_steps": ("Steps of the engine", stats.steps),
        "m3_engine_generated_tokens": ("Tokens drawn by the engine", stats.generated),
        "m3_draft_tokens": ("Nodes of drafts that were verified", stats.drafted),
        "m3_accepted_tokens": ("Of these, accepted", stats.accepted),
        "m3_draft_trees": ("Trees of drafts that were verified, one a request and step", stats.trees),
        "m3_preemptions": ("Requests that lost their pages for a while", stats.preemptions),
    }
    for name, (text, value) in told.items():
        yield CounterMetricFamily(name, text, value=value)


def _length(stats: Stats) -> float:
    return 1 + stats.accepted / stats.trees if stats.trees else 0.0
