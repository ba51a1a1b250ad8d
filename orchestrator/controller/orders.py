"""What users ask of a sweep while it runs, as events in the store: to cancel running trials, to change its caps, to add
to its budgets."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.store import BUDGET_EXTENDED, CANCEL_WANTED, CAP_SET, EventRow, Store
from orchestrator.sweep import ResourcesConfig


class Orders:
    """The caps in force, and what has been asked since the last look. Caps and extensions outlive the controller."""

    def __init__(self, store: Store, sweep_id: int, resources: ResourcesConfig, priority: int = 0) -> None:
        self._store, self._sweep_id = store, sweep_id
        self._caps: dict[str, float | None] = {"max_trials": resources.max_trials, "max_gpus": resources.max_gpus}
        self.priority = priority
        self.extensions: list[str] = []
        """What was added to budgets: ``gpu_hours=+10``."""
        self._after = 0
        self._take(self._new())

    def to_cancel(self) -> set[str]:
        """Fingerprints of the trials that were asked to be canceled since the last look; caps are taken over."""
        events = self._new()
        self._take(events)
        return {event.fingerprint for event in events if event.kind == CANCEL_WANTED and event.fingerprint}

    def left_to_cancel(self, fingerprints: Iterable[str]) -> list[str]:
        """Of trials whose controller went away: those that it was asked to cancel while their last attempt ran."""
        asked = {event.fingerprint: event.at for event in self._store.events(self._sweep_id) if _is_cancel(event)}
        return [one for one in fingerprints if one in asked and asked[one] >= self._store.attempts(one)[-1].started_at]

    def caps(self) -> tuple[float, float]:
        """Trials and GPUs that may be in use at once; inf: as many as the cluster holds."""
        trials, gpus = self._caps["max_trials"], self._caps["max_gpus"]
        return float("inf") if trials is None else trials, float("inf") if gpus is None else gpus

    def _new(self) -> list[EventRow]:
        events = self._store.events(self._sweep_id, self._after)
        self._after = max((event.id for event in events), default=self._after)
        return events

    def _take(self, events: Iterable[EventRow]) -> None:
        for event in events:
            if event.kind == CAP_SET:
                name, _, value = event.message.partition("=")
                if name == "priority":
                    self.priority = int(value)
                    continue
                self._caps[name] = None if value == "none" else float(value)
            elif event.kind == BUDGET_EXTENDED:
                self.extensions.append(event.message)


def _is_cancel(event: EventRow) -> bool:
    return event.kind == CANCEL_WANTED
