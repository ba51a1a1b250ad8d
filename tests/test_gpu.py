"""What only a GPU can show: Transformer Engine's kernels, FP8, NCCL, speed. ``make test-gpu``; skipped aloud elsewhere.

Every case runs in processes of its own, a GPU a rank. Figures are printed (``pytest -s -m gpu``). Here alone is a time
asserted: a gate may cost 2 % of a step (the paper's claim), measured beside the baseline in one process.
"""

import math
import statistics
from pathlib import Path

import pytest
import ranks
from oracle import relative_error
from small_trials import KINDS, corpus_trial, new_attempt, steps_of, summary_of, write_corpus

from models import run_dir
from models.config import GateConfig, Layout, ModelConfig, MoEConfig, TrialConfig
from models.presets import PRESETS

pytestmark = pytest.mark.gpu

FP8_SHAPE = ModelConfig(num_layers=2, hidden_size=256, num_query_heads=4, num_kv_heads=2, head_dim=64, ffn_size=512)
"""Every dimension a multiple of 128, which the block recipe asks for."""
BIG = PRESETS["dense-1.7b-28l"].model_copy(update={"num_layers": 4})
"""Four layers of the paper's dense model: as wide as the real one, and fits anywhere."""
GATED = {"sdpa elementwise": GateConfig(position="sdpa"), "sdpa headwise": KINDS["sdpa-headwise-hidden"]}


@pytest.fixture
def on_gpus():
    """``on_gpus(function, number, *arguments)``: what each rank returned; skips where there are too few."""
    torch = pytest.importorskip("torch")

    def run(function, number, *arguments):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found < number:
            pytest.skip(f"needs {number} CUDA device(s), torch sees {found}")
        return ranks.run(function, number, *arguments)

    return run


@pytest.fixture
def with_te():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and Transformer Engine")
    return pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine", exc_type=Exception)


def trial_of(model, gate=None, precision="bf16", fp8=None, sequence=256, sequences=4):
    values = {
        "model": model.model_dump(),
        "gate": None if gate is None else gate.model_dump(),
        "precision": precision,
        "fp8": fp8,
        "data": {"sequence_length": sequence, "vocab_size": 1024},
        "train": {"tokens": 100 * sequence * sequences, "batch_tokens": sequence * sequences, "lr": 1e-3},
        "seed": 1,
    }
    return TrialConfig.model_validate(values)


# -- on a rank ------------------------------------------------------------------------------------------------


class Training:
    """A trial's model on this rank's GPU, trained on one batch of random tokens."""

    def __init__(self, trial, backend, layout=None):
        import torch

        from models import device, layer_specs
        from models.trainer.optimizer import wrap

        self.trial = trial
        device.seed_everything(trial.seed, "cuda")
        self.chunks, self.optimizer = wrap(
            trial, layer_specs.build_chunks(trial, layout or Layout(), "cuda", backend), "cuda"
        )
        generator = torch.Generator().manual_seed(0)
        shape = (trial.batch_sequences, trial.data.sequence_length)
        tokens = torch.randint(trial.data.vocab_size, shape, generator=generator).cuda()
        self.batch = {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "position_ids": torch.arange(shape[1], device="cuda").expand(shape),
            "loss_mask": torch.ones(shape, device="cuda"),
        }

    def losses(self):
        from models.trainer.passes import token_losses

        return token_losses(self.chunks[0], self.batch)

    def step(self):
        import torch

        from models.trainer import passes
        from models.trainer.optimizer import update

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        (loss,) = passes.run(
            self.chunks,
            lambda: iter([self.batch]),
            passes.mean_loss,
            num_micro_batches=1,
            micro_batch_sequences=self.trial.batch_sequences,
            sequence_length=self.trial.data.sequence_length,
        )
        norm = update(self.optimizer, self.trial.train.lr, self.trial.train.clip_gradient_norm)
        assert math.isfinite(norm)
        torch.cuda.synchronize()
        return float(loss)


def join(rank, folder, layout=None):
    from models.trainer import World

    return World.join(rank, layout or Layout(), "cuda", f"file://{folder}/meet", local_rank=rank)


