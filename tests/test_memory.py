"""The memory model against what torch really holds: saved tensors, gradients, optimizer states, and the peak."""

import itertools

import pytest
import ranks
from small_trials import KINDS, VOCABULARY, shape_of

from models import accounting
from models.accounting.memory import in_flight, micro_batches
from models.config import GateConfig, Layout
from models.presets import PRESETS

SEQUENCE = 64
GATES = {
    **KINDS,
    "silu": GateConfig(position="sdpa", activation="silu"),
    "value-silu": GateConfig(position="value", activation="silu"),
    "additive-silu": GateConfig(position="sdpa", activation="silu", combine="additive"),
    "additive-identity": GateConfig(position="sdpa", activation="identity", combine="additive"),
    "shared-logits": GateConfig(position="sdpa", sharing="head_shared", shared_average="logits"),
    "query-before-norm": GateConfig(position="query", qk_order="before_norm"),
    "key-before-norm": GateConfig(position="key", qk_order="before_norm"),
    "dense-ns-sigmoid": GateConfig(position="dense", activation="ns_sigmoid"),
    "dense-silu": GateConfig(position="dense", activation="silu"),
    "open": GateConfig(position="sdpa", init="open"),
    "scaled": GateConfig(position="sdpa", scale=2.0),
    "identity": GateConfig(position="sdpa", activation="identity"),
    "dense-identity": GateConfig(position="dense", activation="identity"),
}
SHAPES = {
    "untied": {"tied_embeddings": False},
    "without-qk-norm": {"qk_norm": False},
    "normalised": {"sdpa_output": "group_norm", "sandwich_norm": True},
    "silu": {"sdpa_output": "silu"},
    "sink": {"softmax_sink": True},
    "odd-ffn": {"ffn_size": 91},
}


def sized(trial, num_sequences, sequence=SEQUENCE):
    """``trial`` with a batch of ``num_sequences``."""
    tokens = {"tokens": num_sequences * sequence, "batch_tokens": num_sequences * sequence}
    data = trial.data.model_copy(update={"sequence_length": sequence})
    return trial.model_copy(update={"data": data, "train": trial.train.model_copy(update=tokens)})


def one_batch(trial):
    import torch

    shape = (trial.batch_sequences, trial.data.sequence_length)
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": torch.arange(shape[1]).expand(shape)}


def saved_bytes(trial, layout=None):
    """What autograd keeps of a forward pass, weights left out and each storage counted once."""
    import torch

    from models import device, layer_specs
    from models.trainer import passes

    layout = layout or Layout()
    with device.on("cpu"):
        model = layer_specs.build_model(trial, layout, "cpu")
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = passes.token_losses(model, one_batch(trial)).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("preset", ["cpu-tiny", "cpu-moe-tiny"])
@pytest.mark.parametrize("kind", GATES)
def test_activations_are_what_autograd_saves(world, preset, kind):
    trial = sized(shape_of(preset, GATES[kind]), 2)
    assert accounting.rank_memory(trial, Layout(), 2, "cpu").activations == pytest.approx(saved_bytes(trial), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["baseline", "sdpa-elementwise-hidden"])
def test_activations_of_every_shape_are_what_autograd_saves(world, shape, kind):
    if shape in ("normalised", "silu") and kind != "baseline":
        kind = "value-headwise-hidden"
    trial = sized(shape_of("cpu-tiny", GATES[kind], **SHAPES[shape]), 3)
    assert accounting.rank_memory(trial, Layout(), 3, "cpu").activations == pytest.approx(saved_bytes(trial), rel=1e-3)


def test_activations_of_gates_at_every_place_add_up(world):
    others = tuple(GateConfig(position=position) for position in ("value", "key", "query", "dense"))
    trial = sized(shape_of("cpu-tiny", GateConfig(position="sdpa")).model_copy(update={"more_gates": others}), 2)
    assert accounting.rank_memory(trial, Layout(), 2, "cpu").activations == pytest.approx(saved_bytes(trial), rel=1e-3)


