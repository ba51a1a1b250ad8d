"""Writing a plan into the store: idempotent, one transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Executable, Table, insert, select, update

from orchestrator.store import schema
from orchestrator.store.rows import Added

if TYPE_CHECKING:
    from orchestrator.plan import Confirmation, GrownRate, Plan, PlannedTrial
    from orchestrator.sweep import Sweep


def insert_missing(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert the rows whose key is not there yet, and leave the others as they are."""
    if not rows:
        return
    connection.execute(_insert_missing(connection.dialect.name, table), rows)


@cache
def _insert_missing(dialect: str, table: Table) -> Executable:
    if dialect == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table).on_conflict_do_nothing()
    from sqlalchemy.dialects import postgresql  # a tenth of a second, which SQLite need not wait for

    return postgresql.insert(table).on_conflict_do_nothing()


def storable(said: str) -> str:
    """Without the NUL that a log may hold and Postgres refuses, on SQLite too: a store can be moved."""
    return said.replace("\0", "\ufffd")


def add_event(
    connection: Connection,
    sweep_id: int | None,
    kind: str,
    message: str,
    fingerprint: str | None = None,
    attempt: int | None = None,
    at: datetime | None = None,
) -> None:
    values = {"sweep_id": sweep_id, "fingerprint": fingerprint, "attempt_number": attempt, "kind": kind}
    connection.execute(insert(schema.event).values(at=at or datetime.now(UTC), message=storable(message), **values))


def add_plan(connection: Connection, plan: Plan) -> Added:
    """Keep what is known, add what is missing, and mark what the plan no longer holds as not current."""
    sweep_id = _put_sweep(connection, plan)
    _put_arms(connection, sweep_id, plan.sweep)
    fingerprints = [planned.fingerprint for planned in plan.trials]
    if len(set(fingerprints)) != len(fingerprints):
        raise ValueError(f"sweep {plan.sweep.name}: the plan holds one fingerprint twice")
    known = _known(connection, fingerprints)
    new = [planned for planned in plan.trials if planned.fingerprint not in known]
    # Sorted, so that two submissions that share trials lock them in one order.
    rows = [_trial_values(planned) for planned in sorted(new, key=lambda planned: planned.fingerprint)]
    insert_missing(connection, schema.trial, rows)
    chosen = _still_chosen(connection, sweep_id, plan.confirmations)
    confirming = [trial for confirmation, lr in chosen for trial in confirmation.by_lr[lr]]
    confirming += [trial for confirmation, lr in chosen for trial in _allotted(connection, sweep_id, confirmation, lr)]
    _link(connection, sweep_id, [*plan.trials, *confirming])
    return Added(sweep_id=sweep_id, num_new=len(new), num_known=len(fingerprints) - len(new))


def grown_rates(connection: Connection, sweep_id: int) -> list[GrownRate]:
    """Kept in ``verdict`` under ``grown``, oldest first."""
    from orchestrator.plan import GrownRate

    verdict = connection.scalars(select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id)).one()
    return [GrownRate(one["arm"], one["axes"], one["lr"]) for one in verdict.get("grown", ())]


def grown_rates_of(connection: Connection, sweep_name: str) -> list[GrownRate]:
    """The same by name; none of a sweep that is not known yet."""
    sweep_id = connection.scalar(select(schema.sweep.c.id).where(schema.sweep.c.name == sweep_name))
    return [] if sweep_id is None else grown_rates(connection, sweep_id)


def grow(connection: Connection, sweep_id: int, rate: GrownRate, trials: Sequence[PlannedTrial]) -> None:
    query = select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id).with_for_update()
    verdict = connection.scalars(query).one()
    now = {"arm": rate.arm, "axes": rate.axes, "lr": rate.lr}
    if now in verdict.get("grown", ()):
        return
    join_trials(connection, sweep_id, trials)
    verdict = {**verdict, "grown": [*verdict.get("grown", ()), now]}
    connection.execute(update(schema.sweep).where(schema.sweep.c.id == sweep_id).values(verdict=verdict))
    add_event(connection, sweep_id, "learning_rate_added", f"{rate.arm}: learning rate {rate.lr:g}")


