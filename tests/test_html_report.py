"""The HTML report: whole in one file, nothing in it runs or loads, and its pictures show the numbers of the tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from store_runs import STEPS, Run, a_plan, probed, steps, validation
from typer.testing import CliRunner
from verdict_tables import heading, quickstart, trial

from orchestrator.cli import app
from orchestrator.report import Results, results, tabulate, write_report
from orchestrator.report.plots import (
    ArmCurves,
    ArmProbes,
    Picture,
    curves_picture,
    effects_picture,
    inside_picture,
    rates_picture,
)
from orchestrator.report.plots.picture import arm_styles
from orchestrator.store import Curve, RankDecision, Store
from orchestrator.sweep import UserError, VerdictConfig

HOSTILE = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Tags and attributes as a browser finds them, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


ARM = f"{HOSTILE} $x$ & é"
"""Arms also go through Matplotlib into the SVG, where a dollar would begin a formula."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path / 'gatesweep.db'}") as opened:
        yield opened


def trained(store: Store) -> None:
    """Every trial of a sweep with hostile names complete and probed; the gated arm better."""
    plan = a_plan("quick", arms=("baseline", ARM), verdict=VerdictConfig(margin=0.01))
    run = Run(store, replace(plan, sweep=plan.sweep.model_copy(update={"question": HOSTILE})))
    for planned in plan.trials:
        attempt = run.start(fingerprint=planned.fingerprint)
        score = None if planned.arm == "baseline" else 0.4
        records = [*steps(1, STEPS), validation(STEPS, 2.5 - planned.position / 10)]
        store.record(run.lease, attempt, [*records, probed(10, score=score), probed(STEPS, score=score)])
        run.end(attempt, "COMPLETE")


@dataclass(frozen=True)
class Written:
    files: tuple[Path, ...]
    page: Page
    source: str
    results: Results


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("report")
    with Store(f"sqlite:///{folder / 'gatesweep.db'}") as opened:
        trained(opened)
        files = write_report(opened, "quick", folder / "a" / "report")
        source = files[0].read_text()
        return Written(tuple(files), Page(source), source, results(opened, "quick"))


