"""No name out of a sweep's file, or out of a command line, becomes a path outside the home."""

from pathlib import Path

import pytest
from fake_gangs import Bench, bench, plan  # noqa: F401
from sweep_runs import SWEEP, plan_of, write_sweep

from models.config import DataConfig
from models.corpus import prepare
from orchestrator.cli.home import Home
from orchestrator.cli.trained import find_trial
from orchestrator.plan import Plan
from orchestrator.sweep import UserError, load

LEADING_OUT = [
    "../out",
    "/tmp/out",
    "a/b",
    "..",
    ".hidden",
    "~root",
    "a\\nb",
    "a\\0",
    "",
    "a" * 81,
    "name.with.dots/..",
]
PLACES = {
    "sweep": ("name: tiny", "name: {}"),
    "arm": ("  g1: {gate", "  {}: {gate"),
}


def with_name(place: str, name: str) -> str:
    old, new = PLACES[place]
    assert old in SWEEP
    return SWEEP.replace(old, new.replace("{}", f'"{name}"') if place == "arm" else new.format(f'"{name}"'))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_could_lead_out_is_refused_by_the_reader(tmp_path: Path, place: str, name: str):
    load(write_sweep(tmp_path, with_name(place, "a_good-1")))
    with pytest.raises(UserError, match=r"(?s)tiny\.yaml:\d+.*allowed: (lower-case )?letters"):
        load(write_sweep(tmp_path, with_name(place, name)))


def test_a_sweep_writes_nothing_outside_its_home(bench: Bench, tmp_path: Path):  # noqa: F811
    """With names as long and as odd as they may be."""
    text = SWEEP.replace("name: tiny", f"name: {'-_'.join('ab0')}").replace("  g1: {gate", f"  {'x' * 80}: {{gate")
    plan = plan_of(tmp_path / "sweeps", text=text)  # noqa: F811
    before = {path for path in tmp_path.rglob("*") if bench.home not in (path, *path.parents)}
    bench.run(plan)
    assert set(bench.states(plan).values()) == {"COMPLETE"}
    assert {path for path in tmp_path.rglob("*") if bench.home not in (path, *path.parents)} == before
    trials = {path.name for path in (bench.home / "trials").iterdir()}
    assert trials == {trial.fingerprint for trial in plan.trials}
    assert all(name.isalnum() for name in trials)


def test_a_corpus_is_prepared_under_a_hash_whatever_its_path(plan: Plan, tmp_path: Path):  # noqa: F811
    odd = tmp_path / "..data .jsonl"
    odd.write_bytes(Path(plan.trials[0].config.data.corpus).read_bytes())
    given = plan.trials[0].config.data.model_copy(update={"corpus": f"{tmp_path}/x/../{odd.name}", "corpus_sha256": ""})
    (tmp_path / "x").mkdir()
    prepared = prepare(DataConfig.model_validate(given.model_dump()), tmp_path / "home" / "data")
    assert prepared.directory.parent == tmp_path / "home" / "data"
    assert int(prepared.directory.name, 16) >= 0
    assert prepared.indices_directory == prepared.directory / "indices"


@pytest.mark.parametrize("name", ["../secret", "..", "/etc", "*", ".", ""])
def test_a_trial_is_named_by_the_beginning_of_its_fingerprint_and_nothing_else(tmp_path: Path, name: str):
    (tmp_path / "home" / "trials" / "21cbca08c0528082").mkdir(parents=True)
    (tmp_path / "home" / "secret").mkdir()
    with pytest.raises(UserError, match="no trial in"):
        find_trial(Home.of({"GATESWEEP_HOME": str(tmp_path / "home")}), name)
