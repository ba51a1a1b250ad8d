"""What MLflow shows of a trial, and a port where nobody listens."""

from __future__ import annotations

import socket
from typing import Any

from store_runs import Run


def child(client: Any, run: Run, fingerprint: str | None = None) -> Any:
    return client.get_run(run.trial(fingerprint).mlflow_run_id)


def history(client: Any, run: Run, key: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run.trial().mlflow_run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
