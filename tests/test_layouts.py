"""One trial on every layout that runs here gives the numbers of one rank, and takes up the checkpoints of others.

Losses, gradient norms, validations and diagnostics within rounding, since sums are taken in another order: the
tolerances say how close they came with room for other machines. Initial weights, and resuming on the same layout, to
the last bit.
"""

import dataclasses
import math

import numpy as np
import pytest
import ranks
from small_trials import (
    assert_same_diagnostics,
    checkpoint_tensors,
    corpus_trial,
    diagnostics,
    everything,
    metrics,
    new_attempt,
    summary_of,
    write_corpus,
)

from models import accounting, run_dir
from models.config import GateConfig, Layout
from models.presets import PRESETS

STEPS = 4
SAVED = 2
"""The step of the checkpoints."""
DENSE_TOLERANCE = 2e-5
"""Relative, on losses and norms; 4e-7 was reached over 10 steps."""
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

DISTRIBUTED = Layout(data=2, distributed_optimizer=True)

ONE_PAIR = [
    ("dense", PIPELINE, 2),
    ("dense", Layout(data=2), 4),
    ("dense", DISTRIBUTED, 4),
    ("untied", Layout(pipeline=2, recompute="full"), 8),
    ("four layers", INTERLEAVED, 2),
    ("shared", PIPELINE, 4),
    ("parameters", PIPELINE, 2),
    ("experts", PIPELINE, 4),
    ("four layers of experts", INTERLEAVED, 4),
]
OTHER_PAIR = [
    ("dense", Layout(tensor=2), 8),
    ("dense", SEQUENCE, 4),
    ("shared", SEQUENCE, 4),
    ("dense gate", SEQUENCE, 4),
    ("parameters", SEQUENCE, 4),
    ("experts", EXPERT, 4),
    ("experts", DISTRIBUTED.model_copy(update={"expert": 2}), 4),
    ("experts", SEQUENCE, 4),
    ("experts", EXPERT_IN_TENSOR, 8),
]
"""Trial, layout, sequences of a micro-batch on one rank of it."""
FOUR_RANKS = [
    ("dense", Layout(tensor=2, pipeline=2, sequence_parallel=True), 4),
    ("dense", DISTRIBUTED.model_copy(update={"pipeline": 2}), 4),
    ("experts", Layout(pipeline=2, data=2, expert=2), 4),
    ("experts", Layout(tensor=2, data=2, expert=4, sequence_parallel=True), 4),
]
RUNS = ONE_PAIR + OTHER_PAIR + FOUR_RANKS
RESUMED = [
    ("dense", PIPELINE, 2),
    ("dense", DISTRIBUTED, 4),
    ("dense", SEQUENCE, 4),
    ("four layers", INTERLEAVED, 2),
    ("experts", EXPERT, 4),
    ("experts", EXPERT_IN_TENSOR, 8),
]
"""Those that go on from their own checkpoint, and from that of one rank."""
TAKEN_UP_BY_ONE = [
    *RESUMED,
    ("dense", Layout(data=2), 4),
    ("dense", Layout(tensor=2), 8),
    ("parameters", SEQUENCE, 4),
    *FOUR_RANKS[1:3],
]


def name_of(layout):
    changed = layout.model_dump(exclude_defaults=True)
    return " ".join(name if value is True else f"{name}={value}" for name, value in changed.items()) or "one rank"


def trial_of(corpus, kind):
    preset, gates, changes = TRIALS[kind]
    trial = corpus_trial(corpus, gates[0], STEPS)
    model = PRESETS[preset].model_copy(update=changes)
    return trial.model_copy(update={"model": model, "more_gates": gates[1:]})


def spec_of(home, corpus, kind, layout, micro_batch, number=1, **spec):
    folder = home / f"{name_of(layout)} {micro_batch}"
    return new_attempt(folder, trial_of(corpus, kind), number, layout=layout, micro_batch_sequences=micro_batch, **spec)


def saved(spec):
    """How an attempt goes on from another's checkpoint."""
    return {"resume_checkpoint": str(run_dir.checkpoint_path(spec.attempt_dir, SAVED)), "resume_step": SAVED}


def train_on_a_rank(rank, folder, home, lone, corpus):
    """One world after the other in this process, as a warm gang's process would: first two worlds of two, then one.

    Returns this rank's initial weights of each trial and layout.
    """
    pair, weights = rank // 2, {}
    for number, run in enumerate(OTHER_PAIR if pair else ONE_PAIR):
        weights[run] = train_in_a_world(rank % 2, folder / f"{pair}-{number}", home, lone, corpus, run)
    for number, run in enumerate(FOUR_RANKS):
        weights[run] = train_in_a_world(rank, folder / f"all-{number}", home, lone, corpus, run)
    return weights


