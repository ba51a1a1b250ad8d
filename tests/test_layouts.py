"""One trial on every layout that runs here gives the losses, gradient norms and validations of one rank.

Within rounding: sums are taken in another order. TOLERANCES say how close they came with room for other machines.
"""

import math

import pytest
import ranks
from small_trials import corpus_trial, metrics, new_attempt, summary_of, write_corpus

from models import accounting
from models.config import GateConfig, Layout
from models.presets import PRESETS

STEPS = 10
DENSE_TOLERANCE = 2e-5
"""Relative, on losses and norms over 10 steps; 4e-7 was reached."""
EXPERTS_TOLERANCE = 2e-3
"""A rounding may send a token to another expert, in any step after the first; 4e-5 was reached."""
FIRST_TOLERANCE = 2e-6
"""Of the first step's loss and gradient norm, where nothing has been chosen otherwise yet; 3e-7 was reached."""

GATED = (GateConfig(position="sdpa"), GateConfig(position="value", granularity="headwise"))
SHARED = (GateConfig(position="sdpa", sharing="head_shared"), GateConfig(position="query", input="none"))
DENSE_GATE = (GateConfig(position="dense"), GateConfig(position="key", qk_order="before_norm"))
PARAMETERS = (
    GateConfig(position="dense", input="none"),
    GateConfig(position="sdpa", granularity="headwise", input="none"),
)

TRIALS = {
    "dense": ("cpu-tiny", GATED, {}),
    "untied": ("cpu-tiny", GATED, {"tied_embeddings": False}),
    "four layers": ("cpu-tiny", GATED, {"num_layers": 4}),
    "shared": ("cpu-tiny", SHARED, {"softmax_sink": True, "sdpa_output": "silu"}),
    "dense gate": ("cpu-tiny", DENSE_GATE, {"sandwich_norm": True}),
    "parameters": ("cpu-tiny", PARAMETERS, {"sandwich_norm": True, "sdpa_output": "group_norm"}),
    "experts": ("cpu-moe-tiny", GATED, {}),
    "four layers of experts": ("cpu-moe-tiny", DENSE_GATE, {"num_layers": 4, "sandwich_norm": True}),
}

PIPELINE = Layout(pipeline=2)
INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)
SEQUENCE = Layout(tensor=2, sequence_parallel=True)
EXPERT = Layout(data=2, expert=2)
EXPERT_IN_TENSOR = Layout(tensor=2, expert=2, sequence_parallel=True)

RUNS = [
    ("dense", PIPELINE, 2),
    ("dense", PIPELINE, 8),
    ("dense", Layout(data=2), 4),
    ("dense", SEQUENCE, 4),
    ("untied", PIPELINE, 4),
    ("four layers", INTERLEAVED, 2),
    ("shared", PIPELINE, 4),
    ("shared", SEQUENCE, 4),
    ("dense gate", SEQUENCE, 4),
    ("parameters", SEQUENCE, 4),
    ("parameters", PIPELINE, 2),
    ("experts", PIPELINE, 4),
    ("experts", EXPERT, 4),
    ("experts", SEQUENCE, 4),
    ("experts", EXPERT_IN_TENSOR, 8),
    ("four layers of experts", INTERLEAVED, 4),
]
"""Trial, layout, sequences of a micro-batch on one rank of it."""
FOUR_RANKS = [
    ("dense", Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
    ("experts", Layout(pipeline=2, data=2, expert=2), 4),
    ("experts", Layout(tensor=2, data=2, expert=4, sequence_parallel=True), 4),
]


def name_of(layout):
    changed = layout.model_dump(exclude_defaults=True)
    return " ".join(name if value is True else f"{name}={value}" for name, value in changed.items()) or "one rank"


def trial_of(corpus, kind):
    preset, gates, changes = TRIALS[kind]
    trial = corpus_trial(corpus, gates[0], STEPS)
    model = PRESETS[preset].model_copy(update=changes)
    return trial.model_copy(update={"model": model, "more_gates": gates[1:]})


def spec_of(home, corpus, kind, layout, micro_batch):
    folder = home / f"{name_of(layout)} {micro_batch}"
    return new_attempt(folder, trial_of(corpus, kind), layout=layout, micro_batch_sequences=micro_batch)


def train_on_a_rank(rank, folder, home, corpus, runs):
    """One world after the other in this process, as a warm gang's process would."""
    from models.trainer import World, train

    for number, (kind, layout, micro_batch) in enumerate(runs):
        world = World.join(rank, layout, "cpu", f"file://{folder}/{number}")
        train(spec_of(home, corpus, kind, layout, micro_batch), world)
        world.leave()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """All runs of two ranks, and of four."""
    home = tmp_path_factory.mktemp("gangs")
    ranks.run(train_on_a_rank, 2, home, corpus, RUNS)
    ranks.run(train_on_a_rank, 4, home, corpus, FOUR_RANKS)
    return home


@pytest.fixture(scope="module")
def alone(world, corpus, tmp_path_factory):
    """(kind, sequences of a micro-batch over all data-parallel ranks) -> the metrics of one rank."""
    from models.trainer import train

    home, found = tmp_path_factory.mktemp("alone"), {}

    def alone(kind, micro_batch):
        if (kind, micro_batch) not in found:
            spec = spec_of(home, corpus, kind, Layout(), micro_batch)
            train(spec, world)
            found[kind, micro_batch] = metrics(spec)
        return found[kind, micro_batch]

    return alone


def differences(found, expected):
    """The largest relative difference in the first step, and in all records."""
    assert [(r["kind"], r["step"], r["tokens"]) for r in found] == [
        (r["kind"], r["step"], r["tokens"]) for r in expected
    ]
    by_record = [
        max(abs(ours[name] / theirs[name] - 1.0) for name in ("loss_nats", "gradient_norm") if name in ours)
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return by_record[0], max(by_record)


@pytest.mark.parametrize(
    ("kind", "layout", "micro_batch"),
    RUNS + FOUR_RANKS,
    ids=[f"{kind}, {name_of(layout)}, {micro}" for kind, layout, micro in RUNS + FOUR_RANKS],
)
def test_a_layout_gives_the_losses_and_norms_of_one_rank(home, alone, corpus, kind, layout, micro_batch):
    spec = spec_of(home, corpus, kind, layout, micro_batch)
    summary, trial = summary_of(spec), trial_of(corpus, kind)
    assert summary.outcome == "complete"
    assert summary.num_parameters == accounting.parameters(trial.model, trial.gates, trial.data.vocab_size)
    first, largest = differences(metrics(spec), alone(kind, micro_batch * layout.data))
    assert first < FIRST_TOLERANCE
    assert largest < (EXPERTS_TOLERANCE if trial.model.moe else DENSE_TOLERANCE)


def test_the_trials_differ_so_that_equality_means_something(alone):
    last = {round(alone(kind, 8)[-1]["loss_nats"], 5) for kind in TRIALS}
    assert len(last) == len(TRIALS)
    assert all(loss < math.log(256) - 0.8 for loss in last)
