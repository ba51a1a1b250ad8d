"""Several controllers and readers on one store at the same time: nothing is lost, doubled or refused."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gangs import Bench
from store_backends import postgres_server, store_url  # noqa: F401
from sweep_runs import SWEEP, plan_of

from orchestrator import report
from orchestrator.plan import Plan
from orchestrator.store import Store

NAMES = ("first", "second")
EACH = 8
"""Trials of a sweep; the half of them is the other one's, too."""
STEPS = 20
PATIENCE_SECONDS = 120.0


def sweeps(folder: Path) -> list[Plan]:
    seeds = ("[1, 2, 3, 4]", "[3, 4, 5, 6]")
    text = SWEEP.replace("seeds: [1]", "seeds: {}\nbaseline_seeds: 4")
    return [
        plan_of(folder, text=text.replace("name: tiny", f"name: {name}").replace("{}\nb", f"{of}\nb"))
        for name, of in zip(NAMES, seeds, strict=True)
    ]


def test_two_controllers_and_a_reader_work_on_one_store(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.controller.loop.POLL_SECONDS", 0.0)
    monkeypatch.setattr("orchestrator.controller.loop.REFRESH_SECONDS", 0.1)
    plans = sweeps(tmp_path)
    failures: list[BaseException] = []
    have_ended = threading.Event()
    num_reads = 0

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def control(plan: Plan) -> None:
        with Store(store_url) as store:
            Bench(tmp_path / "home", store).run(plan)

    def read() -> None:
        nonlocal num_reads
        with Store(store_url) as store:
            while not have_ended.is_set():
                for row in store.sweeps():
                    report.results(store, row.name)
                    store.num_by_state(row.id)
                store.query("SELECT COUNT(*) FROM curves")
                num_reads += 1

    with Store(store_url) as store:
        store.sweeps()  # its tables are made before anyone else comes
    reader = guarded(read)
    controllers = [guarded(lambda plan=plan: control(plan)) for plan in plans]  # type: ignore[misc]
    for thread in controllers:
        thread.join(PATIENCE_SECONDS)
    have_ended.set()
    reader.join(PATIENCE_SECONDS)
    assert failures == []
    assert not any(thread.is_alive() for thread in (*controllers, reader))
    assert num_reads > 0
    with Store(store_url) as store:
        fingerprints = set()
        for name in NAMES:
            trials = store.trials(store.sweep(name).id)
            assert [trial.state for trial in trials] == ["COMPLETE"] * EACH
            fingerprints |= {trial.fingerprint for trial in trials}
        assert len(fingerprints) == EACH + EACH // 2
        for fingerprint in fingerprints:
            assert [one.cause for one in store.attempts(fingerprint)] == ["complete"]
            assert [row.step for row in store.curve(fingerprint).steps] == list(range(1, STEPS + 1))
