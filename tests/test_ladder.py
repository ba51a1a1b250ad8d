"""Ladders: laws are recovered from noisy synthetic ones, refusals say why, and a stored sweep's are told whole."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import least_squares

from models.run_dir import Summary, ValidationRecord
from orchestrator.plan import expand
from orchestrator.report import LadderView, ladder, ladder_to_csv, ladder_to_json, write_report
from orchestrator.report.ladder import Rung, rank_flips
from orchestrator.scaling import Estimate, RungLosses, fit_ladder
from orchestrator.scaling.power_law import fit_many, log_losses
from orchestrator.scaling.trunks import TrunkPool
from orchestrator.store import Store
from orchestrator.sweep import UserError, parse

FLOOR, EXPONENT, PIVOT = 1.8, 0.25, 1e14
AMPLITUDES = {"baseline": 0.6, "arm": 0.55}
TRUE_SPEED_UP = (0.6 / 0.55) ** (1 / EXPONENT)
NOISE = 0.005


def synthetic(num_rungs: int, seeds: int = 3, noise: float = NOISE, seed: int = 0) -> list[RungLosses]:
    random = np.random.default_rng(seed)
    return [
        RungLosses(arm, size, tuple(law(arm, size) + noise * random.standard_normal(seeds)))
        for arm in AMPLITUDES
        for size in map(float, np.geomspace(1e12, 3e15, num_rungs))
    ]


def law(arm: str, size: float) -> float:
    return float(FLOOR + AMPLITUDES[arm] * (size / PIVOT) ** -EXPONENT)


@pytest.mark.parametrize("num_rungs", [5, 4, 3])
def test_parameters_are_recovered_exactly_without_noise(num_rungs: int):
    found = fit_ladder(synthetic(num_rungs, noise=1e-9), "baseline", resamples=19)
    assert found.form == ("own" if num_rungs == 5 else "shared")
    for one in found.laws:
        amplitude = one.amplitude_nats.value * (PIVOT / one.reference) ** -EXPONENT
        assert one.floor_nats.value == pytest.approx(FLOOR, rel=1e-4)
        assert one.exponent.value == pytest.approx(EXPONENT, rel=1e-3)
        assert amplitude == pytest.approx(AMPLITUDES[one.arm], rel=1e-3)
    (speed_up,) = found.speed_ups
    assert speed_up.ratio is not None
    assert speed_up.ratio.value == pytest.approx(TRUE_SPEED_UP, rel=1e-3)


def test_parameters_are_recovered_from_noisy_ladders_without_bias():
    """400 ladders of five rungs and three seeds: the median's Monte-Carlo error is about SD * 1.25 / 20."""
    random = np.random.default_rng(5)
    sizes = np.repeat(np.log(np.geomspace(1e12, 3e15, 5) / PIVOT), 3)
    arms = np.zeros(15, dtype=np.intp)
    losses = FLOOR + 0.6 * np.exp(-EXPONENT * sizes) + NOISE * random.standard_normal((400, 15))
    found = np.exp(fit_many(sizes, arms, losses, delta=0.004))
    for column, true in zip(found.T, (FLOOR, EXPONENT, 0.6), strict=True):
        assert abs(np.median(column) - true) < 4 * 1.25 * column.std() / 20
        assert column.std() < 0.1 * true


def test_the_fit_is_scipys_best_of_several_starts():
    points = [one for one in synthetic(5, seed=3) if one.arm == "baseline"]
    sizes = np.array([np.log(one.size / PIVOT) for one in points for _ in one.losses_nats])
    losses = np.array([[loss for one in points for loss in one.losses_nats]])
    arms, delta = np.zeros(15, dtype=np.intp), 0.003

    def residuals(parameters):
        return (log_losses(parameters[None], sizes, arms) - np.log(losses))[0]

    def cost(parameters):
        return least_squares(residuals, parameters, loss="huber", f_scale=delta, max_nfev=1).cost

    scipys = min(
        least_squares(
            residuals, np.log([floor, exponent, 0.5]), loss="huber", f_scale=delta, xtol=1e-12, ftol=1e-12
        ).cost
        for floor in (0.5, 1.5, 2.0)
        for exponent in (0.1, 0.5)
    )
    assert cost(fit_many(sizes, arms, losses, delta)[0]) <= scipys * (1 + 1e-4)


