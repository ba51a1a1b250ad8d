"""Curves that other programs wrote, beside a sweep: in tables of their own, which nothing that judges ever reads."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from orchestrator.store import schema
from orchestrator.store.rows import Imported, ImportedCurve, ImportedPoint, SweepRow
from orchestrator.store.submission import add_event
from orchestrator.sweep import UserError

IMPORTED = "imported"


def put(connection: Connection, sweep: SweepRow, given: Imported) -> None:
    """All of it or nothing. UserError for a name that is taken, by an arm or an earlier import."""
    curve, point = schema.imported_curve, schema.imported_point
    arms = select(schema.arm.c.name).where(schema.arm.c.sweep_id == sweep.id)
    if given.name in set(connection.scalars(arms)):
        raise UserError(f"--as {given.name}: an arm of {sweep.name}; allowed: a name that no arm has")
    known = {one.name for one in imported(connection, sweep.id)}
    if given.name in known:
        raise UserError(
            f"--as {given.name}: there already; allowed: another name, or first gatesweep import --sweep {sweep.name} "
            f"--as {given.name} --remove"
        )
    for number, one in enumerate(given.curves):
        values = {"sweep_id": sweep.id, "name": given.name, "number": number, "seed": one.seed, "source": given.source}
        values |= {"format": given.format, "sha256": given.sha256, "imported_at": given.imported_at}
        made = connection.execute(insert(curve).values(**values).returning(curve.c.id)).scalar_one()
        rows = [
            {"curve_id": made, "split": p.split, "step": p.step, "tokens": p.tokens, "loss_nats": p.loss_nats}
            for p in one.points
        ]
        connection.execute(insert(point), rows)
    said = f"{given.name}: {len(given.curves)} curve(s) from {given.source} ({given.format}), unverified"
    add_event(connection, sweep.id, IMPORTED, said)


def remove(connection: Connection, sweep: SweepRow, name: str) -> int:
    """How many curves that were; UserError when there are none of that name."""
    curve, point = schema.imported_curve, schema.imported_point
    ours = select(curve.c.id).where(curve.c.sweep_id == sweep.id, curve.c.name == name)
    ids = list(connection.scalars(ours))
    if not ids:
        known = sorted({one.name for one in imported(connection, sweep.id)})
        raise UserError(
            f"--as {name}: nothing of that name in {sweep.name}; allowed: {', '.join(known) or '(nothing)'}"
        )
    connection.execute(delete(point).where(point.c.curve_id.in_(ids)))
    connection.execute(delete(curve).where(curve.c.id.in_(ids)))
    add_event(connection, sweep.id, IMPORTED, f"{name}: removed")
    return len(ids)


def imported(connection: Connection, sweep_id: int) -> list[Imported]:
    """In the order in which they came."""
    curve, point = schema.imported_curve, schema.imported_point
    curves = connection.execute(select(curve).where(curve.c.sweep_id == sweep_id).order_by(curve.c.id)).all()
    points: dict[int, list[ImportedPoint]] = {}
    of_sweep = select(point).join(curve, curve.c.id == point.c.curve_id).where(curve.c.sweep_id == sweep_id)
    for row in connection.execute(of_sweep.order_by(point.c.curve_id, point.c.split, point.c.step)):
        points.setdefault(row.curve_id, []).append(ImportedPoint(row.split, row.step, row.loss_nats, row.tokens))
    found: dict[str, Imported] = {}
    for row in curves:
        one = ImportedCurve(row.seed, tuple(points.get(row.id, ())))
        before = found[row.name].curves if row.name in found else ()
        found[row.name] = Imported(row.name, row.source, row.format, row.sha256, row.imported_at, (*before, one))
    return list(found.values())
