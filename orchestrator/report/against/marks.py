"""Published claims beside a sweep's own numbers: held, not held, undecided, not measured.

The rules, for "A is lower than B":

* *held*: the whole interval of A minus B lies below 0.
* *not held*: the whole interval lies above 0, or inside the sweep's margin (equivalent).
* *undecided*: the interval says neither, or there is none (fewer than two seeds).
* *not measured*: an arm has no result, or is another mechanism under the same name; or nothing here measures it. So
  are all claims about arms that the sweep does not have, which are only counted.

Intervals of losses against the sweep's baseline are those of its verdict table. All others are simultaneous over the
arms of the table, by the sweep's own method, and share alpha over the references that are asked about (Bonferroni).
Divergence is counted at the learning rates that both arms tried, and tested by Fisher's exact test, one-sided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.report.against.published import CLAIMS, Claim, Measure, is_the_papers
from orchestrator.report.mechanism import ArmMechanism, Mechanism, MechanismTable, Spread, mechanism
from orchestrator.report.results import results
from orchestrator.report.tree import Results, VerdictTable
from orchestrator.verdict import Sample, Verdict, compare

if TYPE_CHECKING:
    from orchestrator.store import Store

FORMULA_VERSION = "against-1"

Mark = Literal["held", "not held", "undecided", "not measured"]


@dataclass(frozen=True)
class Finding:
    """A claim, and what the sweep says of it."""

    claim: Claim
    mark: Mark
    reason: str
    effect: float | None = None
    """Arm minus reference, in the measure's unit: nats for the loss."""
    low: float | None = None
    high: float | None = None
    num_seeds: tuple[int, int] | None = None
    """Of the arm and of the reference."""
    exploratory: bool = False
    trials: tuple[str, ...] = ()


