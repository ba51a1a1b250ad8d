"""The store is away: training goes on, and the controller waits.

Its buffer is the run dirs: ranks write there whatever happens, and the controller reads on from where it was. So every
call to the store is made again until it is done, nothing is started meanwhile, and what ended is told afterwards. Then
the lease is renewed with the same token, which holds unless somebody took it, and two events say what happened when.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from orchestrator.controller.clock import Clock
from orchestrator.controller.snapshot import View
from orchestrator.store import Store, StoreOutage

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0

STORE_DOWN, STORE_BACK = "store_down", "store_back"


class OutageWatch:
    """Waits for the store for a controller. ``store`` is the one to use, and never raises StoreOutage by itself.

    ``renew_lease`` is called when the store is back, ``meanwhile`` before every try, and ``is_hurried`` says that the
    user won't wait: then the outage is raised.
    """

    def __init__(self, store: Store, sweep_id: int, clock: Clock, view: View) -> None:
        self.store = store.patient(self)
        self._sweep_id, self._clock, self._view = sweep_id, clock, view
        self.renew_lease: Callable[[], None] = lambda: None
        self.meanwhile: Callable[[], None] = lambda: None
        self.is_hurried: Callable[[], bool] = lambda: False
        self._since: datetime | None = None
        self._began = 0.0
        self._pause = FIRST_PAUSE_SECONDS
        self._reason = ""
        self._is_telling = False

    def wait(self, outage: StoreOutage) -> None:
        if self._since is None:
            self._since, self._began, self._reason = datetime.now(UTC), self._clock.monotonic(), str(outage)
            self._view.tell(f"PAUSED    {outage}; training goes on, nothing is started until it is back")
        if self.is_hurried():
            raise outage
        self.meanwhile()
        self._clock.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

    def over(self) -> None:
        if self._since is None or self._is_telling:
            return
        self._is_telling = True
        try:
            self.renew_lease()
            seconds = self._clock.monotonic() - self._began
            self.store.add_event(self._sweep_id, STORE_DOWN, f"{self._reason}; training went on", at=self._since)
            said = f"the store is back after {seconds:.0f} s; nothing was lost"
            self.store.add_event(self._sweep_id, STORE_BACK, said)
        finally:
            self._is_telling = False
        self._since, self._pause = None, FIRST_PAUSE_SECONDS
        self._view.tell(f"goes on   {said}")