@pytest.mark.parametrize("num_rungs", [5, 4])
def test_intervals_cover_the_truth(num_rungs: int):
    """30 ladders, so the Monte-Carlo SD of a coverage of 95 % is 4 points; 80 % is almost four of them below."""
    hits = {"floor": 0, "exponent": 0, "speed-up": 0}
    for seed in range(30):
        found = fit_ladder(synthetic(num_rungs, seed=100 + seed), "baseline", resamples=99)
        one = found.laws[1]
        hits["floor"] += one.floor_nats.low <= FLOOR <= one.floor_nats.high
        hits["exponent"] += one.exponent.low <= EXPONENT <= one.exponent.high
        ratio = found.speed_ups[0].ratio
        low, high = (None, None) if ratio is None else (ratio.low, ratio.high)
        hits["speed-up"] += (low is None or low <= TRUE_SPEED_UP) and (high is None or high >= TRUE_SPEED_UP)
    assert min(hits.values()) >= 24, hits


def with_trunks(points: list[RungLosses], shared: bool = True) -> list[RungLosses]:
    """Each seed of an arm one run over all rungs; or a run for each rung."""
    return [
        replace(one, trunks=tuple(f"{one.arm} {i}{'' if shared else one.size}" for i in range(len(one.losses_nats))))
        for one in points
    ]


def budgets(num_rungs: int, seeds: int, seed: int, own: float = 0.5) -> list[RungLosses]:
    """Branches of a trunk for each seed; ``own``: the share of a loss's SD that is not its trunk's."""
    random = np.random.default_rng(seed)
    found = []
    for arm in AMPLITUDES:
        common = random.standard_normal(seeds)
        for size in map(float, np.geomspace(1e12, 3e15, num_rungs)):
            noise = np.sqrt(1 - own**2) * common + own * random.standard_normal(seeds)
            found.append(RungLosses(arm, size, tuple(law(arm, size) + NOISE * noise)))
    return with_trunks(found)


def test_runs_of_their_own_are_resampled_as_they_were_and_trunks_whole():
    points = synthetic(5)
    assert fit_ladder(with_trunks(points, shared=False), "baseline", 99) == fit_ladder(points, "baseline", 99)
    # What moves all rungs of a trunk alike says little of how much they fall from one to the next.
    alike = budgets(5, seeds=3, seed=1, own=0.0)
    singly = fit_ladder([replace(one, trunks=()) for one in alike], "baseline", 99).laws[0]
    whole = fit_ladder(alike, "baseline", 99)
    assert any("intervals come from resampling whole trunks" in one for one in whole.problems)
    assert width(whole.laws[0].exponent) < 0.5 * width(singly.exponent)


def test_a_trunk_is_drawn_with_all_its_rungs():
    of_arm = {arm: [one for one in budgets(4, seeds=3, seed=2, own=0.0) if one.arm == arm] for arm in AMPLITUDES}
    pool = TrunkPool.of(of_arm)
    assert pool is not None
    assert pool.degrees == 4  # six trunks, less one for each arm
    sets = pool.drawn(["arm"], of_arm, 999)
    measured = np.array([one.losses_nats for one in of_arm["arm"]])
    np.testing.assert_array_equal(sets[0], measured.ravel())
    deviations = sets[1:].reshape(999, 4, 3) - measured.mean(axis=1)[:, None]
    np.testing.assert_allclose(deviations, deviations[:, :1].repeat(4, axis=1), atol=1e-12)
    assert deviations[:, 0, 0].std() == pytest.approx(deviations[:, 0, 1].std(), rel=0.1)
    assert abs(np.corrcoef(deviations[:, 0, 0], deviations[:, 0, 1])[0, 1]) < 0.1


def width(one: Estimate) -> float:
    assert one.low is not None
    assert one.high is not None
    return one.high - one.low


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_over_trunks_cover_the_truth(seeds: int):
    """30 ladders, as above; the losses of a trunk are correlated by 0.75."""
    hits = {"floor": 0, "exponent": 0, "speed-up": 0}
    for seed in range(30):
        found = fit_ladder(budgets(5, seeds, seed=300 + seed), "baseline", resamples=99)
        one = found.laws[1]
        hits["floor"] += covers(one.floor_nats, FLOOR)
        hits["exponent"] += covers(one.exponent, EXPONENT)
        ratio = found.speed_ups[0].ratio
        hits["speed-up"] += ratio is None or covers(ratio, TRUE_SPEED_UP)
    assert min(hits.values()) >= 24, hits


