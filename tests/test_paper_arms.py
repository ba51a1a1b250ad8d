"""Every arm of the paper's tables trains, on one rank and on two, with equal losses.

The arms are read from the files' CPU twins and trained for ten steps at the smallest size: an arm that is added there
is tested here. Arms with experts run with these dealt out over two ranks, dense ones over two tensor ranks; all runs of
a layout share one pair of processes.
"""

from pathlib import Path

import pytest
import ranks
from small_trials import metrics, new_attempt, summary_of, write_corpus

from models import accounting
from models.config import Layout
from orchestrator.plan import expand
from orchestrator.sweep import load

TABLES = ("table1", "table2", "table3", "table4", "table6")
STEPS = 10
DENSE_TOLERANCE = 2e-5
EXPERTS_TOLERANCE = 2e-3
"""Relative; 3e-7 was reached by both over 20 steps. A rounding may send a token to another expert elsewhere."""
FIRST_TOLERANCE = 2e-6
"""Of the first step, where nothing has been chosen otherwise yet."""
SMALLEST = {
    True: ("cpu-moe-tiny", Layout(data=2, expert=2)),
    False: ("cpu-tiny", Layout(tensor=2)),
}
"""With experts, or without: the size and the layout."""


def arms():
    """(table, arm) of every arm once: one that stands in several tables is one trial there, and one test here."""
    seen = set()
    for table in TABLES:
        plan = expand(load(Path(__file__).parent.parent / "sweeps" / "paper" / f"{table}-cpu.yaml"))
        has_experts = plan.trials[0].config.model.moe is not None
        for arm in plan.sweep.arms:
            if (has_experts, arm) not in seen:
                seen.add((has_experts, arm))
                yield table, arm, has_experts


ARMS = list(arms())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def trials(corpus):
    """(table, arm) -> its config in the twin, at the smallest size and ten steps of 8 short sequences."""
    trials = {}
    for table in TABLES:
        preset = SMALLEST[table != "table2"][0]
        overrides = [
            f"data.corpus={corpus}",
            "data.sequence_length=32",
            "data.validation_every=4",
            "data.validation={slice_bytes: 600, points: 2}",
            "seeds=[1]",
        ]
        setting = {"train.tokens": STEPS * 256, "train.batch_tokens": 256, "train.lr": 3e-3}
        if table == "table2":  # its settings are rows, and rows are set as a whole
            setting["model.preset"] = preset
            overrides += ["exclude=[]", f"rows=[{setting}]".replace("'", "")]
        else:
            overrides += [f"{name}={value}" for name, value in setting.items()] + [f"model.preset={preset}"]
        plan = expand(load(Path(__file__).parent.parent / "sweeps" / "paper" / f"{table}-cpu.yaml", overrides))
        assert plan.refusals == ()
        trials |= {(table, trial.arm): trial.config for trial in plan.trials}
    return trials


def train_on_a_rank(rank, folder, home, layout, jobs):
    from models.trainer import World, train

    world = World.join(rank, layout, "cpu", f"file://{folder}/meet")
    for name, trial in jobs.items():
        train(new_attempt(home / "-".join(name), trial, layout=layout, diagnostics=None), world)


@pytest.fixture(scope="module")
def two_ranks(trials, tmp_path_factory):
    home = tmp_path_factory.mktemp("two")
    for has_experts, (_, layout) in SMALLEST.items():
        jobs = {(table, arm): trials[table, arm] for table, arm, has_some in ARMS if has_some is has_experts}
        ranks.run(train_on_a_rank, 2, home, layout, jobs)
    return home


@pytest.mark.parametrize(("table", "arm", "has_experts"), ARMS, ids=[f"{table}-{arm}" for table, arm, _ in ARMS])
def test_an_arm_trains_alike_on_one_rank_and_on_two(world, two_ranks, trials, tmp_path, table, arm, has_experts):
    from models.trainer import train

    trial, layout = trials[table, arm], SMALLEST[has_experts][1]
    alone = new_attempt(tmp_path, trial, diagnostics=None)
    train(alone, world)
    together = new_attempt(two_ranks / f"{table}-{arm}", trial, layout=layout)
    ours, theirs = metrics(together), metrics(alone)
    assert [(record["kind"], record["step"]) for record in ours] == [(r["kind"], r["step"]) for r in theirs]
    assert [r["step"] for r in ours if r["kind"] == "step"] == list(range(1, STEPS + 1))
    later = EXPERTS_TOLERANCE if has_experts else DENSE_TOLERANCE
    for one, other in zip(ours, theirs, strict=True):
        tolerance = FIRST_TOLERANCE if one["step"] == 1 else later
        assert one["loss_nats"] == pytest.approx(other["loss_nats"], rel=tolerance), one["step"]
    losses = [record["loss_nats"] for record in ours if record["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5, "it learns"
    for spec in (alone, together):
        assert summary_of(spec).num_parameters == accounting.parameters(trial.model, trial.gates, 256)