def test_the_page_holds_tables_pictures_and_provenance(written: Written):
    files = written.files
    assert sorted(path.name for path in files) == sorted(path.name for path in files[0].parent.iterdir())
    assert {path.name for path in files} == {
        "report.html", "effects.png", "learning-rates.png", "loss-curves.png", "inside.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    for row in written.results.tables[0].rows:
        assert row.arm in written.page.text
        assert f"{row.loss_nats:.4f}" in written.page.text
    for said in ("abc123, with uncommitted changes", "2.13.0", "train.tokens=1e4", "name: quick", "data 2"):
        assert said in written.page.text, said
    assert [tag for tag, _ in written.page.tags].count("svg") == 4


def test_nothing_in_the_page_runs_or_is_loaded(written: Written):
    for tag, attributes in written.page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "img", "base", "form", "image"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#"), value
    policy = next(
        one["content"] for tag, one in written.page.tags if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in (policy or "")


def test_names_and_questions_are_text_wherever_they_are_shown(written: Written):
    assert "<script" not in written.source
    assert HOSTILE in written.page.texts
    assert written.page.text.count(ARM) >= 6
    svgs = re.findall(r"<svg.*?</svg>", written.source, re.S)
    assert sum(ARM in Page(svg).text for svg in svgs) == 4


def test_ids_of_the_pictures_are_their_own(written: Written):
    """A page has one space of ids: a clip path of another picture would cut this one."""
    tags = written.page.tags
    clips = [attributes["id"] for tag, attributes in tags if tag == "clippath"]
    assert clips
    assert len(set(clips)) == len(clips)
    used = {match for _, one in tags for match in re.findall(r"url\(#(\w+)\)", one.get("clip-path") or "")}
    assert used <= set(clips)


def test_a_sweep_that_has_only_begun_says_so(store: Store, tmp_path: Path):
    run = Run(store, a_plan("quick"))
    run.start()
    files = write_report(store, "quick", tmp_path / "out")
    assert [path.name for path in files] == ["report.html"]
    text = Page(files[0].read_text()).text
    assert "Unfinished: 4 of 4 trials" in text
    assert "Without curves, as no learning rate has all its trials: baseline, gated" in text


def test_pruning_is_told_with_its_audit(store: Store, tmp_path: Path):
    run = Run(store, a_plan("quick", lrs=(1e-3, 2e-3, 4e-3)))
    of_gated = [planned for planned in run.plan.trials if planned.arm == "gated"]
    for planned in (*(one for one in run.plan.trials if one.arm == "baseline"), *of_gated[:2]):
        run.complete(planned.fingerprint, 2.5 - planned.position / 10)
    losses = {1e-3: 2.75, 2e-3: 2.8125, 4e-3: None}
    decision = RankDecision("gated", {}, 0.25, (1,), losses, dropped=(2e-3, 4e-3), audited=(2e-3,), formula="halving-1")
    store.add_rank_decision(run.lease, decision, "told")
    assert store.prune(run.lease, [of_gated[2].fingerprint], "pruned") == [of_gated[2].fingerprint]
    text = Page(write_report(store, "quick", tmp_path / "out")[0].read_text()).text
    audit = results(store, "quick").pruning
    assert audit is not None
    assert (audit.num_dropped, audit.num_false) == (2, 1)
    assert "false-prune rate 1 of 1 [0.03, 1.00]" in text
    told = text[text.index("Pruning, audited") :]
    assert "1e-3: 2.7500\n2e-3: 2.8125\n4e-3: diverged" in told
    assert re.search(r"gated\s+-\s+25 %\s+1e-3: .*diverged\s+4e-3\s+2e-3", told, re.S)


def test_what_is_there_is_replaced_whole(store: Store, tmp_path: Path):
    Run(store, a_plan("quick"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("old")
    (tmp_path / "out" / "mine.txt").write_text("kept")
    (page,) = write_report(store, "quick", tmp_path / "out")
    assert page.read_text().endswith("</html>\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "mine.txt"}


def test_a_folder_that_cannot_be_made_is_named(store: Store, tmp_path: Path):
    Run(store, a_plan("quick"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report: .*file.*: (Not a directory|File exists)"):
        write_report(store, "quick", tmp_path / "file" / "out")


def test_the_verb_writes_into_the_home_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Store(f"sqlite:///{tmp_path / 'gatesweep.db'}") as store:
        Run(store, a_plan("quick"))
    monkeypatch.setenv("GATESWEEP_HOME", str(tmp_path))
    told = CliRunner().invoke(app.app, ["report", "quick"])
    assert told.exit_code == 0, told.output
    assert (tmp_path / "reports" / "quick" / "report.html").exists()
    told = CliRunner().invoke(app.app, ["report", "quick", "--out", str(tmp_path / "here")])
    assert (tmp_path / "here" / "report.html").exists(), told.output
    unknown = CliRunner().invoke(app.app, ["report", "../quick"])
    assert isinstance(unknown.exception, UserError)


def shown(picture: Picture | None) -> str:
    assert picture is not None
    return Page(picture.svg).text


def test_the_rates_plot_tells_optimum_and_divergence():
    losses = {1e-3: 2.30, 2e-3: 2.22, 4e-3: 2.20, 8e-3: 2.23, 1.6e-2: 2.33}
    trials = [
        trial(arm, lr=lr, seed=seed, loss=loss + seed / 1e4)
        for arm in ("baseline", "gated") for lr, loss in losses.items() for seed in (1, 2, 3)
    ]  # fmt: skip
    trials += [trial(arm, lr=0.1, seed=s, state="DIVERGED", loss=None) for arm in ("baseline", "gated") for s in (1, 2)]
    trials += [trial(arm, lr=0.1, seed=3, loss=3.0) for arm in ("baseline", "gated")]
    (table,) = tabulate(heading(arms=("baseline", "gated"), seeds=(1, 2, 3)), trials).tables
    optimum = table.rows[0].optimum
    assert optimum is not None
    assert optimum.low is not None
    text = shown(rates_picture("rates", table.rows))
    assert text.count("2 of 3") == 2
    assert f"{optimum.lr * 1e3:.2g}e-3 [{optimum.low * 1e3:.2g}e-3, " in text
    assert optimum.fitted == (1e-3, 1.6e-2)
    assert optimum.loss_at(optimum.lr) == pytest.approx(2.20, abs=0.01)
    assert optimum.loss_at(1e-3) == pytest.approx(2.30, abs=0.01)
    assert rates_picture("rates", table.rows[:0]) is None


def test_one_rate_is_no_curve():
    (table,) = tabulate(heading(), [one for one in quickstart() if one.lr == quickstart()[0].lr]).tables
    assert rates_picture("rates", table.rows) is None


def test_the_forest_holds_every_arms_interval_and_verdict():
    (table,) = tabulate(heading(), quickstart()).tables
    text = shown(effects_picture("effects", table.rows, "baseline", 0.01))
    others = [row for row in table.rows if not row.is_baseline]
    assert others
    for row in others:
        assert f"{row.delta_nats:+.4f} [{row.low_nats:+.4f}, {row.high_nats:+.4f}]" in re.sub(r"\s+", " ", text)
    assert effects_picture("effects", table.rows[:1], "baseline", 0.01) is None


def test_without_probes_or_curves_there_is_no_picture():
    assert inside_picture("inside", [ArmProbes("baseline", ((), ()))], ["baseline"]) is None
    assert curves_picture("curves", [ArmCurves("baseline", (Curve((), ()),))], "baseline", ["baseline"]) is None


def test_arms_differ_without_colour_too():
    styles = list(arm_styles([f"arm{number}" for number in range(40)]).values())
    assert len({(style.dashes, style.marker) for style in styles}) == 40
    assert len({(style.colour, style.marker) for style in styles}) == 40
    assert styles[0].colour == "#000000"


def test_the_same_data_give_the_same_picture():
    (table,) = tabulate(heading(), quickstart()).tables
    first, second = (effects_picture("effects", table.rows, "baseline", 0.01) for _ in range(2))
    assert first == second
