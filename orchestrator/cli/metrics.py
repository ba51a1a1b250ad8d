"""``--metrics [HOST:]PORT``: what a controller does, for Prometheus. Off by default; on loopback without a host.

Figures are read when they are asked for, from the last snapshot and the store; infra/grafana/gatesweep.json shows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.controller import Snapshot, View
from orchestrator.store import STATES, Store
from orchestrator.sweep import UserError

LOOPBACK = "127.0.0.1"


class Metered:
    """A view that also remembers the last snapshot, and serves the figures while it is open."""

    def __init__(
        self, view: View, store: Store, sweep_id: int, sweep: str, lags: Callable[[], Mapping[str, float]], where: str
    ) -> None:
        self._view = view
        self._host, self._port = host_and_port(where)
        self.figures = Figures(store, sweep_id, sweep, lags)

    def __enter__(self) -> Self:
        registry = CollectorRegistry()
        registry.register(self.figures)
        try:
            self._server, self._thread = start_http_server(self._port, self._host, registry)
        except OSError as error:
            raise UserError(f"--metrics: {self._host}:{self._port} can't be listened on: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def tick(self, snapshot: Snapshot) -> None:
        self.figures.snapshot = snapshot
        self.figures.ticked_at = time.time()
        self._view.tick(snapshot)

    def tell(self, line: str) -> None:
        self._view.tell(line)


class Figures(Collector):
    """The metrics of one sweep. A scrape during an outage of the store has what needs no store."""

    def __init__(self, store: Store, sweep_id: int, sweep: str, lags: Callable[[], Mapping[str, float]]) -> None:
        self._store, self._sweep_id, self._sweep, self._lags = store, sweep_id, sweep, lags
        self.snapshot: Snapshot | None = None
        self.ticked_at: float | None = None

    def collect(self) -> Iterator[Metric]:
        snapshot = self.snapshot
        if snapshot is not None and self.ticked_at is not None:
            states = {state: float(snapshot.states.get(state, 0)) for state in STATES}
            yield self._gauge("trials", "Trials by state; WAITING is the queue.", "state", states)
            yield self._one("gangs_starting", "Gangs whose ranks are not up yet.", snapshot.gangs_starting)
            pace = sum(one.tokens_per_second or 0.0 for one in snapshot.running)
            yield self._one("tokens_per_second", "Of all running trials together.", pace)
            if snapshot.eta_seconds is not None:
                yield self._one("eta_seconds", "Until the sweep's end, at the pace so far.", snapshot.eta_seconds)
            yield self._one("ticked_at_seconds", "When the controller last came round, since 1970.", self.ticked_at)
        lags = dict(self._lags())
        yield self._gauge("tracking_lag_seconds", "Since a mirror was last up to date.", "mirror", lags)
        before = time.perf_counter()
        try:
            spent = self._store.spent(self._sweep_id)
            causes = {cause: float(n) for cause, n in self._store.ended_by_cause(self._sweep_id).items()}
        except Exception:
            yield self._one("store_up", "1 when the store answers.", 0.0)
            return
        yield self._one("store_up", "1 when the store answers.", 1.0)
        yield self._one("store_seconds", "How long the store took for these figures.", time.perf_counter() - before)
        hours = {"gpu": spent.gpu_hours, "cpu": spent.cpu_hours, "wall": spent.wall_hours}
        yield self._gauge("hours", "Used up over all runs of the sweep.", "kind", hours)
        yield self._gauge("attempts_ended", "Attempts by what ended them; all but complete and diverged are retries "
                          "or failures.", "cause", causes)  # fmt: skip

    def _one(self, name: str, words: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"gatesweep_{name}", words, labels=("sweep",))
        metric.add_metric((self._sweep,), value)
        return metric

    def _gauge(self, name: str, words: str, label: str, values: Mapping[str, float]) -> Metric:
        metric = GaugeMetricFamily(f"gatesweep_{name}", words, labels=("sweep", label))
        for key, value in values.items():
            metric.add_metric((self._sweep, key), value)
        return metric


def host_and_port(where: str) -> tuple[str, int]:
    """``9464`` or ``HOST:9464``; UserError for anything else."""
    host, _, port = where.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--metrics {where}: allowed: a port, or HOST:PORT to be reached from other hosts")
    return host.strip("[]") or LOOPBACK, int(port)
