"""A sweep as it stands now, for ``gatesweep watch``: read from the store alone, so it may run on another machine.

A frame costs a few reads of indices, whatever the sweep's size: states are counted, and only what runs, what failed
and what happened last is read row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.report.figures import axis_text, loss_text, plural
from orchestrator.report.gated import gate_lines
from orchestrator.report.spending import budget_lines
from orchestrator.report.tree import STATES

if TYPE_CHECKING:
    from orchestrator.store import RunningRow, Store, SweepRow

NUM_EVENTS, NUM_FAILED, NUM_RUNNING = 5, 5, 20
BAR_WIDTH = 12
_LEFT_TO_DO = ("WAITING", "RUNNING")


def watch_frame(store: Store, sweep: SweepRow, now: datetime | None = None) -> RenderableType:
    """One frame: failures first, then what runs, then what bounds it."""
    moment = now or datetime.now(UTC)
    states = store.num_by_state(sweep.id).get(sweep.id, {})
    running = store.running(sweep.id)
    parts: list[RenderableType] = [Text(line, style="bold") for line in _totals(store, sweep, states, running, moment)]
    parts += _failed(store, sweep, states.get("FAILED", 0))
    parts += _running(running, states.get("RUNNING", 0), moment)
    parts += _bounds(store, sweep)
    gates = gate_lines(sweep)
    parts += [Text(""), *map(Text, gates)] if gates else []
    events = store.events(sweep.id, last=NUM_EVENTS)
    if events:
        parts.append(Text(""))
        parts += [
            Text(f"{event.at:%m-%d %H:%M:%S} UTC  {event.kind}: {event.message}", style="dim") for event in events
        ]
    return Group(*parts)


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _totals(
    store: Store, sweep: SweepRow, states: dict[str, int], running: Sequence[RunningRow], now: datetime
) -> list[str]:
    num_trials = sum(states.values())
    ended = sum(count for state, count in states.items() if state not in _LEFT_TO_DO)
    under_way = sum(row.step / row.num_steps for row in running)
    done = (ended + under_way) / num_trials if num_trials else 0.0
    left = seconds_left(running, states.get("WAITING", 0), now)
    holder = store.lease_holder(sweep.id)
    by = f"run by {holder[0]}" if holder else "nobody runs it"
    eta = "" if left is None else f", about {clock(left)} left"
    counts = "  ".join(f"{state.lower()} {states[state]:,}" for state in STATES if states.get(state))
    return [f"{sweep.name}: {done:.0%} done ({ended:,} of {plural(num_trials, 'trial')} ended){eta}; {by}", counts]


def seconds_left(running: Sequence[RunningRow], num_waiting: int, now: datetime) -> float | None:
    """From what runs: its own pace, and as long as a whole one of it for each trial that waits. None before a step."""
    paces = [
        (row, (now - row.started_at).total_seconds() / (row.step - row.resume_step))
        for row in running
        if row.step > row.resume_step
    ]
    if not paces:
        return None
    left = sum((row.num_steps - row.step) * pace for row, pace in paces)
    whole = sum(row.num_steps * pace for row, pace in paces) / len(paces)
    unknown = len(running) - len(paces)
    return max(0.0, (left + whole * (num_waiting + unknown)) / len(running))


def _failed(store: Store, sweep: SweepRow, count: int) -> list[RenderableType]:
    if not count:
        return []
    parts: list[RenderableType] = [Text(""), Text(plural(count, "failed trial"), style="bold red")]
    for row in store.failed(sweep.id, NUM_FAILED):
        axes = "".join(f" {name.rpartition('.')[2]}={axis_text(value)}" for name, value in row.axes.items())
        said = (
            f"  {row.fingerprint}  {row.arm}{axes} seed={row.seed}: {row.cause or 'cause unknown'}: {row.reason or '-'}"
        )
        parts.append(Text(said, style="red"))
    if count > NUM_FAILED:
        parts.append(Text(f"  and {count - NUM_FAILED:,} more; gatesweep status has their last words", style="red"))
    return parts


def _running(rows: Sequence[RunningRow], num_running: int, now: datetime) -> list[RenderableType]:
    table = Table.grid(padding=(0, 2))
    for is_number in (False, True, True, True, True, True, False):
        table.add_column(no_wrap=is_number)
    for row in rows[:NUM_RUNNING]:
        axes = "".join(f" {name.rpartition('.')[2]}={axis_text(value)}" for name, value in row.axes.items())
        again = f" (attempt {row.attempt})" if row.attempt > 1 else ""
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f} tok/s"
        table.add_row(
            Text(f"{row.arm}{axes} seed={row.seed}{again}"),
            ProgressBar(total=row.num_steps, completed=row.step, width=BAR_WIDTH),
            Text(f"{row.step}/{row.num_steps}"),
            Text(f"{loss_text(row.loss_nats)} nats"),
            Text(speed),
            Text(clock((now - row.started_at).total_seconds())),
            Text(", ".join(dict.fromkeys(row.hosts))),
        )
    parts: list[RenderableType] = [Text(""), table] if rows else []
    if len(rows) > NUM_RUNNING:
        parts.append(Text(f"and {len(rows) - NUM_RUNNING:,} more run"))
    if num_running > len(rows):
        parts.append(Text(f"{plural(num_running - len(rows), 'shared trial')} run in other sweeps"))
    return parts


def _bounds(store: Store, sweep: SweepRow) -> list[RenderableType]:
    """Budgets, caps and excluded hosts: why it goes no faster."""
    from orchestrator.store import CAP_SET, HOST_EXCLUDED

    lines = store.budget(sweep.id)
    used_up = any(line.is_used_up for line in lines)
    parts: list[RenderableType] = [
        Text(line, style="bold red" if used_up else "") for line in budget_lines(lines, "budget")
    ]
    resources = sweep.settings.get("resources", {})
    caps = {name: f"{resources[name]:g}" for name in ("max_trials", "max_gpus") if resources.get(name) is not None}
    for event in store.events(sweep.id, kind=CAP_SET):
        name, _, value = event.message.partition("=")
        caps[name] = value
    shown = [f"{name}={value}" for name, value in caps.items() if value != "none"]
    parts += [Text(f"caps: {', '.join(shown)}")] if shown else []
    hosts = store.events(sweep.id, kind=HOST_EXCLUDED)
    parts += [Text(f"excluded host: {event.message}", style="red") for event in hosts]
    return [Text(""), *parts] if parts else []
