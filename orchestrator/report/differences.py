"""How two trials differ: in what is learnt (config), and in where and how they ran (environment of the last attempt).

The surprise: a preset is no key. Configs are compared as they were resolved, so that two files which say the same in
other words do not differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator.report.figures import NOTHING
from orchestrator.store import AttemptRow, TrialRow

ABSENT = "absent"
"""A key that one of the two has not: an option of a gate where there is no gate."""


@dataclass(frozen=True)
class Difference:
    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class TrialDifferences:
    """Of two trials. ``environment`` is empty, and ``unrun`` tells why, when one has no attempt."""

    first: str
    second: str
    config: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    unrun: tuple[str, ...] = ()


def differences(first: TrialRow, second: TrialRow, attempts: Mapping[str, AttemptRow | None]) -> TrialDifferences:
    """``attempts``: the last one of each trial, by fingerprint."""
    configs = [dict(_flat(trial.config.model_dump(mode="json"))) for trial in (first, second)]
    last = [attempts.get(trial.fingerprint) for trial in (first, second)]
    ran = [dict(_flat(_environment(attempt))) for attempt in last if attempt is not None]
    return TrialDifferences(
        first=first.fingerprint,
        second=second.fingerprint,
        config=tuple(_unequal(*configs)),
        environment=tuple(_unequal(*ran)) if len(ran) == 2 else (),
        unrun=tuple(trial.fingerprint for trial, attempt in zip((first, second), last, strict=True) if attempt is None),
    )


def _environment(attempt: AttemptRow) -> dict[str, Any]:
    layout = attempt.layout.model_dump(mode="json")
    return {**attempt.provenance, "hosts": sorted(set(attempt.hosts)), "layout": layout}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys([*first, *second]):
        values = [one.get(key, ABSENT) for one in (first, second)]
        # ``gate: null`` beside ``gate.position: sdpa`` is told by the latter.
        if values[0] != values[1] and not any(other.startswith(f"{key}.") for other in (*first, *second)):
            yield Difference(key, *values)


@dataclass(frozen=True)
class DifferencesView:
    """Prints ``differences``."""

    differences: TrialDifferences

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        told = self.differences
        if told.first == told.second:
            yield Text(f"{told.first} and {told.second} are one trial")
            return
        for title, rows in (("config", told.config), ("environment of the last attempt", told.environment)):
            if not rows:
                continue
            grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
            for heading in (title, told.first, told.second):
                grid.add_column(Text(heading), overflow="fold")
            for row in rows:
                grid.add_row(*(Text(cell) for cell in (row.key, _shown(row.first), _shown(row.second))))
            yield grid
        if told.unrun:
            yield Text(f"not run yet, so no environment to compare: {', '.join(told.unrun)}")
        elif not told.environment:
            yield Text("the last attempts ran in the same environment: packages, commit, hosts, layout, back end, data")


def _shown(value: Any) -> str:
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value)


def differences_to_json(told: TrialDifferences) -> str:
    return json.dumps(asdict(told), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
