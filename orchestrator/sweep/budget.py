"""What a sweep may use up over all its runs, and how a user adds to it: ``gpu_hours=+10``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from models.config import Frozen, Positive
from orchestrator.sweep.document import UserError
from orchestrator.sweep.wording import nearest


class BudgetConfig(Frozen):
    """Hours, over all runs of the sweep. At the first one that is used up nothing starts any more."""

    gpu_hours: Positive | None = None
    """GPUs of a gang times the hours that its attempts held them."""
    cpu_hours: Positive | None = None
    """The same of CPUs."""
    wall_hours: Positive | None = None
    """Hours in which a controller ran the sweep."""


BUDGETS = tuple(BudgetConfig.model_fields)


def check_extension(text: str) -> str:
    """The extension in one form, ``gpu_hours=+10``; UserError for what is none."""
    name, equals, value = text.partition("=")
    allowed = f"allowed: {', '.join(f'{budget}=+HOURS' for budget in BUDGETS)}"
    if not equals or name not in BUDGETS:
        raise UserError(f"extend {text}: {allowed}{nearest(name, BUDGETS)}")
    try:
        hours = float(value)
    except ValueError:
        hours = math.nan
    if not value.startswith("+") or not 0 < hours < math.inf:
        raise UserError(f"extend {text}: got {value!r}; allowed: what is added, such as {name}=+10")
    return f"{name}=+{hours:g}"


def limits(declared: Mapping[str, float | None], extensions: Iterable[str]) -> dict[str, float]:
    """Hours by budget: what the file declares and what was added since. A budget that is not declared has no limit."""
    allowed = {name: hours for name in BUDGETS if (hours := declared.get(name)) is not None}
    for extension in extensions:
        name, _, added = extension.partition("=")
        if name in allowed:
            allowed[name] += float(added)
    return allowed


def refuse_extensions(name: str, declared: Mapping[str, float | None], extensions: Sequence[str]) -> None:
    """UserError for one of a budget that the sweep does not have: it would change nothing."""
    for extension in extensions:
        budget = extension.partition("=")[0]
        if declared.get(budget) is None:
            has = ", ".join(one for one, hours in declared.items() if hours is not None)
            raise UserError(f"extend {extension}: sweep {name} has no budget.{budget}; it has: {has or 'none'}")
