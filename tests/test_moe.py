"""The mixture of experts against the oracle, the losses that teach its router, and what they must not touch."""

import math

import pytest
import ranks
from oracle import Oracle, relative_error, token_weight, unpack, wrong
from small_trials import (
    SMALL,
    build,
    corpus_trial,
    metrics,
    new_attempt,
    small_batch,
    small_trial,
    steps_of,
    summary_of,
    token_losses,
    write_corpus,
)

from models import accounting, run_dir
from models.config import GateConfig, Layout, MoEConfig
from models.presets import PRESETS

TOLERANCE = 1e-5
OFF = {"aux_loss_coefficient": 0.0, "z_loss_coefficient": 0.0}


def small_moe(num_experts=6, top_k=2, **moe):
    """Narrow experts; coefficients large enough to matter, unless they are given."""
    coefficients = {"aux_loss_coefficient": 0.7, "z_loss_coefficient": 0.3} | moe
    experts = MoEConfig(num_experts=num_experts, top_k=top_k, **coefficients)
    return SMALL.model_copy(update={"ffn_size": 20, "moe": experts})


@pytest.fixture(autouse=True)
def unscaled():
    """What an earlier training step of this process left as the scale of the router's losses."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


# -- the layer and its gradients ------------------------------------------------------------------------------


def differences(trial):
    """What the built model does differently from the oracle, as in test_attention."""
    model, batch = build(trial), small_batch(num_sequences=3)
    losses = token_losses(model, *batch)
    (losses * token_weight(batch[0])).sum().backward()
    named = dict(model.named_parameters())
    return wrong(trial, named, losses, {name: p.grad for name, p in named.items()}, batch, TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "moe",
    [OFF, {"aux_loss_coefficient": 0.0}, {"z_loss_coefficient": 0.0}, {}],
    ids=["without router losses", "z-loss", "load balancing", "both"],
)
def test_losses_and_gradients_are_the_oracles(world, top_k, moe):
    assert not differences(small_trial(None, small_moe(top_k=top_k, **moe)))


@pytest.mark.parametrize(
    "changes", [{"sandwich_norm": True}, {"tied_embeddings": False}, {"softmax_sink": True}, {"sdpa_output": "silu"}]
)
def test_experts_go_with_every_other_mechanism(world, changes):
    gate = GateConfig(position="sdpa", granularity="headwise")
    assert not differences(small_trial(gate, small_moe().model_copy(update=changes)))


def test_router_losses_move_the_router(world):
    """So that equality with the oracle means something."""
    gradients = []
    for moe in (OFF, {"aux_loss_coefficient": 0.7}, {"z_loss_coefficient": 0.3}):
        model, batch = build(small_trial(None, small_moe(**OFF | moe))), small_batch()
        token_losses(model, *batch).sum().backward()
        gradients.append(model.decoder.layers[1].mlp.router.weight.grad)
    assert relative_error(gradients[1], gradients[0]) > 1e-3
    assert relative_error(gradients[2], gradients[0]) > 1e-3


# -- micro-batches --------------------------------------------------------------------------------------------


def gradients_of_a_step(trial, num_micro_batches, batch):
    """What Megatron's schedule leaves in the gradient buffers, by name."""
    from models import device
    from models.trainer import passes
    from models.trainer.optimizer import wrap

    tokens, labels = batch
    parts = [
        {
            "tokens": part,
            "labels": targets,
            "position_ids": part.new_tensor(range(part.shape[1])).expand_as(part),
            "loss_mask": (part >= 0).float(),
        }
        for part, targets in zip(tokens.chunk(num_micro_batches), labels.chunk(num_micro_batches), strict=True)
    ]
    model = build(trial)
    with device.on("cpu"):
        wrapped, _ = wrap(trial, [model], "cpu")
        wrapped[0].zero_grad_buffer()
        passes.run(
            wrapped,
            lambda: iter(parts),
            passes.mean_loss,
            num_micro_batches=num_micro_batches,
            sequence_length=tokens.shape[1],
            micro_batch_sequences=tokens.shape[0] // num_micro_batches,
        )
    return model, {name: parameter.main_grad for name, parameter in model.named_parameters()}


