"""A sweep over sizes: each arm's scaling law, what its lead is worth, and where the order turns between rungs.

The tables of the verdicts are the rungs. The surprise: all losses are those of the verdict tables, at each arm's own
best learning rate, so an arm whose rung is unfinished or has a diverged seed there has no point on its law.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.report.results import results
from orchestrator.report.tree import ArmRow, Results
from orchestrator.scaling import LAWS_VERSION, LadderLaws, RungLosses, fit_ladder
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    from orchestrator.store import Store, TrialRow

Along = Literal["compute", "parameters", "tokens"]
UNITS = {"compute": "training FLOPs", "parameters": "parameters", "tokens": "training tokens"}
FORMULA_VERSION = LAWS_VERSION
FLIPS_VERSION = "rank-flip-1"


@dataclass(frozen=True)
class Rung:
    """An arm on one rung. ``delta_nats`` and its interval are those of the verdict, against the baseline."""

    arm: str
    axes: tuple[tuple[str, Any], ...]
    size: float
    losses_nats: tuple[float, ...]
    delta_nats: float | None
    low_nats: float | None
    high_nats: float | None
    trials: tuple[str, ...]


@dataclass(frozen=True)
class Flip:
    """An arm is ahead of the baseline on one rung and behind on a larger one.

    ``certain``: both intervals exclude 0. Else it is a possible flip: one of them does. A sign that turns where neither
    does is noise as likely as not, and no flip.
    """

    arm: str
    lower: Rung
    upper: Rung
    certain: bool


@dataclass(frozen=True)
class Ladder:
    sweep: str
    question: str
    baseline: str
    along: Along
    rungs: tuple[Rung, ...]
    """By arm, and from small to large."""
    laws: LadderLaws
    flips: tuple[Flip, ...]
    gates: tuple[str, ...] = ()
    """Of each arm that a gate keeps off rungs: its name and why."""

    def trials(self, *arms: str) -> tuple[str, ...]:
        """Fingerprints of what the arms' numbers come from."""
        return tuple(dict.fromkeys(one for rung in self.rungs if rung.arm in arms for one in rung.trials))


def ladder(store: Store, sweep_name: str, along: Along = "compute") -> Ladder:
    """The ladder of a stored sweep, as its trials stand now. UserError when there is no such sweep, or no ladder."""
    return ladder_behind(store, results(store, sweep_name), along)


def ladder_behind(store: Store, answer: Results, along: Along = "compute") -> Ladder:
    """The same of results that were read before."""
    _check_axes(answer)
    rows = store.trials(store.sweep(answer.sweep).id)
    tokens = {row.fingerprint: float(row.config.train.tokens) for row in rows}
    found: dict[str, list[tuple[Rung, tuple[float, ...]]]] = {}
    for table in answer.tables:
        for row in table.rows:
            sizes = _sizes(row, tokens)
            if sizes is not None:
                found.setdefault(row.arm, []).append((_rung(row, table.axes, sizes[along]), tuple(sizes.values())))
    for arm, of_arm in found.items():
        of_arm.sort(key=lambda one: (one[0].size, *one[1]))
        _check_order(answer.sweep, arm, along, of_arm)
    rungs = tuple(rung for of_arm in found.values() for rung, _ in of_arm)
    trunks = _Trunks(rows)
    points = [RungLosses(rung.arm, rung.size, rung.losses_nats, trunks.of(rung)) for rung in rungs]
    return Ladder(
        answer.sweep,
        answer.question,
        answer.baseline,
        along,
        rungs,
        fit_ladder(points, answer.baseline),
        tuple(flip for of_arm in found.values() for flip in rank_flips([rung for rung, _ in of_arm])),
        tuple(dict.fromkeys(f"{row.arm} {row.gate}" for table in answer.tables for row in table.rows if row.gate)),
    )


class _Trunks:
    """Which losses of a ladder have a run in common: decay branches and their trunk, also where a branch was trained
    from its beginning, as its numbers are the same."""

    def __init__(self, rows: Sequence[TrialRow]) -> None:
        from orchestrator.plan import decay_branches

        self._seeds = {row.fingerprint: row.seed for row in rows}
        self._trunks = {one: branch.trunk for one, branch in decay_branches(rows, {}, tail=0.0).items()}

    def of(self, rung: Rung) -> tuple[str, ...]:
        """Of each loss, which are in the order of seeds; none in a ladder without branches."""
        if not self._trunks or len(rung.trials) != len(rung.losses_nats):
            return ()
        ordered = sorted(rung.trials, key=lambda one: self._seeds[one])
        return tuple(self._trunks.get(one, one) for one in ordered)


def _check_axes(answer: Results) -> None:
    names = list(dict.fromkeys(name for table in answer.tables for name, _ in table.axes))
    others = [name for name in names if not name.startswith("model.") and name not in ("train.tokens", "train.steps")]
    if others or not names:
        got = f"axis {others[0]}, which is no size" if others else "no axis of sizes"
        raise UserError(f"results --ladder: {answer.sweep} has {got}; allowed: axes of model.* and train.tokens")


def _sizes(row: ArmRow, tokens: dict[str, float]) -> dict[Along, float] | None:
    if row.training_flops is None or row.num_parameters is None or not row.trials:
        return None
    return {"compute": row.training_flops, "parameters": float(row.num_parameters), "tokens": tokens[row.trials[0]]}


def _rung(row: ArmRow, axes: tuple[tuple[str, Any], ...], size: float) -> Rung:
    return Rung(
        row.arm, axes, size, row.losses_nats, row.delta_nats, row.low_nats, row.high_nats, row.trials_best
    )  # fmt: skip


def _check_order(sweep: str, arm: str, along: Along, of_arm: Sequence[tuple[Rung, tuple[float, ...]]]) -> None:
    """A law along one measure needs the others to grow with it: the loss hangs on parameters and tokens both."""
    for (below, sizes_below), (above, sizes_above) in pairwise(of_arm):
        if below.size == above.size:
            raise UserError(
                f"results --ladder: {sweep}, arm {arm}: two rungs of {below.size:g} {UNITS[along]}; "
                "allowed: --along what grows from rung to rung"
            )
        if any(a < b for b, a in zip(sizes_below, sizes_above, strict=True)):
            raise UserError(
                f"results --ladder: {sweep}, arm {arm}: parameters and tokens do not grow together; "
                "allowed: one line of sizes (zip), not a grid"
            )


def rank_flips(rungs: Sequence[Rung]) -> Iterator[Flip]:
    """Of one arm's rungs, from small to large: certain ones between any two, possible ones between neighbours."""
    known = [rung for rung in rungs if rung.delta_nats is not None]
    for lower, upper in combinations(range(len(known)), 2):
        first, second = known[lower], known[upper]
        if (first.delta_nats or 0.0) * (second.delta_nats or 0.0) >= 0.0:
            continue
        decided = _excludes_zero(first) + _excludes_zero(second)
        if decided == 2 or (decided == 1 and upper == lower + 1):
            yield Flip(first.arm, first, second, certain=decided == 2)


def _excludes_zero(rung: Rung) -> bool:
    return rung.low_nats is not None and rung.high_nats is not None and rung.low_nats * rung.high_nats > 0.0
