"""The mirror to MLflow: what it shows, and that it may be killed, repeated, cut off and rebuilt."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_runs import STEPS, Run, a_plan, probed, steps, validation

from orchestrator.store import Curve, LayerRow, StepRow, Store
from orchestrator.tracking import (
    Mirror,
    OutOfTime,
    TrackingError,
    books,
    curves,
    is_server,
    mirror,
    run_content,
    shown_points,
    ui_command,
    ui_environment,
)
from orchestrator.tracking.layer_plots import layer_plots
from orchestrator.tracking.memory import Memory
from orchestrator.tracking.mirror import SweepMirror
from orchestrator.tracking.server import open_client


@pytest.fixture(scope="session")
def mlflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests, since its first migration takes seconds; each test has a sweep of its own in it."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def uri(mlflow_home: Path) -> str:
    return f"sqlite:///{mlflow_home}/mlflow.db"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Store(f"sqlite:///{tmp_path}/gatesweep.db") as store:
        yield Run(store)


@pytest.fixture
def send(run: Run, uri: str, mlflow_home: Path) -> Any:
    def one_pass(**more: Any) -> Any:
        return mirror(run.store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts", **more)

    return one_pass


@pytest.fixture
def client(uri: str) -> Any:
    return open_client(uri)


def child(client: Any, run: Run, fingerprint: str | None = None) -> Any:
    return client.get_run(run.trial(fingerprint).mlflow_run_id)


def history(client: Any, run: Run, key: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run.trial().mlflow_run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What is shown


def test_a_finished_trial_is_shown_with_parameters_tags_and_points(run, send, client):
    run.complete(run.fingerprint, 2.5)
    sent = send()
    shown = child(client, run)
    assert (sent.num_trials, sent.num_points) == (1, 6 * STEPS + 4)
    assert shown.info.status == "FINISHED"
    assert shown.data.params["train.lr"] == "0.001"
    assert shown.data.params["model.ffn_size"] == "192"
    assert shown.data.params["gate"] == "null"
    expected = {
        "arm": "baseline",
        "seed": "1",
        "state": "COMPLETE",
        "cause": "finished",
        "reason": "because",
        "fingerprint": run.fingerprint,
        "attempts": "1",
        "axis.train.lr": "0.001",
        "num_parameters": "1234",
        "gatesweep.sweep": "quick",
        "gatesweep.question": "Is it better?",
        "mlflow.runName": "baseline lr=0.001 seed=1",
        "mlflow.parentRunId": run.store.sweep("quick").mlflow_run_id,
    }
    assert {key: shown.data.tags.get(key) for key in expected} == expected
    assert history(client, run, "loss_nats") == [(step, 3.0) for step in range(1, STEPS + 1)]
    assert history(client, run, "by_tokens/loss_nats") == [(step * 256, 3.0) for step in range(1, STEPS + 1)]
    assert history(client, run, "tokens")[-1] == (STEPS, STEPS * 256)
    assert history(client, run, "validation_loss_nats") == [(STEPS, 2.5)]
    assert history(client, run, "by_tokens/validation_bits_per_byte")[0][0] == STEPS * 256


def test_the_sweep_is_the_parent_and_counts_its_trials(run, send, client):
    run.complete(run.fingerprint, 2.5)
    send()
    parent = client.get_run(run.store.sweep("quick").mlflow_run_id)
    counts = {key: parent.data.tags[key] for key in ("num_trials", "num_complete", "num_waiting", "num_failed")}
    assert counts == {"num_trials": "4", "num_complete": "1", "num_waiting": "3", "num_failed": "0"}
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["mlflow.note.content"] == "Is it better?"
    for trial in run.plan.trials[1:]:
        run.complete(trial.fingerprint, 2.5)
    send()
    parent = client.get_run(parent.info.run_id)
    assert (parent.info.status, parent.data.tags["num_complete"]) == ("FINISHED", "4")


def test_notices_are_tags_of_the_parent_the_last_of_each_kind_and_sent_once(run, send, client, monkeypatch):
    run.complete(run.fingerprint, 2.5)
    run.store.add_event(run.sweep_id, "trial_failed", "the first")
    run.store.add_event(run.sweep_id, "trial_failed", "the second")
    send()
    parent = run.store.sweep("quick").mlflow_run_id
    assert client.get_run(parent).data.tags["gatesweep.notice.trial_failed"].endswith("Z the second")
    run.store.add_event(run.sweep_id, "budget", "80% is used")
    send()
    assert client.get_run(parent).data.tags["gatesweep.notice.budget"].endswith("Z 80% is used")
    monkeypatch.setattr(books, "open_client", None)
    assert send().num_trials == 0


def test_artifacts_are_the_config_the_plot_and_the_sweep_file(run, send, client, tmp_path):
    run.complete(run.fingerprint, 2.5)
    send()
    config = client.download_artifacts(run.trial().mlflow_run_id, "config.json", str(tmp_path))
    assert run.trial().config.model_validate_json(Path(config).read_text()) == run.trial().config
    plot = client.download_artifacts(run.trial().mlflow_run_id, "loss.png", str(tmp_path))
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    parent = run.store.sweep("quick").mlflow_run_id
    assert Path(client.download_artifacts(parent, "sweep.yaml", str(tmp_path))).read_text() == "name: quick\n"


def test_probes_are_points_by_step_and_plots_at_the_end(run, send, client, tmp_path):
    attempt = run.start()
    run.store.record(run.lease, attempt, [*steps(1, 10), probed(10, attention=0.4, score=0.3)])
    assert send().num_points == 6 * 10 + 10
    assert [file.path for file in client.list_artifacts(run.trial().mlflow_run_id)] == []
    records = [*steps(11, STEPS), probed(STEPS, attention=0.2, score=0.1, max_activation=[None, 50.0])]
    run.store.record(run.lease, attempt, records)
    run.end(attempt, "COMPLETE")
    assert send().num_points == 6 * 10 + 9
    means = {
        "first_token_attention": [(10, 0.4), (STEPS, 0.2)],
        "max_activation": [(10, 30.0)],
        "gate_score_sdpa": [(10, 0.3), (STEPS, 0.1)],
        "gate_share_below_0.1_sdpa": [(10, 0.5), (STEPS, 0.5)],
        "update_ratio": [(10, 1.5e-3), (STEPS, 1.5e-3)],
    }
    for name, expected in means.items():
        found = history(client, run, f"diagnostics/{name}")
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    run_id = run.trial().mlflow_run_id
    plots = {"first_token_attention.png", "max_activation.png", "gate_scores_sdpa.png"}
    assert {file.path for file in client.list_artifacts(run_id, "diagnostics")} == {f"diagnostics/{p}" for p in plots}
    for name in plots:
        path = client.download_artifacts(run_id, f"diagnostics/{name}", str(tmp_path))
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert send().num_points == 0


def test_a_resumed_attempts_repeated_probes_are_sent_once(run, send, client):
    first = run.start()
    run.store.record(run.lease, first, [*steps(1, 12), probed(5), probed(10)])
    send()
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=8, resumed_from=first.number)
    run.store.record(run.lease, second, [*steps(9, 15), probed(10), probed(15)])
    send()
    found = history(client, run, "diagnostics/first_token_attention")
    assert [step for step, _ in found] == [5, 10, 15]


def test_heat_maps_show_the_last_probe_and_leave_out_what_is_missing():
    def row(step: int, layer: int, **changes: Any) -> LayerRow:
        gate = {"mean": 0.5, "share_below": {}, "low": 0.0, "high": 1.0, "histogram": [0.25, 0.75]}
        given = LayerRow(
            1, step, layer, step, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, (0.1 * layer, 0.2 * step), {"sdpa": gate}
        )
        return replace(given, **changes)

    missing = {"mean": None, "share_below": {}, "low": 0.0, "high": 1.0, "histogram": None}
    rows = [row(1, 1), row(1, 2), row(2, 1), row(2, 2, heads=(None, 0.4), gates={"sdpa": missing})]
    plots = layer_plots(rows, "g1 seed=1")
    assert set(plots) == {"first_token_attention.png", "max_activation.png", "gate_scores_sdpa.png"}
    axes = plots["first_token_attention.png"].axes[0]
    assert axes.get_title() == "g1 seed=1\nafter step 2"
    shown = axes.images[0].get_array()
    assert shown.tolist() == [[0.1, 0.4], [None, 0.4]]
    assert plots["gate_scores_sdpa.png"].axes[0].images[0].get_array().tolist() == [[0.25, 0.75], [None, None]]
    assert [line.get_label() for line in plots["max_activation.png"].axes[0].lines] == ["step 1", "step 2"]
    assert layer_plots([], "nothing") == {}


def test_each_state_has_its_run_status(run, send, client):
    ends = {"COMPLETE": "FINISHED", "DIVERGED": "KILLED", "PRUNED": "KILLED", "FAILED": "FAILED"}
    for trial, state in zip(run.plan.trials, ends, strict=True):
        run.end(run.start(fingerprint=trial.fingerprint), state, end_step=5)
    send()
    shown = [child(client, run, trial.fingerprint) for trial in run.plan.trials]
    assert [one.info.status for one in shown] == list(ends.values())
    assert [one.data.tags["state"] for one in shown] == list(ends)
    assert shown[1].data.tags["end_step"] == "5"


def test_a_trial_that_waits_has_no_run_and_one_that_runs_is_running(run, send, client):
    run.start()
    send()
    assert [row.mlflow_run_id is None for row in run.store.trials(run.sweep_id)] == [False, True, True, True]
    assert child(client, run).info.status == "RUNNING"


def test_a_missing_number_is_not_sent(run, send, client):
    attempt = run.start()
    lost = steps(1, 1)[0].model_copy(update={"loss_nats": None, "gradient_norm": None, "nonfinite": True})
    run.store.record(run.lease, attempt, [lost, *steps(2, 3)])
    send()
    assert [step for step, _ in history(client, run, "loss_nats")] == [2, 3]
    assert [step for step, _ in history(client, run, "lr")] == [1, 2, 3]


# Repeated, resumed, rerun


def test_with_nothing_new_mlflow_is_not_touched(run, send, monkeypatch):
    run.complete(run.fingerprint, 2.5)
    send()
    monkeypatch.setattr(books, "open_client", lambda uri: pytest.fail("MLflow was opened"))
    assert (send().num_trials, send().num_points) == (0, 0)


def test_only_what_is_new_is_sent(run, send, client):
    attempt = run.start()
    run.store.record(run.lease, attempt, steps(1, 5))
    assert send().num_points == 6 * 5
    run.store.record(run.lease, attempt, [*steps(6, 7), validation(7, 2.8)])
    assert send().num_points == 6 * 2 + 4
    assert send().num_points == 0
    assert [step for step, _ in history(client, run, "loss_nats")] == [1, 2, 3, 4, 5, 6, 7]


def test_steps_that_a_resumed_attempt_repeats_are_sent_once(run, send, client):
    first = run.start()
    run.store.record(run.lease, first, [*steps(1, 10), validation(10, 2.9), *steps(11, 12)])
    send()
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=8, resumed_from=first.number)
    run.store.record(run.lease, second, [*steps(9, 10), validation(10, 2.9), *steps(11, 11)])
    send()
    run.store.record(run.lease, second, steps(12, 14))
    send()
    assert [step for step, _ in history(client, run, "loss_nats")] == list(range(1, 15))
    assert history(client, run, "validation_loss_nats") == [(10, 2.9)]
    assert child(client, run).data.tags["attempts"] == "2"


def test_a_rerun_goes_on_in_the_same_run(run, send, client):
    first = run.start()
    run.store.record(run.lease, first, steps(1, 4))
    run.end(first, "FAILED", cause="out_of_memory")
    send()
    run_id = run.trial().mlflow_run_id
    run.store.reopen(run.sweep_id, [run.fingerprint])
    send()
    assert (child(client, run).info.status, child(client, run).data.tags["cause"]) == ("RUNNING", "")
    run.complete(run.fingerprint, 2.5)
    send()
    assert run.trial().mlflow_run_id == run_id
    assert (child(client, run).info.status, child(client, run).data.tags["attempts"]) == ("FINISHED", "2")


def test_two_sweeps_that_share_a_trial_both_show_it(run, send, client, uri):
    run.complete(run.fingerprint, 2.5)
    send()
    other = run.store.add(a_plan(name="other", lrs=(1e-3,), arms=("baseline",))).sweep_id
    mirror(run.store, other, uri)
    (row,) = run.store.trials(other)
    assert row.mlflow_run_id != run.trial().mlflow_run_id
    assert client.get_run(row.mlflow_run_id).data.tags["gatesweep.sweep"] == "other"


# Killed, lost, rebuilt


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


READS = ("get_", "search_", "trial", "sweeps", "attempts", "curve", "layers", "mirror_cursor", "events", "mlflow_run")


class Mortal:
    """Lets calls through until ``lives`` of them are used up, and dies once the last one has been done."""

    def __init__(self, inner: Any, lives: list[int]) -> None:
        self._inner, self._lives = inner, lives

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._inner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if not name.startswith(READS):
                self._lives[0] -= 1
                if self._lives[0] == 0:
                    raise Killed
            return result

        return call


def test_killed_after_any_write_the_next_pass_makes_it_whole(run, uri, mlflow_home, client, monkeypatch):
    run.complete(run.fingerprint, 2.5)
    lives = [0]
    monkeypatch.setattr(books, "open_client", lambda uri: Mortal(open_client(uri), lives))
    monkeypatch.setattr(curves, "METRICS_PER_BATCH", 60)
    monkeypatch.setattr(books, "WRITE_SECONDS", 0.0)
    store: Any = Mortal(run.store, lives)
    deaths = 0
    # Opening the sweep anew takes two writes, and the longest unit of work three more.
    for lives[0] in (1, 3, *((3, 4, 5) * 30)):
        try:
            mirror(store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts")
            break
        except Killed:
            deaths += 1
    assert 10 < deaths < 92
    experiment = client.get_experiment_by_name("gatesweep").experiment_id
    found = client.search_runs(
        [experiment], f"tags.`gatesweep.key` = '{run_content.sweep_key(run.store.sweep('quick'))}'"
    )
    assert sorted(one.data.tags["gatesweep.kind"] for one in found) == ["sweep", "trial"], "no run is made twice"
    assert history(client, run, "loss_nats") == [(step, 3.0) for step in range(1, STEPS + 1)], "no point is doubled"
    assert child(client, run).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.trial().mlflow_run_id)} == {"config.json", "loss.png"}


def test_a_run_deleted_in_the_ui_is_made_anew_when_there_is_news(run, send, client):
    attempt = run.start()
    run.store.record(run.lease, attempt, steps(1, 5))
    send()
    before = run.trial().mlflow_run_id
    client.delete_run(before)
    run.store.record(run.lease, attempt, steps(6, 7))
    send()
    assert run.trial().mlflow_run_id != before
    assert [step for step, _ in history(client, run, "loss_nats")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_memory_makes_a_pass_cost_only_what_is_new(run, send, client, monkeypatch):
    memory = Memory()
    first, second = (trial.fingerprint for trial in run.plan.trials[:2])
    run.complete(first, 2.5)
    assert [send(memory=memory).num_trials for _ in range(2)] == [1, 0]
    monkeypatch.setattr(run.store, "trials", lambda _: pytest.fail("all trials were read again"))
    monkeypatch.setattr(run.store, "mirror_cursor", lambda *_: None)
    read = run.store.attempts
    monkeypatch.setattr(run.store, "attempts", lambda of: pytest.fail("it is settled") if of == first else read(of))
    run.start(fingerprint=second)
    assert send(memory=memory).num_trials == 1
    monkeypatch.undo()
    assert child(client, run, second).info.status == "RUNNING"


def test_a_running_trial_rests_between_its_points_and_none_of_its_ends_waits(run, uri, mlflow_home, client):
    clock = [0.0]
    one = SweepMirror(
        run.store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts", Memory(lambda: clock[0]), lambda: False
    )
    attempt = run.start()
    sent = []
    for clock[0], first, last in ((0.0, 1, 2), (2.0, 3, 4), (4.0, 5, 6), (6.0, 7, 8)):
        run.store.record(run.lease, attempt, steps(first, last))
        sent.append(one.send_curves(rest_seconds=5.0).num_points // 6)
    assert sent == [2, 0, 0, 6]
    run.store.record(run.lease, attempt, steps(9, STEPS))
    run.end(attempt, "COMPLETE")
    assert one.send_curves(rest_seconds=5.0).num_points == 6 * 12
    assert child(client, run).info.status == "FINISHED"


def test_what_can_wait_does_a_piece_at_a_time_while_points_are_due(run, uri, mlflow_home, client):
    one = SweepMirror(run.store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts", Memory(), lambda: False)
    first, second = (trial.fingerprint for trial in run.plan.trials[:2])
    for fingerprint in (first, second):
        run.complete(fingerprint, 2.5)
    assert one.send_curves(lambda: True).num_points == 2 * (6 * STEPS + 4)
    assert [child(client, run, of).info.status for of in (first, second)] == ["FINISHED", "RUNNING"]
    one.send_artifacts(lambda: True)
    one.send_curves(lambda: True)
    assert child(client, run, second).info.status == "FINISHED"
    assert [len(client.list_artifacts(run.trial(of).mlflow_run_id)) for of in (first, second)] == [2, 0]
    one.send_artifacts(lambda: True)
    assert len(client.list_artifacts(run.trial(second).mlflow_run_id)) == 2


def test_a_run_made_by_another_process_since_is_found_and_not_doubled(run, send, client):
    memory = Memory()
    memory.read(run.store, run.sweep_id)
    run.complete(run.fingerprint, 2.5)
    send()
    run_id = run.trial().mlflow_run_id
    send(memory=memory)
    assert run.trial().mlflow_run_id == run_id
    assert len(history(client, run, "loss_nats")) == STEPS


def test_what_a_memory_holds_for_settled_is_looked_at_again_after_a_rerun(run, send, client):
    memory = Memory()
    run.end(run.start(), "FAILED", cause="out_of_memory")
    send(memory=memory)
    send(memory=memory)
    run.store.reopen(run.sweep_id, [run.fingerprint])
    run.complete(run.fingerprint, 2.5)
    send(memory=memory)
    assert (child(client, run).info.status, child(client, run).data.tags["attempts"]) == ("FINISHED", "2")


def test_a_memory_that_is_wrong_about_a_run_costs_one_pass(run, send, client):
    memory, attempt = Memory(), run.start()
    for last in (3, 6):
        run.store.record(run.lease, attempt, steps(last - 2, last))
        send(memory=memory)
    client.delete_run(run.trial().mlflow_run_id)
    run.store.record(run.lease, attempt, steps(7, 9))
    with pytest.raises(TrackingError, match="must be in the 'active' state"):
        send(memory=memory)
    send(memory=memory)
    assert [step for step, _ in history(client, run, "loss_nats")] == list(range(1, 10))


def test_a_rebuild_fills_an_emptied_mlflow(run, send, client):
    run.complete(run.fingerprint, 2.5)
    send()
    before = {run.trial().mlflow_run_id, run.store.sweep("quick").mlflow_run_id}
    for run_id in before:
        client.delete_run(run_id)
    assert send().num_trials == 0, "a deletion is respected until a rebuild is asked for"
    assert send(rebuild=True).num_trials == 1
    assert before.isdisjoint({run.trial().mlflow_run_id, run.store.sweep("quick").mlflow_run_id})
    assert history(client, run, "loss_nats") == [(step, 3.0) for step in range(1, STEPS + 1)]


def test_another_tracking_uri_gets_everything(run, send, uri, client):
    run.complete(run.fingerprint, 2.5)
    send()
    elsewhere = uri + "?timeout=20"
    assert mirror(run.store, run.sweep_id, elsewhere).num_points == 6 * STEPS + 4
    assert history(client, run, "loss_nats") == [(step, 3.0) for step in range(1, STEPS + 1)], "the same database"


# Outages


def test_a_dead_server_is_a_short_clear_error(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    run.complete(run.fingerprint, 2.5)
    with pytest.raises(
        TrackingError, match=r"MLflow at http://me:\*\*\*@127\.0\.0\.1:\d+ can't be written: .*refused"
    ) as raised:
        mirror(run.store, run.sweep_id, f"http://me:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(raised.value)
    assert run.trial().mlflow_run_id is None


def test_after_an_outage_the_mirror_catches_up_and_tells_once(run, uri, mlflow_home, client, monkeypatch):
    down, clock = [True], [0.0]

    def opened(uri: str) -> Any:
        if down[0]:
            raise ConnectionError("refused")
        return open_client(uri)

    monkeypatch.setattr(books, "open_client", opened)
    tracking = Mirror(
        run.store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts", interval_seconds=1.0, clock=lambda: clock[0]
    )
    run.complete(run.fingerprint, 2.5)
    for clock[0] in (0.0, 10.0, 20.0):
        tracking.step()
    assert [event.kind for event in run.store.events(run.sweep_id)] == ["tracking_down"]
    down[0], clock[0] = False, 1000.0
    tracking.step()
    assert [event.kind for event in run.store.events(run.sweep_id)] == ["tracking_down", "tracking_back"]
    assert child(client, run).info.status == "FINISHED"
    assert len(history(client, run, "loss_nats")) == STEPS


def test_a_dead_server_does_not_hold_the_sweep_and_the_next_run_catches_up(run, uri, mlflow_home, client):
    tracking = Mirror(run.store, run.sweep_id, f"http://127.0.0.1:{free_port()}", interval_seconds=0.01)
    tracking.start()
    run.complete(run.fingerprint, 2.5)
    tracking.nudge()
    assert not tracking.close(30.0)
    assert run.trial().state == "COMPLETE"
    assert [event.kind for event in run.store.events(run.sweep_id)] == ["tracking_down"]
    again = Mirror(run.store, run.sweep_id, uri, f"file://{mlflow_home}/artifacts")
    again.start()
    assert again.close(60.0)
    assert child(client, run).info.status == "FINISHED"


def test_the_pause_grows_and_one_mirrors_outage_is_not_anothers(run, uri):
    clock, failed_at, num_updates = [0.0], [], [0]

    def broken(_is_due: Any) -> None:
        failed_at.append(clock[0])
        raise OSError("no")

    def fine(_is_due: Any) -> None:
        num_updates[0] += 1

    also = {"optuna": broken, "other": fine}
    tracking = Mirror(run.store, run.sweep_id, uri, also=also, interval_seconds=1.0, clock=lambda: clock[0])
    for second in range(32):
        clock[0] = float(second)
        tracking.step()
    assert failed_at == [0.0, 2.0, 6.0, 14.0, 30.0]
    assert num_updates == [32]
    (event,) = run.store.events(run.sweep_id)
    assert event.message == "optuna is not reached; the sweep runs on: no"


def test_closing_is_bounded_though_a_server_hangs(run, uri):
    hanging, released = threading.Event(), threading.Event()

    def hang(_is_due: Any) -> None:
        hanging.set()
        released.wait(30)

    tracking = Mirror(run.store, run.sweep_id, uri, also={"slow": hang}, interval_seconds=0.01)
    tracking.start()
    assert hanging.wait(30)
    assert not tracking.close(0.01)
    released.set()


def test_a_pass_that_is_out_of_time_stops_and_is_finished_by_the_next(run, send, client):
    run.complete(run.fingerprint, 2.5)
    with pytest.raises(OutOfTime):
        send(out_of_time=lambda: True)
    send()
    assert len(history(client, run, "loss_nats")) == STEPS


# Points


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


# Start-up and the UI


def test_importing_tracking_does_not_import_mlflow():
    code = "import sys, orchestrator.tracking; print([m for m in ('mlflow', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_ui_is_started_on_the_right_back_end():
    command = ui_command("sqlite:////home/runs/mlflow.db", "/home/runs/mlartifacts", 5005)
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert (
        ui_environment("sqlite:////home/runs/mlflow.db")["MLFLOW_BACKEND_STORE_URI"] == "sqlite:////home/runs/mlflow.db"
    )
    assert command[command.index("--default-artifact-root") + 1] == "/home/runs/mlartifacts"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5005"


def test_a_tracking_server_serves_its_own_ui():
    assert is_server("https://tracking.example")
    assert not is_server("sqlite:///mlflow.db")
    with pytest.raises(ValueError, match=r"http://x:5000 is a tracking server and serves its own UI"):
        ui_command("http://x:5000", "", 5005)
