"""Where a sweep's numbers come from: code, packages, hosts and data of its attempts, and the file that asked for them.

The surprise: what differs between attempts is not hidden behind the first of them. Every value is listed, with the
number of attempts that had it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestrator.report.results import layout_text

if TYPE_CHECKING:
    from orchestrator.store import Store, SweepRow


@dataclass(frozen=True)
class Fact:
    """One thing noted of attempts; ``values`` by how many had them, most first."""

    name: str
    values: tuple[tuple[str, int], ...]

    @property
    def agrees(self) -> bool:
        return len(self.values) == 1


@dataclass(frozen=True)
class Origins:
    num_attempts: int
    facts: tuple[Fact, ...]
    overrides: tuple[str, ...]
    """Of the command line, at the last submission."""
    text: str
    """The sweep file as it was last submitted, without credentials."""
    created_at: datetime
    updated_at: datetime


def origins_of(store: Store, sweep: SweepRow) -> Origins:
    frame = store.frame("attempts", sweep.name)
    counted: dict[str, Counter[str]] = {}
    for provenance, hosts, layout in zip(frame["provenance"], frame["hosts"], frame["layout"], strict=True):
        for name, value in _facts(provenance, hosts, layout):
            counted.setdefault(name, Counter())[value] += 1
    return Origins(
        num_attempts=len(frame),
        facts=tuple(Fact(name, tuple(values.most_common())) for name, values in counted.items()),
        overrides=sweep.overrides,
        text=sweep.text,
        created_at=sweep.created_at,
        updated_at=sweep.updated_at,
    )


def _facts(provenance: Any, hosts: Any, layout: Any) -> Iterator[tuple[str, str]]:
    """Of one attempt, in the order in which they are read: code, packages, machines, data."""
    noted: Mapping[str, Any] = provenance if isinstance(provenance, Mapping) else {}
    if "commit" in noted:
        yield "commit", _said(noted["commit"]) + (", with uncommitted changes" if noted.get("dirty") else "")
    for name, value in noted.items():
        if name in ("commit", "dirty"):
            continue
        if name == "packages" and isinstance(value, Mapping):
            yield from ((f"{package} (package)", _said(version)) for package, version in value.items() if version)
        elif value is not None:
            yield name.replace("_", " "), _said(value)
    yield (
        "hosts",
        ", ".join(sorted({str(host) for host in hosts})) if isinstance(hosts, list) and hosts else "not noted",
    )
    if isinstance(layout, Mapping):
        yield "layout", layout_text(layout)


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
