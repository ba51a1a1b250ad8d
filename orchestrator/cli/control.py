"""The verbs that change what a sweep does, and the one that shows what its ranks say. A running controller obeys."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from models import run_dir
from orchestrator.cli.home import Home, existing_store
from orchestrator.cli.selection import closed_gates, one_trial, select_trials
from orchestrator.cli.submit import Address, TokenFile, open_jobs, print_job_log
from orchestrator.store import BUDGET_EXTENDED, CANCEL_WANTED, CAP_SET, TrialRow
from orchestrator.sweep import BUDGETS, UserError, check_cap, check_extension, refuse_extensions

SweepName = Annotated[str, typer.Argument(help="The sweep's name.", show_default=False)]
Where = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE over arm, state, cause, seed and axes (train.lr=1e-3); repeated: all must match."),
]
Trials = Annotated[list[str] | None, typer.Option("--trial", help="A fingerprint or its beginning; may be repeated.")]
FOLLOW_SECONDS = 0.5


def register(app: typer.Typer, console: Console) -> None:
    """Add these verbs to ``app``; they print on ``console``."""

    @app.command()
    def rerun(
        sweep: SweepName,
        failed: Annotated[bool, typer.Option("--failed", help="Every FAILED trial.")] = False,
        canceled: Annotated[bool, typer.Option("--canceled", help="Every CANCELED trial.")] = False,
        trial: Trials = None,
        where: Where = None,
    ) -> None:
        """Let FAILED or CANCELED trials wait again, with fresh retry budgets. The next run takes them. With
        --where arm=NAME alone, or the size of a rung beside it, an arm also passes the gate that has held it back."""
        wanted = {state for state, asked in (("FAILED", failed), ("CANCELED", canceled)) if asked}
        if not wanted and not trial and not where:
            raise UserError("rerun: say which trials: --failed, --canceled, --where KEY=VALUE or --trial FINGERPRINT")
        with existing_store() as store:
            row = store.sweep(sweep)
            trials = store.trials(row.id)
            chosen = select_trials(trials, where or (), trial or ())
            chosen = [one for one in chosen if not wanted or one.state in wanted]
            _refuse_finished(chosen if trial else [])
            count = store.reopen(row.id, [one.fingerprint for one in chosen])
            shut = [] if wanted or trial else closed_gates(row, trials, where or ())
            opened = store.promote_anyway(row.id, shut)
        for one in opened:
            console.print(f"{one.arm} goes on to rung {one.rung}: {one.reason}", highlight=False)
        if opened and not count:
            console.print("gatesweep run, or submit, with the sweep's file goes on", highlight=False)
            return
        said = f"{count} trial(s) wait again; gatesweep run, or submit, with the sweep's file goes on"
        console.print(said if count else "nothing to rerun", highlight=False)

    @app.command()
    def cancel(sweep: SweepName, trial: Trials = None, where: Where = None) -> None:
        """Cancel trials: those that wait at once, running ones by their controller, after their current step."""
        with existing_store() as store:
            row = store.sweep(sweep)
            chosen = select_trials(store.trials(row.id), where or (), trial or ())
            finished = [one.fingerprint for one in chosen if one.state not in ("WAITING", "RUNNING")]
            if trial and finished:
                raise UserError(f"cancel: neither WAITING nor RUNNING in {sweep}: {', '.join(finished)}")
            count = store.cancel(row.id, [one.fingerprint for one in chosen if one.state == "WAITING"])
            running = [one for one in chosen if one.state == "RUNNING"]
            for one in running:
                store.add_event(row.id, CANCEL_WANTED, "the user wants it canceled", one.fingerprint)
        told = f"; {len(running)} running are told to stop" if running else ""
        console.print(f"{count} trial(s) canceled{told}", highlight=False)

    @app.command("set")
    def set_caps(
        sweep: SweepName,
        changes: Annotated[
            list[str],
            typer.Argument(help="max_trials=4 max_gpus=64; none lifts a cap. gpu_hours=+10 adds to a budget."),
        ],
    ) -> None:
        """Change how many trials or GPUs a sweep may use at once, or add to its budgets, also while it runs. What
        runs goes on."""
        extensions = [check_extension(one) for one in changes if one.partition("=")[0] in BUDGETS]
        caps = [check_cap(one) for one in changes if one.partition("=")[0] not in BUDGETS]
        checked = [*caps, *extensions]
        with existing_store() as store:
            row = store.sweep(sweep)
            refuse_extensions(sweep, row.settings.get("budget", {}), extensions)
            for cap in caps:
                store.add_event(row.id, CAP_SET, cap)
            for extension in extensions:
                store.add_event(row.id, BUDGET_EXTENDED, extension)
            holder = store.lease_holder(row.id)
        when = "within seconds" if holder else "when the sweep runs again"
        console.print(f"{', '.join(checked)} from now on; heeded {when}", highlight=False)

    @app.command()
    def logs(
        trial: Annotated[
            str,
            typer.Argument(help="A fingerprint or its beginning; with --address a sweep.", show_default=False),
        ],
        rank: Annotated[int, typer.Option(min=0)] = 0,
        attempt: Annotated[int | None, typer.Option(help="Its number; by default the last one.")] = None,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows; Ctrl-C ends it.")] = False,
        address: Address = None,
        token_file: TokenFile = None,
    ) -> None:
        """Print what a rank of a trial's attempt said; or, with --address, the controller of a submitted sweep."""
        if address is not None:
            print_job_log(open_jobs(address, token_file), trial, follow)
            return
        with existing_store() as store:
            every = [one for sweep in store.sweeps() for one in store.trials(sweep.id)]
            row = one_trial(every, trial)
            attempts = {one.number: one for one in store.attempts(row.fingerprint)}
        number = max(attempts, default=None) if attempt is None else attempt
        if number not in attempts:
            raise UserError(f"logs: trial {row.fingerprint} has attempts {sorted(attempts) or 'none'}, not {number}")
        folder = run_dir.trial_dir(Home.of().directory, row.fingerprint) / "attempts"
        path = run_dir.log_path(folder / f"{number:03d}-{attempts[number].token}", rank)
        if not path.exists():
            raise UserError(f"logs: no log of rank {rank} at {path}; GATESWEEP_HOME must be the sweep's own folder")
        _print_log(path, follow)


def _refuse_finished(trials: list[TrialRow]) -> None:
    for one in trials:
        if one.state not in ("FAILED", "CANCELED"):
            raise UserError(
                f"rerun: trial {one.fingerprint} is {one.state}; only FAILED and CANCELED trials can be rerun"
            )


def _print_log(path: Path, follow: bool) -> None:
    with path.open(errors="replace") as stream:
        while True:
            for line in stream:
                sys.stdout.write(line)
            if not follow:
                return
            sys.stdout.flush()
            time.sleep(FOLLOW_SECONDS)
