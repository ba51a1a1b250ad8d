"""Which points of a curve MLflow is shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlflow_view import child, history
from store_runs import STEPS, a_plan, steps

from orchestrator.store import Curve, StepRow
from orchestrator.tracking import (
    run_content,
    shown_points,
)


def rows(first: int, last: int, attempt: int = 1, tokens_per_second: float = 300.0) -> tuple[StepRow, ...]:
    return tuple(
        StepRow(attempt, step, step * 256, step / STEPS, 1e-3, 3.0, 1.0, tokens_per_second, False)
        for step in range(first, last + 1)
    )


def test_points_do_not_depend_on_how_the_curve_is_cut():
    config = a_plan().trials[0].config
    started = {1: 1_000_000, 2: 2_000_000}
    curve = [*rows(1, 8), *rows(9, STEPS, attempt=2)]
    (whole,) = shown_points.packets(Curve(tuple(curve), ()), (), config, started, {}, 1000)
    cut, cursor = [], {}
    for start in range(0, STEPS, 3):
        part = Curve(tuple(curve[start : start + 3]), ())
        (packet,) = shown_points.packets(part, (), config, started, cursor, 1000)
        cut += packet.points
        cursor = packet.cursor
    assert cut == whole.points
    assert cursor == whole.cursor
    times = {point.step: point.timestamp_ms for point in whole.points if point.key == "loss_nats"}
    assert times[1] == 1_000_000 + round(256 / 300 * 1000)
    assert times[9] == 2_000_000 + round(256 / 300 * 1000)


def test_no_packet_is_larger_than_mlflow_takes():
    config = a_plan().trials[0].config
    found = shown_points.packets(Curve(rows(1, STEPS), ()), (), config, {}, {}, 50)
    assert max(len(packet.points) for packet in found) <= 50
    assert sum(len(packet.points) for packet in found) == 6 * STEPS
    assert [packet.cursor["step"] for packet in found] == [8, 16, 20]


def test_a_long_trial_is_thinned_but_its_first_and_last_step_are_shown(monkeypatch):
    monkeypatch.setattr(shown_points, "STEPS_PER_TRIAL", 7)
    (packet,) = shown_points.packets(Curve(rows(1, STEPS), ()), (), a_plan().trials[0].config, {}, {}, 1000)
    assert [point.step for point in packet.points if point.key == "lr"] == [1, 3, 6, 9, 12, 15, 18, 20]
    assert packet.cursor["step"] == STEPS


def a_config(num_steps: int) -> Any:
    config = a_plan().trials[0].config
    return config.model_copy(update={"train": config.train.model_copy(update={"tokens": num_steps * 256})})


def long_rows(num_steps: int, losses: dict[int, float] | None = None) -> tuple[StepRow, ...]:
    """At 20 steps a second."""
    given = losses or {}
    return tuple(
        StepRow(1, step, step * 256, step / num_steps, 1e-3, given.get(step, 3.0), 1.0, 20 * 256.0, False)
        for step in range(1, num_steps + 1)
    )


def shown(packets: list[Any], key: str = "lr") -> list[int]:
    return [point.step for packet in packets for point in packet.points if point.key == key]


def test_the_running_trials_of_a_sweep_share_what_mlflow_is_shown_a_second():
    config, curve = a_config(1000), Curve(long_rows(1000), ())
    assert [shown_points.stride(config, 20.0, running) for running in (1, 40, 41, 100, 800)] == [4, 4, 8, 16, 128]
    (few,) = shown_points.packets(curve, (), config, {}, {}, 10_000)
    (many,) = shown_points.packets(curve, (), config, {}, {}, 10_000, num_running=100)
    assert shown([few]) == [1, *range(4, 1001, 4)]
    assert shown([many]) == [1, *range(16, 951, 16), *range(952, 1001, 4)], "the last twentieth is shown as if alone"
    assert (few.cursor["stride"], many.cursor["stride"]) == (4, 16)


def test_a_spike_between_two_shown_steps_is_shown_and_an_even_curve_gets_no_more_points():
    losses = {101: 3.2, 203: 3.5, 204: 9.0, 205: 3.4, 304: 3.9, 400: 5.0}
    (packet,) = shown_points.packets(Curve(long_rows(1000, losses), ()), (), a_config(1000), {}, {}, 10_000)
    found = [(point.step, point.value) for point in packet.points if point.key == "loss_nats" and point.value > 3.1]
    assert found == [(204, 9.0), (304, 3.9), (400, 5.0)], "these are shown anyway"
    (thin,) = shown_points.packets(
        Curve(long_rows(1000, losses), ()), (), a_config(1000), {}, {}, 10_000, num_running=100
    )
    found = [(point.step, point.value) for point in thin.points if point.key == "loss_nats" and point.value > 3.1]
    assert found == [(204, 9.0), (304, 3.9), (400, 5.0)]
    spikes = [point for point in thin.points if point.step == 204 or point.step == 204 * 256]
    assert [point.key for point in spikes] == ["loss_nats", "by_tokens/loss_nats"]


def test_thinned_points_do_not_depend_on_how_the_curve_is_cut():
    config, curve = a_config(1000), long_rows(1000, {204: 9.0, 999: 5.0})
    (whole,) = shown_points.packets(Curve(curve, ()), (), config, {}, {}, 10_000, num_running=100)
    cut, cursor = [], {}
    for start in range(0, 1000, 7):
        part = Curve(curve[start : start + 7], ())
        for packet in shown_points.packets(part, (), config, {}, cursor, 10_000, num_running=100):
            cut += packet.points
            cursor = packet.cursor
    assert cut == whole.points
    assert cursor == whole.cursor


def test_the_last_step_of_a_trial_that_ended_early_is_shown():
    config, curve = a_config(1000), long_rows(1000, {30: 8.0})[:31]
    (running,) = shown_points.packets(Curve(curve, ()), (), config, {}, {}, 10_000, num_running=100)
    assert shown([running]) == [1, 16]
    (ended,) = shown_points.packets(
        Curve((), ()), (), config, {}, running.cursor, 10_000, num_running=100, has_ended=True
    )
    assert (shown([ended]), shown([ended], "loss_nats")) == ([31], [30, 31])
    assert shown_points.packets(Curve((), ()), (), config, {}, ended.cursor, 10_000, has_ended=True) == []


def test_what_was_thinned_is_a_tag_and_a_trials_last_values_are_exact(run, send, client, monkeypatch):
    monkeypatch.setattr(shown_points, "STEPS_PER_TRIAL", 5)
    attempt = run.start()
    run.store.record(run.lease, attempt, steps(1, 6))
    send()
    assert child(client, run).data.tags["gatesweep.shown_steps"] == "one in 4"
    run.store.record(run.lease, attempt, steps(7, 11, loss=2.0))
    send()
    assert history(client, run, "loss_nats") == [(1, 3.0), (4, 3.0), (8, 2.0)]
    run.end(attempt, "DIVERGED", end_step=11)
    send()
    assert history(client, run, "loss_nats") == [(1, 3.0), (4, 3.0), (8, 2.0), (11, 2.0)]
    assert child(client, run).data.metrics["tokens"] == 11 * 256
    assert child(client, run).data.tags["state"] == "DIVERGED"


def test_long_values_are_cut_to_what_mlflow_takes(run):
    run.end(run.start(), "FAILED", cause="error")
    sweep = run.store.sweep("quick")
    tags = run_content.trial_tags(sweep, replace(run.trial(), reason="x" * 100_000))
    assert max(len(value) for value in tags.values()) == run_content.MAX_VALUE_LENGTH
