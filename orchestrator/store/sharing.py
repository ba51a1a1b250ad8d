"""What sweeps of one store have in common: trials that another one trained, comparisons that lean on one baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, text

from orchestrator.store.rows import Reused

_CHUNK = 500

_ELSEWHERE = text(
    """
    SELECT a.fingerprint, MIN(o.name)
    FROM attempt a JOIN sweep o ON o.id = a.sweep_id
    WHERE o.name <> :name AND a.fingerprint IN :fingerprints
      AND NOT EXISTS (SELECT 1 FROM attempt b JOIN sweep s ON s.id = b.sweep_id
                      WHERE b.fingerprint = a.fingerprint AND s.name = :name)
    GROUP BY a.fingerprint
    """
).bindparams(bindparam("fingerprints", expanding=True))

_STATES = text("SELECT fingerprint, state FROM trial WHERE fingerprint IN :fingerprints").bindparams(
    bindparam("fingerprints", expanding=True)
)

_LAST = """
    SELECT st.fingerprint, o.name, CAST(a.provenance AS TEXT), CAST(a.hosts AS TEXT)
    FROM sweep_trial st
    JOIN attempt a ON a.fingerprint = st.fingerprint
    JOIN sweep o ON o.id = a.sweep_id
    WHERE st.sweep_id = :sweep_id AND st.current AND a.sweep_id <> :sweep_id
      AND a.number = (SELECT MAX(b.number) FROM attempt b WHERE b.fingerprint = st.fingerprint)
"""

_OWN = """
    SELECT CAST(a.provenance AS TEXT), CAST(a.hosts AS TEXT) FROM attempt a
    WHERE a.sweep_id = :sweep_id ORDER BY a.id DESC LIMIT 1
"""

_COMPARED = """
    SELECT s.name, (
        SELECT COUNT(*) FROM arm WHERE arm.sweep_id = s.id AND arm.name <> s.baseline AND EXISTS (
            SELECT 1 FROM sweep_trial other
            WHERE other.sweep_id = s.id AND other.arm = arm.name AND other.current
        )
    ) AS num_arms
    FROM sweep s
    WHERE s.id IN (
        SELECT theirs.sweep_id
        FROM sweep_trial ours
        JOIN sweep this ON this.id = ours.sweep_id AND ours.arm = this.baseline
        JOIN sweep_trial theirs ON theirs.fingerprint = ours.fingerprint AND theirs.current
        JOIN sweep them ON them.id = theirs.sweep_id AND theirs.arm = them.baseline
        WHERE ours.sweep_id = :sweep_id AND ours.current
    )
    ORDER BY s.name
"""


def trained_elsewhere(connection: Connection, name: str, fingerprints: Sequence[str]) -> dict[str, str]:
    """Of these trials, those that only other sweeps than ``name`` have trained: by fingerprint, which one."""
    found: dict[str, str] = {}
    for start in range(0, len(fingerprints), _CHUNK):
        chunk = list(fingerprints[start : start + _CHUNK])
        rows = connection.execute(_ELSEWHERE, {"name": name, "fingerprints": chunk})
        found.update((fingerprint, sweep) for fingerprint, sweep in rows)
    return found


def states(connection: Connection, fingerprints: Sequence[str]) -> dict[str, str]:
    """Of those that the store knows, whatever sweep they belong to."""
    found: dict[str, str] = {}
    for start in range(0, len(fingerprints), _CHUNK):
        chunk = {"fingerprints": list(fingerprints[start : start + _CHUNK])}
        found.update((fingerprint, state) for fingerprint, state in connection.execute(_STATES, chunk))
    return found


def reused(connection: Connection, sweep_id: int) -> list[Reused]:
    """The sweep's trials that another one trained last, with what was otherwise than in this sweep's last attempt."""
    of_sweep = {"sweep_id": sweep_id}
    own = connection.execute(text(_OWN), of_sweep).first()
    here = None if own is None else _facts(*own)
    drifts: dict[tuple[str, str | None], tuple[str, ...]] = {}
    found = []
    for fingerprint, sweep, provenance, hosts in connection.execute(text(_LAST), of_sweep):
        key = (provenance, hosts)
        if key not in drifts:
            drifts[key] = () if here is None else _drift(_facts(provenance, hosts), here)
        found.append(Reused(fingerprint, sweep, drifts[key]))
    return found


def comparisons(connection: Connection, sweep_id: int) -> dict[str, int]:
    """By sweep, the arms that are compared with this sweep's baseline trials; this sweep's own among them."""
    rows = connection.execute(text(_COMPARED), {"sweep_id": sweep_id})
    return {row[0]: row[1] for row in rows if row[1]}


def _facts(provenance: str, hosts: str | None) -> dict[str, Any]:
    """``hosts`` is NULL until the attempt's gang has told them."""
    content: dict[str, Any] = json.loads(provenance)
    packages: dict[str, Any] = content.get("packages") or {}
    kept = {name: content.get(name) for name in ("commit", "source_hash", "python", "backend")}
    return {**kept, **packages, "hosts": ", ".join(sorted(set(json.loads(hosts) if hosts else ())))}


def _drift(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """``torch 2.12 -> 2.13``. The hash of the source is told only where no commit tells it."""
    names = [name for name in then if then[name] != now.get(name)]
    if "commit" in names:
        names = [name for name in names if name != "source_hash"]
    return tuple(f"{name} {_short(then[name])} -> {_short(now.get(name))}" for name in names)


def _short(value: Any) -> str:
    text_ = "none" if value is None else str(value)
    return text_[:12] if len(text_) == 40 else text_
