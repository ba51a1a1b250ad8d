"""What MLflow shows of a sweep and of a trial: parameters, tags, status and points. Pure; no MLflow here.

Points are the same whenever they are made from the same curve and cursor, timestamps too: MLflow drops a point that
it has, so one that is sent again after a lost acknowledgement does no harm.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.config import TrialConfig
from orchestrator.store import (
    STATES,
    Curve,
    EventRow,
    LayerRow,
    StepRow,
    SweepRow,
    TrialRow,
    ValidationRow,
    mean_or_none,
    standing_passages,
)

STEPS_PER_TRIAL = 250
"""Of a longer trial every k-th step is shown, the first and the last too. SQL has them all. MLflow takes 0.1
CPU-milliseconds a point: a hundred gangs at twenty steps a second would be a whole core, and MLflow ever later."""

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

_STEP_METRICS = ("loss_nats", "gradient_norm", "lr", "tokens_per_second", "tokens")
_LAYER_METRICS = (
    "first_token_attention", "max_activation", "attention_output_rms", "ffn_output_rms", "residual_rms",
    "gradient_norm", "update_ratio",
)  # fmt: skip
_VALIDATION_METRICS = (("loss_nats", "validation_loss_nats"), ("bits_per_byte", "validation_bits_per_byte"))


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric. ``step`` is in optimizer steps, or in tokens for ``by_tokens/`` metrics."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True, slots=True)
class Packet:
    """Points that are sent together, and the cursor that holds once they are."""

    points: list[Point]
    cursor: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Probe:
    """All layers of one probe."""

    attempt: int
    step: int
    layers: list[LayerRow]


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


def trial_tags(sweep: SweepRow, row: TrialRow) -> dict[str, str]:
    """Tags of a trial's run, the sweep's settings among them. A missing one is empty, so that a rerun clears it."""
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


def packets(
    curve: Curve,
    layers: Sequence[LayerRow],
    config: TrialConfig,
    started_ms: Mapping[int, int],
    cursor: Mapping[str, Any],
    max_points: int,
) -> list[Packet]:
    """What of a curve and of its probes is new since ``cursor``, in order, in packets of at most ``max_points``.

    Steps that an attempt repeats after a resumption are not sent again: they are bit-identical. A timestamp is the
    start of the attempt plus the training time since then, by the measured tokens/s (validation is not counted).
    """
    position = {"attempt": 0, "step": 0, "elapsed": 0.0, "validations": [], "probed": 0, **cursor}
    sent = {tuple(key) for key in position["validations"]}
    reached = position["step"]
    stride = -(-config.train.num_steps // STEPS_PER_TRIAL)
    full: list[Packet] = []
    points: list[Point] = []
    before = dict(position)
    rows: list[StepRow | ValidationRow | _Probe] = [*curve.steps, *curve.validations, *_probes(layers)]
    for row in sorted(rows, key=lambda row: (row.step, not isinstance(row, StepRow))):
        new: list[Point] = []
        moment = started_ms.get(row.attempt, 0) + round(position["elapsed"] * 1000)
        if isinstance(row, StepRow):
            if row.attempt != position["attempt"]:
                position |= {"attempt": row.attempt, "elapsed": 0.0}
            if row.tokens_per_second:
                position["elapsed"] += config.train.batch_tokens / row.tokens_per_second
            moment = started_ms.get(row.attempt, 0) + round(position["elapsed"] * 1000)
            if row.step > reached:
                position["step"] = row.step
                if row.step % stride == 0 or row.step in (1, config.train.num_steps):
                    new = _step_points(row, moment)
        elif isinstance(row, _Probe):
            if row.step > position["probed"]:
                position["probed"] = row.step
                new = _probe_points(row, moment)
        elif (row.step, row.split) not in sent:
            position["validations"] = [*position["validations"], [row.step, row.split]]
            new = _validation_points(row, moment)
        if points and len(points) + len(new) > max_points:
            full.append(Packet(points, before))
            points = []
        points += new
        before = dict(position)
    return [*full, Packet(points, before)] if points else full


def _step_points(row: StepRow, moment: int) -> list[Point]:
    values = [(name, getattr(row, name)) for name in _STEP_METRICS]
    points = [Point(name, float(value), moment, row.step) for name, value in values if value is not None]
    if row.loss_nats is not None:
        points.append(Point("by_tokens/loss_nats", row.loss_nats, moment, row.tokens))
    return points


def _validation_points(row: ValidationRow, moment: int) -> list[Point]:
    prefix = "" if row.split == "slice" else f"{row.split.replace('/', '_')}_"
    points = []
    for column, name in _VALIDATION_METRICS:
        value = getattr(row, column)
        if value is not None:
            points.append(Point(prefix + name, value, moment, row.step))
            points.append(Point(f"by_tokens/{prefix}{name}", value, moment, row.tokens))
    return points


def _probes(layers: Sequence[LayerRow]) -> list[_Probe]:
    found: dict[int, list[LayerRow]] = {}
    for row in layers:
        found.setdefault(row.step, []).append(row)
    return [_Probe(rows[0].attempt, step, rows) for step, rows in found.items()]


def _probe_points(probe: _Probe, moment: int) -> list[Point]:
    """Means over layers: the layers themselves are in SQL, and in the plots. ``/`` makes a folder in MLflow."""
    means = {name: mean_or_none([getattr(row, name) for row in probe.layers]) for name in _LAYER_METRICS}
    for position in probe.layers[0].gates:
        gates = [row.gates[position] for row in probe.layers]
        means[f"gate_score_{position}"] = mean_or_none([gate["mean"] for gate in gates])
        for threshold in gates[0]["share_below"]:
            shares = [gate["share_below"][threshold] for gate in gates]
            means[f"gate_share_below_{threshold}_{position}"] = mean_or_none(shares)
    return [
        Point(f"diagnostics/{name}", value, moment, probe.step) for name, value in means.items() if value is not None
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
