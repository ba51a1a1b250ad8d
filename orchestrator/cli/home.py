"""Where things are kept: one folder on a laptop, URLs on a cluster. Read from the environment, once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.copies import Place
from orchestrator.store import Store
from orchestrator.sweep import UserError


@dataclass(frozen=True)
class Home:
    """``GATESWEEP_HOME`` (default ``./runs``) holds the run dirs and, unless URLs say otherwise, the databases."""

    directory: Path
    store_url: str
    """``GATESWEEP_STORE``, or the content of the file ``GATESWEEP_STORE_FILE``: a Postgres URL; else SQLite in the
    home."""
    tracking_uri: str
    """``GATESWEEP_MLFLOW`` or ``MLFLOW_TRACKING_URI``: SQLite in the home, or an MLflow server."""
    artifact_location: str | None
    """``GATESWEEP_MLFLOW_ARTIFACTS``: where a new MLflow experiment keeps artifacts; None: the server decides."""
    optuna_url: str
    """``GATESWEEP_OPTUNA``: the copy for optuna-dashboard."""
    reader_url: str | None = None
    """``GATESWEEP_STORE_READER``: the Postgres store by a role that can only read, for ``gatesweep query``."""

    copies_url: str | None = None
    """``GATESWEEP_COPIES``: where checkpoints of trials that have ended, and reports, are copied to."""

    @property
    def artifact_root(self) -> str:
        """Where this home's own MLflow keeps artifacts."""
        return self.artifact_location or str(self.directory / "mlartifacts")

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Home:
        directory = Path(environment.get("GATESWEEP_HOME") or "runs").expanduser().resolve()
        local_mlflow = f"sqlite:///{directory / 'mlflow.db'}"
        tracking = environment.get("GATESWEEP_MLFLOW") or environment.get("MLFLOW_TRACKING_URI") or local_mlflow
        return cls(
            directory=directory,
            store_url=_store_url(environment) or f"sqlite:///{directory / 'gatesweep.db'}",
            tracking_uri=tracking,
            artifact_location=_artifacts(environment)
            or (str(directory / "mlartifacts") if tracking == local_mlflow else None),
            optuna_url=environment.get("GATESWEEP_OPTUNA") or f"sqlite:///{directory / 'optuna.db'}",
            reader_url=environment.get("GATESWEEP_STORE_READER") or None,
            copies_url=environment.get("GATESWEEP_COPIES") or None,
        )


def _artifacts(environment: Mapping[str, str]) -> str | None:
    """MLflow stores and shows it: a URL with a credential is refused, and never repeated."""
    url = environment.get("GATESWEEP_MLFLOW_ARTIFACTS") or None
    return None if url is None else Place(url, "GATESWEEP_MLFLOW_ARTIFACTS").url


def _store_url(environment: Mapping[str, str]) -> str | None:
    """The store's URL by value, or by a file: a mounted secret, which no process listing shows."""
    path = environment.get("GATESWEEP_STORE_FILE")
    if not path:
        return environment.get("GATESWEEP_STORE")
    if environment.get("GATESWEEP_STORE"):
        raise UserError("GATESWEEP_STORE and GATESWEEP_STORE_FILE are both set; allowed: one of them")
    try:
        url = Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"GATESWEEP_STORE_FILE {path} can't be read: {error}") from error
    if not url:
        raise UserError(f"GATESWEEP_STORE_FILE {path} is empty; allowed: one line with the store's URL")
    return url


def existing_store() -> Store:
    """The store of this home; UserError when nothing has run yet."""
    home = Home.of()
    if not has_store(home):
        raise UserError(f"nothing has run yet: no store at {home.store_url} (GATESWEEP_HOME is {home.directory})")
    return Store(home.store_url, home.reader_url)


def has_store(home: Home) -> bool:
    """False when a SQLite file is not there yet; opening it would make it."""
    if not home.store_url.startswith("sqlite:///"):
        return True
    try:
        return Path(home.store_url.removeprefix("sqlite:///")).exists()
    except OSError as error:
        raise UserError(f"GATESWEEP_HOME {home.directory} can't be read: {error.strerror}") from error
