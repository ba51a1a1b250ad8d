"""The verbs. Each reads its input, calls one thing below, prints; a UserError becomes one message and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from models.redaction import redacted
from orchestrator import report
from orchestrator.cli import (
    control,
    copies,
    data_verbs,
    db_verbs,
    doctor,
    schema_verb,
    signing,
    submit,
    trace,
    trained,
    watch,
)
from orchestrator.cli import imports as imports_verb
from orchestrator.cli import results as results_verb
from orchestrator.cli.home import Home, existing_store, has_store
from orchestrator.copies import CopyError
from orchestrator.store import Store, StoreOutage, standing_passages
from orchestrator.sweep import UserError, check_extension, load

if TYPE_CHECKING:
    from orchestrator.plan import Plan

FILE_WIDTH = 120

app = typer.Typer(
    help="Ablation sweeps that end in verdicts. Things are kept in $GATESWEEP_HOME (default ./runs).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_verbs.app, name="data")
# Rich takes 80 columns for what is no terminal; a table in a file or a log may be as wide as it is.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH)
errors = Console(stderr=True)

control.register(app, console)
copies.register(app, console)
db_verbs.register(app, console)
doctor.register(app, console)
schema_verb.register(app)
signing.register(app, console)
submit.register(app, console)
trained.register(app, console)
trace.register(app, console)
watch.register(app, console)
results_verb.register(app, console)
imports_verb.register(app, console)

USER_ERROR_EXIT, DEFECT_EXIT = 2, 1

File = Annotated[Path, typer.Argument(help="A sweep file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.tokens=1e6 seeds=[1,2,3]", show_default=False)
]


@app.command()
def plan(file: File, overrides: Overrides = None) -> None:
    """Print every trial, its parameters and FLOPs, and the refusals. Starts nothing, writes nothing."""
    from orchestrator.plan import expand

    planned = expand(load(file, overrides or ()), files_may_be_absent=True)
    known = _known(Home.of(), planned)
    states, standing = known.states, known.standing
    planned = planned.promoted(key for key, is_through in known.gates.items() if is_through)
    closed = [key for key, is_through in known.gates.items() if not is_through]
    console.print(report.plan_table(planned, states, known.elsewhere, closed))
    planned = planned.without(closed)
    prices = report.price_lines(planned, states, standing), report.disk_lines(planned)
    for line in (*prices[0], *prices[1], *report.budget_forecast(planned, states, standing)):
        console.print(line, highlight=False)
    if known.stale is not None:
        raise known.stale
    if planned.refusals:
        raise typer.Exit(USER_ERROR_EXIT)


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="A running Ray cluster; without it a local one is started."),
    ] = None,
    extend: Annotated[
        list[str] | None,
        typer.Option(help="Add to a budget that is used up: gpu_hours=+10; may be repeated.", show_default=False),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(envvar="GATESWEEP_METRICS", help="[HOST:]PORT for Prometheus; on loopback without a host."),
    ] = None,
    json_logs: Annotated[
        bool,
        typer.Option("--json-logs", envvar="GATESWEEP_JSON_LOGS", help="Logs also as JSON lines, for a collector."),
    ] = False,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="Refuse to take trials that another sweep has trained.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="While another run has the sweep: wait until that has ended, or is dead.")
    ] = False,
) -> None:
    """Run a sweep here, in the foreground. Run again, it goes on where it stopped."""
    from orchestrator.cli.run import run_sweep  # Ray and Optuna: seconds that other verbs need not wait
    from orchestrator.plan import expand

    added = [check_extension(one) for one in extend or ()]
    planned = expand(load(file, overrides or ()))
    given = (planned, Home.of(), address, console, added, metrics, not no_reuse, json_logs, wait)
    raise typer.Exit(run_sweep(*given))


@app.command()
def status(address: submit.Address = None, token_file: submit.TokenFile = None) -> None:
    """Every sweep: trials by state, what happened last, what failed and why. With --address also the jobs there."""
    if address is not None:
        console.print(submit.jobs_table(submit.open_jobs(address, token_file)))
        if not has_store(Home.of()):
            return
    with existing_store() as store:
        console.print(report.status_table(store))


class FrameFormat(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help='For example "SELECT arm, lr, validation_loss_nats FROM results".')],
    format: Annotated[FrameFormat, typer.Option("--format")] = FrameFormat.TABLE,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows beyond these are cut, with a note.")] = 100_000,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which the query is stopped.")] = 60.0,
) -> None:
    """Ask the store in SQL, read-only. Views: results, curves, attempts, diagnostics."""
    with existing_store() as store:
        frame = store.query(sql, timeout, max_rows)
    if frame.attrs["is_cut"]:
        errors.print(
            f"note: there are more rows than these {max_rows:,}; narrow the query, or give --max-rows", highlight=False
        )
    if format is FrameFormat.CSV:
        sys.stdout.write(frame.to_csv(index=False))
    elif format is FrameFormat.JSON:
        sys.stdout.write(frame.to_json(orient="records", indent=2, date_format="iso") + "\n")
    elif len(frame):
        # A column of nothing but NULL holds None, which na_rep does not cover.
        shown = frame.map(lambda value: "NULL" if value is None else value)
        print(shown.to_string(index=False, na_rep="NULL"))
    else:
        print("no rows")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Where the MLflow UI listens, on loopback.")] = 5000,
) -> None:
    """Open the MLflow UI on this home's runs; Ctrl-C ends it."""
    from orchestrator import tracking
    from orchestrator.cli.run import catch_up

    home = Home.of()
    with existing_store() as store:
        catch_up(store, home, console)
    if tracking.is_server(home.tracking_uri):
        console.print(f"MLflow runs at {redacted(home.tracking_uri)}", highlight=False)
        return
    command = tracking.ui_command(home.tracking_uri, home.artifact_root, port)
    console.print(f"MLflow UI: http://127.0.0.1:{port}", highlight=False)
    raise typer.Exit(subprocess.call(command, env={**os.environ, **tracking.ui_environment(home.tracking_uri)}))


