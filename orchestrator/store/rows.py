"""What the store hands out, and the errors it raises. Rows are snapshots: nothing changes behind their back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from models.config import Layout, TrialConfig


class StoreError(Exception):
    """Base of the errors that a controller handles; a user's mistake is a ``UserError`` instead."""


class LeaseHeld(StoreError):
    """Another controller runs the sweep."""

    def __init__(self, holder: str, seconds_left: float) -> None:
        super().__init__(f"the sweep is run by {holder}; its lease ends in {seconds_left:.0f} s unless it is renewed")
        self.holder = holder
        self.seconds_left = seconds_left


class LeaseLost(StoreError):
    """Another controller took the sweep over, or the lease was released: stop writing."""


class TrialTaken(StoreError):
    """The trial is not WAITING: another sweep's controller runs it, or it has ended."""


class FinishedIsFinal(StoreError):
    """The trial is COMPLETE, PRUNED or DIVERGED, or not running in this attempt and for this sweep: its end can't be
    written (again)."""


HOST_EXCLUDED = "host_excluded"
"""The kind of event that keeps a host out of a sweep, also for its next controller."""

CONTROLLER_LOST = "controller_lost"
"""The cause of an attempt that ended because its controller was gone; no budget is charged."""

CANCEL_WANTED = "cancel_wanted"
"""A user wants a running trial canceled; its controller does it."""

REPRODUCED = "reproduced"
"""A trial was trained once more; the message says what came of it, in a word or two before its colon."""

CAP_SET = "cap_set"
"""A user has set a cap: ``max_gpus=64``, or ``max_gpus=none``."""


BUDGET_EXTENDED = "budget_extended"
"""A user has added to a budget: ``gpu_hours=+10``."""

BUDGET = "budget"
"""A budget is nearly or wholly used up."""


@dataclass(frozen=True, slots=True)
class Added:
    """What a submission did: ``num_new`` trials were unknown to the whole store, ``num_known`` were kept."""

    sweep_id: int
    num_new: int
    num_known: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for a sweep, until another token is stored."""

    sweep_id: int
    token: int


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A sweep. ``arms`` are the current ones in file order; ``settings`` is the resolved sweep as last submitted.

    ``verdict`` is what the first submission declared about verdicts, and ``looks_taken``: the seeds of earlier
    submissions with which one could be read. What was decided while it ran is there, too: ``chosen``, ``grown``,
    ``allocated``, ``gated``.
    """

    id: int
    name: str
    question: str
    baseline: str
    arms: tuple[str, ...]
    verdict: dict[str, Any]
    settings: dict[str, Any]
    text: str
    overrides: tuple[str, ...]
    created_at: datetime
    updated_at: datetime
    mlflow_run_id: str | None
    mirror_cursor: dict[str, Any] | None
    """What the mirror last noted about the sweep itself; the store does not look inside."""


@dataclass(frozen=True, slots=True)
class TrialRow:
    """A trial as one sweep sees it. State and end belong to the trial, arm, axes and position to the sweep."""

    fingerprint: str
    arm: str
    axes: dict[str, Any]
    seed: int
    position: int
    layout: Layout
    config: TrialConfig
    state: str
    cause: str | None
    reason: str | None
    end_step: int | None
    num_attempts: int
    reopened_after: int
    """Attempts up to this number were made before the last rerun: they don't count against the retry budget."""
    num_parameters: int
    training_flops: int
    mlflow_run_id: str | None


class Outcome(NamedTuple):
    """A trial of a sweep with what was measured of it, for tables. A tuple, since there may be 10^5 of them.

    ``axes`` and ``layouts`` are shared between rows: don't change them.
    """

    fingerprint: str
    arm: str
    axes: dict[str, Any]
    seed: int
    lr: float
    state: str
    cause: str | None
    reason: str | None
    num_parameters: int
    training_flops: float
    num_steps: int
    batch_tokens: int
    precision: str
    end_step: int | None
    num_attempts: int
    backends: tuple[str, ...]
    """What its attempts were built from, as far as they said."""
    layouts: tuple[dict[str, Any], ...]
    """Those on which the steps that count were trained, oldest first and each change once."""
    tokens_per_second: float | None
    """Of the last attempt."""
    trained_in: str | None
    """The sweep whose controller ran the last attempt."""
    branched: tuple[str, int] | None
    """The fingerprint of the trial that its history begins in, and the last step that it shares with it."""
    slice_points: int | None
    """Validations on the slice in the tail of the schedule, of a COMPLETE trial; None without any."""
    slice_loss_nats: float | None
    """Their mean; None when one was not finite."""
    slice_bits_per_byte: float | None
    full_points: int | None
    """The same on the whole validation split."""
    full_loss_nats: float | None
    full_bits_per_byte: float | None

    @property
    def tails(self) -> dict[str, TailRow]:
        """By split, where there are validations."""
        measured = (
            ("slice", self.slice_points, self.slice_loss_nats, self.slice_bits_per_byte),
            ("full", self.full_points, self.full_loss_nats, self.full_bits_per_byte),
        )
        return {
            split: TailRow(self.fingerprint, split, points, loss, bits)
            for split, points, loss, bits in measured
            if points is not None
        }


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A trial that FAILED, and the last lines of its last attempt's log."""

    fingerprint: str
    arm: str
    axes: dict[str, Any]
    seed: int
    cause: str | None
    reason: str | None
    log_tail: str | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One launch. ``ended_at`` is None while it is open; ``sweep_id`` is the sweep whose controller started it."""

    id: int
    fingerprint: str
    number: int
    token: str
    sweep_id: int
    layout: Layout
    hosts: tuple[str, ...]
    provenance: dict[str, Any]
    resume_step: int
    resumed_from: int | None
    branched_from: str | None
    """The other trial whose checkpoint of ``resume_step`` it began at."""
    cpus: float | None
    """Of the whole gang; None when they were not noted."""
    gpus: float | None
    held_seconds: float | None
    """From its start until its end was seen, or its controller was lost: what it has used up its gang for."""
    started_at: datetime
    ended_at: datetime | None
    cause: str | None
    reason: str | None
    end_step: int | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    log_tail: str | None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One optimizer step of a trial's curve, and the attempt that made it."""

    attempt: int
    step: int
    tokens: int
    fraction: float
    lr: float | None
    loss_nats: float | None
    gradient_norm: float | None
    tokens_per_second: float | None
    nonfinite: bool