@pytest.fixture
def stepped(world):
    """A trial's model in DDP and its optimizer, and a function that does one step."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from models import device, layer_specs
    from models.trainer import passes
    from models.trainer.optimizer import update, wrap

    def make(trial):
        batch = one_batch(trial)
        with device.on("cpu"):
            (model,), optimizer = wrap(trial, layer_specs.build_chunks(trial, Layout(), "cpu"), "cpu")

        def forward(batches, model):
            return passes.token_losses(model, next(batches)), lambda losses: (losses.mean(), losses.detach().mean())

        def step():
            with device.on("cpu"):
                model.zero_grad_buffer()
                optimizer.zero_grad()
                get_forward_backward_func()(
                    forward_step_func=forward,
                    data_iterator=iter([batch]),
                    model=[model],
                    num_microbatches=1,
                    seq_length=trial.data.sequence_length,
                    micro_batch_size=trial.batch_sequences,
                    forward_only=False,
                )
                update(optimizer, 1e-3, 1.0)

        step()
        return model, optimizer, step

    return make


@pytest.mark.parametrize("preset", ["cpu-tiny", "cpu-moe-tiny"])
def test_weights_gradients_and_optimizer_are_exact(stepped, preset):
    trial = sized(shape_of(preset, GateConfig(position="sdpa")), 2)
    model, optimizer, _ = stepped(trial)
    expected = accounting.rank_memory(trial, Layout(), 2, "cpu")
    assert sum(p.nbytes for p in model.parameters()) == expected.weights
    assert (
        sum(buffer.grad_data.nbytes for buffer in model.buffers + model.expert_parallel_buffers) == expected.gradients
    )
    states = [state for group in optimizer.optimizer.state.values() for state in group.values()]
    assert sum(state.nbytes for state in states if state.numel() > 1) == expected.optimizer


@pytest.mark.parametrize(
    ("preset", "kind", "sequences"), [("cpu-1m", "sdpa-elementwise-hidden", 4), ("cpu-4m", "baseline", 2)]
)
def test_the_peak_of_a_step_is_activations_and_working_space(stepped, preset, kind, sequences):
    from torch.profiler import ProfilerActivity, profile

    trial = sized(shape_of(preset, GateConfig(position="sdpa")), sequences, sequence=128)
    _, _, step = stepped(trial)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = max(itertools.accumulate(change for _, change in changes))
    expected = accounting.rank_memory(trial, Layout(), sequences, "cpu")
    assert expected.activations + expected.working == pytest.approx(peak, rel=0.05)


# -- layouts --------------------------------------------------------------------------------------------------


def test_recomputation_keeps_less(world):
    """Full: each layer's input, and one whole layer at a time. Selective pays where attention keeps its weights."""
    plain, sink = (sized(shape_of("cpu-4m", None, softmax_sink=sink), 8, 256) for sink in (False, True))
    for trial in (plain, sink):
        none, selective, full = (
            accounting.rank_memory(trial, Layout(recompute=how), 8, "cpu") for how in ("none", "selective", "full")
        )
        assert none.total > selective.total > full.total
        assert full.activations < 0.1 * none.activations
        assert full.working > (none.activations - full.activations) / trial.model.num_layers
    ratios = [
        accounting.rank_memory(trial, Layout(recompute="selective"), 8, "cpu").activations
        / accounting.rank_memory(trial, Layout(), 8, "cpu").activations
        for trial in (plain, sink)
    ]
    assert ratios[1] < 0.8 < 0.98 < ratios[0]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("num_micro_batches", [4, 8])
def test_chunks_in_flight_are_megatrons_warm_up_and_one(monkeypatch, stages, chunks, num_micro_batches):
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
    interleaved = chunks if chunks > 1 else None
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: interleaved)
    for stage in range(stages):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=stage: rank)
        total, _, warm_up, _ = get_pp_rank_microbatches(num_micro_batches, chunks, stages)
        layout = Layout(pipeline=stages, virtual_pipeline=chunks)
        assert in_flight(layout, stage, num_micro_batches) == min(warm_up + 1, total)


def test_the_first_stage_holds_most_in_flight_and_the_last_the_logits():
    trial = sized(shape_of("dense-1.7b-28l", None, num_layers=8), 64, 1024)
    layout = Layout(pipeline=4)
    stages = [accounting.rank_memory(trial, layout, 4, "cuda", stage) for stage in range(4)]
    without_ends = [stage.activations for stage in stages[:3]]
    assert without_ends == sorted(without_ends, reverse=True)
    assert stages[0].activations == pytest.approx(2 * stages[2].activations, rel=0.01)
    wide = trial.model_copy(update={"data": trial.data.model_copy(update={"vocab_size": 152_064})})
    wide_stages = [accounting.rank_memory(wide, layout, 4, "cuda", stage) for stage in range(4)]
    assert [w.activations - s.activations for w, s in zip(wide_stages, stages, strict=True)][:3] == [0, 0, 0]
    added = wide_stages[3].activations - stages[3].activations
    assert added == 4 * (152_064 - VOCABULARY) * 4 * 1024  # fp32, for every token of the micro-batch


def test_the_distributed_optimizer_shares_its_states_and_master_weights():
    trial = sized(shape_of("moe-15a2b", None), 64).model_copy(update={"precision": "bf16"})
    alone, shared = (accounting.rank_memory(trial, Layout(data=n, expert=e), 1, "cuda") for n, e in ((1, 1), (8, 4)))
    total = accounting.parameters(trial.model, None, VOCABULARY)
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * total, 4 * total, 12 * total)
    held = accounting.rank_parameters(trial.model, None, VOCABULARY, Layout(data=8, expert=4), 0)
    assert held.experts == (total - held.shared) // 4
    assert shared.optimizer == 12 * held.shared // 8 + 12 * held.experts // 2


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("preset", ["cpu-tiny", "cpu-moe-tiny"])
def test_what_recomputation_keeps_is_what_autograd_saves(world, recompute, preset):
    for gate, changes in ((GateConfig(position="sdpa"), {}), (None, {"softmax_sink": True})):
        trial, layout = sized(shape_of(preset, gate, **changes), 2), Layout(recompute=recompute)
        expected = accounting.rank_memory(trial, layout, 2, "cpu").activations
        assert expected == pytest.approx(saved_bytes(trial, layout), rel=0.05), changes


