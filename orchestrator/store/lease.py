"""One writer a sweep: a lease by the database's clock, with a fencing token.

A token only grows. Every write of a controller compares its own inside its own transaction, so a controller that
lost the lease without noticing can't write a byte more. An expired lease stays good until someone takes it.
"""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, Float, and_, bindparam, case, cast, func, literal, select, update
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.store import schema
from orchestrator.store.rows import Demand, Lease, LeaseHeld, LeaseLost
from orchestrator.store.submission import insert_missing


def database_seconds(connection: Connection) -> ColumnElement[float]:
    """Seconds since 1970 by the database's clock, as SQL."""
    if connection.dialect.name == "sqlite":
        return (func.julianday("now") - literal(2440587.5)) * literal(86400.0)
    return cast(func.extract("epoch", func.clock_timestamp()), Float(53))


def acquire(connection: Connection, sweep_id: int, holder: str, seconds: float) -> Lease:
    """Take the lease with a new token, or raise LeaseHeld while another one is in force."""
    lease = schema.lease
    vacant = {"sweep_id": sweep_id, "holder": "", "token": 0, "expires_at": 0.0}
    insert_missing(connection, lease, [vacant])
    now = database_seconds(connection)
    held = connection.execute(
        select(lease.c.holder, lease.c.token, lease.c.expires_at, (lease.c.expires_at - now).label("seconds_left"))
        .where(lease.c.sweep_id == sweep_id)
        .with_for_update()
    ).one()
    if held.seconds_left > 0:
        raise LeaseHeld(held.holder, held.seconds_left)
    token: int = held.token + 1
    values = {"holder": holder, "token": token, "expires_at": now + literal(seconds), "renewed_at": now}
    values["demand"] = None
    if held.holder:  # it ran out, and nobody gave it back
        values["left_at"] = held.expires_at
    connection.execute(update(lease).where(lease.c.sweep_id == sweep_id).values(**values))
    return Lease(sweep_id=sweep_id, token=token)


_TOKEN = select(schema.lease.c.token).where(schema.lease.c.sweep_id == bindparam("of")).with_for_update()
"""Built once: every write of a controller asks for it, and to build it takes longer than to run it."""


def check(connection: Connection, lease: Lease) -> None:
    """Raise LeaseLost unless the lease is the newest one; hold it until the transaction ends."""
    token = connection.scalar(_TOKEN, {"of": lease.sweep_id})
    if token != lease.token:
        raise LeaseLost(
            f"the lease on sweep {lease.sweep_id} with token {lease.token} was lost: the token is now {token}"
        )


def renew(connection: Connection, lease: Lease, seconds: float) -> None:
    check(connection, lease)
    now = database_seconds(connection)
    values = {"expires_at": now + literal(seconds), "renewed_at": now, "held_seconds": _held_until(now)}
    connection.execute(update(schema.lease).where(schema.lease.c.sweep_id == lease.sweep_id).values(**values))


def release(connection: Connection, lease: Lease) -> None:
    """Give the lease back; the old token is void from now on."""
    check(connection, lease)
    now = database_seconds(connection)
    vacant = {"holder": "", "token": lease.token + 1, "expires_at": 0.0, "renewed_at": None, "demand": None}
    connection.execute(
        update(schema.lease)
        .where(schema.lease.c.sweep_id == lease.sweep_id)
        .values(held_seconds=_held_until(now), left_at=now, **vacant)
    )


def _held_until(now: ColumnElement[float]) -> ColumnElement[float]:
    """What all holders together have had, as SQL. A lease that was acquired by older code has no ``renewed_at``."""
    lease = schema.lease
    return lease.c.held_seconds + now - func.coalesce(lease.c.renewed_at, now)


def held_seconds(connection: Connection, sweep_id: int) -> float:
    """How long controllers have run the sweep, all together. Of one that died, up to its last renewal."""
    lease, now = schema.lease, database_seconds(connection)
    is_held = lease.c.expires_at > now
    held = case((is_held, _held_until(now)), else_=lease.c.held_seconds)
    return float(connection.scalar(select(held).where(lease.c.sweep_id == sweep_id)) or 0.0)


def last_left_at(connection: Connection, sweep_id: int) -> float | None:
    """When the time of the last holder before the present one was over; None when that is not known."""
    lease, now = schema.lease, database_seconds(connection)
    ran_out = and_(lease.c.holder != "", lease.c.expires_at <= now)
    left = case((ran_out, lease.c.expires_at), else_=lease.c.left_at)
    moment: float | None = connection.scalar(select(left).where(lease.c.sweep_id == sweep_id))
    return moment


def publish_demand(connection: Connection, lease: Lease, demand: Demand) -> None:
    check(connection, lease)
    said = {name: value for name, value in asdict(demand).items() if name != "sweep_id"}
    connection.execute(update(schema.lease).where(schema.lease.c.sweep_id == lease.sweep_id).values(demand=said))


def demands(connection: Connection) -> list[Demand]:
    """Of the leases in force, by sweep."""
    lease = schema.lease
    query = select(lease.c.sweep_id, lease.c.demand).where(
        lease.c.expires_at > database_seconds(connection), lease.c.demand.is_not(None)
    )
    found = []
    for sweep_id, said in connection.execute(query.order_by(lease.c.sweep_id)):
        amounts = {name: tuple(said[name]) for name in ("held", "wanted", "gang")}
        found.append(Demand(**{**said, **amounts}, sweep_id=sweep_id))
    return found


def holder(connection: Connection, sweep_id: int) -> tuple[str, float] | None:
    """(holder, seconds left) of a lease in force, or None."""
    lease = schema.lease
    left = (lease.c.expires_at - database_seconds(connection)).label("seconds_left")
    row = connection.execute(select(lease.c.holder, left).where(lease.c.sweep_id == sweep_id)).one_or_none()
    return (row.holder, row.seconds_left) if row is not None and row.seconds_left > 0 else None


def is_vacant(connection: Connection, sweep_id: int) -> bool:
    """Whether nobody holds a sweep's lease; if so, nobody will until this transaction ends."""
    if holder(connection, sweep_id) is not None:
        return False
    connection.execute(select(schema.lease.c.token).where(schema.lease.c.sweep_id == sweep_id).with_for_update())
    return holder(connection, sweep_id) is None