def covers(one: Estimate, truth: float) -> bool:
    return (one.low is None or one.low <= truth) and (one.high is None or truth <= one.high)


def test_a_largest_rung_that_leaves_the_law_is_a_miss_of_many_sds():
    points = synthetic(5)
    assert all(abs(one.sds) < 4 for one in fit_ladder(points, "baseline", 99).left_out)
    points[4] = replace(points[4], losses_nats=tuple(loss + 0.1 for loss in points[4].losses_nats))
    broken = next(one for one in fit_ladder(points, "baseline", 99).left_out if one.arm == "baseline")
    assert broken.miss_nats == pytest.approx(0.1, abs=0.03)
    assert broken.sds > 4


def test_a_law_that_misses_its_largest_rung_gives_no_speed_up():
    points = synthetic(5)
    kept = fit_ladder(points, "baseline", 99)
    assert kept.speed_ups[0].ratio is not None
    for number, arm in ((4, "baseline"), (9, "arm")):
        bent = list(points)
        bent[number] = replace(points[number], losses_nats=tuple(loss + 0.1 for loss in points[number].losses_nats))
        found = fit_ladder(bent, "baseline", 99)
        assert found.speed_ups[0].ratio is None
        assert found.speed_ups[0].problem.startswith(f"of {arm} the largest rung lies +")
        assert any(one.startswith(f"{arm}: the largest rung lies +") for one in found.problems)


def test_too_few_rungs_are_refused_with_the_reason():
    found = fit_ladder(synthetic(2), "baseline")
    assert (found.form, found.laws) == (None, ())
    assert "3 are needed" in found.problems[0]
    alone = fit_ladder([one for one in synthetic(4) if one.arm == "arm"], "baseline")
    assert alone.form is None
    assert "two arms have to share" in alone.problems[0]
    lacking = fit_ladder(synthetic(5)[:-1], "baseline", 19)
    assert [one.arm for one in lacking.laws] == ["baseline"]
    assert "arm: no law of 4 rung(s)" in lacking.problems[0]
    with pytest.raises(ValueError, match="finite and above 0"):
        fit_ladder([RungLosses("arm", 1e12, (float("nan"),))], "baseline")


def test_one_seed_has_no_interval_and_a_lead_beyond_the_rungs_no_speed_up():
    found = fit_ladder(synthetic(5, seeds=1, noise=0.0), "baseline")
    assert all(one.exponent.low is None for one in found.laws)
    assert any("single trial" in one for one in found.problems)
    far = [
        replace(one, losses_nats=tuple(loss - 0.15 for loss in one.losses_nats)) if one.arm == "arm" else one
        for one in synthetic(5, noise=1e-6)
    ]
    (speed_up,) = fit_ladder(far, "baseline", 19).speed_ups
    assert speed_up.ratio is None
    assert "beyond the baseline's rungs" in speed_up.problem


def rung(size: float, delta: float, half: float) -> Rung:
    return Rung("arm", (("model.preset", size),), size, (2.0,), delta, delta - half, delta + half, (f"t{size:g}",))


def test_a_flip_is_certain_only_when_both_intervals_exclude_zero():
    (flip,) = rank_flips([rung(1, -0.05, 0.02), rung(2, 0.04, 0.02)])
    assert flip.certain
    assert (flip.lower.size, flip.upper.size) == (1, 2)
    (possible,) = rank_flips([rung(1, -0.05, 0.02), rung(2, 0.01, 0.02)])
    assert not possible.certain
    assert not list(rank_flips([rung(1, -0.01, 0.02), rung(2, 0.01, 0.02)]))
    assert not list(rank_flips([rung(1, -0.05, 0.02), rung(2, -0.04, 0.02)]))
    around = list(rank_flips([rung(1, -0.05, 0.02), rung(2, -0.001, 0.02), rung(3, 0.04, 0.02)]))
    assert [(one.lower.size, one.upper.size, one.certain) for one in around] == [(1, 3, True), (2, 3, False)]


