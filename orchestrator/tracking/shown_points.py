"""Which points of a trial MLflow is shown. Pure; no MLflow here.

SQL has every step; MLflow takes some 0.15 CPU-milliseconds a point, and shows:

- every k-th step, k = the schedule's steps / 250, rounded up; the first, the schedule's last, and where a trial ends
  earlier its last step;
- while a sweep makes more of these than 200 a second, every 2k-th, 4k-th, ... of a trial, so that each running trial
  has an equal share of the 200; in the last twentieth of the schedule every k-th all the same;
- between two shown steps the highest loss, if it lies 0.3 nats above both: spikes stay in sight;
- every validation, and every probe's means over the layers.

Points are the same whenever they are made from the same curve, cursor and k, timestamps too: MLflow drops a point that
it has, so one that is sent again after a lost acknowledgement does no harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from models.config import TrialConfig
from orchestrator.spikes import THRESHOLD_NATS
from orchestrator.store import Curve, LayerRow, StepRow, ValidationRow, mean_or_none

STEPS_PER_TRIAL = 250
STEPS_PER_SECOND = 200
"""Of all running trials of a sweep together."""
TAIL = 0.05

_STEP_METRICS = ("gradient_norm", "lr", "tokens_per_second", "tokens")
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
    """Points that are sent together, and the cursor that holds once they are. Without points: what was passed over."""

    points: list[Point]
    cursor: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Probe:
    """All layers of one probe."""

    attempt: int
    step: int
    layers: list[LayerRow]


def packets(
    curve: Curve,
    layers: Sequence[LayerRow],
    config: TrialConfig,
    started_ms: Mapping[int, int],
    cursor: Mapping[str, Any],
    max_points: int,
    *,
    num_running: int = 1,
    has_ended: bool = False,
) -> list[Packet]:
    """What of a curve and of its probes is new since ``cursor``, in order, in packets of at most ``max_points``.

    ``num_running``: trials of the sweep that share what MLflow is shown. ``has_ended``: this one's curve is whole.
    Steps that an attempt repeats after a resumption are not sent again: they are bit-identical. A timestamp is the
    start of the attempt plus the training time since then, by the measured tokens/s (validation is not counted).
    """
    walk = _Walk(config, started_ms, cursor, stride(config, _pace(curve, config), num_running))
    rows: list[StepRow | ValidationRow | _Probe] = [*curve.steps, *curve.validations, *_probes(layers)]
    full: list[Packet] = []
    points: list[Point] = []
    before = dict(walk.cursor)
    for row in sorted(rows, key=lambda row: (row.step, not isinstance(row, StepRow))):
        new = walk.see(row)
        if not new:
            continue
        if points and len(points) + len(new) > max_points:
            full.append(Packet(points, before))
            points = []
        points += new
        before = dict(walk.cursor)
    if has_ended:
        points += walk.last()
    is_news = bool(points) or any(walk.cursor[key] != cursor.get(key, value) for key, value in _START.items())
    return [*full, Packet(points, walk.cursor)] if is_news else full


def stride(config: TrialConfig, steps_per_second: float, num_running: int = 1) -> int:
    """Every how many steps one is shown of a trial at this pace. Coarser ones are a part of the finer ones, so that the
    curves of two trials have steps in common."""
    k = finest_stride(config)
    share = STEPS_PER_SECOND / max(1, num_running)
    while steps_per_second / k > share:
        k *= 2
    return k


def finest_stride(config: TrialConfig) -> int:
    return -(-config.train.num_steps // STEPS_PER_TRIAL)


def _pace(curve: Curve, config: TrialConfig) -> float:
    """Steps a second at the end of a curve; 0 where nothing was measured."""
    measured = next((row.tokens_per_second for row in reversed(curve.steps) if row.tokens_per_second), 0.0)
    return measured / config.train.batch_tokens


_START: dict[str, Any] = {
    "attempt": 0,
    "step": 0,
    "elapsed": 0.0,
    "validations": [],
    "probed": 0,
    "shown_loss": None,
    "unshown": None,
    "peak": None,
    "stride": 0,
}
"""Where a walk begins. ``unshown`` and ``peak``: the last step since the last shown one, and the one with the highest
loss, each with its moment. ``stride``: the coarsest there was."""


class _Walk:
    """Along a trial's rows, in order; the cursor says all that is known of those behind it."""

    def __init__(
        self, config: TrialConfig, started_ms: Mapping[int, int], cursor: Mapping[str, Any], stride: int
    ) -> None:
        self._config, self._started_ms, self._stride = config, started_ms, stride
        self.cursor: dict[str, Any] = {**_START, **cursor}
        self._validated = {tuple(key) for key in self.cursor["validations"]}
        self._reached: int = self.cursor["step"]

    def see(self, row: StepRow | ValidationRow | _Probe) -> list[Point]:
        """What is shown for it."""
        if isinstance(row, StepRow):
            return self._see_step(row)
        moment = self._moment(row.attempt)
        if isinstance(row, _Probe):
            if row.step <= self.cursor["probed"]:
                return []
            self.cursor["probed"] = row.step
            return _probe_points(row, moment)
        if (row.step, row.split) in self._validated:
            return []
        self.cursor["validations"] = [*self.cursor["validations"], [row.step, row.split]]
        return validation_points(row, moment)

    def last(self) -> list[Point]:
        """The curve's last step, where it was not shown yet, and a spike before it."""
        if self.cursor["unshown"] is None:
            return []
        *fields, moment = self.cursor["unshown"]
        return self._show(StepRow(*fields), moment)

    def _moment(self, attempt: int) -> int:
        elapsed: float = self.cursor["elapsed"]
        return self._started_ms.get(attempt, 0) + round(elapsed * 1000)

    def _see_step(self, row: StepRow) -> list[Point]:
        cursor, train = self.cursor, self._config.train
        if row.attempt != cursor["attempt"]:
            cursor |= {"attempt": row.attempt, "elapsed": 0.0}
        if row.tokens_per_second:
            cursor["elapsed"] += train.batch_tokens / row.tokens_per_second
        if row.step <= self._reached:
            return []
        cursor["step"] = row.step
        every = finest_stride(self._config) if row.fraction > 1 - TAIL else self._stride
        if row.step % every == 0 or row.step in (1, train.num_steps):
            return self._show(row, self._moment(row.attempt))
        cursor["stride"] = max(cursor["stride"], every)
        cursor["unshown"] = [*astuple(row), self._moment(row.attempt)]
        if row.loss_nats is not None and (cursor["peak"] is None or row.loss_nats > cursor["peak"][_LOSS]):
            cursor["peak"] = cursor["unshown"]
        return []

    def _show(self, row: StepRow, moment: int) -> list[Point]:
        spike = self._spike(row)
        self.cursor |= {"shown_loss": row.loss_nats, "unshown": None, "peak": None}
        return [*spike, *_step_points(row, moment)]

    def _spike(self, row: StepRow) -> list[Point]:
        """The highest loss since the last shown step, if it stands out between that and ``row``."""
        peak, before, after = self.cursor["peak"], self.cursor["shown_loss"], row.loss_nats
        if peak is None or before is None or after is None or peak[_LOSS] <= max(before, after) + THRESHOLD_NATS:
            return []
        *fields, moment = peak
        return _loss_points(StepRow(*fields), moment)


_LOSS: int = list(StepRow.__dataclass_fields__).index("loss_nats")


def _step_points(row: StepRow, moment: int) -> list[Point]:
    values = [(name, getattr(row, name)) for name in _STEP_METRICS]
    return [
        *_loss_points(row, moment),
        *(Point(name, float(value), moment, row.step) for name, value in values if value is not None),
    ]


def _loss_points(row: StepRow, moment: int) -> list[Point]:
    if row.loss_nats is None:
        return []
    by_tokens = Point("by_tokens/loss_nats", row.loss_nats, moment, row.tokens)
    return [Point("loss_nats", row.loss_nats, moment, row.step), by_tokens]


def validation_points(row: ValidationRow, moment: int) -> list[Point]:
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
