"""Pruning by rank while a sweep runs: who waits at a rung, who is stopped, who may start. ``scaling.halving`` decides.

A trial whose rung is not decided yet is paused: it checkpoints and gives its gang to another one. All that counts is in
the store: a decision and the marks of its audit before anything is stopped for it, so that a new controller carries
out what the last one decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.controller.known_trials import Place
from orchestrator.controller.running import RunningAttempt
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import Wish
from orchestrator.gang import GangShape
from orchestrator.plan import LR
from orchestrator.scaling import RankedTrial, RankPolicy, RungPoint, loss_at, rung_point
from orchestrator.store import RankDecision, TrialRow
from orchestrator.sweep import Derived, seeds_of_looks


class RankPruning:
    """Does nothing in a sweep that declares none."""

    def __init__(self, run: SweepRun) -> None:
        self._run, sweep = run, run.sweep
        config = sweep.prune.rank
        self._policy = None if config is None else RankPolicy(config, sweep.seeds)
        looks = seeds_of_looks(sweep)
        fresh = (*sweep.confirm_seeds, *sweep.extra_baseline_seeds, *(() if looks is None else looks.baseline[-1]))
        self._confirming = set(fresh if sweep.confirm_seeds else ())
        self._hidden = {LR, *(name for name, axis in sweep.axes.items() if isinstance(axis, Derived))}
        self._decided: list[RankDecision] | None = None
        """Read under the lease: nobody else adds to them then."""
        self._points: dict[str, tuple[RungPoint, ...]] = {}
        self._losses: dict[str, tuple[float | None, ...]] = {}
        self._looked_at: dict[str, tuple[str, int]] = {}
        """The state and the attempt in which a trial's curve was last read, by fingerprint."""
        self._seen: list[tuple[str, str]] = []
        self._goals: dict[str, float | None] = {}

    def work(self) -> None:
        """Decide what can be decided; tell running trials, and end those that waited in vain."""
        if self._policy is None:
            return
        judged = [trial for trial in self._run.trials.rows if trial.seed not in self._confirming]
        is_news = self._read(judged, {attempt.trial.fingerprint: attempt.step for attempt in self._run.running})
        states = [(trial.fingerprint, trial.state) for trial in judged]
        if is_news or states != self._seen:
            self._seen = states
            self._decide(self._policy, judged)
        for attempt in self._run.running:
            self._heed(attempt)
        self._prune(judged)

    @property
    def is_declared(self) -> bool:
        return self._policy is not None

    def queues(self) -> dict[GangShape, list[Place]]:
        """Of the trials that wait, those that may train on, by shape; the ones that only audit come last."""
        queues: dict[GangShape, list[Place]] = {}
        place = 0
        for trial in self._launchable(self._run.trials.waiting()):
            place = max(place, trial.position)
            queues.setdefault(self._run.trials.shape(trial), []).append((place, trial.fingerprint))
        return queues

    def _launchable(self, waiting: Sequence[TrialRow]) -> list[TrialRow]:
        free = [trial for trial in waiting if self._may_train(trial.fingerprint)]
        dropped = [(one.arm, dict(one.axes), lr) for one in self._decided or () for lr in one.dropped]
        return sorted(free, key=lambda trial: (trial.arm, self._axes(trial), trial.config.train.lr) in dropped)

    def _may_train(self, fingerprint: str) -> bool:
        """What the policy does not know, as confirming trials, runs as ever."""
        goal = self._goals.get(fingerprint, 1.0)
        return goal is not None and goal > 0.0 and not self._is_there(fingerprint, goal)

    def _is_there(self, fingerprint: str, goal: float) -> bool:
        assert self._policy is not None
        if goal >= 1.0:
            return False
        return self._losses[fingerprint][self._policy.rungs.index(goal)] is not None

    def _read(self, trials: Sequence[TrialRow], steps: dict[str, int]) -> bool:
        """The losses at the rungs that trials have come to, out of their curves; whether any is new."""
        is_news = False
        for trial in trials:
            known = self._losses.setdefault(trial.fingerprint, (None,) * len(self._rung_points(trial)))
            points = self._rung_points(trial)
            if None not in known:
                continue
            step = steps.get(trial.fingerprint)
            if step is not None:
                is_due = step >= points[known.index(None)].step
            else:
                mark = (trial.state, trial.num_attempts)
                is_due = mark != ("WAITING", 0) and self._looked_at.get(trial.fingerprint) != mark
                self._looked_at[trial.fingerprint] = mark
            if is_due:
                curve = self._run.store.curve(trial.fingerprint)
                found = tuple(
                    loss if loss is not None else loss_at(point, curve)
                    for loss, point in zip(known, points, strict=True)
                )
                is_news = is_news or found != known
                self._losses[trial.fingerprint] = found
        return is_news

    def _rung_points(self, trial: TrialRow) -> tuple[RungPoint, ...]:
        assert self._policy is not None
        if trial.fingerprint not in self._points:
            self._points[trial.fingerprint] = tuple(rung_point(trial.config, one) for one in self._policy.rungs)
        return self._points[trial.fingerprint]

    def _decide(self, policy: RankPolicy, trials: Sequence[TrialRow]) -> None:
        if self._decided is None:
            self._decided = self._run.store.rank_decisions(self._run.sweep_id)
        ranked = [self._ranked(trial) for trial in trials]
        while decisions := policy.decide(ranked, self._decided):
            for decision in decisions:
                words = decision_in_words(decision)
                self._run.store.add_rank_decision(self._run.lease, decision, words)
                self._decided.append(decision)
                self._run.view.tell(f"ranked    {words}")
        self._goals = policy.goals(ranked, self._decided)

    def _ranked(self, trial: TrialRow) -> RankedTrial:
        return RankedTrial(
            fingerprint=trial.fingerprint,
            arm=trial.arm,
            axes=self._axes(trial),
            lr=trial.config.train.lr,
            seed=trial.seed,
            state=trial.state,
            losses_nats=self._losses[trial.fingerprint],
        )

    def _axes(self, trial: TrialRow) -> dict[str, object]:
        return {name: value for name, value in trial.axes.items() if name not in self._hidden}

    def _heed(self, attempt: RunningAttempt) -> None:
        goal = self._goals.get(attempt.trial.fingerprint, 1.0)
        if goal is None:
            attempt.ask_to_stop(Wish("rank", "rank", self._reason(attempt.trial), attempt.step))
        elif goal > 0.0 and self._is_there(attempt.trial.fingerprint, goal):
            waits = f"waits at {100 * goal:g} % of the schedule for the arm's other rates"
            attempt.ask_to_stop(Wish("rung", "rung", waits))

    def _prune(self, trials: Sequence[TrialRow]) -> None:
        lost = [one for one in trials if one.state == "WAITING" and self._goals.get(one.fingerprint, 1.0) is None]
        by_reason: dict[str, list[str]] = {}
        for trial in lost:
            by_reason.setdefault(self._reason(trial), []).append(trial.fingerprint)
        run = self._run
        done = {one for reason, of in by_reason.items() for one in run.store.prune(run.lease, of, reason)}
        for trial in lost:
            if trial.fingerprint in done:
                run.trials.note(trial, "PRUNED")
                run.search.tell(trial.fingerprint, "PRUNED", cause="rank", reason=self._reason(trial))
                run.mirror.nudge()

    def _reason(self, trial: TrialRow) -> str:
        lr, mine = trial.config.train.lr, (trial.arm, self._axes(trial))
        ours = [one for one in self._decided or () if (one.arm, dict(one.axes)) == mine and lr in one.dropped]
        return decision_in_words(ours[0]) if ours else "ranked too low"


def decision_in_words(decision: RankDecision) -> str:
    """``g1 at 25 % of the schedule, seed 1: learning rates 0.001, 0.002 go on; 0.008 is stopped; 0.004 is audited``."""
    axes = "".join(f" {name}={value}" for name, value in decision.axes.items())
    kept = [lr for lr in decision.losses_nats if lr not in decision.dropped]
    stopped = [lr for lr in decision.dropped if lr not in decision.audited]
    parts = [
        ("goes on", "go on", kept),
        ("is stopped", "are stopped", stopped),
        ("is audited", "are audited", decision.audited),
    ]
    said = [
        f"{', '.join(f'{lr:g}' for lr in rates)} {many if len(rates) > 1 else one}"
        for one, many, rates in parts
        if rates
    ]
    seeds = f"seed{'s' * (len(decision.seeds) > 1)} {', '.join(map(str, decision.seeds))}"
    place = f"{decision.arm}{axes} at {100 * decision.fraction:g} % of the schedule, {seeds}"
    return f"{place}: learning rate {'; '.join(said)}"