@dataclass(frozen=True)
class _Known:
    """What the store knows of a plan: states of its trials, which other sweep trained them, its budgets' standing, why
    its confirming seeds are none, and by ``arm_key`` which gates are open."""

    states: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    standing: report.Standing | None = None
    stale: UserError | None = None
    gates: dict[str, bool] = field(default_factory=dict)


def _known(home: Home, planned: Plan) -> _Known:
    """No store is made for looking."""
    if not has_store(home):
        return _Known()
    from orchestrator.cli.fresh import refuse_stale

    with Store(home.store_url) as store:
        name, fingerprints = planned.sweep.name, [trial.fingerprint for trial in planned.all_trials]
        ids = [row.id for row in store.sweeps() if row.name == name]
        elsewhere = store.trained_elsewhere(name, fingerprints)
        states = store.states(list(elsewhere))
        states |= {one.fingerprint: one.state for sweep_id in ids for one in store.trials(sweep_id)}
        standing = report.Standing.of(store, ids[0]) if ids else None
        row = store.sweep(name) if ids else None
        decided = {} if row is None else standing_passages(row.verdict, row.settings)
        gates, stale = {key: one.is_through for key, one in decided.items()}, None
        try:
            refuse_stale(planned, store)
        except UserError as error:
            stale = error
        return _Known(states, elsewhere, standing, stale, gates)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR_EXIT)
    except (StoreOutage, CopyError) as error:
        errors.print(f"error: {redacted(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(DEFECT_EXIT)
    except Exception:  # a defect: its traceback is shown, but a library's error may hold a URL
        errors.print(redacted(traceback.format_exc()), markup=False, highlight=False, soft_wrap=True)
        sys.exit(DEFECT_EXIT)