LAYOUTS = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "data": Layout(data=2),
    "pipeline": Layout(pipeline=2),
    "expert": Layout(data=2, expert=2),
    "expert-tensor": Layout(tensor=2, expert=2, sequence_parallel=True),
}


def on_a_rank(rank, folder, trials):
    """(parameters, experts' parameters, saved bytes) by layout and trial; no bytes of a pipeline's stage."""
    import torch

    from models import device, layer_specs
    from models.trainer import World

    found = {}
    for name, layout in LAYOUTS.items():
        world = World.join(rank, layout, "cpu", f"file://{folder}/{name}")
        for trial_name, trial in trials.items():
            if not runs(layout, trial):
                continue
            with torch.device("meta"), device.on("cpu"):
                named = dict(layer_specs.build_model(trial, layout, "cpu").named_parameters())
            experts = sum(p.numel() for key, p in named.items() if ".experts." in key)
            saved = None if layout.pipeline > 1 else saved_bytes(trial, layout)
            found[name, trial_name] = sum(p.numel() for p in named.values()), experts, saved
        world.leave()
    return found


def runs(layout, trial):
    if trial.model.moe is None:
        return layout.expert == 1
    return layout.tensor == 1 or layout.sequence_parallel


def test_parameters_and_activations_of_a_rank_are_the_built_ones(tmp_path):
    kinds = ("baseline", "sdpa-elementwise-hidden", "value-headwise-none", "key-elementwise-hidden", "sdpa-shared")
    trials = {kind: shape_of("cpu-tiny", KINDS[kind], sandwich_norm=kind == "baseline") for kind in kinds}
    trials |= {
        kind: shape_of("cpu-tiny", KINDS[kind]) for kind in ("dense-elementwise-hidden", "dense-elementwise-none")
    }
    trials |= {"sink": shape_of("cpu-tiny", None, tied_embeddings=False, softmax_sink=True)}
    trials |= {"group-norm": shape_of("cpu-tiny", None, qk_norm=False, sdpa_output="group_norm")}
    trials |= {"experts": shape_of("cpu-moe-tiny", KINDS["sdpa-headwise-hidden"])}
    trials = {name: sized(trial, 2) for name, trial in trials.items()}
    for rank, found in enumerate(ranks.run(on_a_rank, 2, trials)):
        for (name, trial_name), (number, experts, saved) in found.items():
            trial, layout = trials[trial_name], LAYOUTS[name]
            stage = rank if layout.pipeline > 1 else 0
            held = accounting.rank_parameters(trial.model, trial.gates, VOCABULARY, layout, stage)
            assert (number, experts) == (held.total, held.experts), (name, trial_name, rank)
            if saved is not None and trial.model.moe is None:
                expected = accounting.rank_memory(trial, layout, 2, "cpu").activations
                assert expected == pytest.approx(saved, rel=0.01), (name, trial_name, rank)


# -- what fits ------------------------------------------------------------------------------------------------


def test_the_largest_micro_batch_that_fits_is_a_divisor_of_the_share():
    trial = sized(shape_of("dense-1.7b-28l", None), 96, 4096).model_copy(update={"precision": "bf16"})
    layout = Layout(data=8)
    assert list(micro_batches(trial, layout)) == [12, 6, 4, 3, 2, 1]
    needs = {size: accounting.fullest_rank(trial, layout, size, "cuda") for size in micro_batches(trial, layout)}
    for size, memory in needs.items():
        room = memory.total / (1 - accounting.SPARE_FRACTION)
        assert accounting.largest_micro_batch(trial, layout, "cuda", room + 1) == size
    assert accounting.largest_micro_batch(trial, layout, "cuda", room - 1e6) is None
    assert accounting.largest_micro_batch(trial, layout, "cuda", None) == 12


@pytest.mark.parametrize("preset", PRESETS)
def test_more_of_anything_needs_more_and_more_ranks_need_less(preset):
    trial = sized(shape_of(preset, GateConfig(position="sdpa")), 64, 1024).model_copy(update={"precision": "bf16"})

    def total(layout=None, micro=8, trial=trial):
        return accounting.fullest_rank(trial, layout or Layout(), micro, "cuda").total

    assert total(micro=4) < total(micro=8) < total(micro=16)
    assert total() > total(trial=trial.model_copy(update={"gate": None}))
    assert total(Layout(data=2)) < total()
    assert total(Layout(context=2)) < total()
    assert total(Layout(tensor=2, sequence_parallel=True)) < total(Layout(tensor=2)) < total()
    if trial.model.moe:
        assert total(Layout(data=2, expert=2)) < total(Layout(data=2))