@dataclass(frozen=True)
class AgainstTable:
    axes: tuple[tuple[str, Any], ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Against:
    """A sweep's tables, each beside the claims about its arms."""

    sweep: str
    question: str
    alpha: float
    margin_nats: float | None
    tables: tuple[AgainstTable, ...]
    num_elsewhere: int
    """Claims about arms that the sweep does not have."""


def against_paper(store: Store, sweep_name: str) -> Against:
    """Every claim about a stored sweep's arms, as its trials stand now. UserError when there is no such sweep."""
    answer, inside = results(store, sweep_name), mechanism(store, sweep_name)
    trials = store.trials(store.sweep(sweep_name).id)
    foreign = {trial.arm for trial in trials if not is_the_papers(trial.arm, trial.config)}
    return mark_claims(answer, inside, foreign)


def mark_claims(answer: Results, inside: Mechanism, foreign: set[str], claims: Sequence[Claim] = CLAIMS) -> Against:
    """``foreign``: arms that have a name of the paper's and are something else."""
    arms = {row.arm for table in answer.tables for row in table.rows}
    ours = [claim for claim in claims if {claim.arm, claim.reference} <= arms]
    tables = tuple(
        AgainstTable(table.axes, tuple(_Marks(answer, table, seen, foreign).of(_at_setting(ours, table, claims))))
        for table, seen in zip(answer.tables, inside.tables, strict=True)
    )
    return Against(
        answer.sweep, answer.question, answer.alpha, answer.margin_nats, tables, num_elsewhere=len(claims) - len(ours)
    )


def _at_setting(ours: Sequence[Claim], table: VerdictTable, claims: Sequence[Claim]) -> list[Claim]:
    """Without the claims of another setting, where the table is at one of the paper's."""
    published: dict[str, set[Any]] = {}
    for claim in claims:
        for name, value in claim.setting.items():
            published.setdefault(name, set()).add(value)
    return [
        claim
        for claim in ours
        if not any(
            value in published.get(name, ()) and claim.setting.get(name, value) != value for name, value in table.axes
        )
    ]


class _Marks:
    """The claims of one table."""

    def __init__(self, answer: Results, table: VerdictTable, seen: MechanismTable, foreign: set[str]) -> None:
        self.answer, self.table, self.foreign = answer, table, foreign
        self.rows = {row.arm: row for row in table.rows}
        self.seen = {row.arm: row for row in seen.rows}
        self.seeds = {trial.fingerprint: trial.seed for trial in answer.trials}
        self.num_references = 1
        self.compared: dict[tuple[Measure, str], Mapping[str, Verdict]] = {}

    def of(self, claims: Sequence[Claim]) -> list[Finding]:
        asked = {(claim.measure, claim.reference) for claim in claims if not self._reads_verdict(claim)}
        self.num_references = max(1, len(asked))
        return [self._finding(claim) for claim in claims]

    def _reads_verdict(self, claim: Claim) -> bool:
        return claim.measure in ("benchmarks", "divergence") or (
            claim.measure == "loss" and claim.reference == self.answer.baseline
        )

    def _finding(self, claim: Claim) -> Finding:
        if claim.measure == "benchmarks":
            return Finding(claim, "not measured", f"{claim.note}: there is no evaluation of these here")
        for arm in (claim.arm, claim.reference):
            if arm in self.foreign:
                return Finding(claim, "not measured", f"arm {arm} of this sweep is another mechanism than the paper's")
        if claim.measure == "divergence":
            return self._divergence(claim)
        return self._difference(claim)

    def _difference(self, claim: Claim) -> Finding:
        samples = {arm: self._sample(claim.measure, arm) for arm in (claim.arm, claim.reference)}
        lacking = next((arm for arm, sample in samples.items() if not sample.losses_nats), None)
        if lacking is not None:
            return Finding(claim, "not measured", f"{lacking}: {samples[lacking].problem}")
        row = self.rows[claim.arm]
        verdict = self._verdicts(claim)[claim.arm]
        mark, reason = _mark(claim, verdict, self.answer.margin_nats)
        return Finding(
            claim,
            mark,
            reason,
            effect=verdict.delta_nats,
            low=verdict.low_nats,
            high=verdict.high_nats,
            num_seeds=(len(samples[claim.arm].losses_nats), len(samples[claim.reference].losses_nats)),
            exploratory=row.exploratory,
            trials=(*row.trials_best, *self.rows[claim.reference].trials_best),
        )

    def _verdicts(self, claim: Claim) -> Mapping[str, Verdict]:
        """Of all arms against the claim's reference."""
        key = (claim.measure, claim.reference)
        if key not in self.compared:
            is_loss = claim.measure == "loss"
            samples = [self._sample(claim.measure, arm) for arm in self.rows]
            alpha = self.answer.alpha if self._reads_verdict(claim) else self.answer.alpha / self.num_references
            margin = self.answer.margin_nats if is_loss else None
            comparison = compare(samples, claim.reference, margin, alpha, self.answer.design)
            self.compared[key] = {one.arm: one for one in comparison.verdicts}
        return self.compared[key]

    def _sample(self, measure: Measure, arm: str) -> Sample:
        """What is compared: an arm's losses, or what its probes saw, a number a seed."""
        row = self.rows[arm]
        if measure == "loss":
            return Sample(arm, row.losses_nats, row.verdict, tuple(self.seeds[one] for one in row.trials_best))
        spread = _SPREADS[measure](self.seen[arm])
        if spread is None or spread.mean is None:
            return Sample(arm, (), f"no {measure} of all its seeds at its best learning rate")
        return Sample(arm, spread.values, seeds=tuple(self.seeds[one] for one in spread.trials))

    def _divergence(self, claim: Claim) -> Finding:
        import numpy as np
        from scipy.stats import fisher_exact

        counts: dict[str, dict[float, Mapping[str, int]]] = {}
        for cell in self.table.states:
            if sum(cell.counts.get(state, 0) for state in ("COMPLETE", "DIVERGED")):
                counts.setdefault(cell.arm, {})[cell.lr] = cell.counts
        of_arm, of_reference = counts.get(claim.arm, {}), counts.get(claim.reference, {})
        both = sorted({*of_arm} & {*of_reference})
        rates = [lr for lr in both if any(arm[lr].get("DIVERGED") for arm in (of_arm, of_reference))]
        if not rates:
            return Finding(claim, "not measured", "no learning rate that both arms tried diverged in either")
        diverged = [sum(arm[lr].get("DIVERGED", 0) for lr in rates) for arm in (of_arm, of_reference)]
        sound = [sum(arm[lr].get("COMPLETE", 0) for lr in rates) for arm in (of_arm, of_reference)]
        seen = np.array([diverged, sound])
        tested = [float(fisher_exact(seen, alternative=side).pvalue) for side in ("less", "greater")]
        mark: Mark = (
            "held" if tested[0] < self.answer.alpha else "not held" if tested[1] < self.answer.alpha else "undecided"
        )
        num = [lost + kept for lost, kept in zip(diverged, sound, strict=True)]
        said = f"at {', '.join(f'{lr:g}' for lr in rates)}: {diverged[0]} of {num[0]} diverged, of {claim.reference} "
        said += f"{diverged[1]} of {num[1]}; p = {tested[0]:.2g}"
        row = self.rows[claim.arm]
        effect = diverged[0] / num[0] - diverged[1] / num[1]
        trials = (*row.trials, *self.rows[claim.reference].trials)
        return Finding(claim, mark, said, effect=effect, num_seeds=(num[0], num[1]), trials=trials)


_SPREADS: dict[Measure, Callable[[ArmMechanism], Spread | None]] = {
    "gate score": lambda row: next(iter(row.gate_scores.values()), None),
    "M-Act": lambda row: row.max_activation,
    "F-Attn": lambda row: row.first_token_attention,
    "loss spikes": lambda row: row.num_loss_spikes,
}


def _mark(claim: Claim, verdict: Verdict, margin_nats: float | None) -> tuple[Mark, str]:
    low, high = verdict.low_nats, verdict.high_nats
    if low is None or high is None:
        return "undecided", verdict.words
    if claim.direction == "higher":
        low, high = -high, -low
    if high < 0.0:
        return "held", "the interval excludes 0"
    if low > 0.0:
        return "not held", "the interval says the contrary"
    if verdict.decision == "equivalent":
        return "not held", f"equivalent within the margin of {margin_nats:g} nats"
    return "undecided", verdict.words if claim.measure == "loss" else "the interval holds 0"


def counted(against: Against) -> dict[Mark, int]:
    """How many findings have each mark."""
    marks: tuple[Mark, ...] = ("held", "not held", "undecided", "not measured")
    found = [finding.mark for table in against.tables for finding in table.findings]
    return {mark: found.count(mark) for mark in marks}