def oracle_gradients(trial, model, num_micro_batches, batch):
    """Mean over micro-batches of cross-entropy and router losses, f being the mean over the micro-batches so far."""
    oracle = Oracle(trial.model, trial.gates, unpack(dict(model.named_parameters()), trial.model, trial.gates))
    seen, total = [], 0.0
    for tokens, labels in zip(*(part.chunk(num_micro_batches) for part in batch), strict=True):
        loss = oracle.losses(tokens, labels).mean()
        seen.append(oracle.fractions())
        so_far = [sum(layer) / len(seen) for layer in zip(*seen, strict=True)]
        total = total + (loss + oracle.router_losses(so_far)) / num_micro_batches
    total.backward()
    return {name: weight.grad for name, weight in oracle.weights.items()}


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_router_losses_are_means_over_micro_batches_like_the_loss(world, num_micro_batches):
    trial, batch = small_trial(None, small_moe()), small_batch(num_sequences=4)
    model, gradients = gradients_of_a_step(trial, num_micro_batches, batch)
    expected = oracle_gradients(trial, model, num_micro_batches, batch)
    for name, gradient in unpack(gradients, trial.model, ()).items():
        assert relative_error(gradient, expected[name]) < 5 * TOLERANCE, name


def test_micro_batches_change_nothing_but_rounding_where_the_losses_allow_it(world):
    """The z-loss is a mean over tokens. Load balancing counts choices, and Megatron's count grows over the batch."""
    batch = small_batch(num_sequences=4)

    def moved_by_micro_batches(**moe):
        trial = small_trial(None, small_moe(**moe))
        one, two = (gradients_of_a_step(trial, number, batch)[1] for number in (1, 2))
        name = "decoder.layers.0.mlp.router.weight"
        return relative_error(two[name], one[name])

    assert moved_by_micro_batches(aux_loss_coefficient=0.0) < TOLERANCE
    assert 1e-3 < moved_by_micro_batches() < 0.5
    assert moved_by_micro_batches(aux_loss_coefficient=1e-3) < 2e-3


# -- whole trials ---------------------------------------------------------------------------------------------


def moe_trial(corpus, steps=5, preset="cpu-moe-tiny", gate=None, train=None, **moe):
    model = PRESETS[preset]
    model = model.model_copy(update={"moe": model.moe.model_copy(update=moe)})
    return corpus_trial(corpus, gate, steps, **(train or {})).model_copy(update={"model": model})


