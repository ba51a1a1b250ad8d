"""What MLflow shows of a sweep and of a trial beside points: parameters, tags, status. Pure; no MLflow here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from models.config import TrialConfig
from orchestrator.store import STATES, EventRow, SweepRow, TrialRow, standing_passages

MAX_VALUE_LENGTH = 5_000
"""MLflow allows 6,000 characters in a parameter and 8,000 in a tag (older ones 5,000)."""

STATUS = {
    "COMPLETE": "FINISHED",
    "PRUNED": "KILLED",
    "DIVERGED": "KILLED",
    "CANCELED": "KILLED",
    "FAILED": "FAILED",
}
"""MLflow's run status by trial state; RUNNING for any other."""


def sweep_key(sweep: SweepRow) -> str:
    """A sweep of one store: several stores may mirror sweeps of one name to a shared server."""
    return f"{sweep.name}@{sweep.created_at.isoformat()}"


def sweep_tags(sweep: SweepRow, rows: Sequence[TrialRow]) -> dict[str, str]:
    """Tags of the parent run. Settings are tags and not parameters, since a resubmission may change them."""
    counts = Counter(row.state for row in rows)
    tags = {
        "gatesweep.sweep": sweep.name,
        "gatesweep.key": sweep_key(sweep),
        "gatesweep.question": sweep.question,
        "mlflow.note.content": sweep.question,
        "gatesweep.baseline": sweep.baseline,
        "gatesweep.arms": ", ".join(sweep.arms),
        "num_trials": str(len(rows)),
        **{f"num_{state.lower()}": str(counts[state]) for state in STATES},
    }
    return {key: value[:MAX_VALUE_LENGTH] for key, value in tags.items()}


def notice_tags(notices: Sequence[EventRow]) -> dict[str, str]:
    """``gatesweep.notice.trial_failed`` and so on: when it was, and its words."""
    return {
        f"gatesweep.notice.{event.kind}": f"{event.at:%Y-%m-%dT%H:%M:%SZ} {event.message}"[:MAX_VALUE_LENGTH]
        for event in notices
    }


def gate_tags(sweep: SweepRow) -> dict[str, str]:
    """``gatesweep.gate.ARM.rung_2``: whether the arm goes on to the rung, and why."""
    tags = {}
    for one in standing_passages(sweep.verdict, sweep.settings).values():
        does = "goes on" if one.is_through else "does not go on"
        tags[f"gatesweep.gate.{one.arm}.rung_{one.rung}"] = f"{does}: {one.reason}"[:MAX_VALUE_LENGTH]
    return tags


def sweep_status(rows: Sequence[TrialRow]) -> str:
    return "FINISHED" if all(row.state in STATUS for row in rows) else "RUNNING"


def trial_tags(sweep: SweepRow, row: TrialRow, stride: int = 0) -> dict[str, str]:
    """Tags of a trial's run, the sweep's settings among them. A missing one is empty, so that a rerun clears it.

    ``stride``: the largest distance in steps between two that are shown; 0 when all are.
    """
    tags = {
        "gatesweep.sweep": sweep.name,
        "gatesweep.key": sweep_key(sweep),
        "gatesweep.question": sweep.question,
        "gatesweep.baseline": sweep.baseline,
        "arm": row.arm,
        "seed": str(row.seed),
        "state": row.state,
        "cause": row.cause or "",
        "reason": row.reason or "",
        "end_step": "" if row.end_step is None else str(row.end_step),
        "fingerprint": row.fingerprint,
        "attempts": str(row.num_attempts),
        "gatesweep.shown_steps": f"one in {stride}" if stride > 1 else "all",
        "num_parameters": str(row.num_parameters),
        "training_flops": str(row.training_flops),
        **{f"axis.{name}": _text(value) for name, value in row.axes.items()},
    }
    return {key: value[:MAX_VALUE_LENGTH] for key, value in tags.items()}


def trial_name(row: TrialRow) -> str:
    axes = [f"{name.rpartition('.')[2]}={_text(value)}" for name, value in row.axes.items()]
    return " ".join([row.arm, *axes, f"seed={row.seed}"])[:250]


def parameters(config: TrialConfig) -> dict[str, str]:
    """The whole config, flat: ``train.lr`` and so on."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = _text(value)[:MAX_VALUE_LENGTH]

    walk("", config.model_dump(mode="json"))
    return flat


def digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