def join_trials(connection: Connection, sweep_id: int, trials: Sequence[PlannedTrial]) -> None:
    """Trials become the sweep's, beside those that it has; known ones are kept."""
    rows = [_trial_values(planned) for planned in sorted(trials, key=lambda planned: planned.fingerprint)]
    insert_missing(connection, schema.trial, rows)
    link = schema.sweep_trial
    for planned in trials:
        row = _link_values(sweep_id, planned)
        insert_missing(connection, link, [row])
        here = (link.c.sweep_id == sweep_id, link.c.fingerprint == planned.fingerprint)
        connection.execute(update(link).where(*here).values(**row))


def choose(connection: Connection, sweep_id: int, confirmation: Confirmation, lr: float) -> float:
    """Note an arm's learning rate and add its confirming trials; a choice made before on the same trials holds.

    Kept in ``verdict`` under ``chosen``, oldest first: the rate, the trials that chose it, those that confirm it, and
    which of these were ``seen``: had run before the choice, so that they are no fresh data.
    """
    query = select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id).with_for_update()
    earlier = find_choice(connection.scalars(query).one(), confirmation)
    lr = lr if earlier is None else earlier["lr"]
    _confirm(connection, sweep_id, confirmation, lr)
    join_trials(connection, sweep_id, confirmation.by_lr[lr])
    if earlier is None:
        said = f"{confirmation.arm}: learning rate {lr:g} chosen by {len(confirmation.selection)} trials"
        add_event(connection, sweep_id, "learning_rate_chosen", said)
    return lr


def find_choice(verdict: Mapping[str, Any], confirmation: Confirmation) -> dict[str, Any] | None:
    """The choice that these very trials made, if they did."""
    wanted = (confirmation.arm, list(confirmation.selection))
    found = [one for one in verdict.get("chosen", ()) if (one["arm"], one["selection"]) == wanted]
    return found[-1] if found and found[-1]["lr"] in confirmation.by_lr else None


def _still_chosen(
    connection: Connection, sweep_id: int, confirmations: Sequence[Confirmation]
) -> list[tuple[Confirmation, float]]:
    """Choices that a new submission leaves as they are; with more confirming seeds, their trials are added."""
    found = []
    for confirmation in confirmations:
        verdict = connection.scalars(select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id)).one()
        choice = find_choice(verdict, confirmation)
        if choice is not None:
            _confirm(connection, sweep_id, confirmation, choice["lr"])
            found.append((confirmation, choice["lr"]))
    return found


def _allotted(connection: Connection, sweep_id: int, confirmation: Confirmation, lr: float) -> list[PlannedTrial]:
    """Those that looks after the first gave the arm."""
    verdict = connection.scalars(select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id)).one()
    given = {fingerprint for one in verdict.get("allocated", ()) for fingerprint in one["trials"]}
    return [trial for trials in confirmation.later.get(lr, ()) for trial in trials if trial.fingerprint in given]


def _confirm(connection: Connection, sweep_id: int, confirmation: Confirmation, lr: float) -> None:
    """The trials of one rate into the table of trials, and into the sweep's note of its choices."""
    trials = confirmation.by_lr[lr]
    fingerprints = [trial.fingerprint for trial in trials]
    states = select(schema.trial.c.fingerprint).where(
        schema.trial.c.fingerprint.in_(fingerprints), schema.trial.c.state != schema.WAITING
    )
    begun = set(connection.scalars(states))
    rows = [_trial_values(planned) for planned in sorted(trials, key=lambda planned: planned.fingerprint)]
    insert_missing(connection, schema.trial, rows)
    verdict = connection.scalars(select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id)).one()
    chosen: list[dict[str, Any]] = verdict.get("chosen", [])
    ours = {one for choice in chosen for one in choice["confirming"]}
    seen = {one for choice in chosen for one in choice["seen"]}
    now = {
        "arm": confirmation.arm,
        "axes": confirmation.axes,
        "lr": lr,
        "selection": list(confirmation.selection),
        "confirming": fingerprints,
        "seen": [one for one in fingerprints if one in seen or (one in begun and one not in ours)],
    }
    if chosen and now in chosen:
        return
    # More seeds of the same choice replace its note; another choice is added to it.
    same = [one for one in chosen if all(one[key] == now[key] for key in ("arm", "lr", "selection"))]
    kept = [one for one in chosen if one not in same]
    verdict = {**verdict, "chosen": [*kept, now]}
    connection.execute(update(schema.sweep).where(schema.sweep.c.id == sweep_id).values(verdict=verdict))


