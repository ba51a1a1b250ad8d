"""What the tables of a sweep are made of, for 10^5 trials: few statements, one snapshot, and no config is read.

``reader`` gives whole rows, with their configs checked; that is 0.2 ms a trial. Here it is a hundredth of it, since of
a COMPLETE trial there is one narrow row (``ended``); what has none is worked out in the same snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, text

from orchestrator.store.ended import missing, missing_of
from orchestrator.store.rows import FailedRow, Outcome
from orchestrator.store.schema import FAILED

_TRIALS = """
SELECT st.position, st.fingerprint, st.arm, CAST(st.axes AS TEXT), st.seed, t.lr, t.state, t.cause, t.reason,
       t.num_parameters, t.training_flops, t.num_steps, t.batch_tokens, t.precision, t.end_step,
       o.num_attempts, o.backends, o.layouts, o.tokens_per_second, o.sweep_id, o.branched, o.slice_points,
       o.slice_loss_nats, o.slice_bits_per_byte, o.full_points, o.full_loss_nats, o.full_bits_per_byte
FROM sweep_trial st
JOIN trial t ON t.fingerprint = st.fingerprint
LEFT JOIN outcome o ON o.fingerprint = st.fingerprint AND o.tail = :tail
WHERE st.sweep_id = :sweep_id AND st.current
"""
_IN_ORDER = itemgetter(0, 1)
_FINGERPRINT, _AXES, _NUM_ATTEMPTS, _BACKENDS, _LAYOUTS, _SWEEP, _BRANCHED = 1, 3, 15, 16, 17, 19, 20
_NOT_BEGUN = (0, "[]", "[]", *[None] * 9)
"""What ``outcome`` would hold of a trial without attempts."""
_FEW = 0.1

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
    return list(map(Outcome._make, zip(*outcome_columns(connection, sweep_id, tail).values(), strict=True)))


def outcome_columns(connection: Connection, sweep_id: int, tail: float) -> dict[str, Sequence[Any]]:
    """The same by field of Outcome, a value a trial: so the loops are C's, and what is parsed is shared."""
    result = connection.execute(text(_TRIALS), {"sweep_id": sweep_id, "tail": tail})
    assert result.cursor is not None
    rows: list[Any] = list(result.cursor.fetchall())  # plain tuples, which are fast
    result.close()
    rows.sort(key=_IN_ORDER)  # here and not there: the database would sort them whole
    _fill_in(connection, sweep_id, tail, rows)
    if not rows:
        return dict.fromkeys(Outcome._fields, ())
    columns: list[Any] = list(zip(*rows, strict=True))
    columns[_AXES] = list(map(_Parsed(json.loads).__getitem__, columns[_AXES]))
    for column in (_BACKENDS, _LAYOUTS, _BRANCHED):
        columns[column] = list(map(_Parsed(_tuple).__getitem__, columns[column]))
    sweeps = {row.id: row.name for row in connection.execute(text("SELECT id, name FROM sweep"))}
    columns[_SWEEP] = list(map(sweeps.get, columns[_SWEEP]))
    return dict(zip(Outcome._fields, columns[1:], strict=True))


def _fill_in(connection: Connection, sweep_id: int, tail: float, rows: list[Any]) -> None:
    """What has no row in ``outcome``: mostly trials that are not COMPLETE."""
    absent = [index for index, row in enumerate(rows) if row[_NUM_ATTEMPTS] is None]
    if len(absent) < _FEW * len(rows):
        found = missing_of(connection, [rows[index][_FINGERPRINT] for index in absent], tail)
    else:
        found = missing(connection, sweep_id, tail)
    known = {one.fingerprint: tuple(one[1:]) for one in found}
    for index in absent:
        row = rows[index]
        rows[index] = (*row[:_NUM_ATTEMPTS], *known.get(row[_FINGERPRINT], _NOT_BEGUN))


def _tuple(said: str | None) -> tuple[Any, ...] | None:
    return None if said is None else tuple(json.loads(said))


class _Parsed(dict[Any, Any]):
    """By its text: the same few layouts, and the axes of a cell once for all its seeds."""

    def __init__(self, parse: Callable[[Any], Any]) -> None:
        self.parse = parse

    def __missing__(self, said: Any) -> Any:
        return self.setdefault(said, self.parse(said))


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
