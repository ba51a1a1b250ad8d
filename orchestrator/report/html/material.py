"""All that a report shows, read from the store and drawn. Verdicts first: the rest is of the trials behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.report.figures import axes_text
from orchestrator.report.html.origins import Origins, origins_of
from orchestrator.report.ladder import Ladder, ladder_behind
from orchestrator.report.mechanism import MechanismTable, mechanism_behind
from orchestrator.report.plots import (
    ArmCurves,
    ArmProbes,
    Picture,
    curves_picture,
    effects_picture,
    inside_picture,
    ladder_picture,
    rates_picture,
)
from orchestrator.report.results import results
from orchestrator.report.tree import Results, VerdictTable
from orchestrator.store import Imported, RankDecision
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    from orchestrator.store import Store


@dataclass(frozen=True)
class Comparison:
    """One verdict table with all that belongs to it."""

    heading: str
    """The values of its axes; empty when only the learning rate varies."""
    table: VerdictTable
    mechanism: MechanismTable
    pictures: tuple[Picture, ...]
    inside: tuple[Picture, ...]
    not_drawn: tuple[str, ...]
    """Arms whose curves have no place yet: no learning rate of theirs has all its trials."""


@dataclass(frozen=True)
class LadderShown:
    ladder: Ladder
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Material:
    results: Results
    comparisons: tuple[Comparison, ...]
    ladder: LadderShown | None
    """Of a sweep over sizes; None: its axes are no ladder, or there is one size."""
    decisions: tuple[RankDecision, ...]
    """What was pruned by rank, oldest first."""
    origins: Origins
    written_at: datetime

    @property
    def pictures(self) -> Iterator[Picture]:
        for one in self.comparisons:
            yield from (*one.pictures, *one.inside)
        yield from () if self.ladder is None else self.ladder.pictures


def gathered(store: Store, sweep_name: str) -> Material:
    """UserError when there is no such sweep."""
    answer = results(store, sweep_name)
    tables = mechanism_behind(store, answer).tables
    pairs = list(zip(answer.tables, tables, strict=True))
    sweep = store.sweep(sweep_name)
    foreign = store.imported(sweep.id)
    return Material(
        results=answer,
        comparisons=tuple(
            _comparison(store, answer, table, inside, "" if len(pairs) == 1 else f"-{number}", foreign)
            for number, (table, inside) in enumerate(pairs, start=1)
        ),
        ladder=_ladder(store, answer),
        decisions=tuple(store.rank_decisions(sweep.id)),
        origins=origins_of(store, sweep),
        written_at=datetime.now(UTC),
    )


def _ladder(store: Store, answer: Results) -> LadderShown | None:
    if len(answer.tables) < 2:
        return None
    try:
        found = ladder_behind(store, answer)
    except UserError:
        return None
    picture = ladder_picture("ladder", found)
    return LadderShown(found, () if picture is None else (picture,))


def _comparison(
    store: Store,
    answer: Results,
    table: VerdictTable,
    mechanism: MechanismTable,
    suffix: str,
    foreign: Sequence[Imported],
) -> Comparison:
    """``suffix``: what tells the files of several tables apart. ``foreign``: curves from elsewhere, drawn beside."""
    order = [row.arm for row in table.rows]
    behind = {row.arm: row.trials_best for row in table.rows}
    curves = [ArmCurves(arm, tuple(store.curve(one) for one in trials)) for arm, trials in behind.items() if trials]
    probes = [
        ArmProbes(arm, tuple(tuple(store.layers(one)) for one in trials)) for arm, trials in behind.items() if trials
    ]
    drawn = (
        effects_picture(f"effects{suffix}", table.rows, answer.baseline, answer.margin_nats),
        rates_picture(f"learning-rates{suffix}", table.rows),
        curves_picture(f"loss-curves{suffix}", curves, answer.baseline, order, foreign),
    )
    inside = inside_picture(f"inside{suffix}", probes, order)
    return Comparison(
        heading=axes_text(dict(table.axes)),
        table=table,
        mechanism=mechanism,
        pictures=tuple(picture for picture in drawn if picture is not None),
        inside=() if inside is None else (inside,),
        not_drawn=tuple(arm for arm, trials in behind.items() if not trials),
    )
