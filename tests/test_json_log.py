"""JSON lines of controller and ranks: who said it is in every line, and no credential."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest
from fake_gangs import Bench, FakeCluster, bench, plan  # noqa: F401
from sweep_runs import Watcher

from models import run_dir
from models.trainer.journal import Journal
from orchestrator.cli.json_log import JsonLogged
from orchestrator.plan import Plan
from orchestrator.sweep import UserError

LABELS = {"sweep": "tiny", "trial": "00ff00ff00ff00ff", "attempt": 2, "rank": 1}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rank_says_the_same_in_text_and_in_json(tmp_path: Path):
    log = logging.getLogger("models.trainer.attempt")
    with Journal(tmp_path, 1, LABELS) as journal:
        log.info("step %d, password=hunter22", 3)
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("attempt 2 failed")
    log.info("said after its end")
    journal.append("Traceback: the checkpoint")
    said = lines(run_dir.json_log_path(tmp_path, 1))
    assert [one["message"].splitlines()[0] for one in said] == [
        "step 3, password=***",
        "attempt 2 failed",
        "Traceback: the checkpoint",
    ]
    assert [one["level"] for one in said] == ["INFO", "ERROR", "ERROR"]
    assert said[1]["message"].endswith("ValueError: two\nlines")
    for one in said:
        assert {name: one[name] for name in LABELS} == LABELS
        assert datetime.fromisoformat(one["time"]).utcoffset().total_seconds() == 0
    text = run_dir.log_path(tmp_path, 1).read_text()
    assert "INFO models.trainer.attempt: step 3, password=***" in text
    assert "Traceback: the checkpoint" in text


def test_without_labels_there_is_only_text(tmp_path: Path):
    with Journal(tmp_path, 0):
        logging.getLogger("models").info("alone")
    assert "alone" in run_dir.log_path(tmp_path, 0).read_text()
    assert not run_dir.json_log_path(tmp_path, 0).exists()


def test_the_controller_says_of_which_attempt_it_speaks(bench: Bench, plan: Plan):
    def dies_once(spec, _config, step):
        return "die" if spec.number == 1 and step == 7 and spec.fingerprint == plan.trials[0].fingerprint else None

    watcher, bad = Watcher(), plan.trials[0].fingerprint
    with (
        JsonLogged(watcher, bench.home, "tiny") as view,
        bench.controller(plan, FakeCluster(2, dies_once), view) as controller,
    ):
        controller.run()
    said = lines(bench.home / "logs" / "tiny.jsonl")
    assert [one["message"] for one in said] == watcher.lines
    assert {one["sweep"] for one in said} == {"tiny"}
    started = [(one["trial"], one["attempt"]) for one in said if one["message"].startswith("started")]
    assert sorted(started) == sorted([(bad, 1), (bad, 2), (plan.trials[1].fingerprint, 1)])
    complete = [(one["trial"], one["attempt"]) for one in said if one["message"].startswith("complete")]
    assert sorted(complete) == sorted([(bad, 2), (plan.trials[1].fingerprint, 1)])
    assert all("trial" not in one for one in said if one["message"].startswith("gang dismissed"))


@pytest.mark.parametrize("wanted", [False, True])
def test_ranks_are_told_whether_json_is_wanted(bench: Bench, plan: Plan, wanted: bool):
    with bench.controller(plan, FakeCluster(2)) as controller:
        controller.sweep_run.json_logs = wanted
        controller.run()
    specs = [run_dir.read_attempt_spec(path.parent) for path in bench.home.glob("trials/*/attempts/*/attempt.json")]
    assert len(specs) == 2
    assert all(one.log_labels == ({"sweep": "tiny"} if wanted else None) for one in specs)


def test_a_folder_that_can_not_be_written_is_told_before_anything_starts(tmp_path: Path):
    (tmp_path / "logs").write_text("a file")
    with (
        pytest.raises(UserError, match=r"--json-logs: .*tiny\.jsonl can't be written"),
        JsonLogged(Watcher(), tmp_path, "tiny"),
    ):
        pass