SWEEP = """
name: sizes
question: Does the lead hold with size?
base: {data: {sequence_length: 64}}
baseline: baseline
arms: {baseline: {}, g1: {gate: {position: sdpa}}}
zip:
  - model.preset: [cpu-tiny, cpu-350k, cpu-1m, cpu-2m]
    train.tokens: [5120, 10240, 20480, 40960]
axes: {train.lr: [1e-3], train.batch_tokens: [128]}
seeds: [1, 2]
controls: []
verdict: {margin: 0.01}
"""


def trained(store: Store, text: str = SWEEP) -> None:
    """Losses fall with compute; G1 is ahead on all rungs but the last."""
    plan = expand(parse(text, "sizes.yaml"))
    lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
    for planned in plan.trials:
        attempt = store.start_attempt(
            lease, planned.fingerprint, layout=planned.layout, provenance={}, resume_step=0
        )  # fmt: skip
        steps, last = planned.config.train.num_steps, planned.config.train.tokens == 40960
        loss = 2.0 + 0.5 * (planned.training_flops / 1e11) ** -0.2 + planned.seed / 1000
        loss += (planned.arm == "g1") * (0.05 if last else -0.05)
        record = ValidationRecord(
            step=steps, tokens=int(planned.config.train.tokens), fraction=1.0, split="slice", loss_nats=loss,
            bits_per_byte=loss, num_tokens=10, num_bytes=10,
        )  # fmt: skip
        store.record(lease, attempt, [record])
        store.end_attempt(
            lease, attempt, state="COMPLETE", cause="complete", reason="done", end_step=steps,
            summary=Summary(outcome="complete", step=steps, resume_step=0, seconds=1.0, tokens_per_second=9.0),
        )  # fmt: skip


def test_a_stored_ladder_is_told_in_every_format(tmp_path: Path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        trained(store, SWEEP.replace(", train.batch_tokens: [128]", "").replace("base: {", BATCH))
        found = ladder(store, "sizes")
        by_tokens = ladder(store, "sizes", "tokens")
    assert found.laws.form == "shared"
    assert [one.arm for one in found.laws.laws] == ["baseline", "g1"]
    assert [one.size for one in by_tokens.rungs[:4]] == [5120, 10240, 20480, 40960]
    assert {(flip.arm, flip.certain, dict(flip.upper.axes)["model.preset"]) for flip in found.flips} == {
        ("g1", True, "cpu-2m")
    }
    stream = io.StringIO()
    Console(file=stream, width=140, color_system=None).print(LadderView(found))
    assert "RANK FLIP: g1" in stream.getvalue()
    assert "shared by all arms" in stream.getvalue()
    lines = list(csv.DictReader(io.StringIO(ladder_to_csv(found))))
    assert len(lines) == 8
    assert all(float(line["law_loss_nats"]) > 1 for line in lines)
    content = json.loads(ladder_to_json(found))
    assert content["laws"][0]["formula"] == "power-law-2"
    assert len(content["laws"][0]["trials"]) == 16
    assert len(content["flips"]) == 3
    assert len(content["left_out"]) == 2


def test_the_report_of_a_ladder_has_its_laws_flips_and_picture(tmp_path: Path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        trained(store, SWEEP.replace(", train.batch_tokens: [128]", "").replace("base: {", BATCH))
        page, *pictures = write_report(store, "sizes", tmp_path / "report")
    text = page.read_text()
    assert "<h2>The ladder</h2>" in text
    assert "RANK FLIP: g1 minus the baseline" in text
    assert text.count('aria-label="The ladder"') == 1
    assert "power-law-2" in text
    assert "ladder.png" in {path.name for path in pictures}


def test_a_sweep_over_no_sizes_has_no_ladder_in_its_report(tmp_path: Path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        trained(store)
        assert "The ladder" not in write_report(store, "sizes", tmp_path / "report")[0].read_text()


BATCH = "base: {train: {batch_tokens: 128}, "


def test_what_is_no_ladder_is_refused(tmp_path: Path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        trained(store)
        with pytest.raises(UserError, match=r"train.batch_tokens, which is no size"):
            ladder(store, "sizes")
        grid = (
            SWEEP.replace("name: sizes", "name: grid")
            .replace("base: {", BATCH)
            .replace(", train.batch_tokens: [128]", "")
        )
        crossed = grid.replace("[5120, 10240, 20480, 40960]", "[40960, 20480, 10240, 5120]")
        trained(store, crossed)
        with pytest.raises(UserError, match="parameters and tokens do not grow together"):
            ladder(store, "grid", "parameters")
