"""What the mirror to MLflow shows, once, and again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow_view import child, history
from store_runs import STEPS, a_plan, probed, steps, validation

from orchestrator.store import LayerRow
from orchestrator.tracking import (
    books,
    is_server,
    mirror,
    ui_command,
    ui_environment,
)
from orchestrator.tracking.layer_plots import layer_plots

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
