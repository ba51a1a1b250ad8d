"""The verbs that tell where a number comes from."""

from __future__ import annotations

import functools
import sys
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from orchestrator import report
from orchestrator.cli.home import Home, existing_store
from orchestrator.cli.selection import one_trial


class DiffFormat(StrEnum):
    TABLE = "table"
    JSON = "json"


DIFFERS_EXIT = 1

Trial = Annotated[str, typer.Argument(help="A fingerprint or its beginning.", show_default=False)]


def register(app: typer.Typer, console: Console) -> None:
    """Add these verbs to ``app``; they print on ``console``."""

    @app.command()
    def diff(
        first: Trial,
        second: Trial,
        format: Annotated[DiffFormat, typer.Option("--format")] = DiffFormat.TABLE,
    ) -> None:
        """Show how two trials differ: config keys, and packages, commit, hosts and layout of their last attempts."""
        with existing_store() as store:
            every = [trial for sweep in store.sweeps() for trial in store.trials(sweep.id)]
            rows = [one_trial(every, beginning) for beginning in (first, second)]
            last = {row.fingerprint: next(reversed(store.attempts(row.fingerprint)), None) for row in rows}
        told = report.differences(rows[0], rows[1], last)
        if format is DiffFormat.JSON:
            sys.stdout.write(report.differences_to_json(told))
        else:
            console.print(report.DifferencesView(told))

    @app.command()
    def reproduce(
        trial: Trial,
        address: Annotated[
            str | None,
            typer.Option(envvar="RAY_ADDRESS", help="A running Ray cluster; without it a local one is started."),
        ] = None,
    ) -> None:
        """Train a finished trial once more, compare the curves, and stamp its row. Changes nothing else."""
        from orchestrator.controller import reproduce as train_again  # Ray: seconds that other verbs need not wait
        from orchestrator.gang import Cluster

        home = Home.of()
        with existing_store() as store:
            owners = {one.fingerprint: sweep.id for sweep in store.sweeps() for one in store.trials(sweep.id)}
            row = one_trial([one for sweep in store.sweeps() for one in store.trials(sweep.id)], trial)
            with Cluster(address) as cluster:
                sweep_id, tell = owners[row.fingerprint], functools.partial(console.print, highlight=False)
                found = train_again(store, cluster, home.directory, row, sweep_id, tell)
        console.print(found.words, highlight=False)
        if found.outcome == "differs":
            raise typer.Exit(DIFFERS_EXIT)
