"""A ladder for a terminal, CSV and JSON. Unrounded in CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator.report.figures import NOTHING, axes_text, delta_text, flops_text, loss_text, wrapped
from orchestrator.report.formats import derived_value
from orchestrator.report.ladder import FLIPS_VERSION, FORMULA_VERSION, UNITS, Flip, Ladder, Rung
from orchestrator.scaling import EXTRAPOLATION, Estimate, LeftOut, SpeedUp

LADDER_HEADINGS = ("arm", "floor E", "A", "exponent", "largest rung", "foretold", "miss", "speed-up")


@dataclass(frozen=True)
class LadderView:
    """Prints ``ladder``; in a narrow terminal cells are folded, not cut."""

    ladder: Ladder

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.ladder.sweep, "bold"), f": {self.ladder.question}")
        yield Text("")
        if self.ladder.laws.laws:
            grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
            for index, heading in enumerate(LADDER_HEADINGS):
                grid.add_column(Text(heading), justify="right" if index else "left", overflow="fold")
            for cells in ladder_cells(self.ladder):
                grid.add_row(*map(Text, cells))
            yield grid
            yield Text("")
        for flip in self.ladder.flips:
            style = "bold red" if flip.certain else "yellow"
            yield Text("\n".join(wrapped(flip_in_words(flip), options.max_width)), style=style)
        for note in ladder_notes(self.ladder):
            yield Text("\n".join(wrapped(note, options.max_width)), style="dim")


def ladder_cells(ladder: Ladder) -> Iterator[tuple[str, ...]]:
    left_out = {one.arm: one for one in ladder.laws.left_out}
    speed_ups = {one.arm: one for one in ladder.laws.speed_ups}
    for law in ladder.laws.laws:
        check, speed_up = left_out.get(law.arm), speed_ups.get(law.arm)
        yield (
            law.arm,
            _spread(law.floor_nats),
            _spread(law.amplitude_nats),
            _spread(law.exponent),
            NOTHING if check is None else loss_text(check.loss_nats),
            NOTHING if check is None else loss_text(check.predicted_nats),
            _miss(check),
            _faster(speed_up),
        )


def _spread(estimate: Estimate) -> str:
    if estimate.low is None and estimate.high is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} [{_end(estimate.low)}, {_end(estimate.high)}]"


def _end(value: float | None) -> str:
    return "open" if value is None else f"{value:.3g}"


def _miss(check: LeftOut | None) -> str:
    if check is None:
        return NOTHING
    return delta_text(check.miss_nats) + ("" if check.sds is None else f" ({check.sds:+.1f} SD)")


def _faster(speed_up: SpeedUp | None) -> str:
    if speed_up is None:
        return NOTHING
    return "refused" if speed_up.ratio is None else f"x {_spread(speed_up.ratio)}"


def flip_in_words(flip: Flip) -> str:
    what = "RANK FLIP" if flip.certain else "possible rank flip"
    return f"{what}: {flip.arm} minus the baseline is {_side(flip.lower)} and {_side(flip.upper)}"


def _side(rung: Rung) -> str:
    interval = "" if rung.low_nats is None else f" [{delta_text(rung.low_nats)}, {delta_text(rung.high_nats)}]"
    return f"{delta_text(rung.delta_nats)}{interval} at {axes_text(dict(rung.axes))}"


def ladder_notes(ladder: Ladder) -> list[str]:
    """What the numbers are, what could not be had and why."""
    laws, notes = ladder.laws, []
    if laws.laws:
        shared = "; E and the exponent are shared by all arms" if laws.form == "shared" else ""
        notes.append(
            f"loss = E + A (x / {flops_text(laws.laws[0].reference)})^-exponent, x: {UNITS[ladder.along]}{shared}; "
            "95 % intervals by resampling whole trials: the noise of seeds, not of the form of the law"
        )
    if laws.left_out:
        notes.append("foretold: the largest rung's loss, by the same law fitted without that rung; miss: loss minus it")
    if laws.speed_ups:
        notes.append(
            f"speed-up: {UNITS[ladder.along]} that the baseline would need for the arm's loss on its largest rung, "
            f"over the arm's; not told more than {EXTRAPOLATION:g} times beyond the baseline's rungs"
        )
    notes += [f"{one.arm}: no speed-up, {one.problem}" for one in laws.speed_ups if one.ratio is None]
    if not ladder.flips:
        notes.append("no arm's lead over the baseline turns between rungs where an interval excludes 0")
    if ladder.gates:
        said = "; ".join(ladder.gates)
        notes.append(
            f"gates: {said}. An arm went on since it looked good below, so its lead there is on average larger than "
            "the true one, the more so the less a gate lets through"
        )
    return [*notes, *laws.problems]


def ladder_to_csv(ladder: Ladder) -> str:
    """A line an arm and rung: its size, its losses' mean, its difference to the baseline, and what its law says."""
    laws = {law.arm: law for law in ladder.laws.laws}
    lines = [
        {
            "sweep": ladder.sweep,
            **dict(rung.axes),
            "arm": rung.arm,
            "along": ladder.along,
            "size": rung.size,
            "num_seeds": len(rung.losses_nats),
            "loss_nats": sum(rung.losses_nats) / len(rung.losses_nats) if rung.losses_nats else None,
            "law_loss_nats": laws[rung.arm].loss_nats(rung.size) if rung.arm in laws else None,
            "delta_nats": rung.delta_nats,
            "low_nats": rung.low_nats,
            "high_nats": rung.high_nats,
        }
        for rung in ladder.rungs
    ]
    stream = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def ladder_to_json(ladder: Ladder) -> str:
    """Every derived value with its formula's version and the fingerprints of the trials that it came from."""
    laws = ladder.laws
    content = {
        "sweep": ladder.sweep,
        "question": ladder.question,
        "baseline": ladder.baseline,
        "along": ladder.along,
        "form": laws.form,
        "rungs": [{**asdict(rung), "axes": dict(rung.axes)} for rung in ladder.rungs],
        "laws": _derived(ladder, laws.laws, alone=laws.form == "own"),
        "left_out": _derived(ladder, laws.left_out, alone=laws.form == "own"),
        "speed_ups": _derived(ladder, laws.speed_ups, alone=False),
        "flips": [
            {
                "arm": flip.arm,
                "certain": derived_value(flip.certain, FLIPS_VERSION, (*flip.lower.trials, *flip.upper.trials)),
                "lower": dict(flip.lower.axes),
                "upper": dict(flip.upper.axes),
            }
            for flip in ladder.flips
        ],
        "notes": ladder_notes(ladder),
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _derived(ladder: Ladder, found: Sequence[Any], alone: bool) -> list[dict[str, Any]]:
    """``alone``: from the arm's own trials; else from the baseline's, too, or from all where the law is shared."""
    fitted = [law.arm for law in ladder.laws.laws]
    lines = []
    for one in found:
        arms = fitted if ladder.laws.form == "shared" else [one.arm] if alone else [ladder.baseline, one.arm]
        fields = {name: value for name, value in asdict(one).items() if name != "arm"}
        lines.append({"arm": one.arm, **derived_value(fields, FORMULA_VERSION, ladder.trials(*arms))})
    return lines
