"""Where the runs are kept: a local SQLite file or another database, or a tracking server; and how it is reached.

Left alone, MLflow waits for a dead server for minutes, prints into the live view and reports home. It takes all of
this from environment variables, read at each call: ours are set once, before its import, and never over the user's.
They are not taken back, since another thread may be copying the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models.redaction import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}

_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the background mirror has a back-off of its own
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def is_server(tracking_uri: str) -> bool:
    """Whether the URI is a tracking server's, which has a UI of its own, and not a database's."""
    return tracking_uri.startswith(("http://", "https://"))


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file of a SQLite back end; None for any other."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix).partition("?")[0]) if tracking_uri.startswith(prefix) else None


def ui_environment(tracking_uri: str) -> dict[str, str]:
    """What MLflow's UI gets beside the environment. The URI is in here, and not in a command line that all can see."""
    quiet = {name: value for name, value in _QUIET.items() if name not in os.environ}
    return {**quiet, "MLFLOW_BACKEND_STORE_URI": tracking_uri}


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of its own: no active run, no global tracking URI. A first SQLite file takes about 2 CPU-seconds."""
    for name, value in (_QUIET | _PATIENCE).items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    path = sqlite_path(tracking_uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri)


def ui_command(tracking_uri: str, artifact_root: str, port: int, host: str = "127.0.0.1") -> list[str]:
    """The command that serves MLflow's UI on a database; run it with ``ui_environment``."""
    if is_server(tracking_uri):
        raise ValueError(f"{redacted(tracking_uri)} is a tracking server and serves its own UI: open it in a browser")
    artifacts = ["--default-artifact-root", artifact_root]
    return [sys.executable, "-m", "mlflow", "ui", *artifacts, "--host", host, "--port", str(port), "--workers", "1"]
