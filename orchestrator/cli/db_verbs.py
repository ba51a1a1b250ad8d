"""``gatesweep db``: what is done to the store as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli.home import Home, has_store
from orchestrator.store import Transfer, check_store, export_store, import_store, upgrade_store
from orchestrator.sweep import UserError

PROBLEM_EXIT = 1
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def register(app: typer.Typer, console: Console) -> None:
    """Add ``db`` and its verbs to ``app``; they print on ``console``."""
    db = typer.Typer(help="The store as a whole: its schema, its soundness, and a move to another database.")
    app.add_typer(db, name="db", no_args_is_help=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    @db.command()
    def upgrade() -> None:
        """Bring the store to this gatesweep's schema, or make an empty one. Every other verb does so, too."""
        before, after = upgrade_store(Home.of().store_url)
        if before == after:
            say(f"schema version {after}: nothing to do")
        else:
            say(f"schema version {'none' if before is None else before} -> {after}")

    @db.command()
    def check() -> None:
        """Look for damage, changing nothing: schema, keys, trials and attempts, run dirs. Exit code 1 for a problem."""
        home = _with_store()
        findings = check_store(home.store_url, home.directory / "trials")
        for finding in findings:
            console.print(f"{finding.level:8}", style=STYLES[finding.level], end="")
            say(finding.message)
        if any(finding.level == "problem" for finding in findings):
            raise typer.Exit(PROBLEM_EXIT)

    @db.command("export")
    def export_(
        to: Annotated[str, typer.Argument(help="A new SQLite file, or an empty database's URL.", show_default=False)],
    ) -> None:
        """Copy the whole store, compared row by row. Run dirs, MLflow and Optuna's copy stay where they are."""
        _tell(export_store(_with_store().store_url, to), say)

    @db.command("import")
    def import_(
        origin: Annotated[str, typer.Argument(help="A SQLite file, or a store's URL.", show_default=False)],
    ) -> None:
        """Fill this home's empty store (GATESWEEP_STORE) with all of another one, compared row by row."""
        _tell(import_store(origin, Home.of().store_url), say)


def _with_store() -> Home:
    home = Home.of()
    if not has_store(home):
        raise UserError(f"there is no store at {home.store_url}")
    return home


def _tell(transfer: Transfer, say: Callable[[str], None]) -> None:
    width = max(len(one.table) for one in transfer.moved)
    for one in transfer.moved:
        say(f"{one.table:{width}}  {one.num_rows:>12,} rows  sha256 sum {one.checksum[:16]}")
    for sweep, holder in transfer.run_by:
        say(f"note: {sweep} is run by {holder}; what it writes from now on is not in the copy")
    say(f"{sum(one.num_rows for one in transfer.moved):,} rows copied and found equal")
