"""``gatesweep watch``: a sweep live in a terminal, from the store alone: from any machine that reaches it."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from orchestrator import report
from orchestrator.cli.home import existing_store

SECONDS = 2.0
LEAST_REST = 9.0
"""Times as long as a look took: at most a tenth of the store's time is ours, however large the sweep."""


def register(app: typer.Typer, console: Console) -> None:
    """Add the verb to ``app``; it prints on ``console``."""

    @app.command()
    def watch(
        sweep: Annotated[str, typer.Argument(help="The sweep's name.", show_default=False)],
        once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
        every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks at the store.")] = SECONDS,
    ) -> None:
        """Watch a sweep that runs anywhere: done, time left, budgets, failures, running trials. Ctrl-C ends it."""
        with existing_store() as store:
            row = store.sweep(sweep)
            if once or not console.is_terminal:
                console.print(report.watch_frame(store, row))
                return
            with (
                contextlib.suppress(KeyboardInterrupt),
                Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live,
            ):
                while True:
                    begun = time.monotonic()
                    live.update(report.watch_frame(store, store.sweep(sweep)), refresh=True)
                    time.sleep(max(every, LEAST_REST * (time.monotonic() - begun)))
