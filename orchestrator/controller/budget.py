"""What a sweep uses up while it runs, against what it may: a notice at 80 %, and the reason to stop at 100 %."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.controller.orders import Orders
from orchestrator.controller.running import RunningAttempt
from orchestrator.store import BUDGET, Store
from orchestrator.sweep import BUDGETS, BudgetConfig, limits

NOTICE_AT = 0.8


class BudgetWatch:
    """Counts by the controller's clock from what the store knew at the start: asking it again costs a pass over all
    attempts. ``now``: the clock's seconds at the start."""

    def __init__(self, store: Store, sweep_id: int, declared: BudgetConfig, orders: Orders, now: float) -> None:
        self._declared, self._orders = declared.model_dump(), orders
        self._spent = {name: getattr(store.spent(sweep_id), name) for name in BUDGETS}
        self._counted_until = now
        self._told = {event.message for event in store.events(sweep_id, kind=BUDGET)}

    def count(self, running: Iterable[RunningAttempt], now: float) -> None:
        """What the attempts that ran since the last call have held."""
        hours = (now - self._counted_until) / 3600
        self._counted_until = now
        held = [attempt.row for attempt in running]
        self._spent["gpu_hours"] += hours * sum(row.gpus or 0.0 for row in held)
        self._spent["cpu_hours"] += hours * sum(row.cpus or 0.0 for row in held)
        self._spent["wall_hours"] += hours

    def used_up(self, announce: Callable[[str, dict[str, Any]], None]) -> str | None:
        """Why nothing may run any more, or None. ``announce`` gets each piece of news once in the sweep's life: its
        words and its facts."""
        reason = None
        for name, limit in limits(self._declared, self._orders.extensions).items():
            if self._spent[name] >= limit:
                said = reason = f"budget.{name} {limit:g} is used up"
            elif self._spent[name] >= NOTICE_AT * limit:
                said = f"{NOTICE_AT:.0%} of budget.{name} {limit:g} is used"
            else:
                continue
            if said not in self._told:
                self._told.add(said)
                spent = round(self._spent[name], 6)
                announce(said, {"budget": name, "limit_hours": limit, "spent_hours": spent})
        return reason
