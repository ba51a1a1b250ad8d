"""A trial trained once more, to see whether its numbers come again. Nothing of the trial itself changes.

It is an attempt of its own kind: it has its own folder (``reproductions/<fingerprint>/`` in the home), no row among the
trial's attempts and no lease, starts at step 0 and keeps no checkpoint. Layout, micro-batch and back end are those of
the attempt that brought the trial to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from models import run_dir
from models.run_dir import AttemptSpec, Record, StepRecord, ValidationRecord
from orchestrator.controller.provenance import data_hashes, provenance
from orchestrator.controller.resume import attempt_dir
from orchestrator.gang import Cluster, Gang, GangEnd, GangShape, GangState, refuse_too_large
from orchestrator.store import FINISHED, REPRODUCED, AttemptRow, Curve, Store, TrialRow
from orchestrator.sweep import UserError

POLL_SECONDS = 0.1
TOLERANCE_NATS = 1e-3
"""The largest difference of a loss that still counts as the same curve where equal bits are not to be expected: on
another host, layout, device or version. Rounding alone grows with the steps, so a long curve may fail this honestly."""


@dataclass(frozen=True)
class Reproduction:
    """What came of it. ``outcome``: ``bitwise``, ``within tolerance``, or ``differs``."""

    fingerprint: str
    outcome: str
    num_steps: int
    """Compared, from the first one on."""
    num_validations: int
    first_difference: int | None
    """The first step at which any number differs by a bit; None: none does."""
    largest_nats: float
    """The largest difference of a loss, over steps and validations."""
    changed: tuple[str, ...]
    """What is not as it was: ``host``, ``torch`` and the like. Without any, equal bits are expected."""
    provenance: dict[str, Any]

    @property
    def words(self) -> str:
        """``bitwise: 40 steps, 2 validations``. What comes before the colon is the stamp in tables."""
        said = f"{self.outcome}: {self.num_steps} steps, {self.num_validations} validations"
        if self.first_difference is not None:
            said += f"; the first difference at step {self.first_difference}, the largest {self.largest_nats:.3g} nats"
        return said + (f"; not as it was: {', '.join(self.changed)}" if self.changed else "")


def reproduce(
    store: Store, cluster: Cluster, home: Path, trial: TrialRow, sweep_id: int, tell: Callable[[str], None]
) -> Reproduction:
    """Train the trial anew as far as its curve goes, compare, and stamp it in the store.

    UserError when it has not ended in a result, or cannot be trained here.
    """
    if trial.state not in FINISHED or not trial.end_step:
        raise UserError(f"reproduce: trial {trial.fingerprint} is {trial.state}; allowed: COMPLETE, PRUNED or DIVERGED")
    last = store.attempts(trial.fingerprint)[-1]
    spec = _spec(home, trial, last)
    run_dir.write_trial_config(Path(spec.trial_dir), trial.config)
    run_dir.write_json(spec.attempt_dir / "attempt.json", spec)
    ranks = last.layout.world_size
    shape = GangShape(last.layout, (last.cpus or ranks) / ranks, (last.gpus or 0.0) / ranks)
    refuse_too_large(shape, cluster.rooms())
    gang = cluster.start_gang(shape, spec.threads_per_rank)
    try:
        hosts = _train(gang, spec, trial.end_step, tell)
    finally:
        gang.dismiss()
    records, _ = run_dir.read_records(spec.attempt_dir)
    now = {**provenance(), **data_hashes(trial.config), "hosts": hosts}
    found = compare_curves(trial, store.curve(trial.fingerprint), records, changed_since(last, now), now)
    run_dir.write_json(spec.attempt_dir / "reproduction.json", asdict(found))
    store.add_event(sweep_id, REPRODUCED, found.words, trial.fingerprint, spec.number)
    return found


def _spec(home: Path, trial: TrialRow, last: AttemptRow) -> AttemptSpec:
    old = attempt_dir(run_dir.trial_dir(home, trial.fingerprint), last)
    try:
        asked = run_dir.read_attempt_spec(old)
    except (OSError, ValueError) as error:
        raise UserError(f"reproduce: what the trial was asked to do can't be read from {old}: {error}") from error
    folder = home / "reproductions" / trial.fingerprint
    number = 1 + sum(1 for _ in (folder / "attempts").glob("[0-9]*-*"))
    changes = {
        "number": number,
        "token": uuid4().hex[:12],
        "trial_dir": str(folder),
        "data_dir": str(home / "data"),
        "resume_checkpoint": None,
        "resume_step": 0,
        "checkpoint_every_steps": None,
        "final_checkpoint": False,
        "branch_steps": (),
    }
    return asked.model_copy(update=changes)


def _train(gang: Gang, spec: AttemptSpec, end_step: int, tell: Callable[[str], None]) -> list[str]:
    """Until the curve is as long as the stored one; returns the hosts. UserError when the gang fails."""
    while gang.state is GangState.STARTING:
        error = gang.poll_start()
        if error is not None:
            raise UserError(f"reproduce: no gang could be started: {error}")
        time.sleep(POLL_SECONDS)
    hosts = sorted({member["host"] for member in gang.members})
    tell(f"training {spec.fingerprint} anew, to step {end_step}, in {spec.attempt_dir}")
    gang.launch(spec)
    offset, is_stopped = 0, False
    while (end := gang.poll_end()) is None:
        records, offset = run_dir.read_records(spec.attempt_dir, offset)
        if not is_stopped and any(record.step > end_step for record in records):
            gang.stop(spec.token)
            is_stopped = True
        time.sleep(POLL_SECONDS)
    _refuse_failure(end, spec)
    return hosts


def _refuse_failure(end: GangEnd, spec: AttemptSpec) -> None:
    said = end.error or (end.summary.error if end.summary and end.summary.outcome == "error" else None)
    if said is not None:
        raise UserError(f"reproduce: {said}; {run_dir.log_path(spec.attempt_dir, end.rank)} tells more")


def changed_since(last: AttemptRow, now: dict[str, Any]) -> tuple[str, ...]:
    """What may change the last bits of a number: hosts, packages, this program. By name."""
    before = last.provenance
    names = [name for name in ("source_hash", "python") if before.get(name) != now.get(name)]
    packages: dict[str, Any] = before.get("packages") or {}
    names += [name for name, version in now["packages"].items() if packages.get(name) != version]
    return (*names, *(["host"] if sorted(set(last.hosts)) != now["hosts"] else []))


def compare_curves(
    trial: TrialRow, stored: Curve, records: list[Record], changed: tuple[str, ...], now: dict[str, Any]
) -> Reproduction:
    """Losses and gradient norms of steps, losses of validations, as far as the stored curve goes. Pure."""
    steps = {one.step: one for one in records if isinstance(one, StepRecord)}
    validations = {(one.step, one.split): one for one in records if isinstance(one, ValidationRecord)}
    differences: dict[int, float] = {}
    for row in stored.steps:
        again = steps.get(row.step)
        if again is None or (row.loss_nats, row.gradient_norm) != (again.loss_nats, again.gradient_norm):
            differences[row.step] = _distance(row.loss_nats, None if again is None else again.loss_nats)
    for one in stored.validations:
        measured = validations.get((one.step, one.split))
        if measured is None or one.loss_nats != measured.loss_nats:
            distance = _distance(one.loss_nats, None if measured is None else measured.loss_nats)
            differences[one.step] = max(differences.get(one.step, 0.0), distance)
    largest = max(differences.values(), default=0.0)
    is_near = bool(changed) and largest <= TOLERANCE_NATS
    outcome = "differs" if not is_near else "within tolerance"
    return Reproduction(
        fingerprint=trial.fingerprint,
        outcome=outcome if differences else "bitwise",
        num_steps=len(stored.steps),
        num_validations=len(stored.validations),
        first_difference=min(differences, default=None),
        largest_nats=largest,
        changed=changed,
        provenance=now,
    )


def _distance(first: float | None, second: float | None) -> float:
    """Infinite when one of them is no number and the other is."""
    if first is None or second is None:
        return 0.0 if first is second else float("inf")
    return abs(first - second)
