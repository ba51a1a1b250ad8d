"""All arms of a table against its baseline: the family, its intervals, and a verdict an arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from orchestrator.verdict.decision import decide, more_seeds, seeds_in_words
from orchestrator.verdict.intervals import Difference, chosen_method, common_seeds, differences
from orchestrator.verdict.samples import Comparison, Decision, Design, Method, NoiseFloor, Sample, Verdict, noise_floor

FORMULA_VERSION = "simultaneous-2"
"""Raised whenever a change alters an interval or a decision."""


def compare(
    samples: Sequence[Sample],
    baseline: str,
    margin_nats: float | None,
    alpha: float = 0.05,
    design: Design | None = None,
) -> Comparison:
    """Judge every sample against the one named ``baseline``, at family-wise level ``alpha``.

    Raises ValueError when the baseline is absent, a name occurs twice, or a parameter is out of range.
    """
    design = design or Design()
    _check(samples, baseline, margin_nats, alpha, design)
    floor = noise_floor(samples)
    control = next(sample for sample in samples if sample.arm == baseline)
    family = [s for s in samples if s is not control and min(len(s.losses_nats), len(control.losses_nats)) >= 2]
    if design.paired and family and len(common_seeds([control, *family])) < 2:
        family = []
    method, variances_p = chosen_method(design, [control, *family])
    found = differences(samples, control, family, method, design, alpha) if family else {}
    judge = _Judge(control, floor, found, method, margin_nats, alpha, design)
    critical = [one.critical for one in found.values() if one.critical is not None]
    return Comparison(
        baseline=baseline,
        alpha=alpha,
        margin_nats=margin_nats,
        noise_floor=floor,
        critical_value=max(critical, default=None),
        num_compared=len(critical),
        verdicts=tuple(judge.verdict(sample) for sample in samples),
        method=method,
        variances_p=variances_p,
        degrees_of_freedom=min((one.spread.degrees_of_freedom for one in found.values()), default=None),
    )


def _check(samples: Sequence[Sample], baseline: str, margin_nats: float | None, alpha: float, design: Design) -> None:
    names = [sample.arm for sample in samples]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not among the arms {', '.join(names) or '(none)'}")
    if len(set(names)) != len(names):
        raise ValueError(f"arms must be named once each, got {', '.join(names)}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha:g}")
    if margin_nats is not None and not 0.0 < margin_nats < math.inf:
        raise ValueError(f"margin must be a positive number of nats, got {margin_nats:g}")
    for sample in samples:
        if not all(math.isfinite(loss) for loss in sample.losses_nats):
            raise ValueError(f"arm {sample.arm!r}: every loss must be finite, got {sample.losses_nats}")
        if design.paired and len(sample.seeds) != len(sample.losses_nats):
            raise ValueError(f"arm {sample.arm!r}: pairing needs the seed of every loss, got {sample.seeds}")


class _Judge:
    """What all verdicts of a table share."""

    def __init__(
        self,
        control: Sample,
        floor: NoiseFloor | None,
        found: Mapping[str, Difference],
        method: Method,
        margin_nats: float | None,
        alpha: float,
        design: Design,
    ) -> None:
        self.control, self.floor, self.found, self.method = control, floor, found, method
        self.margin_nats, self.alpha, self.design = margin_nats, alpha, design

    def verdict(self, sample: Sample) -> Verdict:
        losses, control = sample.losses_nats, self.control
        mean = fmean(losses) if losses else None
        delta = None if mean is None or not control.losses_nats else mean - fmean(control.losses_nats)
        difference = self.found.get(sample.arm)
        if sample is control:
            delta = None
        elif difference is not None:
            delta = difference.delta_nats
        decision, words, more = self._decision(sample, delta, difference)
        half = None if difference is None else difference.half_nats
        floor = self.floor
        return Verdict(
            arm=sample.arm,
            num_seeds=len(losses),
            mean_nats=mean,
            sd_nats=stdev(losses) if len(losses) > 1 else None,
            delta_nats=delta,
            low_nats=None if half is None or delta is None else delta - half,
            high_nats=None if half is None or delta is None else delta + half,
            delta_sds=None if delta is None or floor is None or floor.sd_nats == 0.0 else delta / floor.sd_nats,
            decision=decision,
            words=words,
            more_seeds=more,
        )

    def _decision(
        self, sample: Sample, delta: float | None, difference: Difference | None
    ) -> tuple[Decision, str, int | None]:
        control, num_seeds = self.control, len(sample.losses_nats)
        if not num_seeds:
            return "no result", f"no result: {sample.problem or 'no complete trial'}", None
        if sample is control:
            return "baseline", "baseline", None
        if delta is None:
            return "no result", f"no result: the baseline has none ({control.problem or 'no complete trial'})", None
        if num_seeds < 2:
            return "no interval", "no interval: 1 seed", None
        if len(control.losses_nats) < 2:
            return "no interval", "no interval: the baseline has 1 seed", None
        if difference is None:
            return "no interval", "no interval: the arms have fewer than 2 seeds in common", None
        if difference.half_nats is None:
            return "no interval", "no interval: the seeds show no spread", None
        low, high = delta - difference.half_nats, delta + difference.half_nats
        decision = decide(low, high, self.margin_nats, min(num_seeds, len(control.losses_nats)))
        if decision != "inconclusive" or self.margin_nats is None:
            return decision, decision, None
        more = more_seeds(
            difference.spread,
            len(self.found),
            self.margin_nats,
            self.alpha,
            num_seeds,
            method=self.method,
            design=self.design,
            num_control=len(control.losses_nats),
        )
        return decision, f"inconclusive: {seeds_in_words(more)}", more
