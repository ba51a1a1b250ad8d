"""What the tables of a sweep are made of, for 10^5 trials: few statements, one snapshot, and no config is read.

``reader`` gives whole rows, with their configs checked; that is 0.2 ms a trial. Here it is a hundredth of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, text

from orchestrator.store.reader import tails
from orchestrator.store.rows import FailedRow, Outcome, TailRow
from orchestrator.store.schema import FAILED

_TRIALS = """
SELECT st.fingerprint, st.arm, CAST(st.axes AS TEXT) AS axes, st.seed, t.lr, t.state, t.cause, t.reason,
       t.num_parameters, t.training_flops, t.num_steps, t.batch_tokens, t.precision, t.end_step
FROM sweep_trial st JOIN trial t ON t.fingerprint = st.fingerprint
WHERE st.sweep_id = :sweep_id AND st.current
ORDER BY st.position
"""

_ATTEMPTS = """
SELECT a.fingerprint, a.number, a.resume_step, CAST(a.layout AS TEXT) AS layout, a.provenance ->> 'backend' AS backend,
       a.tokens_per_second, o.name
FROM sweep_trial st JOIN attempt a ON a.fingerprint = st.fingerprint JOIN sweep o ON o.id = a.sweep_id
WHERE st.sweep_id = :sweep_id AND st.current
"""

_COUNTS = """
SELECT st.sweep_id, t.state, COUNT(*)
FROM sweep_trial st JOIN trial t ON t.fingerprint = st.fingerprint
WHERE st.current {and_where}
GROUP BY st.sweep_id, t.state
"""

_FAILED = f"""
SELECT st.fingerprint, st.arm, CAST(st.axes AS TEXT) AS axes, st.seed, t.cause, t.reason,
       (SELECT a.log_tail FROM attempt a WHERE a.fingerprint = t.fingerprint ORDER BY a.number DESC LIMIT 1) AS log_tail
FROM trial t JOIN sweep_trial st ON st.fingerprint = t.fingerprint AND st.sweep_id = :sweep_id
WHERE t.state = '{FAILED}' AND st.current
ORDER BY st.position LIMIT :limit
"""


def outcomes(connection: Connection, sweep_id: int, tail: float) -> list[Outcome]:
    """A sweep's current trials in execution order, with what was measured of them."""
    of_sweep = {"sweep_id": sweep_id}
    attempts: dict[str, list[Sequence[Any]]] = {}
    for attempt in connection.execute(text(_ATTEMPTS), of_sweep):
        attempts.setdefault(attempt[0], []).append(attempt)
    ends: dict[str, dict[str, TailRow]] = {}
    for end in tails(connection, sweep_id, tail):
        ends.setdefault(end.fingerprint, {})[end.split] = end
    axes = _Parsed()
    layouts = _Parsed()
    found = []
    for fingerprint, arm, axes_text, *others in connection.execute(text(_TRIALS), of_sweep):
        taken = _taken(attempts.get(fingerprint, []), layouts)
        row = (fingerprint, arm, axes[axes_text], *others, *taken, ends.get(fingerprint, {}))
        found.append(Outcome._make(row))
    return found


class _Parsed(dict[str, Any]):
    """JSON by its text: the same few layouts, and the axes of a cell once for all its seeds."""

    def __missing__(self, json_text: str) -> Any:
        return self.setdefault(json_text, json.loads(json_text))


def _taken(attempts: list[Sequence[Any]], layouts: _Parsed) -> tuple[Any, ...]:
    """Of a trial's attempts: their number, the back ends and layouts, and the speed and the sweep of the last.

    A layout counts if no later attempt began at its attempt's first step or before: successors build on it.
    """
    if not attempts:
        return 0, (), (), None, None
    attempts.sort(key=_NUMBER)
    backends = tuple(sorted({attempt[4] for attempt in attempts if attempt[4] is not None}))
    counted: list[dict[str, Any]] = []
    first = math.inf
    for attempt in reversed(attempts):
        if attempt[2] < first:
            first, layout = attempt[2], layouts[attempt[3]]
            if counted[-1:] != [layout]:
                counted.append(layout)
    last = attempts[-1]
    return len(attempts), backends, tuple(reversed(counted)), last[5], last[6]


_NUMBER = itemgetter(1)


def num_by_state(connection: Connection, sweep_id: int | None = None) -> dict[int, dict[str, int]]:
    """By sweep, or of one alone, how many of its current trials are in which state; states without any are left out."""
    counts: dict[int, dict[str, int]] = {}
    one = "" if sweep_id is None else "AND st.sweep_id = :sweep_id"
    for found_id, state, number in connection.execute(
        text(_COUNTS.format(and_where=one)), {"sweep_id": sweep_id} if one else {}
    ):
        counts.setdefault(found_id, {})[state] = number
    return counts


def failed(connection: Connection, sweep_id: int, limit: int) -> list[FailedRow]:
    """The first trials of a sweep that FAILED, in execution order."""
    rows = connection.execute(text(_FAILED), {"sweep_id": sweep_id, "limit": limit})
    return [FailedRow(fingerprint, arm, json.loads(axes), *others) for fingerprint, arm, axes, *others in rows]
