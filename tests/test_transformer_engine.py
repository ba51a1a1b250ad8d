"""The Transformer Engine layers against the local ones: same weights, same outputs, same gradients, same checkpoints.

On a CPU, by Transformer Engine's own Python over a stand-in for its kernels (``te_on_cpu``), in processes of their own.
Prints the largest difference of every comparison: ``pytest -s tests/test_transformer_engine.py``.
"""

import itertools
import math
from pathlib import Path

import pytest
import ranks
import te_on_cpu
from oracle import relative_error, token_weight
from small_trials import KINDS, SMALL, build, small_batch, small_trial, token_losses

from models import run_dir
from models.config import GateConfig, Layout, MoEConfig, TrialConfig

TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2
"""A rounding to bf16 is 4e-3, and the two back ends round at other places."""
OTHER = {"local": "transformer_engine", "transformer_engine": "local"}

needs_sources = pytest.mark.skipif(
    te_on_cpu.sources() is None,
    reason=f"no Transformer Engine sources: make puts them beside the environment, or set {te_on_cpu.FOLDER_VARIABLE}",
)

MOE = {"moe": MoEConfig(num_experts=4, top_k=2)}
SHAPES = {
    "no QK-norm": {"qk_norm": False},
    "untied": {"tied_embeddings": False},
    "a kv head each": {"num_kv_heads": 4},
    "sandwich norm": {"sandwich_norm": True},
    "sinks": {"softmax_sink": True},
    "GroupNorm": {"sdpa_output": "group_norm"},
    "SiLU": {"sdpa_output": "silu"},
    "experts": MOE,
    "one expert a token": {"moe": MoEConfig(num_experts=4, top_k=1)},
}
GATES = {
    "sdpa-additive": GateConfig(position="sdpa", combine="additive", activation="silu"),
    "sdpa-ns_sigmoid": GateConfig(position="sdpa", activation="ns_sigmoid", init="open", scale=2.0),
    "key-before_norm": GateConfig(position="key", qk_order="before_norm"),
    "dense-additive": GateConfig(position="dense", combine="additive", activation="identity"),
}
SEVERAL = (GateConfig(position="value", granularity="headwise"), GateConfig(position="dense"))


def cases():
    """Every gate of the tests, alone; every shape, ungated and gated; gates at several places."""
    found = {kind: small_trial(gate) for kind, gate in (KINDS | GATES).items()}
    for name, changes in SHAPES.items():
        model = SMALL.model_copy(update=changes)
        for kind in ("baseline", "sdpa-headwise-hidden", "dense-elementwise-hidden"):
            found[f"{kind}, {name}"] = small_trial(KINDS[kind], model)
    trial = small_trial(GateConfig(position="sdpa"))
    return found | {"sdpa+value+dense": trial.model_copy(update={"more_gates": SEVERAL})}


CASES = cases()
STORED = ("sdpa-headwise-hidden", "dense-elementwise-hidden", "sdpa-headwise-hidden, experts", "baseline, sinks")
SHARDED = {
    kind: CASES[kind]
    for kind in ("baseline", "sdpa-elementwise-hidden", "value-shared", "dense-elementwise-hidden", "baseline, sinks")
}
SHARDED_EXPERTS = "sdpa-headwise-hidden, experts"
"""Over tensor-parallel ranks Megatron has experts under sequence parallelism only."""


# -- in processes of their own --------------------------------------------------------------------------------


def local_name(name):
    """A parameter's name in the local spec: the norms stand by themselves there, and so do the experts."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    stem, found, expert = name.rpartition(".weight")
    if found and expert and ".experts.linear_fc" in name:
        before, linear = stem.split(".experts.")
        return f"{before}.experts.local_experts.{expert}.{linear}.weight"
    return name


def built(trial, backend, layout=None, seed=1):
    from models import device, layer_specs

    with device.on("cpu"):
        device.seed_everything(seed, "cpu")
        return layer_specs.build_model(trial, layout or Layout(), "cpu", backend)


def by_local_name(model):
    return {local_name(name): parameter for name, parameter in model.named_parameters()}


def twins(trial, layout=None):
    """(local, Transformer Engine), with the same weights, drawn so that each matters."""
    import torch

    local, other = build(trial, layout), built(trial, "transformer_engine", layout)
    named = dict(local.named_parameters())
    assert by_local_name(other).keys() == named.keys()
    with torch.no_grad():
        for name, parameter in by_local_name(other).items():
            parameter.copy_(named[name])
    return local, other


def results(model):
    """Losses [B, S], and gradients by local name."""
    from models import device

    batch = small_batch()
    with device.on("cpu"):
        losses = token_losses(model, *batch)
        (losses * token_weight(batch[0])).sum().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in by_local_name(model).items()}


def difference(local, other):
    """(of the losses, of the gradients): max|a - b| / max|b|, for gradients the worst parameter's."""
    (ours, gradients), (theirs, expected) = results(other), results(local)
    worst = max(expected, key=lambda name: relative_error(gradients[name], expected[name]))
    return relative_error(ours, theirs), relative_error(gradients[worst], expected[worst]), worst


