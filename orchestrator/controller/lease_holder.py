"""Who holds a sweep's lease, by name; whether that process still lives; and how to come by it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from orchestrator.store import Lease, LeaseHeld, Store
from orchestrator.sweep import UserError


def acquire_lease(store: Store, name: str, sweep_id: int, seconds: float, tell: Callable[[str], None]) -> Lease:
    """The sweep's lease. That of a dead process of this host is waited for; UserError while another one holds it."""
    told = False
    while True:
        try:
            return store.acquire_lease(sweep_id, own_name(), seconds)
        except LeaseHeld as held:
            if not is_dead(held.holder):
                raise UserError(f"sweep {name}: {held}") from held
            if not told:
                tell(f"the last controller ({held.holder}) is dead; waiting for its lease to run out")
            told = True
            time.sleep(min(1.0, held.seconds_left + 0.1))


def own_name() -> str:
    """``host:pid``, as the store keeps it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_dead(holder: str) -> bool:
    """Whether the holder of a lease was a controller of this host whose process is gone."""
    host, _, pid = holder.rpartition(":")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
