"""What users ask of a running sweep: cancel this, use less, use more; obeyed by the controller, over fake gangs."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

from typing import Any

import pytest
from fake_gangs import Bench, FakeCluster, bench, plan  # noqa: F401
from sweep_runs import Watcher, plan_of

from orchestrator.controller.orders import Orders
from orchestrator.gang import GangState
from orchestrator.plan import Plan
from orchestrator.store import CANCEL_WANTED, CAP_SET
from orchestrator.sweep import ResourcesConfig, UserError, check_cap


def test_a_running_trial_is_canceled_after_its_step_and_a_rerun_goes_on_from_there(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("orchestrator.controller.loop.REFRESH_SECONDS", 0.0)
    watcher, asked = Watcher(), []
    with bench.controller(plan, FakeCluster(2), watcher) as controller:

        def cancel(_: Any) -> None:
            for attempt in controller.running:
                if attempt.trial.arm == "g1" and attempt.step >= 6 and not asked:
                    asked.append(attempt.row.fingerprint)
                    bench.store.add_event(controller.sweep_id, CANCEL_WANTED, "", attempt.row.fingerprint)

        watcher.on_tick = cancel
        controller.run()
    assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "CANCELED"}
    stopped = bench.store.attempts(asked[0])[0]
    assert bench.store.reopen(bench.store.sweep("tiny").id, asked) == 1
    bench.run(plan)
    assert bench.states(plan)["g1/1"] == "COMPLETE"
    assert bench.store.attempts(asked[0])[1].resume_step == stopped.end_step


def test_a_trial_whose_controller_died_before_it_obeyed_is_canceled_by_the_next(bench: Bench, plan: Plan, monkeypatch):
    monkeypatch.setattr("orchestrator.controller.loop.LEASE_SECONDS", 0.01)
    dying = bench.controller(plan, FakeCluster(2))
    dying.__enter__()
    while len(dying.running) < 2:
        dying._refresh(now=True)
        dying._keep_lease()
        dying._work()
    (wanted,) = [one.row.fingerprint for one in dying.running if one.trial.arm == "g1"]
    bench.store.add_event(dying.sweep_id, CANCEL_WANTED, "", wanted)
    monkeypatch.setattr("orchestrator.controller.lease_holder.is_dead", lambda _: True)
    monkeypatch.setattr("orchestrator.controller.loop.LEASE_SECONDS", 20.0)
    bench.run(plan)
    assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "CANCELED"}


def test_a_cap_may_fall_to_nothing_and_be_lifted_while_the_sweep_runs(bench: Bench, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.controller.loop.REFRESH_SECONDS", 0.0)
    plan = plan_of(tmp_path, ["seeds=[1,2,3]", "resources={max_trials: 1}"])
    cluster, watcher, most = FakeCluster(4), Watcher(), []
    with bench.controller(plan, cluster, watcher) as controller:

        def change(snapshot: Any) -> None:
            most.append(len(snapshot.running))
            caps = {3: "max_trials=3", 6: "max_trials=0", 40: "max_trials=none"}
            if len(most) in caps:
                bench.store.add_event(controller.sweep_id, CAP_SET, caps[len(most)])

        watcher.on_tick = change
        controller.run()
    assert set(bench.states(plan).values()) == {"COMPLETE"}
    assert max(most[:3]) == 1
    assert max(most[3:6]) == 3
    assert most[39] == 0
    assert sum(line.startswith("gang dismissed: the caps allow 0") for line in watcher.lines) == 3
    assert all(gang.state is GangState.DEAD for gang in cluster.gangs)


def test_caps_outlive_the_controller(bench: Bench, plan: Plan):
    sweep_id = bench.store.add(plan).sweep_id
    resources = ResourcesConfig(gpus=1, max_gpus=8)
    assert Orders(bench.store, sweep_id, resources).caps() == (float("inf"), 8)
    bench.store.add_event(sweep_id, CAP_SET, check_cap("max_gpus=5"))
    bench.store.add_event(sweep_id, CAP_SET, check_cap("max_trials=7"))
    assert Orders(bench.store, sweep_id, resources).caps() == (7, 5)
    bench.store.add_event(sweep_id, CAP_SET, check_cap("max_gpus=none"))
    assert Orders(bench.store, sweep_id, resources).caps() == (7, float("inf"))


@pytest.mark.parametrize("text", ["max_trials", "max_trial=3", "max_gpus=many", "max_trials=-1", "max_trials=1.5"])
def test_a_cap_that_is_none_is_refused(text: str):
    with pytest.raises(UserError, match=f"set {text}: .*allowed: "):
        check_cap(text)
