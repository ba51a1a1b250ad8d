"""The divergence rules, the in-memory study, and its copy for optuna-dashboard."""

import math
import random
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from models.run_dir import StepRecord, ValidationRecord
from orchestrator.search import DivergenceRule, MirrorError, Search, StudyMirror
from orchestrator.search.study import REPORTS_PER_TRIAL, NothingIsSampled
from orchestrator.sweep import DivergenceConfig

CONFIG = DivergenceConfig(loss_above_start=1.0, loss_above_best=1.5, patience_steps=3, gradient_norm_above=100.0)


@dataclass(frozen=True)
class Cell:
    fingerprint: str = "f1"
    arm: str = "baseline"
    axes: dict[str, Any] = field(default_factory=lambda: {"train.lr": 1e-3})
    seed: int = 1


@dataclass(frozen=True)
class Row(Cell):
    """A finished trial as the store hands it out."""

    state: str = "COMPLETE"
    cause: str | None = None
    reason: str | None = None
    end_step: int | None = None
    num_attempts: int = 1


@dataclass
class FakeStore:
    rows: list[Row]
    num_curves_read: int = 0

    def trials(self, sweep_id: int) -> list[Row]:
        return self.rows

    def curve(self, fingerprint: str) -> SimpleNamespace:
        self.num_curves_read += 1
        validations = [
            SimpleNamespace(split="slice", step=50, fraction=0.5, loss_nats=4.0),
            SimpleNamespace(split="slice", step=100, fraction=1.0, loss_nats=3.0),
            SimpleNamespace(split="full", step=100, fraction=1.0, loss_nats=3.5),
        ]
        return SimpleNamespace(steps=steps([5.0] * 100, total=100), validations=validations)


def steps(losses, norms=None, first=1, total=1000):
    norms = norms or [1.0] * len(losses)
    return [
        StepRecord(
            step=i,
            tokens=i * 10,
            fraction=i / total,
            lr=1e-3,
            loss_nats=loss if loss is not None and math.isfinite(loss) else None,
            gradient_norm=norm if norm is not None and math.isfinite(norm) else None,
            tokens_per_second=1.0,
            nonfinite=loss is None or norm is None or not (math.isfinite(loss) and math.isfinite(norm)),
        )
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), first)
    ]


def stop_of(records, config=CONFIG):
    rule = DivergenceRule(config)
    for record in records:
        rule.observe(record)
    return rule.stop


@pytest.fixture
def search():
    search = Search("s", [Cell(), Cell("f2", "gate", {"train.lr": 1.0}, 2)], CONFIG)
    search.ask("f1")
    return search


# --- the rules


@pytest.mark.parametrize(
    ("loss", "norm", "subject"),
    [(math.nan, 1.0, "training loss"), (5.0, math.inf, "gradient norm"), (math.inf, math.nan, "loss and the gradient")],
)
def test_a_nonfinite_number_stops_at_once_and_is_named(loss, norm, subject):
    stop = stop_of(steps([5.0, loss], [1.0, norm]))
    assert (stop.step, stop.rule) == (2, "nonfinite")
    assert subject in stop.reason


def test_nonfinite_floats_in_a_record_count_without_the_flag():
    record = steps([5.0])[0].model_copy(update={"loss_nats": math.inf})
    assert stop_of([record]).rule == "nonfinite"


def test_a_nonfinite_validation_stops():
    record = ValidationRecord(
        step=7, tokens=70, fraction=0.1, split="slice", loss_nats=None, bits_per_byte=None, num_tokens=1, num_bytes=1,
        nonfinite=True,
    )  # fmt: skip
    assert (stop_of([record]).step, stop_of([record]).rule) == (7, "nonfinite")


def test_a_number_that_was_not_measured_is_not_a_divergence():
    records = [record.model_copy(update={"gradient_norm": None}) for record in steps([5.0] * 10)]
    assert stop_of(records) is None


def test_loss_above_its_start_stops_when_patience_runs_out():
    stop = stop_of(steps([5.0, 6.1, 6.2, 6.3, 6.4]))
    assert (stop.step, stop.rule) == (4, "loss_above_start")
    assert "above 6 nats (its start 5 + 1) at steps 2 to 4, and is 6.3 nats" in stop.reason