@pytest.mark.parametrize("preset", ["cpu-moe-tiny", "cpu-moe-1m"])
def test_a_trial_learns_and_counts_all_its_parameters(world, corpus, tmp_path, preset):
    """Both in one process: the second model has more layers than what Megatron's tables were made for."""
    from models.trainer import train

    for name in ("cpu-moe-tiny", preset):
        spec = new_attempt(tmp_path / name, moe_trial(corpus, steps=12, preset=name))
        summary = train(spec, world)
    losses = [record.loss_nats for record in steps_of(spec)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert losses[-1] < losses[0] - 0.8
    assert summary.num_parameters == accounting.parameters(PRESETS[preset], None, 256)


def test_recorded_losses_are_the_cross_entropy_alone(world, corpus, tmp_path):
    """At a rate of nothing the router's losses, however large, show in the gradient and nowhere else."""
    from models.trainer import train

    curves = []
    for moe in (OFF, {"aux_loss_coefficient": 50.0, "z_loss_coefficient": 50.0}):
        spec = new_attempt(tmp_path / str(len(curves)), moe_trial(corpus, steps=2, train={"lr": 1e-30}, **moe))
        train(spec, world)
        curves.append(metrics(spec))
    plain, taught = curves
    assert {record["kind"] for record in plain} == {"step", "validation"}
    assert [record["loss_nats"] for record in taught] == [record["loss_nats"] for record in plain]
    assert taught[0]["gradient_norm"] > 2 * plain[0]["gradient_norm"]


# -- two data-parallel ranks ----------------------------------------------------------------------------------

DATA = Layout(data=2)
ON_TWO_RANKS = {
    "as published": {},
    "load balancing": {"aux_loss_coefficient": 5.0, "z_loss_coefficient": 0.0},
    "z-loss": {"aux_loss_coefficient": 0.0, "z_loss_coefficient": 0.5},
    "one expert": {"top_k": 1},
}


def train_on_a_rank(rank, folder, home, corpus):
    from models.trainer import World, train

    world = World.join(rank, DATA, "cpu", f"file://{folder}/meet")
    for kind, moe in ON_TWO_RANKS.items():
        train(new_attempt(home / kind, moe_trial(corpus, **moe), layout=DATA, checkpoint_every_steps=3), world)


def assert_same_but_for_rounding(found, expected, first):
    """Nearly the same at step ``first``, where weights are. Later a rounding can send a token to another expert."""
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        exact = ours["step"] == first
        assert ours["loss_nats"] == pytest.approx(theirs["loss_nats"], rel=1e-5 if exact else 2e-3), ours["step"]
        if exact and ours["kind"] == "step":
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=2e-5)


@pytest.fixture(scope="module")
def gang(corpus, tmp_path_factory):
    home = tmp_path_factory.mktemp("gang")
    ranks.run(train_on_a_rank, 2, home, corpus)
    return home


@pytest.mark.parametrize("kind", ON_TWO_RANKS)
def test_two_data_parallel_ranks_give_the_losses_and_norms_of_one(world, gang, corpus, tmp_path, kind):
    """Balance is over the global batch: 4 sequences on each of two ranks are the 8 of one."""
    from models.trainer import train

    trial = moe_trial(corpus, **ON_TWO_RANKS[kind])
    alone, together = new_attempt(tmp_path, trial), new_attempt(gang / kind, trial, layout=DATA)
    train(alone, world)
    assert summary_of(together).outcome == "complete"
    assert_same_but_for_rounding(metrics(together), metrics(alone), first=1)


def test_what_two_ranks_saved_goes_on_with_one(world, gang, corpus):
    """Not bit for bit: sums are taken in another order."""
    from models.trainer import train

    trial = moe_trial(corpus, **ON_TWO_RANKS["load balancing"])
    together = new_attempt(gang / "load balancing", trial, layout=DATA, checkpoint_every_steps=3)
    checkpoint = run_dir.checkpoint_path(together.attempt_dir, 3)
    alone = new_attempt(gang / "load balancing", trial, 2, resume_checkpoint=str(checkpoint), resume_step=3)
    train(alone, world)
    expected = [record for record in metrics(together) if record["step"] > 3]
    assert_same_but_for_rounding(metrics(alone), expected, first=4)


# -- two tensor-parallel ranks --------------------------------------------------------------------------------

TENSOR = Layout(tensor=2)


def refusal_on_a_rank(rank, folder, home, corpus):
    from models.trainer import World, train

    world = World.join(rank, TENSOR, "cpu", f"file://{folder}/meet")
    try:
        train(new_attempt(home, moe_trial(corpus), layout=TENSOR), world)
    except ValueError as error:
        return str(error)
    return None


def test_megatron_itself_refuses_tensor_parallel_experts(corpus, tmp_path):
    """Why ``plan`` does: when this fails, experts may train over tensor ranks, and the plan's refusal has to go."""
    for message in ranks.run(refusal_on_a_rank, 2, tmp_path, corpus):
        assert "without also enabling sequence parallelism" in str(message)
