"""``gatesweep submit``: a sweep handed to a cluster by Ray Jobs. Its driver runs there; the laptop may close."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orchestrator.sweep import UserError, load

if TYPE_CHECKING:
    from orchestrator.gang.jobs import Job, Jobs

STOP_SECONDS = 150
"""What Ray gives the driver between SIGTERM and SIGKILL; by itself 3 s. Trials checkpoint within 60, and the mirror
catches up within 60."""
START_SECONDS = 120.0
POLL_SECONDS = 1.0
LOG_LINES = 15

Address = Annotated[str | None, typer.Option(help="Ray's dashboard: http://HEAD:8265.", show_default=False)]
SubmitAddress = Annotated[
    str | None,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard: http://HEAD:8265.", show_default=False),
]
TokenFile = Annotated[
    Path | None, typer.Option(help="The file with Ray's token; or RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.")
]


def register(app: typer.Typer, console: Console) -> None:
    """Add the verb to ``app``; it prints on ``console``."""

    @app.command()
    def submit(
        file: Annotated[Path | None, typer.Argument(help="A sweep file (YAML).", show_default=False)] = None,
        overrides: Annotated[
            list[str] | None, typer.Argument(help="Dotted overrides: train.tokens=1e6", show_default=False)
        ] = None,
        address: SubmitAddress = None,
        home: Annotated[
            str | None,
            typer.Option(help="GATESWEEP_HOME of the job: a path that all nodes share. Default: the cluster's own."),
        ] = None,
        store: Annotated[
            str | None, typer.Option(help="GATESWEEP_STORE of the job, without a password. Default: the cluster's own.")
        ] = None,
        store_file: Annotated[
            str | None, typer.Option(help="A file on the cluster that holds the store's URL, password and all.")
        ] = None,
        mlflow: Annotated[
            str | None, typer.Option(help="GATESWEEP_MLFLOW of the job. Default: the cluster's own.")
        ] = None,
        python: Annotated[str, typer.Option(help="The cluster's interpreter, by its path there.")] = "python",
        token_file: TokenFile = None,
        stop: Annotated[
            str | None, typer.Option("--stop", metavar="SWEEP", help="Instead: stop this sweep's job cleanly.")
        ] = None,
    ) -> None:
        """Hand a sweep to a cluster and return: its driver runs there, with this very version of the packages."""
        if (file is None) == (stop is None):
            raise UserError("submit: allowed: a sweep FILE to submit, or --stop SWEEP")
        if stop is not None:
            _stop(open_jobs(address, token_file), stop, console)
            return
        assert file is not None
        told = {
            "GATESWEEP_HOME": home,
            "GATESWEEP_STORE": store,
            "GATESWEEP_STORE_FILE": store_file,
            "GATESWEEP_MLFLOW": mlflow,
        }
        environment = {name: value for name, value in told.items() if value is not None}
        _submit(file, overrides or [], environment, python, lambda: open_jobs(address, token_file), console)


def open_jobs(address: str | None, token_file: Path | None) -> Jobs:
    """The jobs at ``address``; UserError without one."""
    from orchestrator.gang.jobs import Jobs

    if address is None:
        raise UserError("--address is missing; allowed: Ray's dashboard, http://HEAD:8265, or RAY_API_SERVER_ADDRESS")
    return Jobs(address, token_file)


def _submit(
    file: Path,
    overrides: list[str],
    environment: Mapping[str, str],
    python: str,
    connect: Callable[[], Jobs],
    console: Console,
) -> None:
    """Plan and pack here, then send: what is refused is refused before anyone is asked."""
    from orchestrator.cli import parcel
    from orchestrator.cli.run import refuse
    from orchestrator.controller.provenance import provenance
    from orchestrator.plan import expand

    parcel.refuse_credentials(list(environment.values()))
    if "GATESWEEP_STORE" in environment and "GATESWEEP_STORE_FILE" in environment:
        raise UserError("submit: --store and --store-file; allowed: one of them")
    plan = expand(load(file, overrides), files_may_be_absent=True)
    refuse(plan)
    with tempfile.TemporaryDirectory(prefix="gatesweep-") as scratch:
        sent = parcel.pack(plan, overrides, provenance(), Path(scratch), environment.get("GATESWEEP_HOME"))
        jobs = connect()
        entrypoint = f"exec {shlex.quote(python)} -W ignore -m orchestrator.cli.submitted"
        settings = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **environment}
        job, is_new = jobs.submit(plan.sweep.name, entrypoint, Path(scratch), settings)
    if not is_new:
        console.print(f"{job.id} is {job.status} already; nothing was sent", highlight=False)
    else:
        console.print(f"{job.id} is sent to {jobs.address}, packages {sent.source_hash}", highlight=False)
        console.print(_first_words(jobs, job), markup=False, highlight=False)
    _tell_verbs(plan.sweep.name, jobs.address, console)


def _first_words(jobs: Jobs, job: Job) -> str:
    """What the driver says once it has planned, on the cluster and with the cluster's files; UserError when it fails
    before. From then on nothing here is needed."""
    from orchestrator.gang.jobs import FAILED

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended, log = jobs.get(job.id), jobs.logs(job.id)
        planned = re.search(rf"^{re.escape(job.sweep)}: \d+ trials, .*$", log, re.M)
        if ended.status == FAILED and not planned:
            lines = [line for line in log.splitlines() if line.strip()] or ended.message.splitlines()
            raise UserError("\n".join([f"{job.id} failed before it began:", *lines[-LOG_LINES:]]))
        if planned or ended.has_ended:
            return planned[0] if planned else f"{job.id} has ended: {ended.status}"
        time.sleep(POLL_SECONDS)
    return f"{job.id} has not begun yet ({jobs.get(job.id).status}); it needs nothing from here"


def _tell_verbs(sweep: str, address: str, console: Console) -> None:
    at = f"--address {address}"
    for command, what in (
        (f"gatesweep status {at}", "jobs, and trials by state where GATESWEEP_STORE is the job's"),
        (f"gatesweep logs {sweep} {at}", "what its controller says"),
        (f"gatesweep submit --stop {sweep} {at}", "running trials checkpoint; submit again goes on"),
    ):
        console.print(f"  {command:<64} {what}", markup=False, highlight=False, soft_wrap=True)


def _stop(jobs: Jobs, sweep: str, console: Console) -> None:
    job = jobs.newest(sweep)
    if job.has_ended:
        raise UserError(f"{job.id} has ended already: {job.status}")
    jobs.stop(job.id)
    console.print(
        f"{job.id} is told to stop: its trials checkpoint; the same submission goes on from there", highlight=False
    )


def print_job_log(jobs: Jobs, sweep: str, follow: bool) -> None:
    """What the controller of a sweep's last job says; with ``follow`` until the job ends."""
    job, shown = jobs.newest(sweep), 0
    while True:
        ended = jobs.get(job.id).has_ended
        log = jobs.logs(job.id)
        sys.stdout.write(log[shown:])
        sys.stdout.flush()
        shown = len(log)
        if ended or not follow:
            return
        time.sleep(POLL_SECONDS)


def jobs_table(jobs: Jobs) -> Table:
    """A row a job, newest last."""
    table = Table(box=SIMPLE_HEAD, title=f"jobs at {jobs.address}", title_justify="left")
    for heading in ("job", "sweep", "status", "began", "ended"):
        table.add_column(heading, no_wrap=heading != "sweep")
    for job in jobs.of_sweeps():
        table.add_row(job.id, job.sweep, job.status, _clock(job.started_at), _clock(job.ended_at))
    return table


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