def test_a_spike_that_recovers_is_not_a_divergence():
    assert stop_of(steps([5.0, 9.0, 9.0, 5.0, 9.0, 9.0, 5.0], [1.0, 1e4, 1e4, 1.0, 1e4, 1e4, 1.0])) is None


def test_a_loss_exactly_at_the_limit_is_not_above_it():
    assert stop_of(steps([5.0] + [6.0] * 10)) is None


def test_loss_above_its_own_best_stops_below_its_start():
    stop = stop_of(steps([5.0, 3.0, 3.0, 3.0, 4.6, 4.6, 4.6, 4.6]))
    assert (stop.step, stop.rule) == (7, "loss_above_best")
    assert "its best 3, a median over 3 steps, + 1.5" in stop.reason


def test_one_lucky_batch_is_not_the_best():
    assert stop_of(steps([5.0, 5.0, 3.0, 5.0, 5.0, 5.0, 5.0])) is None


def test_an_exploding_gradient_norm_stops_whatever_the_loss_says():
    stop = stop_of(steps([5.0] * 5, [1.0, 101.0, 500.0, 101.0, 1.0]))
    assert (stop.step, stop.rule) == (4, "gradient_norm")


def test_rules_that_are_off_do_not_stop():
    off = DivergenceConfig(loss_above_start=None, loss_above_best=None, gradient_norm_above=None)
    assert stop_of(steps([5.0] + [50.0] * 50, [1e9] * 51), off) is None


