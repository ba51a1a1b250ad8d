"""Of each COMPLETE trial one narrow row (table ``outcome``) with what tables need of its attempts and validations.

COMPLETE is final, and so is the row: it is written in the transaction that ends the trial, for the tail of every sweep
that holds it. The surprise: a row may be missing, and nothing hangs on its being there. Readers work out the same by
the same statements, which for 10^5 trials takes seconds instead of none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, Connection, TextClause, bindparam, text

from orchestrator.store import schema
from orchestrator.store.submission import insert_missing
from orchestrator.sweep import VerdictConfig

_CHUNK = 500


class Ended(NamedTuple):
    """What came of a trial's attempts; of one that is not COMPLETE, up to now. Columns of the table ``outcome``."""

    fingerprint: str
    num_attempts: int
    backends: str
    """JSON, as the next one."""
    layouts: str
    tokens_per_second: float | None
    sweep_id: int
    branched: str | None
    """JSON: the trial that its history begins in, and the last step that it shares with it."""
    slice_points: int | None = None
    slice_loss_nats: float | None = None
    slice_bits_per_byte: float | None = None
    full_points: int | None = None
    full_loss_nats: float | None = None
    full_bits_per_byte: float | None = None


_ATTEMPTS = """
SELECT a.fingerprint, a.number, a.resume_step, CAST(a.layout AS TEXT), a.provenance ->> 'backend',
       a.tokens_per_second, a.sweep_id, a.resumed_from_attempt, a.branched_from
FROM attempt a WHERE a.fingerprint {among}
"""
_FINGERPRINT, _NUMBER, _RESUME_STEP, _LAYOUT, _BACKEND, _SPEED, _SWEEP, _OWN, _TRUNK = range(9)

_TAILS = """
SELECT v.fingerprint, v.split, COUNT(*),
       CASE WHEN COUNT(v.loss_nats) = COUNT(*) THEN AVG(v.loss_nats) END,
       CASE WHEN COUNT(v.bits_per_byte) = COUNT(*) THEN AVG(v.bits_per_byte) END
FROM trial t JOIN curve_validation v ON v.fingerprint = t.fingerprint
WHERE t.state = 'COMPLETE' AND v.fraction > :after AND t.fingerprint {among}
GROUP BY v.fingerprint, v.split
"""

_MISSING = """
IN (SELECT st.fingerprint FROM sweep_trial st
    LEFT JOIN outcome o ON o.fingerprint = st.fingerprint AND o.tail = :tail
    WHERE st.sweep_id = :sweep_id AND st.current AND o.fingerprint IS NULL)
"""


_AMONG: BindParameter[Any] = bindparam("among", expanding=True)
_OF_SWEEP = text(_ATTEMPTS.format(among=_MISSING)), text(_TAILS.format(among=_MISSING))
_OF_SOME = (
    text(_ATTEMPTS.format(among="IN :among")).bindparams(_AMONG),
    text(_TAILS.format(among="IN :among")).bindparams(_AMONG),
)
_HELD_WITH = text(
    "SELECT DISTINCT s.verdict ->> 'tail' FROM sweep_trial st JOIN sweep s ON s.id = st.sweep_id"
    " WHERE st.fingerprint = :fingerprint"
)
_KEPT = text("SELECT DISTINCT fingerprint FROM outcome WHERE fingerprint IN :among").bindparams(_AMONG)
_DROP = text("DELETE FROM outcome WHERE fingerprint = :fingerprint")
_COMPLETE = text(f"SELECT t.fingerprint FROM trial t WHERE t.state = '{schema.COMPLETE}' AND t.fingerprint {_MISSING}")
_TAIL_OF_SWEEP = text("SELECT verdict ->> 'tail' FROM sweep WHERE id = :sweep_id")


def keep(connection: Connection, fingerprint: str) -> None:
    """Write the rows of a trial that has become COMPLETE in this transaction."""
    tails = {_tail(one) for one in connection.scalars(_HELD_WITH, {"fingerprint": fingerprint})}
    for tail in sorted(tails):
        _insert(connection, tail, _ended(connection, _OF_SOME, tail, {"among": [fingerprint]}))


