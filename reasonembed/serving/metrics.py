"""Prometheus metrics of one ingress, the embedder's included: it reports its batches.

Each ingress counts for itself. Where several stand behind one address, a scrape reaches any of
them, so each names itself in every sample (label `ingress`): what one counted only ever grows, and
rates are summed over the label. Names follow Prometheus' rules: base units, `_total` for counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from reasonembed.serving.protocol import BatchStats, ServedModel

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TOKENS = (32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)


class Metrics:
    """A registry of its own, so that two services in a process do not share counts.

    Args:
        ingress: What this ingress is called among several; None where it is the only one.
    """

    def __init__(self, *, ingress: str | None = None) -> None:
        self.registry = CollectorRegistry()
        self._exposed = _Exposed(self.registry, {} if ingress is None else {"ingress": ingress})
        self.requests = self._counter("requests", "Answers by route and status", "route", "status")
        self.request_seconds = self._histogram(
            "request_seconds", "From headers to the last part of the answer", _SECONDS, "route"
        )
        self.tokenize_seconds = self._histogram("tokenize_seconds", "Tokenisation", _SECONDS)
        self.queue_seconds = self._histogram("queue_seconds", "Wait for a batch", _SECONDS)
        self.forward_seconds = self._histogram("forward_seconds", "Forward passes", _SECONDS)
        self.serialize_seconds = self._histogram("serialize_seconds", "Writing answers", _SECONDS)
        self.tokens = self._counter("tokens", "Tokens answered for", "role")
        self.batch_tokens = self._histogram("batch_tokens", "Tokens of a forward pass", _TOKENS)
        self.batch_fill = self._histogram(
            "batch_fill_ratio", "Padded tokens over the budget of a batch", _SHARES
        )
        self.padding = self._histogram("padding_ratio", "Share of a batch that is padding", _SHARES)
        self.queue_tokens = Gauge(
            "reasonembed_queue_tokens", "Tokens admitted and not answered", registry=self.registry
        )
        self.rejected = self._counter("rejected", "Refused requests", "reason")
        self.truncated_inputs = self._counter("truncated_inputs", "Inputs that were cut")
        self.cache_hits = self._counter("cache_hits", "Inputs answered from the cache")
        self.cache_misses = self._counter("cache_misses", "Inputs that were not in the cache")
        self._model = Info("reasonembed_model", "What is served", registry=self.registry)

    def describe(self, model: ServedModel) -> None:
        """Sets `reasonembed_model_info`."""
        self._model.info(
            {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "dimension": str(model.dimension),
            }
        )

    def took_part(self, batches: Sequence[BatchStats]) -> None:
        """Notes forward passes."""
        for batch in batches:
            self.batch_tokens.observe(batch.tokens)
            self.batch_fill.observe(min(1.0, batch.padded_tokens / batch.budget_tokens))
            self.padding.observe(1 - batch.tokens / max(1, batch.padded_tokens))

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All samples, and the Content-Type that they are in.

        Args:
            accept: The request's Accept header; OpenMetrics for who asks, else the format 0.0.4.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._exposed), content_type

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"reasonembed_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(
            f"reasonembed_{name}", text, labels, buckets=buckets, registry=self.registry
        )


class _Exposed(Collector):
    """A registry as it is shown: with constant labels, without the client's own additions."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterable[Metric]:
        """As Prometheus' client has it."""
        for metric in self._registry.collect():
            # Times of creation would double the series; nothing asks for them.
            kept = [one for one in metric.samples if not one.name.endswith("_created")]
            metric.samples = [one._replace(labels={**self._labels, **one.labels}) for one in kept]
            yield metric
