"""Published claims beside measured effects: the marks, and that the paper's files hold the arms they are about."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from models.presets import PRESETS
from orchestrator.plan import expand
from orchestrator.report import SweepHeading, TrialResult, tabulate
from orchestrator.report.against import CLAIMS, AgainstView, Claim, Finding, against_to_json, is_the_papers, mark_claims
from orchestrator.report.against.formats import against_to_markdown
from orchestrator.report.mechanism import ArmMechanism, Mechanism, MechanismTable, Spread
from orchestrator.sweep import load, parse

PAPER = Path(__file__).parent.parent / "sweeps" / "paper"
NOISE = (-0.004, 0.001, 0.003)


def trials(arm: str, mean: float, diverged_above: float = 1.0, num_seeds: int = 3) -> list[TrialResult]:
    made = []
    for lr, above in ((4e-3, 0.0), (8e-3, 0.3)):
        for seed in range(1, num_seeds + 1):
            is_complete = lr <= diverged_above
            loss = mean + above + NOISE[seed - 1] if is_complete else None
            name = f"{arm}/{lr}/{seed}"
            state = "COMPLETE" if is_complete else "DIVERGED"
            made.append(TrialResult(name, arm, {"train.lr": lr}, lr, seed, state, slice_loss_nats=loss))
    return made


def findings(every: list[TrialResult], claims: list[Claim], foreign: set[str] = set(), **attention: float):  # noqa: B006
    """By (arm, reference, measure). ``attention``: F-Attn by arm, with dashes as underscores."""
    arms = tuple(dict.fromkeys(one.arm for one in every))
    heading = SweepHeading("small", "why?", "baseline", arms, None, 0.01, 0.05, ("train.lr",))
    answer = tabulate(heading, every)
    (table,) = answer.tables
    nothing = Spread(None, None, ())
    rows = []
    for row in table.rows:
        base = attention.get(row.arm.replace("-", "_"))
        values = () if base is None else tuple(base + noise for noise in NOISE)
        spread = nothing if base is None else Spread(base, 0.003, row.trials_best, values)
        rows.append(
            ArmMechanism(
                row.arm, row.is_baseline, row.best_lr, None, None, {}, nothing, spread, nothing, 3, len(values)
            )
        )
    inside = Mechanism("small", "why?", "slice", (MechanismTable((), tuple(rows), ()),))
    found = mark_claims(answer, inside, foreign, claims)
    marks: dict[tuple[str, str, str], Finding] = {
        (one.claim.arm, one.claim.reference, one.claim.measure): one for one in found.tables[0].findings
    }
    return found, marks


LOWER = Claim("Table 1", "g1-elementwise", "baseline", "loss", (5.761, 6.026))


@pytest.mark.parametrize(
    ("mean", "num_seeds", "mark"),
    [(2.3, 3, "held"), (2.7, 3, "not held"), (2.5001, 3, "not held"), (2.492, 3, "undecided"), (2.3, 1, "undecided")],
)
def test_a_claim_is_held_by_the_interval_alone(mean: float, num_seeds: int, mark: str) -> None:
    """2.5001: equivalent within the margin; 2.492: neither; one seed: no interval, however large the effect."""
    every = [*trials("baseline", 2.5, num_seeds=num_seeds), *trials("g1-elementwise", mean, num_seeds=num_seeds)]
    _, marks = findings(every, [LOWER])
    finding = marks["g1-elementwise", "baseline", "loss"]
    assert finding.mark == mark
    assert finding.effect == pytest.approx(mean - 2.5)


def test_the_published_effect_of_perplexities_is_in_nats() -> None:
    assert LOWER.published_effect == pytest.approx(math.log(5.761) - math.log(6.026))


def test_arms_are_compared_with_each_other_as_the_claim_asks() -> None:
    every = [*trials("baseline", 2.5), *trials("g1-elementwise", 2.3), *trials("g2-elementwise", 2.4)]
    between = Claim("Table 1", "g1-elementwise", "g2-elementwise", "loss", (5.761, 5.82))
    _, marks = findings(every, [LOWER, between])
    finding = marks["g1-elementwise", "g2-elementwise", "loss"]
    assert finding.mark == "held"
    assert finding.effect == pytest.approx(-0.1)
    # Further questions share alpha: the interval is wider than it would be alone.
    _, alone = findings(every, [between])
    _, shared = findings(every, [between, Claim("x", "g2-elementwise", "g1-elementwise", "loss", direction="higher")])
    assert (
        shared["g1-elementwise", "g2-elementwise", "loss"].high > alone["g1-elementwise", "g2-elementwise", "loss"].high
    )
    assert shared["g2-elementwise", "g1-elementwise", "loss"].mark == "held"


def test_what_probes_saw_is_compared_over_seeds() -> None:
    every = [*trials("baseline", 2.5), *trials("g1-elementwise", 2.5)]
    claim = Claim("Table 4", "g1-elementwise", "baseline", "F-Attn", (0.048, 0.467))
    _, marks = findings(every, [claim], baseline=0.4, g1_elementwise=0.1)
    finding = marks["g1-elementwise", "baseline", "F-Attn"]
    assert (finding.mark, finding.effect) == ("held", pytest.approx(-0.3))
    _, without = findings(every, [claim], baseline=0.4)
    assert without["g1-elementwise", "baseline", "F-Attn"].mark == "not measured"


def test_divergence_is_counted_where_both_arms_were_tried() -> None:
    claim = Claim("Table 2", "g1-elementwise", "baseline", "divergence")
    few = [*trials("baseline", 2.5, diverged_above=5e-3), *trials("g1-elementwise", 2.5)]
    assert findings(few, [claim])[1]["g1-elementwise", "baseline", "divergence"].mark == "undecided"  # 0 and 3 of 3
    calm = [*trials("baseline", 2.5), *trials("g1-elementwise", 2.5)]
    assert findings(calm, [claim])[1]["g1-elementwise", "baseline", "divergence"].mark == "not measured"


def test_another_mechanism_under_the_papers_name_measures_nothing() -> None:
    every = [*trials("baseline", 2.5), *trials("g1-elementwise", 2.3)]
    _, marks = findings(every, [LOWER], foreign={"g1-elementwise"})
    assert marks["g1-elementwise", "baseline", "loss"].mark == "not measured"
    text = """