@dataclass(frozen=True, slots=True)
class ValidationRow:
    """One evaluation of a trial's curve, after ``step`` optimizer steps."""

    attempt: int
    step: int
    split: str
    tokens: int
    fraction: float
    loss_nats: float | None
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int
    nonfinite: bool


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What a probe after ``step`` optimizer steps saw of one layer; README.md says what each number is."""

    attempt: int
    step: int
    layer: int
    """From 1."""
    tokens: int
    fraction: float
    first_token_attention: float | None
    max_activation: float | None
    attention_output_rms: float | None
    ffn_output_rms: float | None
    residual_rms: float | None
    gradient_norm: float | None
    update_ratio: float | None
    heads: tuple[float | None, ...]
    """First-token attention by head."""
    gates: dict[str, dict[str, Any]]
    """By position: ``mean``, ``share_below``, ``low``, ``high``, ``histogram``."""


@dataclass(frozen=True, slots=True)
class TailRow:
    """The validations of a complete trial in the last part of its schedule, on one split: their mean.

    None when one of them was not finite.
    """

    fingerprint: str
    split: str
    num_points: int
    loss_nats: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """A trial's history as if it had been trained in one go: steps and validations, ascending."""

    steps: tuple[StepRow, ...]
    validations: tuple[ValidationRow, ...]


@dataclass(frozen=True, slots=True)
class Reused:
    """A trial that another sweep trained. ``drift``: what is otherwise in this sweep's own newest attempt."""

    fingerprint: str
    sweep: str
    drift: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankDecision:
    """Learning rates of one arm that were stopped at one rung, since others of the arm did better there."""

    arm: str
    axes: Mapping[str, Any]
    """But the learning rate and what is derived."""
    fraction: float
    """The rung, as a share of the schedule."""
    seeds: tuple[int, ...]
    """That decided."""
    losses_nats: Mapping[float, float | None]
    """By rate, the mean over these seeds, of all that were ranked; None: a seed diverged."""
    dropped: tuple[float, ...]
    audited: tuple[float, ...]
    """Those of ``dropped`` that are finished all the same, drawn before anything was stopped."""
    formula: str


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a look decided: which arms are settled, and the confirming trials that the others got."""

    axes: Mapping[str, Any]
    """Of the table: but the learning rate and what is derived."""
    look: int
    """That was taken, from 1."""
    at: datetime
    trials: tuple[str, ...]
    """Fingerprints, in the order in which they run; none when all are settled, or after the last look."""
    reasons: Mapping[str, str]
    """By arm, in words: of those that were undecided before, and of the baseline where it got seeds."""
    formula: str


@dataclass(frozen=True, slots=True)
class ImportedPoint:
    """A loss that another program wrote."""

    split: str
    """``training`` or ``validation``, by the file's own word."""
    step: int
    loss_nats: float | None
    """None where it is not finite. That it is in nats a token is the user's word."""
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ImportedCurve:
    seed: int | None
    """None: the file does not tell."""
    points: tuple[ImportedPoint, ...]
    """By split and step."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Curves from one file, under the name that the user gave them."""

    name: str
    source: str
    """The file."""
    format: str
    sha256: str
    """Of the file's bytes."""
    imported_at: datetime
    curves: tuple[ImportedCurve, ...]


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something worth telling that is not a number."""

    id: int
    at: datetime
    kind: str
    message: str
    fingerprint: str | None
    attempt: int | None


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sweep holds of a Ray cluster and what its waiting trials could still take: (CPUs, GPUs) in Ray's units, a
    ten-thousandth each. ``gang``: the largest one that it would start."""

    sweep_id: int
    name: str
    cluster: str
    priority: int
    held: tuple[int, int]
    wanted: tuple[int, int]
    gang: tuple[int, int]


@dataclass(frozen=True, slots=True)
class RunningRow:
    """An open attempt of a sweep, with its newest step."""

    arm: str
    axes: dict[str, Any]
    seed: int
    fingerprint: str
    attempt: int
    hosts: tuple[str, ...]
    started_at: datetime
    resume_step: int
    step: int
    """Optimizer steps done; before its first one, the step that it resumed at."""
    num_steps: int
    loss_nats: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Spent:
    """What a sweep has used up over all its runs, in hours; what other sweeps ran for it is theirs."""

    gpu_hours: float
    cpu_hours: float
    wall_hours: float


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """A declared budget, in hours: ``limit`` is what the file says and what users have added since."""

    name: str
    limit: float
    spent: float

    @property
    def is_used_up(self) -> bool:
        return self.spent >= self.limit