def initial(trial, layout=None):
    """Whether both back ends draw the same weights, and count the same parameters."""
    from models import layer_specs

    local, other = built(trial, "local", layout), built(trial, "transformer_engine", layout)
    named = dict(local.named_parameters())
    same = all(bool((parameter == named[name]).all()) for name, parameter in by_local_name(other).items())
    return same, layer_specs.num_parameters(local) == layer_specs.num_parameters(other)


class Training:
    """A model of one back end in training."""

    def __init__(self, trial, backend, seed):
        from models import device
        from models.trainer.optimizer import wrap

        with device.on("cpu"):
            (self.model,), self.optimizer = wrap(trial, [built(trial, backend, seed=seed)], "cpu")

    def step(self):
        from models import device
        from models.trainer.optimizer import update

        with device.on("cpu"):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            loss = token_losses(self.model, *small_batch()).mean()
            loss.backward()
            self.model.finish_grad_sync()
            update(self.optimizer, 1e-2, 1.0)
        return loss.item()

    def state(self):
        """Weights and moments by local name."""
        named = by_local_name(self.model.module)
        (optimizer,) = [chained.optimizer for chained in self.optimizer.chained_optimizers]
        moments = {
            f"{name}, {moment}": optimizer.state[parameter][moment]
            for name, parameter in named.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        return {name: tensor.detach().clone() for name, tensor in (named | moments).items()}


def carried_over(trial, backend, folder):
    """Write a checkpoint with ``backend``, read it with the other: (same weights and moments, same next loss)."""
    import torch

    from models import checkpoint, device

    writer, reader = Training(trial, backend, seed=1), Training(trial, OTHER[backend], seed=2)
    for _ in range(2):
        writer.step()
    with device.on("cpu"):
        saver = checkpoint.Saver(folder, 1, checkpoint.Writer())
        saver.save(2, [writer.model], writer.optimizer)
        saver.wait()
        path = run_dir.checkpoint_path(folder, 2)
        assert checkpoint.load(path, [reader.model], reader.optimizer) == 2
    written, read = writer.state(), reader.state()
    assert written.keys() == read.keys()
    differing = [name for name in written if not torch.equal(read[name], written[name])]
    ours, theirs = reader.step(), writer.step()
    return differing, abs(ours - theirs) / theirs


def probed(trial):
    """What diagnostics say of both models, the same but for rounding: the largest difference of a number."""
    import torch

    from models import device
    from models.diagnostics import probe

    tokens, _ = small_batch()
    batch = {"tokens": tokens, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens)}
    with device.on("cpu"):
        local, other = (probe(model, batch) for model in twins(trial))

    def numbers(found):
        layers = zip(found.max_activation, found.gate_scores["sdpa"].mean, found.first_token_attention, strict=True)
        return torch.tensor([[largest, score, *heads] for largest, score, heads in layers])

    return relative_error(numbers(other), numbers(local))


def bf16(trial):
    return trial.model_copy(update={"precision": "bf16"})


def on_one_rank(rank, folder):
    te_on_cpu.install()
    import torch

    from models.trainer import World

    World.join(rank, Layout(), "cpu", f"file://{folder}/meet")
    wrong_norm = {}
    for name in ("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight", "q_layernorm.weight"):
        local, other = twins(CASES["sdpa-elementwise-hidden"])
        with torch.no_grad():
            next(p for key, p in other.named_parameters() if key.endswith(name)).mul_(1.001)
        wrong_norm[name] = difference(local, other)
    return {
        "fp32": {kind: difference(*twins(trial)) for kind, trial in CASES.items()},
        "bf16": {kind: difference(*twins(bf16(CASES[kind])))[0] for kind in SHARDED},
        "wrong norm": wrong_norm,
        "initial": {kind: initial(trial) for kind, trial in CASES.items()},
        "checkpoints": {
            (kind, backend): carried_over(CASES[kind], backend, Path(folder) / f"{number}-{backend}")
            for number, kind in enumerate(STORED)
            for backend in OTHER
        },
        "diagnostics": probed(CASES["sdpa-elementwise-hidden"]),
        "fp8": fp8_models(),
    }


def on_two_ranks(rank, folder):
    te_on_cpu.install()
    from models.trainer import World

    World.join(rank, Layout(tensor=2), "cpu", f"file://{folder}/meet")
    found = {}
    for kind, sequence_parallel in [*itertools.product(SHARDED, (False, True)), (SHARDED_EXPERTS, True)]:
        models = twins(CASES[kind], Layout(tensor=2, sequence_parallel=sequence_parallel))
        found[kind, sequence_parallel] = {
            "difference": difference(*models),
            "marked": [{name for name, p in by_local_name(model).items() if marked(p)} for model in models],
            "initial": initial(CASES[kind], Layout(tensor=2, sequence_parallel=sequence_parallel)),
        }
    return found