def test_warmup_steps_are_judged_by_finiteness_only():
    config = CONFIG.model_copy(update={"warmup_steps": 4})
    losses = [5.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    assert stop_of(steps(losses), config).step == 7
    assert stop_of(steps([5.0, math.nan]), config).step == 2


def test_the_running_median_is_the_median():
    rng = random.Random(0)
    for size in (1, 2, 5, 8):
        losses = [rng.uniform(3.0, 6.0) for _ in range(60)]
        config = DivergenceConfig(loss_above_start=None, loss_above_best=100.0, patience_steps=size)
        rule = DivergenceRule(config)
        for record in steps(losses):
            rule.observe(record)
        medians = [sorted(losses[i : i + size]) for i in range(60 - size + 1)]
        best = min((m[size // 2] + m[(size - 1) // 2]) / 2 for m in medians)
        assert rule._best == pytest.approx(best)


# --- the study


def test_the_decision_does_not_depend_on_how_records_are_batched():
    rng = random.Random(1)
    for seed in range(20):
        losses = [5.0 + rng.uniform(-0.5, 0.5) * i / 4 for i in range(60)]
        whole = stop_of(steps(losses))
        search = Search("s", [Cell()], CONFIG)
        search.ask("f1")
        records, stops = steps(losses), []
        sizes = random.Random(seed)
        while records:
            size = sizes.randint(0, 7)
            stops.append(search.decide("f1", records[:size]))
            records = records[size:]
        assert stops[-1] == whole, "the stop is kept, and it is the one of the whole curve"
        assert {stop for stop in stops if stop} == ({whole} if whole else set())


def test_should_prune_is_the_decision(search):
    search.decide("f1", steps([5.0, 5.0]))
    optuna_trial = search._running["f1"].trial
    assert not optuna_trial.should_prune()
    stop = search.decide("f1", steps([math.nan], first=3))
    assert stop is not None
    assert optuna_trial.should_prune()
    search.study.pruner = optuna.pruners.NopPruner()
    assert search.decide("f1", []) is None, "with another pruner in the study, that one decides"


def test_asking_begins_a_fixed_point_and_samples_nothing(search):
    search.ask("f2")
    params = {trial.user_attrs["fingerprint"]: trial.params for trial in search.study.trials}
    assert params["f1"] == {"arm": "baseline", "seed": 1, "train.lr": 1e-3}
    assert params["f2"] == {"arm": "gate", "seed": 2, "train.lr": 1.0}
    with pytest.raises(RuntimeError, match=r"train\.wd has no fixed value"):
        search.study.ask().suggest_float("train.wd", 0.0, 1.0)
    assert isinstance(search.study.sampler, NothingIsSampled)


def test_axes_of_any_kind_become_parameters():
    axes = {"train.tokens": 100, "model": {"preset": "cpu-1m"}, "gate": None, "data.corpus": "sotu", "tied": True}
    search = Search("s", [Cell(axes=axes), Cell("f2", axes={"train.tokens": 200})], CONFIG)
    search.ask("f1")
    search.ask("f2")
    first, second = (trial.params for trial in search.study.trials)
    assert first["train.tokens"] == 100
    assert first["model"] == '{"preset": "cpu-1m"}'
    assert (first["gate"], first["data.corpus"], first["tied"]) == (None, "sotu", True)
    assert second == {"arm": "baseline", "seed": 1, "train.tokens": 200}


def test_a_retry_is_the_same_trial_judged_on_its_curve_up_to_the_resumption(search):
    assert search.decide("f1", steps([5.0, 5.0, 9.0, 9.0])) is None
    search.ask("f1", curve=steps([5.0, 5.0]))
    assert search.decide("f1", steps([9.0, 9.0], first=3)) is None, "the streak of the dead attempt is forgotten"
    assert search.decide("f1", steps([9.0], first=5)).step == 5
    assert len(search.study.trials) == 1


def test_a_restarted_controller_stops_where_the_dead_one_would_have():
    fresh = Search("s", [Cell()], CONFIG)
    fresh.ask("f1", curve=steps([5.0, 9.0, 9.0]))
    assert fresh.decide("f1", steps([9.0], first=4)).step == 4


def test_records_seen_twice_count_once(search):
    search.decide("f1", steps([5.0, 9.0, 9.0]))
    assert search.decide("f1", steps([9.0, 9.0], first=2)) is None


def test_a_long_trial_reports_a_bounded_number_of_points(search):
    search.decide("f1", steps([5.0] * 3000, total=3000))
    assert len(search.study.trials[0].intermediate_values) == REPORTS_PER_TRIAL + 1


def test_each_state_is_told_as_optuna_knows_it():
    states = ("COMPLETE", "PRUNED", "DIVERGED", "FAILED")
    search = Search("s", [Cell(state) for state in states], CONFIG)
    for state in states:
        search.ask(state)
        search.tell(state, state, 3.0, "cause", "reason", 7)
    told = {trial.user_attrs["fingerprint"]: trial for trial in search.study.trials}
    assert [told[state].state for state in states] == [
        TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED, TrialState.FAIL,
    ]  # fmt: skip
    assert told["COMPLETE"].value == 3.0
    assert search.study.best_trial.user_attrs["fingerprint"] == "COMPLETE"
    attributes = {"state": "DIVERGED", "cause": "cause", "reason": "reason", "step": 7, "fingerprint": "DIVERGED"}
    assert told["DIVERGED"].user_attrs == attributes


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_nan_is_never_told_as_a_value(search, value):
    search.tell("f1", "COMPLETE", value)
    (trial,) = search.study.trials
    assert (trial.state, trial.value, trial.user_attrs["state"]) == (TrialState.FAIL, None, "COMPLETE")


def test_a_diverged_trial_does_not_hide_the_best(search):
    search.tell("f1", "COMPLETE", 3.0)
    search.ask("f2")
    search.decide("f2", steps([2.0, 9.0, 9.0, 9.0]))
    search.tell("f2", "DIVERGED")
    assert search.study.best_value == 3.0


def test_a_rerun_is_a_new_trial(search):
    search.tell("f1", "FAILED", cause="out_of_memory")
    search.ask("f1")
    search.tell("f1", "COMPLETE", 2.0)
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_misuse_names_the_trial_and_what_is_allowed(search):
    with pytest.raises(ValueError, match="trial nope is not one of the 2 trials"):
        search.ask("nope")
    with pytest.raises(ValueError, match="trial f2 is not running: ask comes before decide"):
        search.decide("f2", [])
    with pytest.raises(ValueError, match="state WAITING of trial f1 cannot be told; allowed: COMPLETE, PRUNED"):
        search.tell("f1", "WAITING")


def test_threads_do_not_mix_trials():
    cells = [Cell(f"f{i}", axes={"train.lr": float(i + 1)}) for i in range(40)]
    search = Search("s", cells, CONFIG)

    def work(part):
        for cell in part:
            search.ask(cell.fingerprint)
            search.decide(cell.fingerprint, steps([5.0] * 20))
            search.tell(cell.fingerprint, "COMPLETE", cell.axes["train.lr"])

    threads = [threading.Thread(target=work, args=(cells[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {t.user_attrs["fingerprint"]: t.params["train.lr"] for t in search.study.trials} == {
        cell.fingerprint: cell.axes["train.lr"] for cell in cells
    }
    assert all(trial.value == trial.params["train.lr"] for trial in search.study.trials)


# --- the copy for optuna-dashboard


ROWS = [
    Row("a", axes={"train.lr": 1e-3}),
    Row("b", "gate", {"train.lr": 1.0}, 2, "DIVERGED", "loss_above_start", "too high", 9),
    Row("c", state="FAILED", cause="out_of_memory"),
    Row("d", state="RUNNING"),
]


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/optuna.db"


def load(url):
    return optuna.load_study(study_name="s", storage=url)


def test_the_copy_holds_the_finished_trials(url):
    assert StudyMirror(FakeStore(ROWS), 1, "s", url).update() == 3
    by_fingerprint = {trial.user_attrs["fingerprint"]: trial for trial in load(url).trials}
    assert set(by_fingerprint) == {"a", "b", "c"}
    assert by_fingerprint["a"].value == 3.0, "the final validation loss on the slice"
    assert len(by_fingerprint["a"].intermediate_values) == 51
    assert by_fingerprint["b"].state is TrialState.PRUNED
    assert by_fingerprint["b"].params == {"arm": "gate", "seed": 2, "train.lr": 1.0}
    assert by_fingerprint["b"].user_attrs["step"] == 9
    assert by_fingerprint["c"].state is TrialState.FAIL


def test_the_copy_is_written_a_trial_at_a_time_while_something_else_is_due(tmp_path):
    mirror = StudyMirror(FakeStore(ROWS), 1, "s", f"sqlite:///{tmp_path}/optuna.db")
    assert [mirror.update(lambda: True) for _ in range(4)] == [1, 1, 1, 0]


def test_copying_again_adds_only_what_is_new(url):
    store = FakeStore(ROWS[:2])
    mirror = StudyMirror(store, 1, "s", url)
    assert (mirror.update(), mirror.update()) == (2, 0)
    assert store.num_curves_read == 2
    store.rows = ROWS
    assert StudyMirror(store, 1, "s", url).update() == 1, "another process goes on where this one ended"
    assert len(load(url).trials) == 3


def test_a_rerun_is_copied_beside_its_failure(url):
    store = FakeStore([Row("a", state="FAILED")])
    mirror = StudyMirror(store, 1, "s", url)
    mirror.update()
    store.rows = [Row("a", num_attempts=2)]
    assert mirror.update() == 1
    assert [trial.state for trial in load(url).trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_sweep_that_has_grown_is_copied_anew(url):
    StudyMirror(FakeStore(ROWS[:1]), 1, "s", url).update()
    grown = [*ROWS, Row("e", "new-arm", {"train.lr": 3.0})]
    assert StudyMirror(FakeStore(grown), 1, "s", url).update() == 4
    assert {trial.params["arm"] for trial in load(url).trials} == {"baseline", "gate", "new-arm"}


def test_a_copy_that_cannot_be_written_raises_only_mirror_error_and_recovers(tmp_path):
    mirror = StudyMirror(FakeStore(ROWS), 1, "s", f"sqlite:///{tmp_path}/missing/optuna.db")
    with pytest.raises(MirrorError, match=r"Optuna's copy at sqlite:///.*missing/optuna\.db was not written"):
        mirror.update()
    (tmp_path / "missing").mkdir()
    assert mirror.update() == 3


def test_a_password_is_not_shown():
    mirror = StudyMirror(FakeStore(ROWS), 1, "s", "nosuch://me:secret@host/db")
    with pytest.raises(MirrorError, match=r"nosuch://me:\*\*\*@host/db") as raised:
        mirror.update()
    assert "secret" not in str(raised.value)


def test_optuna_dashboard_opens_the_copy(url):
    dashboard = pytest.importorskip("optuna_dashboard")
    StudyMirror(FakeStore(ROWS), 1, "s", url).update()
    app = dashboard.wsgi(optuna.storages.RDBStorage(url))
    status: list[str] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "SERVER_NAME": "x", "SERVER_PORT": "80"}
    body = b"".join(app(environ | {"wsgi.url_scheme": "http"}, lambda line, headers, *rest: status.append(line)))
    assert status == ["200 OK"]
    assert b'"study_name": "s"' in body