def both_back_ends(rank, folder, trial):
    """Losses of the same initial weights, and of ten steps, by back end."""
    join(rank, folder)
    found = {}
    for backend in ("local", "transformer_engine"):
        training = Training(trial, backend)
        first = training.losses().detach().float().cpu()
        found[backend] = first, [training.step() for _ in range(10)]
    return found


def fp8_run(rank, folder, trial):
    """Losses of ten steps, and the next one as the run itself and as a run from its checkpoint has it."""
    from models import checkpoint

    join(rank, folder)
    training, resumed = Training(trial, "transformer_engine"), Training(trial, "transformer_engine")
    losses = [training.step() for _ in range(10)]
    saver = checkpoint.Saver(Path(folder), 1, checkpoint.Writer())
    saver.save(10, training.chunks, training.optimizer)
    saver.wait()
    path = run_dir.checkpoint_path(Path(folder), 10)
    checkpoint.load(path, resumed.chunks, resumed.optimizer)
    return losses, training.step(), resumed.step()


def attempt_on(rank, folder, spec):
    from models.trainer import train

    world = join(rank, folder, spec.layout)
    train(spec, world)


def step_seconds(rank, folder, trials):
    """Median seconds of a step by name, taken in turns so that a clock that drops slows all alike."""
    import torch

    join(rank, folder)
    trainings = {name: Training(trial, "transformer_engine") for name, trial in trials.items()}
    times = {name: [] for name in trials}
    for number in range(40):
        for name, training in trainings.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            training.step()
            end.record()
            end.synchronize()
            if number >= 10:  # the first ones compile and allocate
                times[name].append(start.elapsed_time(end) / 1e3)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    start.record()
    for _ in range(20):
        left @ right
    end.record()
    end.synchronize()
    flops_per_second = 20 * 2 * 8192**3 / (start.elapsed_time(end) / 1e3)
    return {name: statistics.median(seconds) for name, seconds in times.items()}, flops_per_second


# -- the properties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformer_engines_kernels_give_the_local_losses(on_gpus, with_te, kind, precision):
    (found,) = on_gpus(both_back_ends, 1, trial_of(FP8_SHAPE, KINDS[kind], precision))
    (local, local_run), (other, other_run) = found["local"], found["transformer_engine"]
    error = relative_error(other, local)
    print(f"\n{kind}, {precision}: {error:.1e} apart, after ten steps {other_run[-1]:.4f} and {local_run[-1]:.4f} nats")
    # fp32 products may be TF32 in one of the two.
    assert error < (1e-3 if precision == "fp32" else 2e-2)
    assert other_run[-1] == pytest.approx(local_run[-1], abs=0.05)
    assert other_run[-1] < other_run[0]


