"""The mirror killed, cut off, out of time and rebuilt."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from mlflow_view import child, free_port, history
from store_runs import STEPS, steps

from orchestrator.tracking import (
    Mirror,
    OutOfTime,
    TrackingError,
    books,
    curves,
    mirror,
    run_content,
)
from orchestrator.tracking.memory import Memory
from orchestrator.tracking.mirror import SweepMirror
from orchestrator.tracking.server import open_client

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
