"""Verdicts look by look, where seeds go to the arms that are still undecided: a group-sequential design.

At each look the undecided arms are compared with the baseline by ``compare``, at the level that O'Brien and Fleming's
spending allows (``looks``). An arm whose interval decides is settled: it gets no more seeds, and keeps the interval of
its look. The others, and the baseline, go on to the next look, at most as many as were declared.

The intervals are *repeated* ones (Jennison and Turnbull, J. R. Stat. Soc. B 51, 1989, pp. 305-361; Group Sequential
Methods, 2000, ch. 9): all of them, of every arm and look, hold together at the declared rate. So they hold whatever
made an arm stop, and an arm may be settled as equivalent, too. What that does not mend is the estimate: an arm that
stopped early did so since its difference looked large, and on average it looks larger than it is.

Settled arms stay in the family at the size that they have, and in the pooled variance: no other arm's interval becomes
narrower because one is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.sweep import LookSeeds
from orchestrator.verdict.compare import compare
from orchestrator.verdict.looks import Looks
from orchestrator.verdict.samples import Comparison, Design, Method, Sample, Verdict

SEQUENCE_VERSION = "repeated-1"
"""Raised whenever a change alters when an arm is settled, or what it is then given."""

_OPEN = ("inconclusive", "no interval")


@dataclass(frozen=True)
class SeededLosses:
    """An arm's losses as far as they are there."""

    arm: str
    by_seed: Mapping[int, float]
    lost: Collection[int] = ()
    """Seeds whose loss will never be there: they diverged."""
    never: bool = False
    """It will have no losses at all, as no learning rate can be chosen."""
    problem: str = ""
    """Why some are not there."""


@dataclass(frozen=True)
class LookTaken:
    """One look, and what came of it for the arms that were undecided before."""

    number: int
    comparison: Comparison
    judged: tuple[Verdict, ...]
    settled: tuple[str, ...]

    @property
    def open(self) -> tuple[str, ...]:
        return tuple(one.arm for one in self.judged if one.arm not in self.settled)


@dataclass(frozen=True)
class LookSequence:
    comparison: Comparison
    """Every arm by the look that settled it, or by the last one."""
    taken: tuple[LookTaken, ...]
    look_of: Mapping[str, int]
    """Of every arm that a look has judged, the last one that did; of the baseline, the last of all."""
    next_look: int | None
    """The one whose seeds are to run, or run; None: there is nothing left to do."""
    open: tuple[str, ...]
    """Arms that it is for."""


def take_looks(
    arms: Sequence[SeededLosses],
    baseline: str,
    seeds: LookSeeds,
    margin_nats: float | None,
    alpha: float = 0.05,
    method: Method = "dunnett",
) -> LookSequence:
    """All looks that the losses allow, from the first: the same losses give the same answer, whenever it is asked.

    A look is taken when every arm that is undecided, and the baseline, has the seeds of it.
    """
    run = _Run(arms, baseline, seeds, lambda samples, looks: compare(
        samples, baseline, margin_nats, alpha, Design(method, looks=looks)
    ))  # fmt: skip
    while run.next_look is not None and run.is_there(run.next_look):
        run.take(run.next_look)
    return run.answer()


class _Run:
    def __init__(
        self,
        arms: Sequence[SeededLosses],
        baseline: str,
        seeds: LookSeeds,
        judge: Callable[[Sequence[Sample], Looks], Comparison],
    ) -> None:
        self.arms = {one.arm: one for one in arms}
        self.baseline, self.seeds, self.judge = baseline, seeds, judge
        self.open = [name for name in self.arms if name != baseline]
        self.held: dict[str, Sample] = {}
        """What an arm is compared by: of the last look that it was whole at."""
        self.verdicts: dict[str, Verdict] = {}
        self.look_of: dict[str, int] = {}
        self.looks, self.taken = Looks(seeds.number), list[LookTaken]()

    @property
    def next_look(self) -> int | None:
        number = len(self.taken) + 1
        return number if self.open and number <= self.seeds.number else None

    def is_there(self, look: int) -> bool:
        return all(
            self._is_lost(self.arms[name], look) or self._sample(self.arms[name], look) is not None
            for name in (self.baseline, *self.open)
        )

    def take(self, look: int) -> None:
        lost = [name for name in (self.baseline, *self.open) if self._is_lost(self.arms[name], look)]
        for name in (self.baseline, *self.open):
            sample = self._sample(self.arms[name], look)
            if name not in lost and sample is not None:
                self.held[name] = sample
        comparison = self.judge([self._compared(name) for name in self.arms], self.looks)
        by_arm = {one.arm: one for one in comparison.verdicts}
        judged, settled = [], []
        for name in self.open:
            # A sample that is held from before a seed diverged serves the others; its own arm has no mean.
            gone = name if name in lost else self.baseline if self.baseline in lost else None
            verdict = by_arm[name] if gone is None else _without(by_arm[name], self.arms[gone].problem, gone == name)
            judged.append(verdict)
            if gone is not None or verdict.decision not in _OPEN:
                settled.append(name)
            self.verdicts[name], self.look_of[name] = verdict, look
        self.verdicts[self.baseline], self.look_of[self.baseline] = by_arm[self.baseline], look
        self.open = [name for name in self.open if name not in settled]
        self.taken.append(LookTaken(look, comparison, tuple(judged), tuple(settled)))
        self.looks = self.looks.after(len(self.seeds.of(look, False)), len(self.seeds.of(look, True)))

    def answer(self) -> LookSequence:
        if self.taken:
            last = self.taken[-1].comparison
            comparison = replace(last, verdicts=tuple(self.verdicts[name] for name in self.arms))
        else:  # what there is before the first look, as of a sweep that is still running
            comparison = self.judge([self._compared(name) for name in self.arms], self.looks)
        return LookSequence(comparison, tuple(self.taken), self.look_of, self.next_look, tuple(self.open))

    def _compared(self, name: str) -> Sample:
        arm = self.arms[name]
        found = self.held.get(name) or (None if self.taken else self._sample(arm, 1))
        return found or Sample(name, (), arm.problem)

    def _sample(self, arm: SeededLosses, look: int) -> Sample | None:
        wanted = self.seeds.of(look, arm.arm == self.baseline)
        if not all(seed in arm.by_seed for seed in wanted):
            return None
        return Sample(arm.arm, tuple(arm.by_seed[seed] for seed in wanted), seeds=wanted)

    def _is_lost(self, arm: SeededLosses, look: int) -> bool:
        return arm.never or any(seed in arm.lost for seed in self.seeds.of(look, arm.arm == self.baseline))


def _without(verdict: Verdict, problem: str, own: bool) -> Verdict:
    """No result any more, since a seed diverged."""
    words = f"no result: {problem}" if own else f"no result: the baseline has none ({problem})"
    nothing = {"delta_nats": None, "low_nats": None, "high_nats": None, "delta_sds": None, "more_seeds": None}
    of_mean = {"num_seeds": 0, "mean_nats": None, "sd_nats": None} if own else {}
    return replace(verdict, decision="no result", words=words, **nothing, **of_mean)  # type: ignore[arg-type]