def _put_sweep(connection: Connection, plan: Plan) -> int:
    """The column ``verdict`` is written once: what was declared before anything ran holds, whatever comes later.

    ``settings`` also hold ``declared``: by arm, the keys that it sets otherwise than the baseline; and the
    ``rungs`` of a ladder with gates.
    """
    now, sweep = datetime.now(UTC), plan.sweep
    settings = {**sweep.model_dump(mode="json"), "declared": _declared(plan)}
    if plan.rungs:
        settings["rungs"] = [asdict(rung) for rung in plan.rungs]
    values: dict[str, Any] = {
        "question": sweep.question,
        "baseline": sweep.baseline,
        "settings": settings,
        "text": sweep.text,
        "overrides": list(sweep.overrides),
    }
    frozen = {"verdict": {**settings["verdict"], "baseline": sweep.baseline}}
    first = {"name": sweep.name, "created_at": now, "updated_at": now, **values, **frozen}
    insert_missing(connection, schema.sweep, [first])
    stored = connection.execute(select(schema.sweep).where(schema.sweep.c.name == sweep.name).with_for_update()).one()
    sweep_id: int = stored.id
    before = {key: getattr(stored, key) for key in values}
    if before != values:
        looked = _with_look(connection, sweep_id, before["baseline"], before["settings"], stored.verdict, settings)
        changed = {"updated_at": now, "verdict": looked, **values}
        connection.execute(update(schema.sweep).where(schema.sweep.c.id == sweep_id).values(**changed))
    # A store that an older version wrote lacks keys that have come since.
    declared = (_written_out(before["settings"].get("verdict")), before["baseline"])
    if declared != (settings["verdict"], sweep.baseline):
        message = (
            f"verdict settings changed: {declared[0]}, baseline {declared[1]} -> "
            f"{settings['verdict']}, baseline {sweep.baseline}; those of the first submission hold"
        )
        add_event(connection, sweep_id, "verdict settings changed", message)
    return sweep_id


