"""Runs of several budgets: one that starts from a checkpoint of a longer one is the one from its beginning, exactly."""

from pathlib import Path

import pytest
import ranks
from small_trials import corpus_trial, everything, new_attempt, write_corpus

from models import retention, run_dir
from models.config import GateConfig, Layout, TrialConfig
from models.run_dir import AttemptSpec

TRUNK_STEPS, BUDGETS = 40, (10, 24)
"""The trunk sees more text than there is: Megatron's order of the data hangs on how much is asked for."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def budget(corpus: Path, steps: int) -> TrialConfig:
    options = {"schedule": "wsd", "warmup_tokens": 4 * 256, "trunk_tokens": TRUNK_STEPS * 256}
    return corpus_trial(corpus, GateConfig(position="sdpa"), steps, **options)


def decay_begins(config: TrialConfig) -> int:
    return config.train.num_steps - config.train.decay_steps


def trained(home: Path, corpus: Path, world, layout: Layout) -> dict[int, dict[str, AttemptSpec]]:
    """The trunk, then each budget from the trunk's checkpoint and from its own beginning."""
    from models.trainer import train

    steps = tuple(decay_begins(budget(corpus, one)) for one in BUDGETS)
    trunk = new_attempt(home / "trunk", budget(corpus, TRUNK_STEPS), layout=layout, branch_steps=steps)
    assert train(trunk, world).outcome == "complete"
    found = {TRUNK_STEPS: {"whole": trunk}}
    for one, step in zip(BUDGETS, steps, strict=True):
        checkpoint = run_dir.checkpoint_path(trunk.attempt_dir, step)
        config, start = budget(corpus, one), {"resume_checkpoint": str(checkpoint), "resume_step": step}
        found[one] = {
            "whole": new_attempt(home / "whole", config, layout=layout),
            "branch": new_attempt(home / "branch", config, layout=layout, **start),
        }
        for spec in found[one].values():
            assert train(spec, world).outcome == "complete"
    return found


def train_on_a_rank(rank: int, folder: Path, home: Path, corpus: Path) -> None:
    from models.trainer import World

    layout = Layout(data=2)
    world = World.join(rank, layout, "cpu", f"file://{folder}/meet")
    trained(home, corpus, world, layout)
    world.leave()


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two data-parallel ranks"])
def runs(request, corpus, tmp_path_factory):
    """By budget in steps, and how it was trained, the attempts."""
    home = tmp_path_factory.mktemp("runs")
    if request.param == 2:
        ranks.run(train_on_a_rank, 2, home, corpus)
        specs = {}
        for one in (*BUDGETS, TRUNK_STEPS):
            kinds = {"whole": "trunk"} if one == TRUNK_STEPS else {"whole": "whole", "branch": "branch"}
            fingerprint = budget(corpus, one).fingerprint()
            folders = {kind: run_dir.trial_dir(home / at, fingerprint) for kind, at in kinds.items()}
            specs[one] = {
                kind: run_dir.read_attempt_spec(next((folder / "attempts").iterdir()))
                for kind, folder in folders.items()
            }
        return specs
    return trained(home, corpus, request.getfixturevalue("world"), Layout())


@pytest.mark.parametrize("steps", BUDGETS)
def test_a_branch_is_the_run_from_its_beginning_bit_for_bit(runs, corpus, steps):
    whole, branch = (everything(runs[steps][kind]) for kind in ("whole", "branch"))
    begins = decay_begins(budget(corpus, steps))
    assert branch == [record for record in whole if record["step"] > begins]
    assert [record["step"] for record in branch if record["kind"] == "step"] == [*range(begins + 1, steps + 1)]


@pytest.mark.parametrize("steps", BUDGETS)
def test_up_to_its_decay_a_budget_is_its_trunk(runs, corpus, steps):
    begins = decay_begins(budget(corpus, steps))
    curves = [
        {
            record["step"]: (record["lr"], record["loss_nats"], record["gradient_norm"])
            for record in everything(runs[one]["whole"])
            if record["kind"] == "step"
        }
        for one in (steps, TRUNK_STEPS)
    ]
    own, trunks = ([curve[step] for step in range(1, steps + 1)] for curve in curves)
    assert own[:begins] == trunks[:begins]
    assert own[begins][0] < trunks[begins][0]


def test_without_the_trunks_budget_the_data_would_come_in_another_order(runs, world, corpus, tmp_path):
    from models.trainer import train

    config = budget(corpus, BUDGETS[0])
    alone = config.model_copy(update={"train": config.train.model_copy(update={"trunk_tokens": None})})
    spec = new_attempt(tmp_path, alone)
    train(spec, world)
    firsts = [everything(one)[0]["loss_nats"] for one in (spec, runs[BUDGETS[0]]["whole"])]
    assert firsts[0] != firsts[1]


def test_checkpoints_for_branches_stay_beside_the_last_ones(world, corpus, tmp_path):
    from models.trainer import train

    trunk = new_attempt(tmp_path, budget(corpus, 12), branch_steps=(3, 5), checkpoint_every_steps=2, keep_checkpoints=1)
    train(trunk, world)
    assert [step for step, _ in run_dir.complete_checkpoints(trunk.attempt_dir)] == [10, 5, 3]
    retention.prune_trial(Path(trunk.trial_dir), keep=1)
    assert [step for step, _ in run_dir.complete_checkpoints(trunk.attempt_dir)] == [10, 5, 3]
