"""Watching a sweep: the live view's lines and the plain ones, drawn from snapshots."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.cli import live
from orchestrator.cli.live import LiveView, PlainView, clock, render, totals, view_for
from orchestrator.controller import Running, Snapshot


def running(name: str = "g1-elementwise lr=0.004 seed=1", **changes: object) -> Running:
    facts = {
        "name": name,
        "attempt": 1,
        "step": 12,
        "num_steps": 40,
        "loss_nats": 3.14159,
        "tokens_per_second": 6543.2,
        "eta_seconds": 75.0,
    }
    return Running(**{**facts, **changes})  # type: ignore[arg-type]


def snapshot(*lines: Running, **changes: object) -> Snapshot:
    facts = {
        "sweep": "quickstart",
        "states": {"WAITING": 9, "RUNNING": 2, "COMPLETE": 12, "DIVERGED": 1},
        "running": lines,
        "gangs_starting": 0,
        "seconds": 61.0,
        "eta_seconds": 125.0,
        "stopping": None,
    }
    return Snapshot(**{**facts, **changes})  # type: ignore[arg-type]


def drawn(shown: Snapshot, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(shown))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def test_the_totals_line_counts_every_state_and_tells_the_time_left():
    assert totals(snapshot()) == (
        "quickstart: waiting 9  running 2  complete 12  diverged 1  after 1:01, about 2:05 left"
    )


def test_the_totals_line_says_what_is_not_known_yet_and_what_is_going_on():
    text = totals(snapshot(eta_seconds=None, gangs_starting=2, stopping="SIGINT"))
    assert "left" not in text
    assert "gangs starting: 2" in text
    assert text.endswith("stopping: SIGINT")


def test_every_running_trial_has_one_line_below_the_totals():
    lines = drawn(snapshot(running(), running("baseline lr=0.001 seed=2", step=40, eta_seconds=0.0)))
    assert len(lines) == 3
    assert lines[0] == totals(snapshot())
    for part in ("g1-elementwise lr=0.004 seed=1", "12/40", "3.1416 nats", "6,543 tok/s", "1:15"):
        assert part in lines[1]
    for part in ("baseline lr=0.001 seed=2", "40/40", "0:00"):
        assert part in lines[2]


def test_the_bar_grows_with_the_steps():
    lengths = [drawn(snapshot(running(step=step)))[1].count("━") for step in (0, 10, 20, 40)]
    assert lengths == [0, live.BAR_WIDTH // 4, live.BAR_WIDTH // 2, live.BAR_WIDTH]


def test_a_trial_that_has_not_made_a_step_shows_dashes_and_not_zeros():
    line = drawn(snapshot(running(step=0, loss_nats=None, tokens_per_second=None, eta_seconds=None)))[1]
    assert "0/40" in line
    assert line.split()[-3:] == ["-", "-", "-"]


def test_a_retried_trial_says_so():
    assert "g1 seed=1 (attempt 3)" in drawn(snapshot(running("g1 seed=1", attempt=3)))[1]


@pytest.mark.parametrize("width", [100, 80])
def test_a_line_a_trial_fits_also_with_long_names_and_large_numbers(width: int):
    """The name gives way, never a number, and no line wraps."""
    name = "g1-elementwise-head-shared lr=0.00042 batch_tokens=1048576 sequence_length=4096 seed=1234"
    big = running(name, attempt=2, step=123_456, num_steps=250_000, loss_nats=11.98765, tokens_per_second=1_234_567.0,
                  eta_seconds=123_456.0)  # fmt: skip
    lines = drawn(snapshot(big, running()), width)
    assert all(len(line) <= width for line in lines)
    rows = lines[-2:]
    assert len(lines) == len(drawn(snapshot(), width)) + 2
    assert rows[0].startswith("g1-elem")
    for part in ("123456/250000", "11.9877 nats", "1,234,567 tok/s", "34:17:36"):
        assert part in rows[0]
    assert "12/40" in rows[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_times_are_minutes_and_seconds_with_hours_when_there_are_any(seconds: float, text: str):
    assert clock(seconds) == text


def a_console(is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=is_terminal)


def test_only_a_terminal_gets_the_live_view():
    assert isinstance(view_for(a_console(True)), LiveView)
    assert not isinstance(view_for(a_console(False)), LiveView)


def test_plain_lines_are_stamped_unwrapped_and_free_of_control_codes():
    console = a_console(False)
    with view_for(console) as view:
        view.tell("FAILED    g1 lr=[red]0.001[/red] seed=1: " + "a long reason " * 20)
        view.tick(snapshot(running()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
    stamp, _, rest = lines[0].partition(" ")
    assert [len(part) for part in stamp.split(":")] == [2, 2, 2]
    assert rest.startswith("FAILED    g1 lr=[red]0.001[/red] seed=1: a long reason")
    assert lines[1].endswith(totals(snapshot()))


def test_the_plain_view_tells_totals_now_and_then_and_not_at_every_tick(monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    console = a_console(False)
    with PlainView(console) as view:
        for _ in range(int(2 * live.LINE_EVERY_SECONDS * 8) + 1):
            view.tick(snapshot())
            now[0] += 0.125
    assert len(console.file.getvalue().splitlines()) == 3  # type: ignore[attr-defined]


def test_the_live_view_shows_events_above_and_leaves_no_bar_behind():
    console = a_console(True)
    with view_for(console) as view:
        view.tick(snapshot(running()))
        view.tell("complete  g1 seed=1: validation loss 3.1317 nats")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "quickstart: waiting 9" in text
    assert "complete  g1 seed=1: validation loss 3.1317 nats\n" in text.replace("\r", "")
    assert "\x1b[2K" in text  # the view is wiped at its end