def train_in_a_world(rank, meeting, home, lone, corpus, run):
    """From the start (attempt 1), from its own checkpoint (2), and from that of one rank (3)."""
    from models.trainer import World, train

    kind, layout, micro_batch = run
    world = World.join(rank, layout, "cpu", f"file://{meeting}")
    weights = initial_weights(trial_of(corpus, kind), layout)
    first = spec_of(home, corpus, *run, checkpoint_every_steps=SAVED, keep_checkpoints=1)
    train(first, world)
    if run in RESUMED:
        train(spec_of(home, corpus, *run, 2, **saved(first)), world)
        alone = spec_of(lone, corpus, kind, Layout(), micro_batch * layout.data)
        train(spec_of(home, corpus, *run, 3, **saved(alone)), world)
    world.leave()
    return weights


def initial_weights(trial, layout):
    """This rank's parameters by the names of one rank: layers and experts counted over the whole model."""
    from megatron.core import parallel_state

    from models import device, layer_specs

    with device.on("cpu"):
        device.seed_everything(trial.seed, "cpu")
        chunks = layer_specs.build_chunks(trial, layout, "cpu")
        weights = {}
        for chunk in chunks:
            numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            for name, parameter in chunk.named_parameters():
                parts = name.split(".")
                if parts[1] == "layers":
                    parts[2] = str(numbers[int(parts[2])])
                if "local_experts" in parts:
                    place = parts.index("local_experts") + 1
                    first = parallel_state.get_expert_model_parallel_rank() * trial.model.moe.num_experts
                    parts[place] = str(int(parts[place]) + first // layout.expert)
                weights[".".join(parts)] = parameter.detach().numpy().copy()
    return weights


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def lone(world, corpus, tmp_path_factory):
    """The runs of one rank, one for each trial and sequences of a micro-batch over all data-parallel ranks."""
    from models.trainer import train

    home = tmp_path_factory.mktemp("lone")
    for kind, micro_batch in {(kind, micro * layout.data) for kind, layout, micro in RUNS}:
        train(spec_of(home, corpus, kind, Layout(), micro_batch, checkpoint_every_steps=SAVED), world)
    return home


@pytest.fixture(scope="module")
def weights(lone, corpus, tmp_path_factory):
    """All runs of the gangs, trained by four processes: (home, the ranks' initial weights by run)."""
    home = tmp_path_factory.mktemp("gangs")
    return home, ranks.run(train_on_a_rank, 4, home, lone, corpus)


@pytest.fixture(scope="module")
def home(weights):
    return weights[0]


@pytest.fixture(scope="module")
def alone(lone, corpus):
    """(kind, sequences of a micro-batch over all data-parallel ranks) -> the attempt of one rank."""
    return lambda kind, micro_batch: spec_of(lone, corpus, kind, Layout(), micro_batch)


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


def by_run(runs):
    names = [f"{kind}, {name_of(layout)}, {micro}" for kind, layout, micro in runs]
    return pytest.mark.parametrize(("kind", "layout", "micro_batch"), runs, ids=names)


def tolerance_of(trial):
    return EXPERTS_TOLERANCE if trial.model.moe else DENSE_TOLERANCE


@by_run(RUNS)
def test_a_layout_gives_the_losses_and_norms_of_one_rank(home, alone, corpus, kind, layout, micro_batch):
    spec = spec_of(home, corpus, kind, layout, micro_batch)
    summary, trial = summary_of(spec), trial_of(corpus, kind)
    assert summary.outcome == "complete"
    assert summary.num_parameters == accounting.parameters(trial.model, trial.gates, trial.data.vocab_size)
    first, largest = differences(metrics(spec), metrics(alone(kind, micro_batch * layout.data)))
    assert first < FIRST_TOLERANCE
    assert largest < tolerance_of(trial)


@by_run(RUNS)
def test_a_layout_gives_the_diagnostics_of_one_rank(home, alone, corpus, kind, layout, micro_batch):
    """Of experts the first ones only: later a rounding sends a token elsewhere."""
    found = diagnostics(spec_of(home, corpus, kind, layout, micro_batch))
    expected = diagnostics(alone(kind, micro_batch * layout.data))
    assert len(found) == len(expected) > 1
    upto = 1 if trial_of(corpus, kind).model.moe else None
    assert_same_diagnostics(found[:upto], expected[:upto])


@by_run([run for run in RUNS if run[1].tensor == 1])
def test_initial_weights_are_those_of_one_rank_to_the_last_bit(weights, world, corpus, kind, layout, micro_batch):
    trial = trial_of(corpus, kind)
    whole, met = initial_weights(trial, Layout()), set()
    parts = [rank[kind, layout, micro_batch] for rank in weights[1] if (kind, layout, micro_batch) in rank]
    assert len(parts) == layout.world_size
    for part in parts:
        assert len(part) < len(whole) or layout.pipeline * layout.expert == 1
        for name, tensor in part.items():
            if name == "output_layer.weight" and trial.model.tied_embeddings:
                name = "embedding.word_embeddings.weight"  # the last stage's copy
            np.testing.assert_array_equal(tensor, whole[name], err_msg=name)
            met.add(name)
    assert met == whole.keys()


# -- checkpoints ----------------------------------------------------------------------------------------------


@by_run(RESUMED)
def test_a_gang_resumes_to_the_last_bit(home, corpus, kind, layout, micro_batch):
    whole, again = (spec_of(home, corpus, kind, layout, micro_batch, number) for number in (1, 2))
    assert summary_of(again).outcome == "complete"
    expected = [record for record in everything(whole) if record["step"] > SAVED]
    assert everything(again) == expected


@by_run(RUNS)
def test_a_layouts_checkpoint_is_that_of_one_rank(home, alone, corpus, kind, layout, micro_batch):
    """Names and shapes of weights and moments do not tell the layout; the values differ by rounding."""
    spec = spec_of(home, corpus, kind, layout, micro_batch)
    ours, theirs = (
        checkpoint_tensors(run_dir.checkpoint_path(one.attempt_dir, SAVED))
        for one in (spec, alone(kind, micro_batch * layout.data))
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert np.abs(tensor - theirs[name]).mean() <= 1e-3 * np.abs(theirs[name]).mean() + 1e-12, name


@by_run(TAKEN_UP_BY_ONE)
def test_one_rank_goes_on_from_a_layouts_checkpoint(home, alone, world, corpus, tmp_path, kind, layout, micro_batch):
    from models.trainer import train

    from_layout = saved(spec_of(home, corpus, kind, layout, micro_batch))
    spec = spec_of(tmp_path, corpus, kind, Layout(), micro_batch * layout.data, **from_layout)
    train(spec, world)
    expected = [record for record in metrics(alone(kind, micro_batch * layout.data)) if record["step"] > SAVED]
    _, largest = differences(metrics(spec), expected)
    assert largest < tolerance_of(trial_of(corpus, kind))


@by_run(RESUMED)
def test_a_layout_goes_on_from_the_checkpoint_of_one_rank(home, alone, corpus, kind, layout, micro_batch):
    spec = spec_of(home, corpus, kind, layout, micro_batch, 3)
    expected = [record for record in metrics(alone(kind, micro_batch * layout.data)) if record["step"] > SAVED]
    _, largest = differences(metrics(spec), expected)
    assert largest < tolerance_of(trial_of(corpus, kind))


# -- recomputation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("kind", "micro_batch"), [("dense", 8), ("experts", 8), ("parameters", 4)])
def test_recomputed_activations_change_no_bit(alone, world, corpus, tmp_path, kind, micro_batch, recompute):
    """Of losses, gradient norms, validations and diagnostics."""
    from models.trainer import train

    layout = Layout(recompute=recompute)
    spec = spec_of(tmp_path, corpus, kind, layout, micro_batch)
    train(spec, dataclasses.replace(world, layout=layout))
    assert everything(spec) == everything(alone(kind, micro_batch))


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 2), ("full", 2)])
def test_recomputation_runs_core_attention_again(world, corpus, recompute, times):
    from models import device, layer_specs
    from models.trainer import passes

    trial, called = trial_of(corpus, "dense"), []
    with device.on("cpu"):
        (model,) = layer_specs.build_chunks(trial, Layout(recompute=recompute), "cpu")
        core = model.decoder.layers[0].self_attention.core_attention
        core.register_forward_hook(lambda *_: called.append(None))
        tokens = np.arange(8).reshape(1, 8)
        batch = {name: device.torch.from_numpy(tokens) for name in ("tokens", "labels", "position_ids")}
        passes.token_losses(model, batch).sum().backward()
    assert len(called) == times


def test_the_trials_differ_so_that_equality_means_something(alone):
    runs = {kind: micro * layout.data for kind, layout, micro in RUNS}
    last = {round(metrics(alone(kind, micro))[-1]["loss_nats"], 5) for kind, micro in runs.items()}
    assert len(last) == len(TRIALS)
    assert all(loss < math.log(256) - 0.5 for loss in last)
