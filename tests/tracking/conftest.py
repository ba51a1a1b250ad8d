"""One MLflow, and a store with one sweep to show in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_runs import Run

from orchestrator.store import Store
from orchestrator.tracking import (
    mirror,
)
from orchestrator.tracking.server import open_client


@pytest.fixture(scope="session")
def mlflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests, since its first migration takes seconds; each test has a sweep of its own in it."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def uri(mlflow_home: Path) -> str:
    return f"sqlite:///{mlflow_home}/mlflow.db"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Store(f"sqlite:///{tmp_path}/gatesweep.db") as store:
        yield Run(store)


@pytest.fixture
def send(run: Run, uri: str, mlflow_home: Path) -> Any:
    def one_pass(**more: Any) -> Any:
        return mirror(run.store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts", **more)

    return one_pass


@pytest.fixture
def client(uri: str) -> Any:
    return open_client(uri)
