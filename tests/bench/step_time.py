"""Speed of the gated model beside the ungated one: tokens a second, as ratios, all in one run on the CPU.

    OMP_NUM_THREADS=1 python tests/bench/step_time.py [--preset cpu-1m] [--repetitions 15]

Whole training steps (forward, backward, clipping, AdamW). A gated step is timed between two ungated ones, so that a
busy machine slows both; what is printed is the median of the ratios, and their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from models import accounting, device, layer_specs
from models.config import DataConfig, DiagnosticsConfig, GateConfig, Layout, TrainConfig, TrialConfig
from models.diagnostics import UpdateWatch, probe
from models.presets import PRESETS
from models.trainer import World
from models.trainer.optimizer import update, wrap, zero_gradients
from models.trainer.passes import token_losses

GATES = {
    "sdpa elementwise": GateConfig(position="sdpa"),
    "sdpa headwise": GateConfig(position="sdpa", granularity="headwise"),
    "sdpa shared": GateConfig(position="sdpa", sharing="head_shared"),
    "sdpa input none": GateConfig(position="sdpa", input="none"),
    "value elementwise": GateConfig(position="value"),
    "value headwise": GateConfig(position="value", granularity="headwise"),
    "key elementwise": GateConfig(position="key"),
    "query elementwise": GateConfig(position="query"),
    "dense elementwise": GateConfig(position="dense"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-1m")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 256 tokens a step")
    return parser.parse_args()


def trial_of(options: argparse.Namespace, gate: GateConfig | None, matched: bool) -> TrialConfig:
    """The preset with ``gate``; its FFN as wide as the preset's, or narrowed to the preset's parameters."""
    model = PRESETS[options.preset]
    if matched:
        ffn_size = accounting.match_ffn_size(model, gate, accounting.default_ffn_multiple(model))
        model = model.model_copy(update={"ffn_size": ffn_size})
    data = DataConfig()
    batch_tokens = options.sequences * data.sequence_length
    train = TrainConfig(tokens=batch_tokens, batch_tokens=batch_tokens, lr=1e-3)
    return TrialConfig(model=model, gate=gate, data=data, train=train, seed=1)


def stepper(trial: TrialConfig, wanted: DiagnosticsConfig | None = None) -> Callable[..., float]:
    """A function that does one training step on random bytes and returns its seconds; ``step(True)`` probes, too."""
    device.seed_everything(trial.seed, "cpu")
    (model,), optimizer = wrap(trial, layer_specs.build_chunks(trial, Layout(), "cpu"), "cpu")
    shape = (trial.batch_sequences, trial.data.sequence_length)
    tokens = torch.randint(trial.data.vocab_size, shape)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": torch.arange(shape[1]).expand(shape)}

    def forward(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> object:
        return token_losses(model, next(batches)), lambda losses: (losses.mean(), losses.detach().mean())

    watch = None if wanted is None else UpdateWatch(model, optimizer)

    def step(probed: bool = False) -> float:
        start = time.perf_counter()
        zero_gradients([model], optimizer)
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=False,
        )
        update(optimizer, trial.train.lr, trial.train.clip_gradient_norm, watch if probed else None)
        if probed and wanted is not None:
            sequences = {name: tensor[: wanted.sequences] for name, tensor in batch.items()}
            probe(model, sequences, wanted.histogram_bins).model_dump_json()
        return time.perf_counter() - start

    return step


def ratios(gated: Callable[[], float], baseline: Callable[[], float], repetitions: int) -> list[float]:
    """Tokens a second of ``gated`` over those of ``baseline``, the mean of its neighbours in time."""
    found = []
    before = baseline()
    for _ in range(repetitions):
        seconds, after = gated(), baseline()
        found.append((before + after) / 2 / seconds)
        before = after
    return found


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        world = World.join(0, Layout(), "cpu", f"file://{folder}/meet")
        with device.on("cpu"):
            baseline = stepper(trial_of(options, None, matched=False))
            fastest = min(baseline() for _ in range(3))
            tokens = options.sequences * 256
            print(f"{options.preset}, {tokens:,} tokens a step; baseline at best {tokens / fastest:,.0f} tokens/s")
            print(f"{'gate':<20}{'FFN':<10}{'width':>6}{'parameters':>12}{'tokens/s':>10}   quartiles")
            for name, gate in GATES.items():
                for matched in (False, True):
                    print(row(options, name, gate, matched, baseline), flush=True)
        world.leave()


def row(options: argparse.Namespace, name: str, gate: GateConfig, matched: bool, baseline: Callable[[], float]) -> str:
    trial = trial_of(options, gate, matched)
    gated = stepper(trial)
    gated()  # the first step allocates
    low, median, high = statistics.quantiles(ratios(gated, baseline, options.repetitions), n=4)
    parameters = accounting.parameters(trial.model, gate, trial.data.vocab_size)
    kind = "matched" if matched else "equal"
    return f"{name:<20}{kind:<10}{trial.model.ffn_size:>6}{parameters:>12,}{median:>10.3f}   {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    main()
