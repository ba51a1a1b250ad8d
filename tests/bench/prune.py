"""How much of a grid must be trained to know its winner, and its verdicts: policies on a recorded grid, and on drawn
ones.

    python tests/bench/prune.py [--orders 200] [--drawn 48] [--grid tests/bench/data/ablation.json.gz]

The grid's curves are replayed, an eighth of the schedule at a time, in seeded orders that keep the blocks
of seeds (also which seed is the first): the same orders for all policies. Nothing is trained, and compute is the share
of the grid's optimizer steps. The recorded grid is one data set of one size, so policies are held against drawn grids,
too (``drawn_grid``), each in one order: what is better on one alone is tuned to it.

* *ours*: ``prune: {rank: {}}`` by the product's own ``RankPolicy``, with the first rung at a quarter or at an eighth of
  the schedule (``first_fraction``), and with the first seed or all three ranking at every rung (``seeds: 3``); audited
  rates are begun last.
* *Optuna SHA*, *Optuna Hyperband*, on two slots as the next: ``SuccessiveHalvingPruner`` and ``HyperbandPruner`` with
  their defaults, one study of all trials, the resource counted in eighths.
* *Ray Tune ASHA*: ``ASHAScheduler`` with its defaults and ``max_t=8``.
* *no pruning*: the same order, every trial to its end.

The *winner* of a policy at some compute: of the cells (arm and rate) with a trial that came furthest, the one with
the lowest mean there plus its standard error, so that one lucky seed does not beat three sound ones. Its *regret* is
how far its mean at the end of the whole grid lies above the best cell's, in units of the seed SD, pooled over each
arm's best cell. A *verdict is kept* when the product's comparison, on what the policy has trained, decides for the arm
as it does on the whole grid; an arm is judged at its best rate among those that have all their seeds, and none means
that the verdict is not there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from orchestrator.scaling import RankedTrial, RankPolicy
from orchestrator.store import RankDecision
from orchestrator.sweep import RankConfig
from orchestrator.verdict import Sample, compare

GRID = Path(__file__).parent / "data" / "ablation.json.gz"
PARTS = 8
SLOTS = 2
BUDGETS = (0.10, 0.15, 0.20, 0.25, 0.33, 0.40, 0.50, 0.75, 1.0)

Cell = tuple[str, float]


@dataclass(frozen=True)
class Trial:
    number: int
    arm: str
    lr: float
    seed: int
    losses: tuple[float, ...]
    """On the validation slice, after each eighth of the schedule; inf where it is not finite."""

    @property
    def cell(self) -> Cell:
        return self.arm, self.lr


@dataclass(frozen=True)
class Grid:
    trials: tuple[Trial, ...]
    baseline: str
    margin_nats: float | None
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> Grid:
        content = json.loads(gzip.decompress(path.read_bytes()))
        trials = []
        for number, one in enumerate(content["trials"]):
            losses = tuple(math.inf if loss is None else loss for loss in one["validation_nats"])
            losses += (math.inf,) * (PARTS - len(losses))  # diverged: nothing after
            trials.append(Trial(number, one["arm"], one["lr"], one["seed"], losses))
        seeds = tuple(dict.fromkeys(sorted(trial.seed for trial in trials)))
        return cls(tuple(trials), content["baseline"], content["margin_nats"], seeds)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(trial.arm for trial in self.trials))

    @cached_property
    def means(self) -> dict[Cell, float]:
        """Of every cell at the end."""
        cells = dict.fromkeys(trial.cell for trial in self.trials)
        return {cell: fmean(trial.losses[-1] for trial in self.trials if trial.cell == cell) for cell in cells}

    @cached_property
    def sd(self) -> float:
        means = self.means
        best = [min((cell for cell in means if cell[0] == arm), key=means.__getitem__) for arm in self.arms]
        groups = [[trial.losses[-1] for trial in self.trials if trial.cell == cell] for cell in best]
        return math.sqrt(fmean(variance(group) for group in groups))


@dataclass
class State:
    """What a policy has trained, and what it has stopped."""

    grid: Grid
    order: list[Trial]
    done: dict[int, int] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)

    def parts(self, trial: Trial) -> int:
        return self.done.get(trial.number, 0)

    @property
    def compute(self) -> float:
        return sum(self.done.values()) / (PARTS * len(self.grid.trials))

    def winner(self) -> Cell | None:
        furthest = max(self.done.values(), default=0)
        there: dict[Cell, list[float]] = {}
        for trial in self.grid.trials:
            if furthest and self.parts(trial) == furthest:
                there.setdefault(trial.cell, []).append(trial.losses[furthest - 1])
        sd = self.grid.sd
        return min(there, key=lambda cell: fmean(there[cell]) + sd / math.sqrt(len(there[cell])), default=None)

    def verdicts(self) -> dict[str, str]:
        samples = []
        for arm in self.grid.arms:
            whole: dict[float, list[float]] = {}
            for trial in self.grid.trials:
                if trial.arm == arm and self.parts(trial) == PARTS:
                    whole.setdefault(trial.lr, []).append(trial.losses[-1])
            known = [losses for losses in whole.values() if len(losses) == len(self.grid.seeds)]
            best = min(known, key=fmean, default=[])
            samples.append(Sample(arm, tuple(best)))
        decided = compare(samples, self.grid.baseline, self.grid.margin_nats).verdicts
        return {one.arm: one.decision for one in decided if one.arm != self.grid.baseline}


Policy = Callable[[State], Iterator[None]]
"""Trains an eighth of one trial a step, until it is done."""


def in_order(state: State, stops: Callable[[Trial, int], bool]) -> Iterator[None]:
    """Two slots; ``stops`` is asked after each eighth but the last."""
    waiting, slots = list(state.order), []
    while waiting or slots:
        while waiting and len(slots) < SLOTS:
            slots.append(waiting.pop(0))
        for trial in list(slots):
            state.done[trial.number] = state.parts(trial) + 1
            yield
            if state.parts(trial) == PARTS:
                stops(trial, PARTS)
                slots.remove(trial)
            elif stops(trial, state.parts(trial)):
                state.stopped.add(trial.number)
                slots.remove(trial)


def no_pruning(state: State) -> Iterator[None]:
    yield from in_order(state, lambda _trial, _parts: False)


def ours(state: State, config: RankConfig | None = None) -> Iterator[None]:
    config = config or RankConfig()
    seeds = tuple(dict.fromkeys(trial.seed for trial in state.order))
    policy, decided = RankPolicy(config, seeds), list[RankDecision]()
    rungs = [round(rung * PARTS) for rung in config.rungs]
    places = {trial.number: place for place, trial in enumerate(state.order)}
    goals: dict[int, int] = {}

    def judge(arm: str) -> None:
        """Arms are never compared, so a trial changes the goals of its own arm alone."""
        ranked = [_ranked(state, trial, rungs) for trial in state.order if trial.arm == arm]
        ours = [one for one in decided if one.arm == arm]
        while new := policy.decide(ranked, ours):
            decided.extend(new)
            ours += new
        goals.update({int(name): round(PARTS * (goal or 0.0)) for name, goal in policy.goals(ranked, ours).items()})

    for arm in state.grid.arms:
        judge(arm)
    while True:
        audited = {(one.arm, lr) for one in decided for lr in one.audited}
        open_ones = [trial for trial in state.order if state.parts(trial) < goals[trial.number]]
        if not open_ones:
            return
        # A begun one goes on, then what is first in the order; what is only finished for the audit comes last.
        trial = min(open_ones, key=lambda one: (one.cell in audited, not state.parts(one), places[one.number]))
        while state.parts(trial) < goals[trial.number]:
            state.done[trial.number] = state.parts(trial) + 1
            yield
        judge(trial.arm)


def _ranked(state: State, trial: Trial, rungs: Sequence[int]) -> RankedTrial:
    parts = state.parts(trial)
    losses = tuple(trial.losses[rung - 1] if rung <= parts else None for rung in rungs)
    phase = "COMPLETE" if parts == PARTS else "RUNNING" if parts else "WAITING"
    return RankedTrial(str(trial.number), trial.arm, {}, trial.lr, trial.seed, phase, losses)


def optuna_pruner(make: Callable[[], Any]) -> Policy:
    def policy(state: State) -> Iterator[None]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="minimize", pruner=make())
        asked: dict[int, Any] = {}

        def stops(trial: Trial, parts: int) -> bool:
            if trial.number not in asked:
                asked[trial.number] = study.ask()
            one = asked[trial.number]
            one.report(trial.losses[parts - 1], parts)
            if parts == PARTS:
                study.tell(one, trial.losses[-1])
                return False
            if one.should_prune():
                study.tell(one, state=optuna.trial.TrialState.PRUNED)
                return True
            return False

        yield from in_order(state, stops)

    return policy


def ray_asha(state: State) -> Iterator[None]:
    from types import SimpleNamespace

    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    scheduler = ASHAScheduler(time_attr="parts", metric="loss", mode="min", max_t=PARTS)
    added: dict[int, Any] = {}

    def stops(trial: Trial, parts: int) -> bool:
        if trial.number not in added:
            added[trial.number] = SimpleNamespace(trial_id=str(trial.number), config={}, evaluated_params={})
            scheduler.on_trial_add(None, added[trial.number])
        result = {"parts": parts, "loss": trial.losses[parts - 1]}
        if parts == PARTS:
            scheduler.on_trial_complete(None, added[trial.number], result)
            return False
        return bool(scheduler.on_trial_result(None, added[trial.number], result) == TrialScheduler.STOP)

    yield from in_order(state, stops)


def policies() -> dict[str, Policy]:
    from optuna.pruners import HyperbandPruner, SuccessiveHalvingPruner

    return {
        "ours, from 1/4": partial(ours, config=RankConfig(first_fraction=0.25)),
        "ours, from 1/8": partial(ours, config=RankConfig(first_fraction=0.125)),
        "ours, from 1/4, 3 seeds": partial(ours, config=RankConfig(first_fraction=0.25, seeds=(3,))),
        "ours, from 1/8, 3 seeds": partial(ours, config=RankConfig(first_fraction=0.125, seeds=(3,))),
        "Optuna SHA": optuna_pruner(SuccessiveHalvingPruner),
        "Optuna Hyperband": optuna_pruner(lambda: HyperbandPruner(max_resource=PARTS)),
        "Ray Tune ASHA": ray_asha,
        "no pruning": no_pruning,
    }


DRAWN_RATES = (2e-3, 5e-3, 1.2e-2, 3e-2)


def drawn_grid(draw: int, num_arms: int = 8, num_seeds: int = 3, sd: float = 0.04) -> Grid:
    """Curves out of a model, not of trials. Each arm has a parabola in log2 LR, whose optimum lies in the grid or just
    outside and moves down while the schedule runs; a seed's noise grows with the distance from it, and wanders."""
    rng = random.Random(f"grid {draw}")
    log_rates = [math.log2(lr) for lr in DRAWN_RATES]
    trials: list[Trial] = []
    for arm in ("baseline", *(f"arm{number}" for number in range(1, num_arms))):
        best = rng.uniform(log_rates[0] - 0.7, log_rates[-1] - 0.7)
        early, width, floor = best + rng.gauss(0.3, 0.5), rng.uniform(0.015, 0.05), 2.1 + rng.gauss(0.0, 0.03)
        for lr, log_lr in zip(DRAWN_RATES, log_rates, strict=True):
            for seed in range(1, num_seeds + 1):
                end, wander, losses = rng.gauss(0.0, sd * (1.0 + abs(log_lr - best))), 0.0, []
                for part in range(PARTS, 0, -1):
                    left = 1.0 - part / PARTS
                    optimum = best + (early - best) * left
                    curve = floor + 0.9 * left**1.5 + width * (log_lr - optimum) ** 2 * (1.0 + 0.5 * left)
                    losses.append(curve + end * (1.0 - 0.6 * left) + wander * left)
                    wander += rng.gauss(0.0, sd / 4.0)
                trials.append(Trial(len(trials), arm, lr, seed, tuple(reversed(losses))))
    return Grid(tuple(trials), "baseline", 0.01, tuple(range(1, num_seeds + 1)))


