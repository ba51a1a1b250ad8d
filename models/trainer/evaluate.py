"""Validation: mean nats a text token, and bits a byte of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from models import corpus, run_dir
from models.config import TrialConfig
from models.run_dir import ValidationRecord
from models.trainer.world import World


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy in nats of every target, [B, S]. The mask is None: Megatron's attention is causal by itself."""
    losses: torch.Tensor = model(
        input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )
    return losses


class Evaluator:
    """Measures the model on the validation slice, or on the whole validation split."""

    def __init__(
        self,
        trial: TrialConfig,
        prepared: corpus.Prepared,
        model: torch.nn.Module,
        world: World,
        micro_batch: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.trial, self.prepared, self.model, self.world = trial, prepared, model, world
        self.micro_batch, self.beat = micro_batch, beat

    @torch.no_grad()
    def measure(self, step: int, split: Literal["slice", "full"]) -> ValidationRecord:
        """Every text token of the split is predicted once; separators between documents are not counted."""
        windows = corpus.validation_batches(
            self.prepared,
            self.trial.data,
            split,
            batch_sequences=self.micro_batch,
            rank=self.world.data_rank,
            num_ranks=self.world.layout.data,
        )
        self.model.eval()
        nats: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=self._on_device(windows),
            model=[self.model],
            num_microbatches=len(windows),
            seq_length=self.trial.data.sequence_length,
            micro_batch_size=self.micro_batch,
            forward_only=True,
        )
        self.model.train()
        total = float(self.world.sum_over_data_ranks(torch.stack(nats).sum()))
        finite = math.isfinite(total)
        return ValidationRecord(
            step=step,
            tokens=step * self.trial.train.batch_tokens,
            fraction=step / self.trial.train.num_steps,
            split=split,
            loss_nats=run_dir.finite_or_none(total / windows.num_tokens),
            bits_per_byte=run_dir.finite_or_none(total / math.log(2) / windows.num_bytes),
            num_tokens=windows.num_tokens,
            num_bytes=windows.num_bytes,
            nonfinite=not finite,
        )

    def _on_device(self, batches: Iterable[corpus.Batch]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            self.beat()
            yield {name: tensor.to(self.world.device) for name, tensor in batch.items()}


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)

    def sum_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # float64: the sum over a large split must not lose what tells two arms apart.
        total = (losses.double() * batch["loss_mask"]).sum()
        return total, total.detach().clone()

    return token_losses(model, batch), sum_loss
