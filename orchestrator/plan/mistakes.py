"""What only whole cells show to be a mistake of the file: UserErrors with their place in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from models.config import DataConfig, ValidationConfig
from orchestrator.plan.ordering import Cell
from orchestrator.sweep import Problems, Sweep, UserError


def refuse_empty(sweep: Sweep, cells: list[Cell]) -> None:
    problems = Problems(sweep.places)
    for arm in sweep.arms:
        if all(cell.arm != arm for cell in cells):
            problems.add(("arms", arm), "exclude drops every cell of this arm; allowed: at least one", on_key=True)
    problems.raise_if_any()


def refuse_overrides_in_vain(sweep: Sweep, cells: Iterable[Cell]) -> None:
    """An override of a config value that no cell takes, since an arm or an axis sets it again."""
    sources = {leaf.source for cell in cells for leaf in cell.leaves.values()}
    for path, override in sweep.places.overrides.items():
        if path[0] != "base" or any(source[: len(path)] == path for source in sources):
            continue
        name = ".".join(str(part) for part in path[1:])
        if name in sweep.axis_names:
            mend = f"it is an axis here; override axes.{name}=[...] instead"
            mend = mend if name in sweep.axes else "zip or rows set it; override those as a whole"
        else:
            mend = f"every arm sets it; override arms.NAME.{name} instead"
        raise UserError(f"override {override}: no cell takes this value: {mend}")


def refuse_identical(sweep: Sweep, cells: list[Cell]) -> None:
    """Two cells with one fingerprint would be one trial under two names."""
    problems = Problems(sweep.places)
    first_with: dict[str, Cell] = {}
    for cell in cells:
        twin = first_with.setdefault(cell.fingerprint(sweep.seeds[0]), cell)
        if twin is cell:
            continue
        row = next((leaf.source[:2] for leaf in cell.leaves.values() if leaf.source[0] == "rows"), None)
        place = row if row is not None and twin.arm == cell.arm else ("arms", cell.arm)
        problems.add(place, f"{cell.name} is the same trial as {twin.name}; allowed: cells that differ", on_key=True)
    problems.raise_if_any()


def refuse_other_measures(sweep: Sweep, cells: list[Cell]) -> None:
    """An arm measured on other text, or in other tokens, than the baseline can't be compared with it."""
    problems = Problems(sweep.places)
    baselines = {cell_key(cell.axes): cell for cell in cells if cell.arm == sweep.baseline}
    for cell in cells:
        baseline = baselines.get(cell_key(cell.axes))
        if baseline is None:
            continue
        differing = _otherwise_measured(cell.config.data, baseline.config.data)
        if _tail_points(sweep, cell) != _tail_points(sweep, baseline):
            differing.append(f"validations in the last {sweep.verdict.tail:g} of the schedule")
        if differing:
            said = f"{cell.name} is measured otherwise than {baseline.name} ({', '.join(differing)}), so their losses"
            problems.add(("arms", cell.arm), f"{said} can't be compared; make it an axis: a table a value", on_key=True)
    problems.raise_if_any()


def _otherwise_measured(data: DataConfig, baseline: DataConfig) -> list[str]:
    """Settings of what is measured that differ; how often is not among them."""
    if data is baseline:
        return []
    pairs: list[tuple[str, object, object]] = [
        (name, data, baseline) for name in ("corpus_sha256", "tokenizer_sha256", "validation_every")
    ]
    pairs += [(name, data.validation, baseline.validation) for name in ValidationConfig.model_fields]
    return [name for name, ours, theirs in pairs if name != "points" and getattr(ours, name) != getattr(theirs, name)]


def _tail_points(sweep: Sweep, cell: Cell) -> int:
    """Validations whose mean is the trial's loss."""
    config = cell.config
    return sum(step / config.train.num_steps > 1.0 - sweep.verdict.tail for step in config.validation_steps())


def cell_key(axes: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(axes.items())
