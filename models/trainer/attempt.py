"""The training loop of one trial: build, resume, step, validate, write, stop.

A trial that is measured gives its ranks free at once, and *lands* a moment later: when its last checkpoint stands, by
the rank's writing thread, its summary is written. So a summary that says complete never comes before the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models import accounting, checkpoint, corpus, layer_specs, plugins, run_dir
from models import device as devices
from models.config import TrialConfig
from models.run_dir import AttemptSpec, StepRecord, Summary
from models.trainer import passes
from models.trainer.evaluate import Evaluator
from models.trainer.journal import Journal
from models.trainer.optimizer import update, wrap, zero_gradients
from models.trainer.probes import Probes
from models.trainer.schedule import learning_rate
from models.trainer.world import World

log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""What a failed attempt's checkpoint in the making is given to be finished."""


class NonFinite(Exception):
    """The loss or the gradient norm of a step is not a number."""


def train(
    spec: AttemptSpec,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
) -> Summary:
    """Run an attempt to its end and return how it ended; rank 0 also writes ``summary.json``.

    ``should_stop`` is asked after every step, on every rank: all stop when one says so. ``beat`` is called for every
    micro-batch, also of a validation: silence is a hang. Errors of the user's or the machine's are raised after they
    were written down.
    """
    return start(spec, world, should_stop, beat).landed.result()


@dataclass(frozen=True)
class Trained:
    """An attempt that leaves its world free for the next one."""

    summary: Summary
    landed: Future[Summary]
    """The same, when the last checkpoint stands and the summary is written; or what befell the checkpoint."""


def start(
    spec: AttemptSpec,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
) -> Trained:
    """``train``, but the checkpoint of the schedule's end may still be in the writing. Other errors are raised."""
    with devices.on(world.device), Journal(spec.attempt_dir, world.rank, _labels(spec, world.rank)) as journal:
        attempt = _Attempt(spec, world, journal, beat)
        log.info("attempt %d begins", spec.number)
        try:
            outcome, error = attempt.run(should_stop), None
            if outcome == "stopped":
                attempt.saver.wait()
        except NonFinite as stop:
            outcome, error = "nonfinite", str(stop)
            attempt.saver.abandon(GRACE_SECONDS)
        except BaseException as failure:
            attempt.saver.abandon(GRACE_SECONDS)
            if isinstance(failure, Exception):
                log.exception("attempt %d failed", spec.number)
                journal.write_summary(attempt.summary("error", f"{type(failure).__name__}: {failure}"))
            raise
        summary = attempt.summary(outcome, error)
        log.info("ended %s at step %d: %s", outcome, summary.step, error or "no error")
        landing = functools.partial(_land, attempt.saver, journal, summary)
        return Trained(summary, world.writer.submit(landing))


def _labels(spec: AttemptSpec, rank: int) -> dict[str, str | int] | None:
    """Of the JSON log, if there is to be one."""
    if spec.log_labels is None:
        return None
    return {**spec.log_labels, "trial": spec.fingerprint, "attempt": spec.number, "rank": rank}


def _land(saver: checkpoint.Saver, journal: Journal, summary: Summary) -> Summary:
    """In the writing thread, after the last checkpoint: write the summary, or raise what befell the checkpoint."""
    try:
        saver.check()
    except Exception as failure:
        journal.append(traceback.format_exc())
        told = f"{type(failure).__name__}: {failure}"
        journal.write_summary(summary.model_copy(update={"outcome": "error", "error": told}))
        raise
    journal.write_summary(summary)
    return summary