def _written_out(verdict: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if verdict is None else {"allocate": None, "promote": None, **verdict}


def _declared(plan: Plan) -> dict[str, list[str]]:
    keys: dict[str, dict[str, None]] = {}
    for contrast in plan.contrasts:
        keys.setdefault(contrast.arm, {}).update(dict.fromkeys(change.key for change in contrast.declared))
    return {arm: list(of_arm) for arm, of_arm in keys.items()}


def verdict_seeds(settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """Which seeds a verdict is made of: a change of theirs is another look.

    ``select`` are there only when other seeds chose the learning rates.
    """
    confirming = settings.get("confirm_seeds")
    seeds = {"seeds": list(confirming or settings.get("seeds") or ())}
    seeds["extra_baseline_seeds"] = list(settings.get("extra_baseline_seeds") or ())
    return {**seeds, "select": list(settings["seeds"])} if confirming else seeds


def _with_look(
    connection: Connection,
    sweep_id: int,
    baseline: str,
    before: dict[str, Any],
    verdict: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """``verdict`` with the seeds of the last submission added to its ``looks_taken``, if a verdict could be read."""
    seeds = verdict_seeds(before)
    taken = verdict.get("looks_taken", [])
    if seeds == verdict_seeds(settings) or seeds in taken:
        return verdict
    visible = _arms_with_a_whole_cell(connection, sweep_id, set(seeds["seeds"]))
    if baseline not in visible or len(visible) < 2:
        return verdict
    return {**verdict, "looks_taken": [*taken, seeds]}


def _arms_with_a_whole_cell(connection: Connection, sweep_id: int, seeds: set[int]) -> set[str]:
    """Arms with a cell all of whose ``seeds`` are complete: those that a table shows a loss of."""
    link, trial = schema.sweep_trial, schema.trial
    complete = connection.execute(
        select(link.c.arm, link.c.axes, link.c.seed)
        .join(trial, trial.c.fingerprint == link.c.fingerprint)
        .where(link.c.sweep_id == sweep_id, link.c.current, trial.c.state == schema.COMPLETE)
    )
    cells: dict[tuple[str, str], set[int]] = {}
    for arm, axes, seed in complete:
        cells.setdefault((arm, json.dumps(axes, sort_keys=True)), set()).add(seed)
    return {arm for (arm, _), present in cells.items() if seeds <= present}


def _put_arms(connection: Connection, sweep_id: int, sweep: Sweep) -> None:
    arm = schema.arm
    connection.execute(update(arm).where(arm.c.sweep_id == sweep_id).values(current=False))
    arms = sweep.model_dump(mode="json", include={"arms"})["arms"]
    for position, (name, settings) in enumerate(arms.items()):
        values = {"position": position, "settings": settings, "current": True}
        insert_missing(connection, arm, [{"sweep_id": sweep_id, "name": name, **values}])
        connection.execute(update(arm).where(arm.c.sweep_id == sweep_id, arm.c.name == name).values(**values))


def _known(connection: Connection, fingerprints: Sequence[str]) -> set[str]:
    column = schema.trial.c.fingerprint
    known: set[str] = set()
    for start in range(0, len(fingerprints), 500):
        chunk = fingerprints[start : start + 500]
        known.update(connection.scalars(select(column).where(column.in_(chunk))))
    return known


def _trial_values(planned: PlannedTrial) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "fingerprint": planned.fingerprint,
        "config": planned.config.model_dump(mode="json"),
        "lr": planned.config.train.lr,
        "seed": planned.config.seed,
        "num_steps": planned.config.train.num_steps,
        "batch_tokens": planned.config.train.batch_tokens,
        "precision": planned.config.precision,
        "num_parameters": planned.num_parameters,
        "training_flops": float(planned.training_flops),
        "state": schema.WAITING,
        "reopened_after": 0,
        "created_at": now,
        "updated_at": now,
    }


def _link(connection: Connection, sweep_id: int, trials: Sequence[PlannedTrial]) -> None:
    link = schema.sweep_trial
    linked = {
        row.fingerprint: row._asdict() for row in connection.execute(select(link).where(link.c.sweep_id == sweep_id))
    }
    planned_rows = [_link_values(sweep_id, planned) for planned in trials]
    insert_missing(connection, link, [row for row in planned_rows if row["fingerprint"] not in linked])
    for row in planned_rows:
        before = linked.pop(row["fingerprint"], None)
        if before is not None and any(before[key] != value for key, value in row.items()):
            connection.execute(
                update(link).where(link.c.sweep_id == sweep_id, link.c.fingerprint == row["fingerprint"]).values(**row)
            )
    for fingerprint in linked:
        connection.execute(
            update(link).where(link.c.sweep_id == sweep_id, link.c.fingerprint == fingerprint).values(current=False)
        )


def _link_values(sweep_id: int, planned: PlannedTrial) -> dict[str, Any]:
    return {
        "sweep_id": sweep_id,
        "fingerprint": planned.fingerprint,
        "arm": planned.arm,
        "axes": planned.axes,
        "seed": planned.seed,
        "layout": planned.layout.model_dump(mode="json"),
        "position": planned.position,
        "current": True,
    }