def renew(connection: Connection, fingerprints: Iterable[str]) -> None:
    """New validations of these trials: of those that have ended, which is rare, the rows are written anew."""
    among = sorted(set(fingerprints))
    for start in range(0, len(among), _CHUNK):
        for fingerprint in connection.scalars(_KEPT, {"among": among[start : start + _CHUNK]}).all():
            connection.execute(_DROP, {"fingerprint": fingerprint})
            keep(connection, fingerprint)


def keep_missing(connection: Connection, sweep_id: int) -> None:
    """Of a sweep's COMPLETE trials, the rows that are not there: other sweeps trained them and had other tails."""
    tail = _tail(connection.scalar(_TAIL_OF_SWEEP, {"sweep_id": sweep_id}))
    complete = set(connection.scalars(_COMPLETE, {"sweep_id": sweep_id, "tail": tail}))
    if complete:
        found = missing(connection, sweep_id, tail)
        _insert(connection, tail, [one for one in found if one.fingerprint in complete])


def missing(connection: Connection, sweep_id: int, tail: float) -> list[Ended]:
    """Of those current trials of a sweep that have attempts and no row: what it would be, or will be."""
    return _ended(connection, _OF_SWEEP, tail, {"sweep_id": sweep_id, "tail": tail})


def missing_of(connection: Connection, fingerprints: Sequence[str], tail: float) -> list[Ended]:
    """The same of these trials: faster where they are few."""
    chunks = [list(fingerprints[start : start + _CHUNK]) for start in range(0, len(fingerprints), _CHUNK)]
    return [one for chunk in chunks for one in _ended(connection, _OF_SOME, tail, {"among": chunk})]


def _tail(stored: object) -> float:
    """As declared in a sweep's column ``verdict``; a store that an older version wrote may lack it."""
    return float(VerdictConfig.model_fields["tail"].default if stored is None else stored)  # type: ignore[arg-type]


def _insert(connection: Connection, tail: float, rows: Sequence[Ended]) -> None:
    """Another sweep's submission may have been faster."""
    insert_missing(connection, schema.outcome, [{"tail": tail, **row._asdict()} for row in rows])


def _ended(
    connection: Connection, statements: tuple[TextClause, TextClause], tail: float, among: dict[str, Any]
) -> list[Ended]:
    attempts = sorted(connection.execute(statements[0], among), key=itemgetter(_FINGERPRINT, _NUMBER))
    measured: dict[str, dict[str, Any]] = {}
    for fingerprint, split, *numbers in connection.execute(statements[1], {"after": 1.0 - tail, **among}):
        names = (f"{split}_points", f"{split}_loss_nats", f"{split}_bits_per_byte")
        measured.setdefault(fingerprint, {}).update(zip(names, numbers, strict=True))
    return [
        Ended(fingerprint, *_taken(list(of_trial)), **measured.get(fingerprint, {}))
        for fingerprint, of_trial in groupby(attempts, itemgetter(_FINGERPRINT))
    ]


def _taken(attempts: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Of a trial's attempts: their number, the back ends and layouts, the speed and the sweep of the last, and where
    the trial branched off another.

    A layout counts if no later attempt began at its attempt's first step or before: successors build on it.
    """
    backends = sorted({attempt[_BACKEND] for attempt in attempts if attempt[_BACKEND] is not None})
    counted: list[Any] = []
    first = math.inf
    for attempt in reversed(attempts):
        if attempt[_RESUME_STEP] < first:
            first, layout = attempt[_RESUME_STEP], json.loads(attempt[_LAYOUT])
            if counted[-1:] != [layout]:
                counted.append(layout)
    beginning = next(attempt for attempt in reversed(attempts) if attempt[_OWN] is None)
    branched = None if beginning[_TRUNK] is None else json.dumps([beginning[_TRUNK], beginning[_RESUME_STEP]])
    last = attempts[-1]
    return len(attempts), json.dumps(backends), json.dumps(counted[::-1]), last[_SPEED], last[_SWEEP], branched
