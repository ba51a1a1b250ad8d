"""The results of a sweep as data: frozen, unrounded, and with the trials that every number came from.

A number that cannot be had is None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from orchestrator.scaling import Edge, LearningRatePoint, Optimum, PruningAudit
from orchestrator.store import Allotment, GatePassage, RankDecision
from orchestrator.sweep import LookSeeds
from orchestrator.verdict import Decision, Design, Method, NoiseFloor

LR_AXIS = "train.lr"

STATES = ("COMPLETE", "DIVERGED", "PRUNED", "FAILED", "RUNNING", "WAITING", "CANCELED")
"""In the order in which tables count them."""

UNFINISHED = ("RUNNING", "WAITING", "CANCELED")

Split = Literal["slice", "full"]


@dataclass(frozen=True)
class SweepHeading:
    """What the tables need to know of their sweep."""

    name: str
    question: str
    baseline: str
    arms: tuple[str, ...]
    """In file order."""
    seeds: tuple[int, ...] | None = None
    """The seeds that every cell must have; None: those that occur."""
    margin_nats: float | None = None
    alpha: float = 0.05
    axis_names: tuple[str, ...] = ()
    """In file order, which is the order of a table's heading."""
    derived_axes: frozenset[str] = frozenset()
    """Multiples of another value: they vary with it (perhaps with the arm or the learning rate), and split no table."""
    extra_baseline_seeds: tuple[int, ...] = ()
    """More, for the cells of the baseline."""
    design: Design = field(default_factory=Design)
    tail: float = 0.1
    """The last share of the schedule over which a trial's validations are averaged."""
    exploratory: tuple[str, ...] = ()
    """Why no verdict of this sweep is confirmatory, beside what its tables show."""
    confirm_seeds: tuple[int, ...] = ()
    """Seeds of the verdicts, where ``seeds`` only choose the learning rates. ``extra_baseline_seeds`` are such, too."""
    look_seeds: LookSeeds | None = None
    """By look, the confirming seeds, where they go to the arms that are undecided; None: all arms get the same."""
    changes: tuple[str, ...] = ()
    """What was declared otherwise after the first submission, whose settings hold."""
    searched_rates: int | None = None
    """Learning rates of an arm, where each has its own by search; None: all arms have the same ones."""
    rates_note: str = ""
    """How learning rates were found that the file does not name."""
    comparisons: Mapping[str, int] = field(default_factory=dict)
    """By sweep, the arms that are compared with this sweep's baseline trials, its own among them."""
    declared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By arm, the config keys that it sets otherwise than the baseline, in any of its cells."""
    rank_decisions: tuple[RankDecision, ...] = ()
    """What was pruned by rank, oldest first."""
    allotments: tuple[Allotment, ...] = ()
    """What looks decided, oldest first."""
    gates: Mapping[str, str] = field(default_factory=dict)
    """By arm and rung (``arm_key``), why a gate keeps the arm off the rung, or that it is not decided yet."""
    passages: tuple[GatePassage, ...] = ()
    """What gates between rungs decided, oldest first."""

    @property
    def fresh_seeds(self) -> frozenset[int]:
        """All that may confirm and choose no learning rate."""
        if not self.confirm_seeds:
            return frozenset()
        later = () if self.look_seeds is None else self.look_seeds.baseline[-1]
        return frozenset((*self.confirm_seeds, *self.extra_baseline_seeds, *later))


class TrialResult(NamedTuple):
    """One trial as the store knows it. Only complete ones have losses: means over the tail of the schedule.

    A tuple, since there may be 10^5 of them.
    """

    fingerprint: str
    arm: str
    axes: Mapping[str, Any]
    lr: float
    seed: int
    state: str
    cause: str | None = None
    reason: str | None = None
    num_parameters: int | None = None
    training_flops: float | None = None
    num_attempts: int = 0
    slice_loss_nats: float | None = None
    slice_bits_per_byte: float | None = None
    full_loss_nats: float | None = None
    """On the whole validation split, when the trial measures it."""
    full_bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    num_tail_points: int = 1
    """Validations on the slice that ``slice_loss_nats`` is the mean of."""
    layouts: tuple[str, ...] = ()
    """On which it was trained, one after the other: ``tensor 2, data 2``."""
    backends: tuple[str, ...] = ()
    """What its attempts were built from, as far as they said."""
    flops_per_second: float | None = None
    """Model FLOPs: forward and backward pass, without recomputation."""
    utilisation: float | None = None
    """Of the ranks' peak, 0 to 1 (MFU); only where the sweep that trained it knows the peak."""
    reproduced: str | None = None
    """What came of training it once more, the last time that it was: ``bitwise``, ``within tolerance``, ``differs``."""
    drift: tuple[str, ...] = ()
    """Of a trial that another sweep trained: what is otherwise in this sweep's attempts, as ``torch 2.12 -> 2.13``."""
    trained_in: str | None = None
    """The sweep whose controller trained it, when that is not the sweep of the table."""
    share_done: float = 0.0
    """Of its schedule, 0 to 1, up to where it ended; 0 as long as it has not."""
    branched: tuple[str, int] | None = None
    """The longer trial that it began in, by its fingerprint, and the last step that both share."""


