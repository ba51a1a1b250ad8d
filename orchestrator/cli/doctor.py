"""``gatesweep doctor``: a line a check, with the mend; the exit code is 2 for a problem, else 0."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from orchestrator.cli.home import Home

if TYPE_CHECKING:
    from orchestrator.doctor import Finding

STYLES = {"OK": "green", "WARNING": "yellow", "PROBLEM": "bold red"}
CHECK_WIDTH = 20
PROBLEM_EXIT = 2


def register(app: typer.Typer, console: Console) -> None:
    """Add the verb to ``app``; it prints on ``console``."""

    @app.command()
    def doctor(
        cluster: Annotated[
            bool, typer.Option("--cluster", help="Every node of the Ray cluster, and what lies between them.")
        ] = False,
        address: Annotated[
            str | None, typer.Option(envvar="RAY_ADDRESS", help="The cluster; without it a local Ray is started.")
        ] = None,
    ) -> None:
        """Check what a sweep needs: packages, GPUs, disk, store, tracking, ports, collectives. Exit 2: a problem."""
        from orchestrator import doctor as checks

        home = Home.of()
        findings = []

        def tell(one: Finding) -> None:
            findings.append(one)
            console.print(line(one))

        here = (checks.check_store(home.store_url), checks.check_tracking(home.tracking_uri))
        for found in itertools.chain(*here, checks.check_copies(home.copies_url)):
            tell(found)
        if cluster:
            from orchestrator.gang import Cluster

            with Cluster(address) as connected:
                for found in checks.examine_nodes(connected, home.directory):
                    tell(found)
        else:
            for found in itertools.chain(checks.check_ports(), checks.examine(home.directory)):
                tell(found)
        if checks.worst(findings) is checks.Level.PROBLEM:
            raise typer.Exit(PROBLEM_EXIT)


def line(found: Finding) -> Text:
    """``warning  host: check  what was found; mend: how to mend it``."""
    name = f"{found.host}: {found.check}" if found.host else found.check
    text = Text(f"{found.level.name.lower():<8} ", style=STYLES[found.level.name])
    text.append(f"{name:<{CHECK_WIDTH}} {found.said}", style="default")
    if found.mend:
        text.append(f"\n{'':<9}{'':<{CHECK_WIDTH}} mend: {found.mend}", style="dim")
    return text
