"""From a file and overrides to a Sweep: every key known, every value of the right kind, every mistake with its place.

Whole configs are not made here: a mistake that only a combination shows (a headwise gate at a place without heads) is
found by ``plan.expand``, which reports it in the same form.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.sweep.budget import BudgetConfig
from orchestrator.sweep.document import DocumentPath, Places, Problems, UserError, read_document
from orchestrator.sweep.fields import check_section, check_value, config_section, known_field, section_of, unknown_key
from orchestrator.sweep.grammar import read_axes, read_exclude, read_rows, read_where, read_zip, refuse_double_settings
from orchestrator.sweep.override import apply_override
from orchestrator.sweep.pruning import PruneConfig
from orchestrator.sweep.rates import ExtendedRates, SearchedRates
from orchestrator.sweep.resources import ResourcesConfig
from orchestrator.sweep.settings import ArmName, MatchConfig, Seed, Settings, Sweep, VerdictConfig
from orchestrator.sweep.wording import describe, nearest

REQUIRED = ("name", "question", "base", "baseline", "arms", "seeds")
_CELL_KEYS = ("base", "baseline", "arms", "axes", "zip", "rows", "exclude", "seeds")
_KEYS = tuple(dict.fromkeys((*REQUIRED, *_CELL_KEYS, *Settings.model_fields)))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file. ``overrides`` are ``train.tokens=1e6``; UserError for whatever is wrong with either."""
    path = Path(path)
    try:
        if path.is_dir():
            inside = sorted(found.name for found in path.glob("*.y*ml"))
            names = f" ({', '.join(inside)})" if inside else ""
            raise UserError(f"{path}: got a folder; allowed: a sweep file{names}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_nearest_file(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse(text, path, overrides)


def parse(text: str, path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """A sweep from the text of a file that need not be there any more (the store keeps it).

    ``path`` names the file in messages; relative paths in the sweep start at its folder.
    """
    tree, places = read_document(text, str(path))
    _write_out_match(tree, places)
    for override in overrides:
        apply_override(tree, override, places)
        _write_out_match(tree, places)
    problems = Problems(places)
    values = _settings(tree, problems)
    values |= _cells(tree, problems)
    problems.raise_if_any()
    values["sized_controls"] = _sized_controls(values, problems)
    values["arms"] = _with_controls(values)
    values["resources"] = _with_rules_checked(values, problems)
    values["extra_baseline_seeds"] = _extra_baseline_seeds(values, problems)
    _refuse_ranks_in_vain(values, problems)
    _refuse_beside_growing_rates(values, problems)
    _refuse_allocation_in_vain(values, problems)
    _refuse_gates_in_vain(values, problems)
    problems.raise_if_any()
    sweep = Sweep(**values, text=text, overrides=tuple(overrides), path=os.path.abspath(path))
    sweep._places = places
    return sweep


def _write_out_match(tree: dict[str, Any], places: Places) -> None:
    """The short form, ``match: parameters``, as the mapping that an override of match.ffn_multiple finds."""
    if isinstance(tree.get("match"), str):
        tree["match"] = {"by": tree["match"]}
        if ("match",) in places.overrides:
            places.overrides[("match", "by")] = places.overrides[("match",)]
        else:
            places.values[("match", "by")] = places.values[("match",)]


def _settings(tree: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """The keys of ``Settings``, as models; also the unknown and the missing keys."""
    for key in tree:
        if key not in _KEYS:
            problems.add((key,), unknown_key(key, _KEYS), on_key=True)
    for key in REQUIRED:
        if key not in tree:
            problems.add((), f"the sweep has no key {key}; a sweep needs {', '.join(REQUIRED)}")
    section = section_of(Settings)
    present = {key: value for key, value in tree.items() if key in section.fields}
    checked = check_section(section, present, (), problems)
    for name, info in Settings.model_fields.items():
        if name in checked and isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            try:
                checked[name] = info.annotation.model_validate(checked[name])
            except ValidationError as error:
                problems.add((name,), str(error.errors()[0]["msg"]).removeprefix("Value error, "))
    _refuse_hours_of_no_gpu(checked, problems)
    return checked


def _refuse_hours_of_no_gpu(checked: dict[str, Any], problems: Problems) -> None:
    """A budget that nothing could ever use up."""
    resources, budget = checked.get("resources", ResourcesConfig()), checked.get("budget", BudgetConfig())
    if (
        isinstance(resources, ResourcesConfig)
        and isinstance(budget, BudgetConfig)
        and budget.gpu_hours is not None
        and not any((resources.gpus, *(rule.gpus for rule in resources.by)))
    ):
        said = f"got {budget.gpu_hours:g}, and resources.gpus is 0; allowed on CPUs: cpu_hours, wall_hours"
        problems.add(("budget", "gpu_hours"), said)


def _cells(tree: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """What makes the cells: base, arms, axes, zip, rows, exclude, seeds."""
    base = check_section(config_section(), tree.get("base", {}), ("base",), problems, derived=True)
    arms = _arms(tree.get("arms", {}), problems)
    axes = read_axes(tree.get("axes", {}), problems)
    zipped = read_zip(tree.get("zip", []), problems)
    rows = read_rows(tree.get("rows", []), problems)
    refuse_double_settings(arms, axes, zipped, rows, problems)
    varied = [*axes, *(name for group in zipped for name in group), *(name for row in rows for name in row)]
    exclude = read_exclude(tree.get("exclude", []), list(arms), varied, problems)
    baseline = tree.get("baseline")
    known = list(arms)
    if "baseline" in tree and known and baseline not in known:
        problems.add(("baseline",), f"got {describe(baseline)}; allowed: {', '.join(known)}{nearest(baseline, known)}")
    return {
        "base": base,
        "baseline": baseline,
        "arms": arms,
        "axes": axes,
        "zip": zipped,
        "rows": rows,
        "exclude": exclude,
        **_all_seeds(tree.get("seeds", [1]), problems, "train.lr" in varied),
    }


def _arms(node: object, problems: Problems) -> dict[str, dict[str, Any]]:
    if not isinstance(node, dict):
        problems.add(("arms",), f"got {describe(node)}; allowed: a mapping of arms, such as baseline: {{}}")
        return {}
    name_field = known_field(ArmName)
    arms: dict[str, dict[str, Any]] = {}
    for name, content in node.items():
        path: DocumentPath = ("arms", name)
        try:
            check_value(name_field, name)
        except ValueError as error:
            problems.add(path, f"the arm's name: {error}", on_key=True)
        arms[name] = check_section(config_section(), {} if content is None else content, path, problems, derived=True)
    return arms


HALF_SCALE = {"gate": {"position": "sdpa", "input": "constant", "scale": 0.5}}


def _with_controls(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms, and the half-scale control behind them in a gate sweep: one with gated arms and an ungated baseline.

    Where ``base``, the baseline or an axis has gates there is no ungated twin to halve; and a sweep that has the
    control itself, by name or by what it sets, keeps its own. Sized controls come last, still as the baseline is.
    """
    arms: dict[str, dict[str, Any]] = values["arms"]
    sized = dict.fromkeys(values["sized_controls"], arms[values["baseline"]])
    its_own = "half-scale" in arms or HALF_SCALE in arms.values()
    if "half-scale" not in values.get("controls", ("half-scale",)) or not _is_gate_sweep(values) or its_own:
        return {**arms, **sized}
    return {**arms, "half-scale": {**arms[values["baseline"]], **HALF_SCALE}, **sized}


def _is_gate_sweep(values: dict[str, Any]) -> bool:
    """Whether some arms have gates and their baseline has none."""
    gated = [name for name, content in values["arms"].items() if content.get("gate") or content.get("more_gates")]
    varied = [*values["axes"], *(name for part in (*values["zip"], *values["rows"]) for name in part)]
    has_gates = values["base"].get("gate") or values["base"].get("more_gates") or values["baseline"] in gated
    has_gates = has_gates or any(name.startswith("gate.") or name == "more_gates" for name in varied)
    return bool(gated) and not has_gates


def _sized_controls(values: dict[str, Any], problems: Problems) -> tuple[str, ...]:
    """Those that are asked for and that the sweep has not written itself; their size is a matter of the cell."""
    arms: dict[str, dict[str, Any]] = values["arms"]
    wanted = dict.fromkeys(values.get("controls", ()))
    sized = tuple(name for name in wanted if name != "half-scale" and name not in arms)
    if not sized:
        return ()
    said = f"{', '.join(sized)}: sized by what gates add to the baseline, and "
    if not _is_gate_sweep(values):
        problems.add(
            ("controls",), f"{said}this is no sweep of gated arms and an ungated baseline; allowed: [half-scale] or []"
        )
    elif (match := values.get("match", MatchConfig())).by != "none":
        problems.add(("controls",), f"{said}match: {match.by} takes that off again; allowed: with match: none")
    return sized


def _with_rules_checked(values: dict[str, Any], problems: Problems) -> ResourcesConfig:
    """The resources; what their rules compare with is in the type of the axis (``1e6`` as 1000000)."""
    resources: ResourcesConfig = values.get("resources", ResourcesConfig())
    varied = [*values["axes"], *(name for part in (*values["zip"], *values["rows"]) for name in part)]
    rules = []
    for index, rule in enumerate(resources.by):
        place = ("resources", "by", index, "where")
        where = read_where(dict(rule.where), place, list(values["arms"]), varied, problems)
        rules.append(rule.model_copy(update={"where": where}))
    return resources.model_copy(update={"by": tuple(rules)})


def _all_seeds(node: object, problems: Problems, rates_vary: bool) -> dict[str, tuple[int, ...]]:
    """``[1, 2]``, or ``{select: [1, 2], confirm: [3, 4, 5]}``."""
    if not isinstance(node, dict):
        return {"seeds": _seeds(node, ("seeds",), problems)}
    if set(node) != {"select", "confirm"}:
        problems.add(("seeds",), f"got the keys {', '.join(node) or '(none)'}; allowed: select and confirm, or a list")
        return {"seeds": ()}
    select, confirm = (_seeds(node[key], ("seeds", key), problems) for key in ("select", "confirm"))
    if both := sorted({*select} & {*confirm}):
        said = f"got {', '.join(map(str, both))} also in select; allowed: fresh seeds, that chose no learning rate"
        problems.add(("seeds", "confirm"), said)
    if not rates_vary:
        problems.add(("seeds",), "select and confirm choose a learning rate, and train.lr is on no axis; give a list")
    return {"seeds": select, "confirm_seeds": confirm}


def _seeds(node: object, path: DocumentPath, problems: Problems) -> tuple[int, ...]:
    if not isinstance(node, list) or not node:
        problems.add(path, f"got {describe(node)}; allowed: a list of whole numbers, such as [1, 2]")
        return ()
    seed_field = known_field(Seed)
    seeds: list[int] = []
    for index, value in enumerate(node):
        try:
            seed = check_value(seed_field, value)
        except ValueError as error:
            problems.add((*path, index), str(error))
            continue
        assert isinstance(seed, int)
        if seed in seeds:
            problems.add((*path, index), f"got {seed} twice; allowed: every seed once")
        seeds.append(seed)
    return tuple(seeds)


def _extra_baseline_seeds(values: dict[str, Any], problems: Problems) -> tuple[int, ...]:
    """The smallest whole numbers that are no seed yet: with more seeds the baseline's only ever grow. Confirming ones
    count from the first of ``confirm``: who names later ones, as the earlier are used up, gets later ones here, too."""
    confirming: tuple[int, ...] = values.get("confirm_seeds", ())
    seeds, declared = confirming or values["seeds"], values.get("baseline_seeds")
    paired = values.get("verdict", VerdictConfig()).paired
    others = len(values["arms"]) - 1
    # A single seed makes no verdict, and two for the baseline would not change that.
    by_rule = len(seeds) if paired or len(seeds) == 1 else max(len(seeds), round(math.sqrt(others) * len(seeds)))
    wanted = declared or by_rule
    if wanted < len(seeds):
        problems.add(("baseline_seeds",), f"got {wanted}; allowed: at least the {len(seeds)} of every arm")
    if paired and wanted > len(seeds):
        problems.add(("baseline_seeds",), f"got {wanted}; allowed with verdict.paired: {len(seeds)}, as a pair has two")
    first = min(confirming, default=1)
    unused = (seed for seed in itertools.count(first) if seed not in seeds and seed not in values["seeds"])
    return tuple(itertools.islice(unused, max(0, wanted - len(seeds))))


def _refuse_allocation_in_vain(values: dict[str, Any], problems: Problems) -> None:
    if values.get("verdict", VerdictConfig()).allocate is None:
        return
    confirming = values.get("confirm_seeds", ())
    if len(confirming) < 2:
        got = "no seeds.confirm" if not confirming else f"{len(confirming)} in seeds.confirm"
        said = f"it adds confirming seeds to those of the first look; got {got}; allowed: 2 or more"
        problems.add(("verdict", "allocate"), said, on_key=True)


def _refuse_gates_in_vain(values: dict[str, Any], problems: Problems) -> None:
    if values.get("verdict", VerdictConfig()).promote is None:
        return
    place = ("verdict", "promote")
    if len(values.get("confirm_seeds", ()) or values["seeds"]) < 2:
        problems.add(place, "a gate reads an interval, and there is none on 1 seed; allowed: 2 or more", on_key=True)
    if isinstance(values["axes"].get("train.lr"), ExtendedRates):
        said = "an extended grid is one for all arms of a rung, and some may come late; allowed: a list, or a search"
        problems.add(("axes", "train.lr"), f"with verdict.promote {said}")


def _refuse_ranks_in_vain(values: dict[str, Any], problems: Problems) -> None:
    rank = values.get("prune", PruneConfig()).rank
    if rank is None:
        return
    varied = [*values["axes"], *(name for part in (*values["zip"], *values["rows"]) for name in part)]
    if "train.lr" not in varied:
        problems.add(
            ("prune", "rank"), "it stops learning rates, and train.lr is on no axis; allowed: null", on_key=True
        )
    if rank.seeds[-1] > len(values["seeds"]):
        said = f"got {rank.seeds[-1]}; allowed: at most the {len(values['seeds'])} that a cell has"
        problems.add(("prune", "rank", "seeds"), said)


def _refuse_beside_growing_rates(values: dict[str, Any], problems: Problems) -> None:
    """Rates that are not known yet can't be excluded, ranked at one place, or be the source of another value."""
    if not isinstance(values["axes"].get("train.lr"), SearchedRates | ExtendedRates):
        return
    grows = "learning rates are searched or extended"
    if values.get("prune", PruneConfig()).rank is not None:
        said = f"{grows} one after the other, and ranks need them side by side; allowed: null"
        problems.add(("prune", "rank"), said, on_key=True)
    for index, row in enumerate(values["rows"]):
        if "train.lr" in row:
            problems.add(("rows", index, "train.lr"), f"{grows}; allowed: rows without them", on_key=True)
    for index, entry in enumerate(values["exclude"]):
        if "train.lr" in entry:
            problems.add(("exclude", index, "train.lr"), f"{grows}; allowed: the other axes", on_key=True)
    sources = [values["base"], *values["arms"].values(), values["axes"]]
    if any("of='train.lr'" in repr(source) for source in sources):
        problems.add(("axes", "train.lr"), "another value is a multiple of it; allowed then: a list of rates")


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [found.name for found in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f" (did you mean {folder / close[0]}?)" if close else ""
