"""What a run keeps as files: the sweep's file, a finished trial's config and pictures. They come after all points.

The pictures of a trial cost a CPU-second: where many trials end at once, they are drawn a few at a time, between the
points of others.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.store import TrialRow
from orchestrator.tracking import run_content
from orchestrator.tracking.books import Books
from orchestrator.tracking.curves import OutOfTime
from orchestrator.tracking.layer_plots import layer_plots
from orchestrator.tracking.loss_plot import loss_plot


def send_artifacts(books: Books, is_due: Callable[[], bool], out_of_time: Callable[[], bool]) -> None:
    """At least one trial's, if one waits; no more once ``is_due``."""
    sweep = books.sweep
    for row in books.rows:
        told = books.cursor(row).get("told") if _may_wait(books, row) else None
        if told is None:
            continue
        if books.cursor(row).get("artifacts") == told:
            books.memory.settle(row, sweep.updated_at)
            continue
        if out_of_time():
            raise OutOfTime
        if books.live_run(row) is None:  # the next pass over the curves makes it anew
            continue
        _send(books, row)
        books.note(row, books.cursor(row) | {"artifacts": told})
        if is_due():
            break
    books.write()
    if books.memory.runs is not None:
        books.memory.runs.send_settings()


def _may_wait(books: Books, row: TrialRow) -> bool:
    has_ended = row.state in run_content.STATUS and books.run_id(row) is not None
    return has_ended and not books.memory.is_settled(row, books.sweep.updated_at)


def _send(books: Books, row: TrialRow) -> None:
    client, run_id = books.runs().client, books.run_id(row)
    client.log_text(run_id, row.config.model_dump_json(indent=2) + "\n", "config.json")
    figure = loss_plot(books.store.curve(row.fingerprint), run_content.trial_name(row))
    if figure is not None:
        client.log_figure(run_id, figure, "loss.png")
    for name, figure in layer_plots(books.store.layers(row.fingerprint), run_content.trial_name(row)).items():
        client.log_figure(run_id, figure, f"diagnostics/{name}")
