"""Ray Jobs: what was submitted to a cluster, by HTTP. A submitted sweep's driver runs there, and needs no laptop.

Whoever reaches this port runs what he likes on the cluster: it belongs on loopback, behind a tunnel or a token.
What a job is given (entry point, environment, metadata) is shown to everyone who may list jobs: never a secret.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.sweep import UserError

SWEEP_KEY = "gatesweep_sweep"
STOPPED, SUCCEEDED, FAILED = "STOPPED", "SUCCEEDED", "FAILED"
ENDED = (STOPPED, SUCCEEDED, FAILED)
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One submission of a sweep, as Ray tells it."""

    id: str
    sweep: str
    status: str
    """PENDING, RUNNING, or one of ENDED."""
    message: str
    started_at: float | None
    """Seconds since 1970, as ``ended_at``."""
    ended_at: float | None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class Jobs:
    """The jobs that gatesweep submitted to the cluster at ``address``. What goes wrong there is a UserError.

    ``token_file``: Ray's token, for a cluster that asks for one; without it what RAY_AUTH_MODE and
    RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN say.
    """

    def __init__(self, address: str, token_file: Path | None = None) -> None:
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address {address}: allowed: the address of Ray's dashboard, http://HEAD:8265")
        headers = {} if token_file is None else {"Authorization": f"Bearer {_token(token_file)}"}
        self.address = address.rstrip("/")
        self._client = self._ask(lambda: _client(self.address, headers))

    def of_sweeps(self) -> list[Job]:
        """Every job of a sweep, oldest first."""
        listed = self._ask(self._client.list_jobs)
        jobs = [_job(details) for details in listed if SWEEP_KEY in (details.metadata or {})]
        return sorted(jobs, key=lambda job: job.started_at or float("inf"))

    def newest(self, sweep: str) -> Job:
        """The last submission of a sweep; UserError when there is none."""
        jobs = self.of_sweeps()
        found = [job for job in jobs if job.sweep == sweep]
        if not found:
            names = ", ".join(sorted({job.sweep for job in jobs})) or "none"
            raise UserError(f"no job of sweep {sweep} at {self.address}; its sweeps: {names}")
        return found[-1]

    def get(self, job_id: str) -> Job:
        return _job(self._ask(lambda: self._client.get_job_info(job_id)))

    def submit(self, sweep: str, entrypoint: str, folder: Path, environment: Mapping[str, str]) -> tuple[Job, bool]:
        """Upload ``folder`` as the job's working folder and start it; False: one of this sweep runs already.

        The id follows from the sweep's name, so that of two who submit at the same time one is refused by Ray.
        """
        mine = [job for job in self.of_sweeps() if job.sweep == sweep]
        running = [job for job in mine if not job.has_ended]
        if running:
            return running[-1], False
        numbers = [int(job.id.rpartition("-")[2]) for job in mine if job.id.rpartition("-")[2].isdigit()]
        job_id = f"gatesweep-{sweep}-{max(numbers, default=0) + 1}"
        self._ask(
            lambda: self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "env_vars": dict(environment)},
                metadata={SWEEP_KEY: sweep},
            )
        )
        return self.get(job_id), True

    def stop(self, job_id: str) -> bool:
        """SIGTERM to the driver, which has its trials checkpoint; whether it was still running."""
        return bool(self._ask(lambda: self._client.stop_job(job_id)))

    def logs(self, job_id: str) -> str:
        """What the driver said so far."""
        return str(self._ask(lambda: self._client.get_job_logs(job_id)) or "")

    def _ask(self, question: Callable[[], T]) -> T:
        from ray.exceptions import AuthenticationError

        try:
            return question()
        except AuthenticationError as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"Ray at {self.address} wants a token ({first}); give --token-file, or RAY_AUTH_MODE=token with "
                "RAY_AUTH_TOKEN_PATH"
            ) from error
        except Exception as error:
            # requests, aiohttp and Ray each have exceptions of their own for a server that does not answer well.
            raise UserError(f"Ray Jobs at {self.address}: {type(error).__name__}: {str(error)[:500]}") from error


def _client(address: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell each upload
    with _without(_OVERRIDES):
        return JobSubmissionClient(address, headers=headers)


def _token(path: Path) -> str:
    try:
        return path.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path} can't be read: {error}") from error


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Ray would silently talk to the address in these variables instead of the one it is given."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return None if not milliseconds else milliseconds / 1000

    return Job(
        id=str(details.submission_id),
        sweep=str((details.metadata or {}).get(SWEEP_KEY, "")),
        status=str(getattr(details.status, "value", details.status)),
        message=str(details.message or ""),
        started_at=seconds(details.start_time),
        ended_at=seconds(details.end_time),
    )
