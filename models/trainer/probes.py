"""Diagnostics while training: at a few steps, evenly spaced, on the same few validation windows every time.

The trial's numbers are bit-identical with and without them (tests/test_diagnostics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from models import corpus
from models.config import DiagnosticsConfig, TrialConfig
from models.diagnostics import UpdateWatch, probe
from models.run_dir import DiagnosticRecord
from models.trainer.world import World


class Probes:
    """``watch`` goes around the optimizer's step, ``measure`` comes after it; both at ``steps`` only."""

    def __init__(
        self,
        wanted: DiagnosticsConfig | None,
        trial: TrialConfig,
        prepared: corpus.Prepared,
        chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        world: World,
    ) -> None:
        self.trial, self.chunks = trial, chunks
        self.steps = frozenset(wanted.steps(trial.train.num_steps) if wanted is not None else ())
        if wanted is not None and self.steps:
            self.histogram_bins = wanted.histogram_bins
            # The same on every data-parallel rank, so that the numbers do not hang on the layout.
            windows = corpus.validation_batches(prepared, trial.data, "slice", batch_sequences=wanted.sequences)
            self.batch = {name: tensor.to(world.device) for name, tensor in next(iter(windows)).items()}
            self.update_watch = UpdateWatch(chunks, optimizer)

    def watch(self, step: int) -> UpdateWatch | None:
        return self.update_watch if step in self.steps else None

    def measure(self, step: int) -> DiagnosticRecord:
        seen = probe(self.chunks, self.batch, self.histogram_bins)
        gradient_norm, update_ratio = self.update_watch.result
        moved_finite = None not in gradient_norm and None not in update_ratio
        return DiagnosticRecord(
            **(dict(seen) | {"nonfinite": seen.nonfinite or not moved_finite}),
            step=step,
            tokens=step * self.trial.train.batch_tokens,
            fraction=step / self.trial.train.num_steps,
            gradient_norm=gradient_norm,
            update_ratio=update_ratio,
        )