SHAPES = {
    "sinks": {"softmax_sink": True},
    "sandwich norm": {"sandwich_norm": True},
    "experts": {"moe": MoEConfig(num_experts=8, top_k=2)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_transformer_engines_kernels_give_the_local_losses_of_every_shape(on_gpus, with_te, name):
    trial = trial_of(FP8_SHAPE.model_copy(update=SHAPES[name]), GATED["sdpa headwise"])
    (found,) = on_gpus(both_back_ends, 1, trial)
    assert relative_error(found["transformer_engine"][0], found["local"][0]) < 2e-2


@pytest.mark.parametrize("kind", ["baseline", "sdpa-headwise-hidden", "dense-elementwise-hidden"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_fp8_learns_near_bf16_and_resumes(on_gpus, with_te, recipe, kind):
    available = {
        "tensorwise": with_te.is_fp8_available,
        "delayed": with_te.is_fp8_available,
        "blockwise": with_te.is_fp8_block_scaling_available,
        "mxfp8": with_te.is_mxfp8_available,
    }[recipe]()
    if not available:
        pytest.skip(f"this device or Transformer Engine has no {recipe}")
    gate = KINDS[kind]
    ((losses, next_loss, resumed),) = on_gpus(fp8_run, 1, trial_of(FP8_SHAPE, gate, "fp8", {"recipe": recipe}))
    (bf16,) = on_gpus(both_back_ends, 1, trial_of(FP8_SHAPE, gate))
    expected = bf16["transformer_engine"][1]
    print(f"\n{kind}, {recipe}: {losses[0]:.4f} to {losses[-1]:.4f}; bf16 to {expected[-1]:.4f}")
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(expected[-1], abs=0.1)
    assert resumed == pytest.approx(next_loss, abs=1e-3)


LAYOUTS = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "data": Layout(data=2),
    "recompute": Layout(data=2, recompute="full"),
    "expert": Layout(data=2, expert=2),
}


@pytest.mark.parametrize("backend", ["local", "auto"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_over_nccl_give_the_losses_of_one(on_gpus, tmp_path, name, backend):
    trial = corpus_trial(write_corpus(tmp_path / "corpus.jsonl"), GateConfig(position="sdpa"), steps=8)
    preset = PRESETS["cpu-moe-tiny" if name == "expert" else "cpu-tiny"]
    trial = trial.model_copy(update={"precision": "bf16", "model": preset})
    curves = []
    for layout in (Layout(), LAYOUTS[name]):
        home = tmp_path / f"ranks{layout.world_size}"
        spec = new_attempt(home, trial, layout=layout, device="cuda", backend=backend)
        on_gpus(attempt_on, layout.world_size, spec)
        assert summary_of(spec).outcome == "complete"
        curves.append([step.loss_nats for step in steps_of(spec)])
    print(f"\n{name}, {backend}: {max(abs(a - b) for a, b in zip(*curves, strict=True)):.1e} nats apart over 8 steps")
    assert curves[1] == pytest.approx(curves[0], abs=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["data", "tensor", "pipeline", "expert"])
def test_two_gpus_resume_and_one_takes_up_their_checkpoint(on_gpus, tmp_path, name, precision):
    """By Megatron's distributed optimizer; near, not to the bit: some CUDA kernels add up in any order."""
    trial = corpus_trial(write_corpus(tmp_path / "corpus.jsonl"), GateConfig(position="sdpa"), steps=8)
    preset = PRESETS["cpu-moe-tiny" if name == "expert" else "cpu-tiny"]
    trial = trial.model_copy(update={"precision": precision, "model": preset})
    first = new_attempt(tmp_path, trial, layout=LAYOUTS[name], device="cuda", checkpoint_every_steps=4)
    on_gpus(attempt_on, 2, first)
    expected = [step.loss_nats for step in steps_of(first)][4:]
    resumed = {
        "resume_checkpoint": str(run_dir.checkpoint_path(first.attempt_dir, 4)),
        "resume_step": 4,
        "device": "cuda",
    }
    for number, layout in ((2, LAYOUTS[name]), (3, Layout())):
        spec = new_attempt(tmp_path, trial, number, layout=layout, **resumed)
        on_gpus(attempt_on, layout.world_size, spec)
        found = [step.loss_nats for step in steps_of(spec)]
        print(f"\n{name}, {precision}: {max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e} nats apart")
        assert found == pytest.approx(expected, abs=2e-2 if precision == "bf16" else 2e-3)


def test_a_gate_costs_two_percent_of_a_step_at_equal_parameters(on_gpus, with_te):
    from models import accounting

    def matched(gate):
        width = accounting.match_ffn_size(BIG, gate, accounting.default_ffn_multiple(BIG))
        return trial_of(BIG.model_copy(update={"ffn_size": width}), gate, sequence=4096, sequences=1)

    trials = {"baseline": trial_of(BIG, sequence=4096, sequences=1)} | {name: matched(g) for name, g in GATED.items()}
    ((seconds, device_flops),) = on_gpus(step_seconds, 1, trials)
    for name, trial in trials.items():
        flops = 4096 * accounting.training_flops_per_token(trial.model, trial.gates, trial.data.vocab_size, 4096)
        print(
            f"\n{name}: {4096 / seconds[name]:,.0f} tokens/s, {seconds[name] / seconds['baseline']:.3f} of the "
            f"baseline's step, {flops / seconds[name] / device_flops:.0%} of a large bf16 product's FLOPs a second"
        )
    assert max(seconds[name] / seconds["baseline"] for name in GATED) < 1.02