def orders(grid: Grid, number: int) -> Iterator[list[Trial]]:
    """Blocks of seeds, drawn anew in each: which seed comes first, and the order within its block."""
    for draw in range(number):
        rng = random.Random(draw)
        seeds = rng.sample(grid.seeds, len(grid.seeds))
        blocks = [[trial for trial in grid.trials if trial.seed == seed] for seed in seeds]
        yield [trial for block in blocks for trial in rng.sample(block, len(block))]


@dataclass(frozen=True)
class Answer:
    """What a policy says at one budget."""

    regret_sds: float
    kept: float
    """Share of the arms with the whole grid's verdict."""


def replay(grid: Grid, order: list[Trial], policy: Policy) -> tuple[list[Answer], float]:
    """Its answers at the budgets, and the compute that it took in all."""
    means, sd = grid.means, grid.sd
    whole = State(grid, order, dict.fromkeys((trial.number for trial in grid.trials), PARTS)).verdicts()

    def answer(state: State) -> Answer:
        winner, now = state.winner(), state.verdicts()
        regret = math.inf if winner is None else (means[winner] - min(means.values())) / sd
        return Answer(regret, fmean(now[arm] == decision for arm, decision in whole.items()))

    state, answers = State(grid, order), list[Answer]()
    for _ in policy(state):
        while len(answers) < len(BUDGETS) and state.compute >= BUDGETS[len(answers)] - 1e-9:
            answers.append(answer(state))
    answers += [answer(state)] * (len(BUDGETS) - len(answers))
    return answers, state.compute


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--drawn", type=int, default=48, help="how many grids are drawn; 0: none")
    parser.add_argument("--grid", type=Path, default=GRID)
    asked = parser.parse_args()
    grid = Grid.read(asked.grid)
    print("regret in seed SDs: 95th percentile, share below 1; verdicts kept: mean, share of orders with all")
    print(f"{asked.grid.name}: {len(grid.trials)} trials, seed SD {grid.sd:.4f} nats; {asked.orders} orders")
    show([(grid, order) for order in orders(grid, asked.orders)])
    if asked.drawn:
        print(f"drawn grids: {asked.drawn} of as many trials, one order each")
        drawn = [drawn_grid(draw) for draw in range(asked.drawn)]
        show([(one, order) for draw, one in enumerate(drawn) for order in list(orders(one, draw % 6 + 1))[-1:]])


def show(cases: Sequence[tuple[Grid, list[Trial]]]) -> None:
    """A row a policy."""
    print(f"{'policy':24} {'compute':>8}  " + "  ".join(f"{f'at {budget:.0%}':>24}" for budget in BUDGETS))
    for name, policy in policies().items():
        runs = [replay(grid, order, policy) for grid, order in cases]
        columns = []
        for index in range(len(BUDGETS)):
            found = [answers[index] for answers, _ in runs]
            regrets, kept = [one.regret_sds for one in found], [one.kept for one in found]
            below, all_kept = fmean(one < 1.0 for one in regrets), fmean(one == 1.0 for one in kept)
            columns.append(
                f"{_quantile(regrets, 0.95):5.2f} {below:4.0%}; {fmean(kept):4.0%} {all_kept:4.0%}".rjust(24)
            )
        print(f"{name:24} {median(compute for _, compute in runs):8.0%}  " + "  ".join(columns), flush=True)


if __name__ == "__main__":
    main()