def marked(parameter):
    """Whether its gradient is summed over the tensor-parallel ranks, each of which sees a part of the sequence."""
    return getattr(parameter, "sequence_parallel", False)


# -- FP8: what can be known without running it ----------------------------------------------------------------


def fp8_trial(recipe, kind):
    return TrialConfig.model_validate(
        {**CASES[kind].model_dump(), "precision": "fp8", "fp8": {"recipe": recipe, "format": "e4m3"}}
    )


def fp8_models():
    from megatron.core.fp8_utils import get_fp8_recipe

    from models import accounting, layer_specs

    found = {}
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        for kind in ("baseline", "sdpa-headwise-hidden"):
            trial = fp8_trial(recipe, kind)
            model = built(trial, "transformer_engine")
            taken = get_fp8_recipe(model.config)
            weight = model.decoder.layers[0].self_attention.linear_qkv.weight
            found[recipe, kind] = {
                "recipe": type(taken).__name__,
                "format": taken.fp8_format.name,
                "rows": weight.shape[0],
                "parameters": layer_specs.num_parameters(model)
                - accounting.parameters(trial.model, trial.gates, trial.data.vocab_size),
            }
    return found


# -- the properties -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank():
    (found,) = ranks.run(on_one_rank, 1)
    return found


@pytest.fixture(scope="module")
def two_ranks():
    return ranks.run(on_two_ranks, 2)


def report(title, differences):
    losses, gradients, _ = zip(*differences.values(), strict=True)
    print(f"\n{title}: losses {max(losses):.1e}, gradients {max(gradients):.1e} (largest of {len(losses)})")


@needs_sources
def test_losses_and_gradients_are_the_local_ones(one_rank):
    found = one_rank["fp32"]
    report("TE against local, fp32", found)
    assert not {kind: row for kind, row in found.items() if not max(row[:2]) < TOLERANCE}


@needs_sources
def test_in_bf16_they_are_near(one_rank):
    found = one_rank["bf16"]
    print(f"\nTE against local, bf16: losses {max(found.values()):.1e} (largest of {len(found)})")
    assert max(found.values()) < BF16_TOLERANCE
    assert max(found.values()) > 0.0


@needs_sources
def test_the_comparison_sees_a_norm_that_is_off_by_a_thousandth(one_rank):
    for row in one_rank["wrong norm"].values():
        assert min(row[:2]) > TOLERANCE


@needs_sources
def test_initial_weights_and_their_number_are_the_local_ones(one_rank):
    assert one_rank["initial"] == dict.fromkeys(CASES, (True, True))


@needs_sources
@pytest.mark.parametrize("backend", OTHER)
@pytest.mark.parametrize("kind", STORED)
def test_a_checkpoint_of_one_back_end_goes_on_with_the_other(one_rank, kind, backend):
    differing, next_loss = one_rank["checkpoints"][kind, backend]
    assert not differing
    assert next_loss < 1e-6


@needs_sources
def test_diagnostics_see_the_same_numbers(one_rank):
    assert one_rank["diagnostics"] < TOLERANCE


@needs_sources
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks_do_what_local_ones_do(two_ranks, sequence_parallel):
    for found in two_ranks:
        own = {kind: row["difference"] for (kind, parallel), row in found.items() if parallel == sequence_parallel}
        report(f"TE against local, TP=2{' + SP' if sequence_parallel else ''}", own)
        assert not {kind: row for kind, row in own.items() if not max(row[:2]) < TOLERANCE}


@needs_sources
def test_the_same_gradients_are_summed_over_parts_of_the_sequence(two_ranks):
    for (_, sequence_parallel), row in two_ranks[0].items():
        local, other = row["marked"]
        assert local == other
        assert bool(local) == sequence_parallel


@needs_sources
def test_two_ranks_draw_and_count_what_local_ones_do(two_ranks):
    for found in two_ranks:
        assert all(row["initial"] == (True, True) for row in found.values())


FP8_RECIPES = {
    "tensorwise": ("Float8CurrentScaling", 16),
    "delayed": ("TEDelayedScaling", 16),
    "blockwise": ("Float8BlockScaling", 128),
    "mxfp8": ("MXFP8BlockScaling", 32),
}


@needs_sources
@pytest.mark.parametrize("kind", ["baseline", "sdpa-headwise-hidden"])
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_an_fp8_model_has_its_recipe_and_rows_that_fp8_takes(one_rank, recipe, kind):
    found, (name, multiple) = one_rank["fp8"][recipe, kind], FP8_RECIPES[recipe]
    assert (found["recipe"], found["format"]) == (name, "E4M3")
    plain = SMALL.num_kv_heads * (4 * SMALL.head_dim + (2 if kind != "baseline" else 0))
    assert found["rows"] == SMALL.num_kv_heads * multiple * math.ceil(plain / SMALL.num_kv_heads / multiple)
    assert found["parameters"] == 0
