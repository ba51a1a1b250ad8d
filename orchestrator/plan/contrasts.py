"""The single-variable proof: in what an arm differs from the baseline of the same cell, and why.

Configs are compared as they were resolved. What the arm or the baseline sets in the file is *declared*; what follows
from that (a matched width, a preset's fields, multiples, hashes of named files) is *implied*; parameters, FLOPs, memory
and micro-batch are those of the two trials. A difference that is neither would make a verdict about something that
nobody wrote down: no rule of the grammar makes one, and ``expand`` refuses a plan that has one all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.config import TrialConfig
from orchestrator.plan.cells import flat
from orchestrator.plan.controls import SIZED_KEYS
from orchestrator.sweep import Derived, Problems, Sweep

if TYPE_CHECKING:
    from orchestrator.plan import PlannedTrial

ABSENT = None
"""In place of a section that one of the two has not."""

_PRESET = "model.preset"
_FOLLOW = {
    "data.corpus": ("data.corpus_sha256",),
    "data.blend": ("data.blend",),
    "data.tokenizer": ("data.tokenizer_sha256", "data.vocab_size"),
    "data.padded_vocab_size": ("data.vocab_size",),
    "precision": ("fp8",),
}
"""Keys that the plan fills in from another."""


@dataclass(frozen=True)
class Change:
    """A config key, with its value in the baseline and in the arm; ``why`` tells what it follows from, if anything."""

    key: str
    baseline: Any
    arm: Any
    why: str = ""


@dataclass(frozen=True)
class Contrast:
    """One cell of an arm beside the baseline's at the same values of the axes."""

    trial: PlannedTrial
    baseline: PlannedTrial
    declared: tuple[Change, ...]
    """What was set on purpose. More than one: the arm's verdict is about all of them together."""
    implied: tuple[Change, ...]
    undeclared: tuple[Change, ...]

    @property
    def arm(self) -> str:
        return self.trial.arm


def contrasts(sweep: Sweep, trials: Iterable[PlannedTrial]) -> tuple[Contrast, ...]:
    """One for each arm but the baseline and each value of the axes, small models first; of several learning rates one.

    A cell whose baseline is excluded or refused has none.
    """
    derived = {name for name, axis in sweep.axes.items() if isinstance(axis, Derived)}
    cells: dict[tuple[str, str], PlannedTrial] = {}
    for trial in trials:
        cells.setdefault((trial.arm, _key(trial.axes, derived)), trial)
    found: dict[tuple[str, str], Contrast] = {}
    for (arm, key), trial in cells.items():
        baseline, group = cells.get((sweep.baseline, key)), (arm, _key(trial.axes, {*derived, "train.lr"}))
        if arm != sweep.baseline and baseline is not None and group not in found:
            found[group] = _contrast(sweep, trial, baseline)
    places = {arm: place for place, arm in enumerate(sweep.arms)}

    def order(one: Contrast) -> tuple[int, ...]:
        return places[one.arm], one.baseline.num_parameters, one.baseline.training_flops, one.baseline.position

    return tuple(sorted(found.values(), key=order))


def refuse_undeclared(sweep: Sweep, found: Iterable[Contrast]) -> None:
    """UserError for an arm that differs in what nobody set."""
    problems = Problems(sweep.places)
    told = {(one.arm, change.key): change for one in found for change in one.undeclared}
    for (arm, key), change in told.items():
        said = f"{arm} differs from {sweep.baseline} in {key} ({change.baseline} -> {change.arm}), which neither sets"
        problems.add(("arms", arm), f"{said}; allowed: differences that an arm declares", on_key=True)
    problems.raise_if_any()


def _key(axes: Mapping[str, Any], hidden: set[str]) -> str:
    return repr([(name, value) for name, value in axes.items() if name not in hidden])


def _contrast(sweep: Sweep, trial: PlannedTrial, baseline: PlannedTrial) -> Contrast:
    written = _written(sweep, trial.arm) | _written(sweep, sweep.baseline)
    declared: dict[str, Change] = {}
    implied, undeclared = [], []
    is_gated = bool(trial.config.gates or baseline.config.gates)
    for change in _changes(baseline.config, trial.config):
        if any(_is_about(path, change.key) for path in written):
            declared[change.key] = change
        elif why := _why(sweep, is_gated, change.key, written):
            implied.append(Change(change.key, change.baseline, change.arm, why))
        else:
            undeclared.append(change)
    if any(change.why == _PRESET for change in implied):
        names = (_preset(sweep, sweep.baseline), _preset(sweep, trial.arm))
        declared = {_PRESET: Change(_PRESET, *names), **declared}
    if trial.layout != baseline.layout:
        theirs, ours = (one.layout.model_dump(exclude_defaults=True) for one in (baseline, trial))
        implied.append(Change("resources.layout", theirs, ours, "resources.by"))
    return Contrast(trial, baseline, tuple(declared.values()), tuple(implied), tuple(undeclared))


def _written(sweep: Sweep, arm: str) -> set[str]:
    """The paths that an arm sets, by hand or as a control that was sized for its cell."""
    sized = {SIZED_KEYS[arm]} if arm in sweep.sized_controls else set()
    return sized | {path for path, _ in flat(sweep.arms[arm], "", ())}


def _preset(sweep: Sweep, arm: str) -> Any:
    return sweep.arms[arm].get("model", {}).get("preset", sweep.base.get("model", {}).get("preset"))


def _is_about(path: str, key: str) -> bool:
    return path == key or key.startswith(f"{path}.") or path.startswith(f"{key}.")


def _why(sweep: Sweep, is_gated: bool, key: str, written: set[str]) -> str:
    """What a key that nobody set follows from; nothing: it follows from nothing that is known."""
    if key == "model.ffn_size" and sweep.match.by != "none" and is_gated:
        return f"match: {sweep.match.by}"
    base = {path: leaf.value for path, leaf in flat(sweep.base, "", ())}
    source = sweep.axes.get(key, base.get(key))
    if isinstance(source, Derived):
        return str(source)
    for path in written:
        if key in _FOLLOW.get(path, ()):
            return path
    return _PRESET if key.startswith("model.") and _PRESET in written else ""


def _changes(baseline: TrialConfig, arm: TrialConfig) -> Iterator[Change]:
    """Leaves that differ; a section that one of the two has not (a gate, experts, a plug-in) is one change, and of it
    what is no default."""
    whole, sparse = (
        [one.model_dump(mode="json", exclude={"seed"}, exclude_defaults=short) for one in (baseline, arm)]
        for short in (False, True)
    )
    for key, values in _unequal(whole[0], whole[1], ()):
        shown = [
            _at(tree, key) if isinstance(value, dict) else value for tree, value in zip(sparse, values, strict=True)
        ]
        # A plug-in's options stand one level higher in a sweep.
        yield Change(".".join(key).replace(".options.", "."), *shown)


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[Any]:
    for name in dict.fromkeys([*first, *second]):
        ours, theirs = first.get(name, ABSENT), second.get(name, ABSENT)
        if ours == theirs:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _unequal(ours, theirs, (*above, name))
        else:
            yield (*above, name), (ours, theirs)


def _at(tree: Any, key: tuple[str, ...]) -> Any:
    for name in key:
        tree = tree[name]
    return tree
