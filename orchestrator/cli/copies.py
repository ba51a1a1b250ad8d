"""Copies on S3 or another file system: made at the end of a run, brought back by ``gatesweep fetch``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli.home import Home
from orchestrator.cli.signing import check_key
from orchestrator.copies import Copier, Place, fetch, noted_url
from orchestrator.store import Store, TrialRow
from orchestrator.sweep import UserError

VARIABLE = "GATESWEEP_COPIES"
FINISH_SECONDS = 3600.0
"""What copying may take after the last trial of a sweep. It ends at once where the place is down."""
STOPPED_SECONDS = 30.0
"""And after a clean stop, which may be the end of a Slurm job."""


def register(app: typer.Typer, console: Console) -> None:
    """Add the verb to ``app``; it prints on ``console``."""

    @app.command("fetch")
    def fetch_verb(
        trial: Annotated[str, typer.Argument(help="A fingerprint or its beginning.", show_default=False)],
        source: Annotated[
            str | None,
            typer.Option("--from", help=f"URL of the copies. Default: {VARIABLE}, or where the trial was copied to."),
        ] = None,
    ) -> None:
        """Bring a trial's copied checkpoint back into the home, checked: only one that this key signed is taken."""
        home = Home.of()
        check_key(home.directory)
        place = _source(home, trial, source)
        found = fetch(home.directory, trial, place, lambda line: console.print(line, highlight=False, soft_wrap=True))
        what = f"{found.num_bytes:,} bytes, as they were signed" if found.num_bytes else "it was here already, sound"
        console.print(f"{found.checkpoint} (step {found.step}): {what}", highlight=False, markup=False, soft_wrap=True)


def copies_place(home: Home) -> Place | None:
    """Where copies go, None when nowhere; UserError for a URL or a package that can't be used."""
    return None if home.copies_url is None else Place(home.copies_url, VARIABLE).open()


def open_copier(place: Place, home: Home, store: Store, sweep_id: int, trials: Iterable[TrialRow]) -> Copier:
    """At work, with the trials that an earlier run left uncopied."""
    copier = Copier(home.directory, place, lambda kind, message: store.add_event(sweep_id, kind, message))
    copier.add(trial.fingerprint for trial in trials if trial.state == "COMPLETE")
    copier.start()
    return copier


def finish_copies(copier: Copier, console: Console, *, is_done: bool) -> None:
    """Wait for what is still to be copied; after a clean stop only shortly. What is left is no failure of the run."""
    left = copier.close(FINISH_SECONDS if is_done else STOPPED_SECONDS)
    if copier.num_copied:
        console.print(f"{copier.num_copied} checkpoint(s) copied to {copier.place}", highlight=False, soft_wrap=True)
    if left:
        console.print(
            f"{left} checkpoint(s) are not copied to {copier.place}; gatesweep status says why, and the next run "
            "copies them",
            highlight=False,
            soft_wrap=True,
        )


def publish(url: str, said_by: str, last: str, make: Callable[[Path], Sequence[Path]]) -> list[str]:
    """Copy to ``url`` what ``make`` writes into a folder, whose files it returns, ``last`` at the end; their URLs."""
    place = Place(url, said_by).open()
    with tempfile.TemporaryDirectory(prefix="gatesweep-") as scratch:
        folder = Path(scratch) / "written"
        names = [path.relative_to(folder).as_posix() for path in make(folder)]
        place.put_folder(folder, names, "", last=last)
    return [place.at(name) for name in names]


def _source(home: Home, name: str, given: str | None) -> Place:
    if given is not None:
        return Place(given, "--from")
    place = copies_place(home)
    if place is not None:
        return place
    trials = [path for path in (home.directory / "trials").glob("*") if name and path.name.startswith(name)]
    noted = {url for path in trials if (url := noted_url(path)) is not None}
    if len(noted) == 1:
        return Place(noted.pop(), "--from")
    raise UserError(f"fetch: where from? allowed: --from URL, or {VARIABLE}")
