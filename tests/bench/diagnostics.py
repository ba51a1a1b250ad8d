"""What diagnostics cost: the time of training with them over that without, on the CPU, at the quick start's size.

    OMP_NUM_THREADS=1 python tests/bench/diagnostics.py [--preset cpu-1m] [--steps 40] [--points 4] [--repetitions 25]

A step that is probed is timed between two that are not, so that a busy machine slows all three; its median excess,
spread over the steps between two probes, is what a whole trial pays. The bar is 1.02 at the defaults.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable

from step_time import stepper, trial_of

from models import device
from models.config import DiagnosticsConfig, GateConfig, Layout
from models.presets import PRESETS
from models.trainer import World

GATES = {"baseline": None, "sdpa elementwise": GateConfig(position="sdpa"), "value": GateConfig(position="value")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-1m")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the trial")
    parser.add_argument("--points", type=int, default=DiagnosticsConfig().points)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 256 tokens a step")
    parser.add_argument("--repetitions", type=int, default=25)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        world = World.join(0, Layout(), "cpu", f"file://{folder}/meet")
        with device.on("cpu"):
            print(f"{options.preset}, {options.points} probes in {options.steps} steps of {options.sequences} x 256")
            print(f"{'gate':<20}{'ms a step':>10}{'probed step':>13}{'whole trial':>13}   quartiles of the probed step")
            for name, gate in GATES.items():
                print(
                    row(name, stepper(trial_of(options, gate, matched=False), DiagnosticsConfig()), options), flush=True
                )
        world.leave()


def row(name: str, step: Callable[[bool], float], options: argparse.Namespace) -> str:
    for probed in (False, True):  # the first steps allocate
        step(probed)
    ratios, plain = [], [step(False)]
    for _ in range(options.repetitions):
        with_diagnostics = step(True)
        plain.append(step(False))
        ratios.append(with_diagnostics / statistics.fmean(plain[-2:]))
    low, median, high = statistics.quantiles(ratios, n=4)
    whole = 1 + (median - 1) * options.points / options.steps
    milliseconds = 1000 * statistics.median(plain)
    return f"{name:<20}{milliseconds:>10.0f}{median:>13.3f}{whole:>13.4f}   {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    main()