name: other
question: why?
base: {model: {preset: cpu-tiny}, train: {tokens: 5120, batch_tokens: 512, lr: 1e-3}}
baseline: baseline
arms:
  baseline: {}
  g1-elementwise: {gate: {position: value}}
  g2-elementwise: {gate: {position: value}, model: {rope_base: 1e5}}
seeds: [1]
"""
    made = {one.arm: one.config for one in expand(parse(text, "other.yaml")).trials}
    assert not is_the_papers("g1-elementwise", made["g1-elementwise"])
    assert is_the_papers("g2-elementwise", made["g2-elementwise"])
    assert is_the_papers("baseline", made["baseline"])


def test_every_arm_of_the_papers_files_is_what_the_claims_are_about() -> None:
    arms = set()
    for path in sorted(PAPER.glob("*-cpu.yaml")):
        for trial in expand(load(path), files_may_be_absent=True).trials:
            assert is_the_papers(trial.arm, trial.config), (path.name, trial.arm)
            arms.add(trial.arm)
    assert {claim.arm for claim in CLAIMS} | {claim.reference for claim in CLAIMS} <= arms


def test_a_table_at_a_setting_of_the_paper_is_asked_only_about_that_setting() -> None:
    every = [
        TrialResult(
            f"{arm}/{preset}/{seed}", arm, {"model.preset": preset}, 4e-3, seed, "COMPLETE", slice_loss_nats=2.5
        )
        for arm in ("baseline", "g1-elementwise")
        for preset in ("dense-1.7b-28l", "cpu-1m")
        for seed in (1, 2)
    ]
    assert "cpu-1m" in PRESETS
    arms = ("baseline", "g1-elementwise")
    answer = tabulate(SweepHeading("small", "why?", "baseline", arms, (1, 2), axis_names=("model.preset",)), every)
    nothing = Spread(None, None, ())
    row = [ArmMechanism(arm, False, None, None, None, {}, nothing, nothing, nothing, 0, 0) for arm in arms]
    inside = Mechanism("small", "why?", "slice", tuple(MechanismTable(t.axes, tuple(row), ()) for t in answer.tables))
    dense = [claim for claim in CLAIMS if claim.source.startswith("Table 2") and claim.measure == "loss"]
    found = {
        dict(table.axes)["model.preset"]: table.findings for table in mark_claims(answer, inside, set(), dense).tables
    }
    assert {one.claim.setting["model.preset"] for one in found["dense-1.7b-28l"]} == {"dense-1.7b-28l"}
    # A size that the paper has not is beside all of them.
    assert len(found["cpu-1m"]) == sum(claim.arm == "g1-elementwise" for claim in dense)


def test_renderers_say_marks_reasons_and_what_is_elsewhere() -> None:
    every = [*trials("baseline", 2.5), *trials("g1-elementwise", 2.3)]
    found, _ = findings(every, list(CLAIMS))
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(AgainstView(found))
    text = console.export_text()
    content = json.loads(against_to_json(found))
    assert content["counts"]["held"] == sum(one["mark"] == "held" for one in content["tables"][0]["claims"]) > 0
    assert content["num_claims_elsewhere"] == len(CLAIMS) - len(content["tables"][0]["claims"])
    for said in (text, against_to_markdown(found)):
        assert "RULER" in said
        assert "about arms that this sweep does not have" in said
        assert "-0.2000" in said
