"""Trained once more: equal numbers are stamped, a changed one is found, and the trial itself is left as it is."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import json

import pytest
from fake_gangs import Bench, FakeCluster, FateAt, all_goes_well, bench, plan  # noqa: F401
from sqlalchemy import text
from sweep_runs import cluster  # noqa: F401

from orchestrator import report
from orchestrator.controller import Reproduction, reproduce
from orchestrator.gang import Cluster
from orchestrator.plan import Plan
from orchestrator.store import REPRODUCED
from orchestrator.sweep import UserError


def again(bench: Bench, plan: Plan, arm: str = "g1/1", fate: FateAt = all_goes_well, on=None) -> Reproduction:
    sweep_id = bench.store.sweep(plan.sweep.name).id
    return reproduce(bench.store, on or FakeCluster(fate=fate), bench.home, bench.trials(plan)[arm], sweep_id, print)


def falsify(bench: Bench, fingerprint: str, step: int, by: float) -> None:
    with bench.store._engine.begin() as connection:
        attempts = "(SELECT id FROM attempt WHERE fingerprint = :one)"
        changed = connection.execute(
            text(f"UPDATE step_metric SET loss_nats = loss_nats + :by WHERE step = :step AND attempt_id IN {attempts}"),
            {"by": by, "step": step, "one": fingerprint},
        )
        assert changed.rowcount == 1


def test_equal_numbers_are_stamped_and_the_trial_stays_as_it_is(bench: Bench, plan: Plan) -> None:
    bench.run(plan)
    before = bench.trials(plan)["g1/1"], bench.store.attempts(bench.trials(plan)["g1/1"].fingerprint)
    found = again(bench, plan)
    assert (found.outcome, found.num_steps, found.first_difference, found.largest_nats) == ("bitwise", 20, None, 0.0)
    after = bench.trials(plan)["g1/1"], bench.store.attempts(bench.trials(plan)["g1/1"].fingerprint)
    assert after == before
    (stamp,) = bench.store.events(kind=REPRODUCED)
    assert stamp.message.startswith("bitwise: 20 steps")
    notes = report.results(bench.store, plan.sweep.name).tables[0].footnotes
    assert any("trained once more and compared: g1 at LR 3e-3, seed 1, bitwise" in note for note in notes)


def test_a_stored_number_that_was_changed_is_found(bench: Bench, plan: Plan) -> None:
    bench.run(plan)
    falsify(bench, bench.trials(plan)["g1/1"].fingerprint, step=7, by=0.25)
    found = again(bench, plan)
    assert (found.outcome, found.first_difference) == ("differs", 7)
    assert found.largest_nats == pytest.approx(0.25)
    (written,) = (bench.home / "reproductions").glob("*/attempts/*/reproduction.json")
    assert json.loads(written.read_text())["first_difference"] == 7
    # The last stamp counts.
    falsify(bench, bench.trials(plan)["g1/1"].fingerprint, step=7, by=-0.25)
    assert again(bench, plan).largest_nats == pytest.approx(0.0, abs=1e-12)


def test_elsewhere_a_small_difference_is_within_the_tolerance(bench: Bench, plan: Plan) -> None:
    bench.run(plan)
    falsify(bench, bench.trials(plan)["g1/1"].fingerprint, step=7, by=1e-4)
    assert again(bench, plan).outcome == "differs", "on the same host the bits must be equal"
    moved = again(bench, plan, on=FakeCluster(hosts=["another-host"]))
    assert (moved.outcome, moved.changed) == ("within tolerance", ("host",))
    assert "not as it was: host" in moved.words


def test_a_diverged_trial_is_compared_as_far_as_it_went(bench: Bench, plan: Plan) -> None:
    def rises(_spec, config, step):
        return "rise" if config.gate is not None and step >= 8 else None

    bench.run(plan, rises)
    assert bench.states(plan)["g1/1"] == "DIVERGED"
    ended_at = bench.trials(plan)["g1/1"].end_step
    found = again(bench, plan, fate=rises)
    assert (found.outcome, found.num_steps) == ("bitwise", ended_at)


def test_what_has_no_result_is_refused(bench: Bench, plan: Plan) -> None:
    bench.store.add(plan)
    with pytest.raises(UserError, match="is WAITING; allowed: COMPLETE, PRUNED or DIVERGED"):
        again(bench, plan)


def test_a_gang_that_fails_leaves_no_stamp(bench: Bench, plan: Plan) -> None:
    bench.run(plan)
    with pytest.raises(UserError, match=r"reproduce: ValueError: the corpus is gone; .*log-rank0\.txt tells more"):
        again(bench, plan, fate=lambda _spec, _config, step: "raise" if step == 3 else None)
    with pytest.raises(UserError, match="no gang could be started: no room"):
        again(bench, plan, on=FakeCluster(start_error="no room"))
    assert not bench.store.events(kind=REPRODUCED)


def test_a_real_trial_comes_again_to_the_bit(bench: Bench, plan: Plan, cluster: Cluster) -> None:
    with bench.controller(plan, cluster) as controller:
        controller.run()
    found = again(bench, plan, on=cluster)
    assert (found.outcome, found.num_steps, found.num_validations) == ("bitwise", 20, 2)