@dataclass(frozen=True)
class ArmRow:
    """One arm of a table. Losses are at its best learning rate, over its seeds, or over fresh ones that confirm it."""

    arm: str
    is_baseline: bool
    rank: int | None
    """1 is the lowest mean loss; None when a cell failed, is missing or is unfinished."""
    best_lr: float | None
    edge: Edge | None
    num_finite_lrs: int
    optimum: Optimum | None
    """Between the rates that were tried, of the trials that choose; None below four rates with a mean."""
    losses_nats: tuple[float, ...]
    loss_nats: float | None
    loss_sd_nats: float | None
    bits_per_byte: float | None
    perplexity: float | None
    """A token's, so it hangs on the tokenizer: exp of the mean loss."""
    delta_nats: float | None
    low_nats: float | None
    high_nats: float | None
    delta_sds: float | None
    """The difference as a multiple of the table's noise floor."""
    decision: Decision
    verdict: str
    """The decision in words."""
    more_seeds: int | None
    exploratory: bool
    num_parameters: int | None
    training_flops: float | None
    tokens_per_second: float | None
    """Median over the arm's complete trials, like the two below."""
    flops_per_second: float | None
    utilisation: float | None
    counts: Mapping[str, int]
    """Trials by state, in the order of STATES; states that do not occur are left out."""
    num_missing: int
    """Trials that the other arms' cells have and this arm has not: refused, or excluded."""
    diverged_lr: float | None
    """The smallest learning rate at which a seed diverged ..."""
    diverged_lr_num_diverged: int
    """... how many did there ..."""
    diverged_lr_num_seeds: int
    """... of how many ..."""
    diverged_lr_low: float | None
    """... and the 95 % interval of the chance, 0 to 1."""
    diverged_lr_high: float | None
    trials: tuple[str, ...]
    """Fingerprints of all the arm's trials in this table: what the choice of the learning rate saw."""
    trials_best: tuple[str, ...]
    """Fingerprints of what the means are taken over: trials at the best learning rate, or those that confirm it."""
    trials_complete: tuple[str, ...]
    points: tuple[LearningRatePoint, ...] = ()
    """Every learning rate that was tried, ascending, by the trials that choose."""
    look: int | None = None
    """The look whose interval this is, from 1, where seeds go to undecided arms; None before it, and elsewhere."""
    gate: str = ""
    """Why a gate between rungs keeps the arm off this one, or that it is not decided yet; it has no trials then."""


@dataclass(frozen=True)
class CellStates:
    """The trials of an arm at one learning rate, by state in the order of STATES; those that do not occur left out."""

    arm: str
    lr: float
    counts: Mapping[str, int]


@dataclass(frozen=True)
class VerdictTable:
    """The arms compared at one combination of the axes' values; ``axes`` is empty when only the LR varies."""

    axes: tuple[tuple[str, Any], ...]
    rows: tuple[ArmRow, ...]
    """Baseline first, then in the sweep's order."""
    noise_floor: NoiseFloor | None
    critical_value: float | None
    num_compared: int
    method: Method
    variances_p: float | None
    trials_compared: tuple[str, ...]
    """Fingerprints behind the pooled variance and so behind every interval."""
    footnotes: tuple[str, ...]
    states: tuple[CellStates, ...] = ()
    """Of every cell, by arm and learning rate."""


@dataclass(frozen=True)
class ImportedRow:
    """Curves from elsewhere, by one name. Marked wherever it is shown: nothing of it is verified, and no verdict has
    seen it."""

    name: str
    num_curves: int
    seeds: tuple[int, ...]
    """As the file or the user says; none where nobody does."""
    split: str
    """``validation``; ``training`` where the file has no other losses."""
    loss_nats: float | None
    """Mean over the curves, each over the sweep's tail of its own steps."""
    loss_sd_nats: float | None
    delta_nats: float | None
    """To the baseline's mean, described and not judged; only of validation losses whose seeds are given."""
    source: str
    format: str
    sha256: str
    imported_at: str
    status: str = "imported, unverified"


@dataclass(frozen=True)
class Results:
    """A sweep's answer. ``split`` says which validation loss it is about."""

    sweep: str
    question: str
    baseline: str
    margin_nats: float | None
    alpha: float
    design: Design
    tail: float
    split: Split
    counts: Mapping[str, int]
    tables: tuple[VerdictTable, ...]
    pruning: PruningAudit | None
    """Of all tables; None when nothing was pruned by rank."""
    trials: tuple[TrialResult, ...] = field(repr=False)
    allotments: tuple[Allotment, ...] = ()
    """What looks decided and which trials they gave, oldest first, as the controller noted it."""
    passages: tuple[GatePassage, ...] = ()
    """What gates between rungs decided, oldest first, as the controller noted it."""
    imported: tuple[ImportedRow, ...] = ()
    """Curves from elsewhere, which are in no table."""
