"""What the tables of a sweep are made of, for 10^5 trials: few statements, one snapshot, and no config is read.

``reader`` gives whole rows, with their configs checked; that is 0.2 ms a trial. Here it is a hundredth of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, text

from orchestrator.store.reader import tails
from orchestrator.store.rows import FailedRow, Outcome, TailRow
from orchestrator.store.schema import COMPLETE, FAILED

_TRIALS = """
SELECT st.position, st.fingerprint, st.arm, CAST(st.axes AS TEXT), st.seed, t.lr, t.state, t.cause, t.reason,
       t.num_parameters, t.training_flops, t.num_steps, t.batch_tokens, t.precision, t.end_step,
       a.id, a.number, a.resume_step, CAST(a.layout AS TEXT), a.provenance ->> 'backend', a.tokens_per_second,
       a.sweep_id, a.resumed_from_attempt, a.branched_from
FROM sweep_trial st
JOIN trial t ON t.fingerprint = st.fingerprint
LEFT JOIN attempt a ON a.fingerprint = st.fingerprint
WHERE st.sweep_id = :sweep_id AND st.current
"""
"""A row an attempt, and one for a trial without any."""

_FINGERPRINT, _STATE, _ATTEMPT_ID, _NUMBER, _RESUME_STEP, _LAYOUT, _BACKEND, _SPEED, _SWEEP, _OWN, _TRUNK = (
    1,
    6,
    *range(15, 24),
)
_IN_ORDER = itemgetter(0, _FINGERPRINT, _NUMBER)

_ENDS = """
SELECT v.attempt_id, v.split, COUNT(*),
       CASE WHEN COUNT(v.loss_nats) = COUNT(*) THEN AVG(v.loss_nats) END,
       CASE WHEN COUNT(v.bits_per_byte) = COUNT(*) THEN AVG(v.bits_per_byte) END
FROM validation v
WHERE v.fraction > :after AND v.attempt_id {among}
GROUP BY v.attempt_id, v.split
"""
_RANGE = "BETWEEN :first AND :last"
_OF_SWEEP = """IN (SELECT a.id FROM sweep_trial st JOIN attempt a ON a.fingerprint = st.fingerprint
                   WHERE st.sweep_id = :sweep_id AND st.current)"""

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
    unsorted = connection.execute(text(_TRIALS), {"sweep_id": sweep_id}).all()
    rows = sorted(unsorted, key=_IN_ORDER)  # here and not there: the database would sort them whole
    sweeps = {row.id: row.name for row in connection.execute(text("SELECT id, name FROM sweep"))}
    ends = _ends(connection, sweep_id, tail, [row[_ATTEMPT_ID] for row in rows if row[_ATTEMPT_ID] is not None])
    resumed: dict[str, dict[str, TailRow]] = {}
    trials = [list(of_trial) for _, of_trial in groupby(rows, itemgetter(_FINGERPRINT))]
    if len(trials) < len(rows):
        for end in tails(connection, sweep_id, tail, several_attempts=True):
            resumed.setdefault(end.fingerprint, {})[end.split] = end
    axes, layouts = _Parsed(), _Parsed()
    found = []
    for attempts in trials:
        _, fingerprint, arm, axes_text, *others = attempts[0][:_ATTEMPT_ID]
        of_trial: dict[str, TailRow] = {}
        if len(attempts) > 1:
            of_trial = resumed.get(fingerprint, {})
        elif attempts[0][_STATE] == COMPLETE:
            of_trial = {end[1]: TailRow(fingerprint, *end[1:]) for end in ends.get(attempts[0][_ATTEMPT_ID], ())}
        found.append(
            Outcome._make((fingerprint, arm, axes[axes_text], *others, *_taken(attempts, layouts, sweeps), of_trial))
        )
    return found


def _ends(connection: Connection, sweep_id: int, tail: float, attempts: list[int]) -> dict[int, list[Sequence[Any]]]:
    """By attempt: of each split the validations in the last ``tail`` of the schedule, and perhaps other attempts'.

    A sweep's attempts are mostly neighbours. Where they are, the range is read as it lies instead of looking up each.
    """
    if not attempts:
        return {}
    first, last = min(attempts), max(attempts)
    is_dense = last - first < 2 * len(attempts)
    among = {"first": first, "last": last} if is_dense else {"sweep_id": sweep_id}
    question = text(_ENDS.format(among=_RANGE if is_dense else _OF_SWEEP))
    found: dict[int, list[Sequence[Any]]] = {}
    for end in connection.execute(question, {"after": 1.0 - tail, **among}):
        found.setdefault(end[0], []).append(end)
    return found


class _Parsed(dict[str, Any]):
    """JSON by its text: the same few layouts, and the axes of a cell once for all its seeds."""

    def __missing__(self, json_text: str) -> Any:
        return self.setdefault(json_text, json.loads(json_text))


def _taken(attempts: Sequence[Sequence[Any]], layouts: _Parsed, sweeps: Mapping[int, str]) -> tuple[Any, ...]:
    """Of a trial's attempts: their number, the back ends and layouts, the speed and the sweep of the last, and where
    the trial branched off another.

    A layout counts if no later attempt began at its attempt's first step or before: successors build on it.
    """
    last = attempts[-1]
    if last[_ATTEMPT_ID] is None:
        return 0, (), (), None, None, None
    backends = tuple(sorted({attempt[_BACKEND] for attempt in attempts if attempt[_BACKEND] is not None}))
    counted: list[dict[str, Any]] = []
    first = math.inf
    for attempt in reversed(attempts):
        if attempt[_RESUME_STEP] < first:
            first, layout = attempt[_RESUME_STEP], layouts[attempt[_LAYOUT]]
            if counted[-1:] != [layout]:
                counted.append(layout)
    beginning = next(attempt for attempt in reversed(attempts) if attempt[_OWN] is None)
    branched = None if beginning[_TRUNK] is None else (beginning[_TRUNK], beginning[_RESUME_STEP])
    return len(attempts), backends, tuple(reversed(counted)), last[_SPEED], sweeps[last[_SWEEP]], branched


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
