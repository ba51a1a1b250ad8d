"""Watching a sweep: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from models.redaction import redacted
from orchestrator.controller import Running, Snapshot

REFRESHES_PER_SECOND = 4
LINE_EVERY_SECONDS = 15.0
BAR_WIDTH = 12
NUM_COLUMNS = 6


class PlainView:
    """One line for what happens, and a line of totals now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def tell(self, line: str) -> None:
        self.console.print(
            redacted(f"{time.strftime('%H:%M:%S')} {line}"), markup=False, highlight=False, soft_wrap=True
        )

    def tick(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_SECONDS:
            self.last_line = now
            self.tell(totals(snapshot))


class LiveView(PlainView):
    """A line a running trial: bar, loss, tokens a second, time left; totals by state above, events scroll by."""

    def __enter__(self) -> Self:
        self.live = Live(
            console=self.console, refresh_per_second=REFRESHES_PER_SECOND, transient=True, auto_refresh=False
        )
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)

    def tick(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        if now - self.last_line >= 1.0 / REFRESHES_PER_SECOND:
            self.last_line = now
            self.live.update(render(snapshot), refresh=True)


def view_for(console: Console) -> PlainView:
    return LiveView(console) if console.is_terminal else PlainView(console)


def totals(snapshot: Snapshot) -> str:
    states = "  ".join(f"{state.lower()} {count}" for state, count in snapshot.states.items())
    if snapshot.gangs_starting:
        states += f"  (gangs starting: {snapshot.gangs_starting})"
    eta = "" if snapshot.eta_seconds is None else f", about {clock(snapshot.eta_seconds)} left"
    stopping = "" if snapshot.stopping is None else f", stopping: {snapshot.stopping}"
    return f"{snapshot.sweep}: {states}  after {clock(snapshot.seconds)}{eta}{stopping}"


def render(snapshot: Snapshot) -> Group:
    table = Table.grid(padding=(0, 2))
    # In a narrow terminal the name is cut; a number never is, and no line wraps.
    for is_number in (False, *[True] * (NUM_COLUMNS - 1)):
        table.add_column(no_wrap=is_number)
    for running in snapshot.running:
        table.add_row(*_cells(running))
    return Group(Text(totals(snapshot), style="bold"), table)


def _cells(running: Running) -> tuple[Text | ProgressBar, ...]:
    name = running.name if running.attempt == 1 else f"{running.name} (attempt {running.attempt})"
    loss = "-" if running.loss_nats is None else f"{running.loss_nats:.4f} nats"
    speed = "-" if running.tokens_per_second is None else f"{running.tokens_per_second:,.0f} tok/s"
    return (
        Text(name, no_wrap=True, overflow="ellipsis"),
        ProgressBar(total=running.num_steps, completed=running.step, width=BAR_WIDTH),
        Text(f"{running.step}/{running.num_steps}"),
        Text(loss),
        Text(speed),
        Text("-" if running.eta_seconds is None else clock(running.eta_seconds)),
    )


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