class _Attempt:
    """The state of one attempt on one rank."""

    def __init__(self, spec: AttemptSpec, world: World, journal: Journal, beat: Callable[[], None]) -> None:
        self.spec, self.world, self.journal, self.beat = spec, world, journal, beat
        self.trial: TrialConfig
        self.started = time.monotonic()
        self.step = spec.resume_step
        self.step_rates: list[float] = []
        self.num_parameters: int | None = None
        self.backend: layer_specs.Backend | None = None
        self.saver = checkpoint.Saver(spec.attempt_dir, spec.keep_checkpoints, world.writer)

    def run(self, should_stop: Callable[[], bool]) -> Any:
        self.trial = run_dir.read_trial_config(Path(self.spec.trial_dir))
        self._build()
        train = self.trial.train
        validation_steps = set(self.trial.validation_steps())
        while self.step < train.num_steps:
            self.step += 1
            self._train_one_step()
            if self.step == train.num_steps:
                log.info("all %d steps are done", self.step)
            if self.step in validation_steps:
                self._validate("slice")
            if self.step in self.probes.steps:
                self.journal.write(self.probes.measure(self.step))
            done = self.step == train.num_steps
            if done:
                log.info("measured")
                break
            self.saver.check()
            stop = self.world.agree(should_stop)
            if stop or self._checkpoint_is_due():
                self._save()
            if stop:
                log.info("told to stop after step %d", self.step)
                return "stopped"
        if self.spec.final_checkpoint:
            self._save()
        if self.trial.data.validation.full_at_end:
            self._validate("full")
        return "complete"

    # -- the phases -----------------------------------------------------------------------------------------

    def _build(self) -> None:
        trial, world, spec = self.trial, self.world, self.spec
        plugins.check_source(trial.model)
        sources = corpus.gather(trial.data, Path(spec.data_dir))
        devices.seed_everything(trial.seed, world.device)
        self.backend = layer_specs.choose_backend(trial, spec.backend, world.device)
        # A mechanism of somebody else's may ask for CUDA by name when it is built.
        with contextlib.nullcontext() if trial.model.plugins else devices.as_it_is():
            chunks = layer_specs.build_chunks(trial, world.layout, world.device, self.backend)
        # A stage draws no more than it must; from here on the random state does not depend on the layout.
        devices.seed_everything(trial.seed, world.device)
        self.num_parameters = layer_specs.num_parameters(chunks)
        _check_accounting(trial, self.num_parameters)
        self.chunks, self.optimizer = wrap(
            trial, chunks, world.device, distributed_optimizer=world.layout.distributed_optimizer
        )
        self.micro_batch = spec.micro_batch_sequences or trial.batch_sequences // world.layout.data
        self.batches = corpus.TrainBatches(
            corpus.training_samples(
                sources,
                trial.data,
                num_samples=trial.train.num_data_steps * trial.batch_sequences,
                seed=trial.seed,
                opened=world.datasets,
            ),
            batch_sequences=trial.batch_sequences,
            micro_batch_sequences=self.micro_batch,
            rank=world.data_rank,
            num_ranks=world.layout.data,
            separate_at=sources.main.eod if trial.data.separate_documents else None,
        )
        self.evaluator = Evaluator(trial, sources, self.chunks, world, self.micro_batch, self.beat)
        self.probes = Probes(spec.diagnostics, trial, sources.main, self.chunks, self.optimizer, world)
        if spec.resume_checkpoint is not None:
            step = checkpoint.load(Path(spec.resume_checkpoint), self.chunks, self.optimizer)
            if step != spec.resume_step:
                raise checkpoint.CheckpointError(
                    f"checkpoint {spec.resume_checkpoint} holds step {step}, expected {spec.resume_step}"
                )
        log.info(
            "attempt %d: %s parameters, %d steps from step %d, %s, backend %s, precision %s",
            spec.number, f"{self.num_parameters:,}", trial.train.num_steps, self.step, world.layout,
            self.backend, trial.precision,
        )  # fmt: skip

    def _train_one_step(self) -> None:
        train, started = self.trial.train, time.perf_counter()
        zero_gradients(self.chunks, self.optimizer)
        losses = passes.run(
            self.chunks,
            self._micro_batches,
            passes.mean_loss,
            num_micro_batches=self.batches.num_micro_batches,
            micro_batch_sequences=self.micro_batch,
            sequence_length=self.trial.data.sequence_length,
            separate_documents=self.trial.data.separate_documents,
        )
        own = torch.stack(losses).mean() if losses else torch.zeros((), device=self.world.device)
        loss = float(self.world.from_last_stage(self.world.mean_over_data_ranks(own)))
        lr = learning_rate(train, self.step)
        watch = self.probes.watch(self.step)
        norm = update(self.optimizer, lr, train.clip_gradient_norm, watch) if math.isfinite(loss) else math.nan
        seconds = time.perf_counter() - started
        self.step_rates.append(train.batch_tokens / seconds)
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.journal.write(
            StepRecord(
                step=self.step,
                tokens=self.step * train.batch_tokens,
                fraction=self.step / train.num_steps,
                lr=lr,
                loss_nats=run_dir.finite_or_none(loss),
                gradient_norm=run_dir.finite_or_none(norm),
                tokens_per_second=self.step_rates[-1],
                nonfinite=not finite,
            )
        )
        if not finite:
            raise NonFinite(f"loss {loss}, gradient norm {norm} at step {self.step}")

    def _micro_batches(self) -> Iterator[corpus.Batch]:
        for number, batch in enumerate(self.batches.micro_batches(self.step - 1)):
            self.beat()
            if number == 0 and self.step == self.spec.resume_step + 1:
                log.info("the first batch is there")
            yield {name: tensor.to(self.world.device) for name, tensor in batch.items()}

    def _validate(self, split: Literal["slice", "full"]) -> None:
        for record in self.evaluator.measure(self.step, split):
            self.journal.write(record)

    def _checkpoint_is_due(self) -> bool:
        every = self.spec.checkpoint_every_steps
        return self.step in self.spec.branch_steps or (every is not None and self.step % every == 0)

    def _save(self) -> None:
        if self.step > self.spec.resume_step:
            self.saver.save(self.step, self.chunks, self.optimizer)

    def summary(self, outcome: Any, error: str | None) -> Summary:
        return Summary(
            outcome=outcome,
            step=self.step,
            resume_step=self.spec.resume_step,
            seconds=time.monotonic() - self.started,
            tokens_per_second=statistics.median(self.step_rates) if self.step_rates else None,
            peak_memory_bytes=devices.peak_memory_bytes(self.world.device),
            num_parameters=self.num_parameters,
            backend=self.backend,
            error=error,
        )


def _check_accounting(trial: TrialConfig, built: int) -> None:
    """PluginError when plug-ins count their parameters wrong: tables and matching would go by the wrong number."""
    expected = accounting.parameters(trial.model, trial.gates, trial.data.vocab_size)
    if trial.model.plugins and built != expected:
        raise plugins.PluginError(
            f"plug-ins {', '.join(sorted(trial.model.plugins))}: the model was built with {built:,} parameters, and "
            f"with what their parameters() say it has {expected:,}: {built - expected:+,} over "
            f"{trial.model.num_layers} layers"
        )
