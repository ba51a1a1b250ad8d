"""Validation: mean nats a text token, and bits a byte of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from models import corpus, run_dir
from models.config import TrialConfig
from models.run_dir import ValidationRecord
from models.trainer import passes
from models.trainer.world import World


class Evaluator:
    """Measures the model on the validation slice, or on the whole validation split."""

    def __init__(
        self,
        trial: TrialConfig,
        sources: corpus.Sources,
        chunks: Sequence[torch.nn.Module],
        world: World,
        micro_batch: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.trial, self.sources, self.chunks, self.world = trial, sources, chunks, world
        self.micro_batch, self.beat = micro_batch, beat

    def measure(self, step: int, split: Literal["slice", "full"]) -> Iterator[ValidationRecord]:
        """The main corpus, which verdicts are about, then each validation set."""
        yield self._measure(self.sources.main, step, split, split)
        for name, prepared in self.sources.validation_sets.items():
            yield self._measure(prepared, step, split, name if split == "slice" else f"{name}/full")

    @torch.no_grad()
    def _measure(
        self, prepared: corpus.Prepared, step: int, split: Literal["slice", "full"], name: str
    ) -> ValidationRecord:
        """Every text token of the split is predicted once; separators between documents are not counted."""
        windows = corpus.validation_batches(
            prepared,
            self.trial.data,
            split,
            batch_sequences=self.micro_batch,
            rank=self.world.data_rank,
            num_ranks=self.world.layout.data,
            # Megatron's interleaved schedule takes whole groups of micro-batches.
            multiple_of=self.world.layout.pipeline if len(self.chunks) > 1 else 1,
        )
        for chunk in self.chunks:
            chunk.eval()
        nats = passes.run(
            self.chunks,
            lambda: self._on_device(windows),
            passes.sum_loss,
            num_micro_batches=len(windows),
            micro_batch_sequences=self.micro_batch,
            sequence_length=self.trial.data.sequence_length,
            forward_only=True,
            separate_documents=self.trial.data.separate_documents,
        )
        for chunk in self.chunks:
            chunk.train()
        own = torch.stack(nats).sum() if nats else torch.zeros((), dtype=torch.float64, device=self.world.device)
        total = float(self.world.from_last_stage(self.world.sum_over_data_ranks(own)))
        finite = math.isfinite(total)
        return ValidationRecord(
            step=step,
            tokens=step * self.trial.train.batch_tokens,
            fraction=step / self.trial.train.num_steps,
            split=name,
            loss_nats=run_dir.finite_or_none(total / windows.num_tokens),
            bits_per_byte=run_dir.finite_or_none(total / math.log(2) / windows.num_bytes),
            num_tokens=windows.num_tokens,
            num_bytes=windows.num_bytes,
            nonfinite=not finite,
        )

    def _on_device(self, batches: corpus.ValidationBatches) -> Iterator[corpus.Batch]:
        for batch in batches:
            self.beat()
            yield {name: tensor.to(self.world.device) for name, tensor in batch.items()}
