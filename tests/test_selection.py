"""Which trials ``--where`` and ``--trial`` choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.cli.selection import one_trial, select_trials
from orchestrator.sweep import UserError


@dataclass
class Row:
    fingerprint: str
    arm: str
    seed: int = 1
    state: str = "FAILED"
    cause: str | None = "hang"
    axes: dict[str, Any] = field(default_factory=dict)


ROWS: Any = [
    Row("aa11", "g1", axes={"train.lr": 1e-3}),
    Row("aa22", "g1", seed=2, axes={"train.lr": 4e-3}),
    Row("bb11", "baseline", state="WAITING", cause=None, axes={"train.lr": 1e-3}),
]


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ([], ["aa11", "aa22", "bb11"]),
        (["arm=g1"], ["aa11", "aa22"]),
        (["train.lr=0.001"], ["aa11", "bb11"]),
        (["lr=1e-3", "arm=g1"], ["aa11"]),
        (["cause=hang", "seed=2"], ["aa22"]),
        (["state=waiting"], ["bb11"]),
        (["lr=high"], []),
    ],
)
def test_all_conditions_must_match(where: list[str], chosen: list[str]):
    assert [row.fingerprint for row in select_trials(ROWS, where)] == chosen


def test_fingerprints_may_be_shortened_and_combine_with_conditions():
    assert [row.fingerprint for row in select_trials(ROWS, (), ["aa"])] == ["aa11", "aa22"]
    assert [row.fingerprint for row in select_trials(ROWS, ["lr=1e-3"], ["aa", "bb"])] == ["aa11", "bb11"]
    assert one_trial(ROWS, "bb").arm == "baseline"


def test_what_no_trial_has_is_refused_with_what_there_is():
    with pytest.raises(UserError, match="--where width: no such key; allowed: arm, state, cause, seed, train"):
        select_trials(ROWS, ["width=3"])
    with pytest.raises(UserError, match="--where arm=g3: no such arm; allowed: baseline, g1"):
        select_trials(ROWS, ["arm=g3"])
    with pytest.raises(UserError, match="--where arm: allowed: KEY=VALUE"):
        select_trials(ROWS, ["arm"])
    with pytest.raises(UserError, match="--trial cc: no trial of this sweep"):
        select_trials(ROWS, (), ["cc"])
    with pytest.raises(UserError, match="aa is the beginning of 2 fingerprints: aa11, aa22"):
        one_trial(ROWS, "aa")
    with pytest.raises(UserError, match="no trial has the fingerprint cc"):
        one_trial(ROWS, "cc")
