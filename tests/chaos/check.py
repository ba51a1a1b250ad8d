"""What must hold after a run, however it was disturbed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from sweep_runs import curve_numbers, wait_for
from world import Run, World

from models import run_dir
from orchestrator.gang.lease_file import FOLDER
from orchestrator.store import FINISHED, Store
from orchestrator.tracking import mirror


@dataclass(frozen=True)
class Result:
    """All of a trial that must not hang on how it was run; floats are compared to the bit."""

    state: str
    end_step: int | None
    diverged_by: tuple[str | None, str | None] | None
    numbers: list[tuple[Any, ...]]


def results(store: Store) -> dict[str, Result]:
    """By fingerprint."""
    found = {}
    for row in store.trials(store.sweep("chaos").id):
        why = (row.cause, row.reason) if row.state == "DIVERGED" else None
        found[row.fingerprint] = Result(row.state, row.end_step, why, curve_numbers(store, row.fingerprint))
    return found


def causes_of(store: Store) -> Counter[str]:
    """Why the attempts of a run ended."""
    rows = store.trials(store.sweep("chaos").id)
    return Counter(str(one.cause) for row in rows for one in store.attempts(row.fingerprint))


def check(world: World, run: Run, store: Store, undisturbed: dict[str, Result]) -> None:
    """Every trial in a final state, none lost or doubled, the same numbers, and nothing left behind.

    That the numbers are the same says, too, that nobody has read what gangs wrote when they had been given up.
    """
    sweep = store.sweep("chaos")
    rows = store.trials(sweep.id)
    assert sorted(row.fingerprint for row in rows) == sorted(undisturbed)
    assert {path.name for path in (run.home / "trials").iterdir()} == set(undisturbed)
    assert all(row.state in FINISHED for row in rows), [(row.arm, row.state, row.reason) for row in rows]
    for row in rows:
        attempts = store.attempts(row.fingerprint)
        assert [one.number for one in attempts] == list(range(1, len(attempts) + 1))
        assert all(one.ended_at is not None for one in attempts)
        final = [one.number for one in attempts if one.cause == (row.cause or "complete")]
        assert final == [len(attempts)], (row.arm, [one.cause for one in attempts])
        folders = {path.name for path in (run_dir.trial_dir(run.home, row.fingerprint) / "attempts").iterdir()}
        assert folders <= {f"{one.number:03d}-{one.token}" for one in attempts}
    found = results(store)
    for fingerprint, expected in undisturbed.items():
        assert found[fingerprint] == expected, _first_difference(found[fingerprint], expected)
    assert all(path.read_bytes().endswith(written) for path, written in run.late.items())
    assert store.lease_holder(sweep.id) is None
    assert list((run.home / FOLDER).iterdir()) == []
    wait_for(lambda: not any(node.named("ray::_Rank") for node in world.nodes), "the last ranks' end")
    _check_mirror(world, store)


def _first_difference(found: Result, expected: Result) -> str:
    for ours, theirs in zip(found.numbers, expected.numbers, strict=False):
        if ours != theirs:
            return f"disturbed {ours}, undisturbed {theirs}"
    lengths = f"{len(found.numbers)} and {len(expected.numbers)} rows"
    return f"{lengths}; {found.state} {found.diverged_by}, {expected.state} {expected.diverged_by}"


def _check_mirror(world: World, store: Store) -> None:
    """MLflow has each trial once, ended."""
    sweep = store.sweep("chaos")
    wait_for(world.is_tracker_up, "the tracking server")
    mirror(store, sweep.id, world.tracking_uri)
    client, parent = MlflowClient(world.tracking_uri), store.sweep("chaos").mlflow_run_id
    (experiment,) = [one for one in client.search_experiments() if one.name == "gatesweep"]
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(children) == len(store.trials(sweep.id))
    assert all(one.info.status != "RUNNING" for one in children)
