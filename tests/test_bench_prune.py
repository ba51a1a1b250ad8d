"""The replay of a recorded grid: policies answer for what they have trained, and never for more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import prune


@pytest.fixture(scope="module")
def grid() -> prune.Grid:
    return prune.Grid.read(prune.GRID)


def test_the_recorded_grid_is_whole(grid: prune.Grid) -> None:
    cells = {trial.cell for trial in grid.trials}
    assert len(grid.arms) == 8
    assert len(cells) == 8 * 4
    assert len(grid.trials) == len(cells) * len(grid.seeds) == 96
    assert all(len(trial.losses) == prune.PARTS for trial in grid.trials)


@pytest.mark.parametrize("name", list(prune.policies()))
def test_a_policy_trains_at_most_the_grid_and_no_pruning_ends_at_its_answer(grid: prune.Grid, name: str) -> None:
    (order,) = prune.orders(grid, 1)
    answers, compute = prune.replay(grid, order, prune.policies()[name])
    assert len(answers) == len(prune.BUDGETS)
    assert 0.0 < compute <= 1.0
    if name == "no pruning":
        assert compute == 1.0
        assert (answers[-1].regret_sds, answers[-1].kept) == (0.0, 1.0)
    else:
        assert compute < 0.6


def test_ours_keeps_one_rate_of_each_arm_with_all_its_seeds(grid: prune.Grid) -> None:
    for order in prune.orders(grid, 3):
        state = prune.State(grid, order)
        for _ in prune.ours(state):
            pass
        for arm in grid.arms:
            whole = {lr for lr in {one.lr for one in grid.trials} if _is_whole(state, arm, lr)}
            assert whole


def test_drawn_grids_are_as_large_as_the_recorded_one_and_drawn_once_for_all(grid: prune.Grid) -> None:
    drawn = prune.drawn_grid(0)
    assert (len(drawn.trials), len(drawn.arms), drawn.seeds) == (len(grid.trials), len(grid.arms), grid.seeds)
    assert drawn == prune.drawn_grid(0)
    assert drawn != prune.drawn_grid(1)
    assert all(trial.losses[0] > trial.losses[-1] for trial in drawn.trials)
    assert 0.01 < drawn.sd < 0.15


def _is_whole(state: prune.State, arm: str, lr: float) -> bool:
    return all(state.parts(trial) == prune.PARTS for trial in state.grid.trials if trial.cell == (arm, lr))
