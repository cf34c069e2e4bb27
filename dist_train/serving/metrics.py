"""The numbers that Prometheus reads at /metrics, summed over the workers of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class Metrics:
    """Counters of requests and rows, and the seconds of requests; `several`: worker processes."""

    def __init__(self, *, several: bool) -> None:
        self._several = several
        registry = self._registry = CollectorRegistry()
        labels = ["route", "status"]
        self._requests = Counter("dist_train_requests", "Requests by route and status", labels, registry=registry)
        self._rows = Counter("dist_train_rows", "Rows that were scored", registry=registry)
        self._outside = Counter(
            "dist_train_unlike_training", "Cells outside of what training had", ["column"], registry=registry
        )
        self._seconds = Histogram(
            "dist_train_request_seconds", "Seconds of requests", ["route"], buckets=_SECONDS, registry=registry
        )

    def count(self, route: str, status: int, seconds: float, rows: int) -> None:
        """A request that has been answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if status < 300:
            self._rows.inc(rows)

    def unlike_training(self, column: str) -> None:
        """A cell outside of what the training rows had."""
        self._outside.labels(column).inc()

    def text(self) -> bytes:
        """In Prometheus' text format; with several workers the sums over all."""
        registry = self._registry
        if self._several:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
