"""Who holds a sweep's lease, by name; and whether that process still lives."""

from __future__ import annotations

import os
import socket


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
