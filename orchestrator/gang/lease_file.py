"""What tells a gang that its controller still wants it, also where Ray no longer reaches: a file on the shared path.

A controller keeps one file for all of its gangs: a counter, and the gangs that it wants. A rank looks at it every few
seconds. The counter moved and the gang is named: good. It moved and the gang is named no more: it was given up, by a
controller that lost sight of it. It stands still for the grace time, by the rank's own monotonic clock: the controller
is dead. Clocks of two hosts are never compared, and a file that can't be read is no news, neither good nor bad.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.run_dir import write_json

RENEWALS_A_GRACE = 5
LONGEST_PERIOD_SECONDS = 10.0
FOLDER = "controllers"


@dataclass(frozen=True)
class GangLease:
    """What a gang is given: where to look, and how long it goes on without news."""

    path: str
    grace_seconds: float

    @property
    def period_seconds(self) -> float:
        """Between two renewals, and between two looks."""
        return min(LONGEST_PERIOD_SECONDS, self.grace_seconds / RENEWALS_A_GRACE)


class LeaseFile:
    """The controller's side: ``<home>/controllers/<sweep>-<lease token>-<random>.json``. A sweep is known by a hash of
    what tells it from all others, for several stores may share a home."""

    def __init__(
        self,
        home: Path,
        sweep: str,
        lease_token: int,
        grace_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._lease_token, self._now = home / FOLDER, lease_token, now
        self._sweep = hashlib.sha256(sweep.encode()).hexdigest()[:16]
        path = self._folder / f"{self._sweep}-{lease_token}-{secrets.token_hex(4)}.json"
        self.lease = GangLease(str(path), grace_seconds)
        self._beat = 0
        self._written: frozenset[str] = frozenset()
        self._written_at = -float("inf")

    def keep(self, gangs: Collection[str]) -> bool:
        """Name the gangs that are wanted; cheap to call often. False when it was due and could not be written."""
        wanted = frozenset(gangs)
        if wanted == self._written and self._now() - self._written_at < self.lease.period_seconds:
            return True
        self._beat += 1
        self._written, self._written_at = wanted, self._now()
        try:
            write_json(Path(self.lease.path), {"beat": self._beat, "gangs": sorted(wanted)})
        except OSError:
            return False
        return True

    def left_behind(self) -> list[str]:
        """The gangs that earlier controllers of this sweep named last."""
        return [gang for path in self._earlier() for gang in _read(path).get("gangs", [])]

    def remove_earlier(self) -> None:
        for path in self._earlier():
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """To be called once no gang looks at it any more."""
        Path(self.lease.path).unlink(missing_ok=True)

    def _earlier(self) -> list[Path]:
        found = []
        for path in sorted(self._folder.glob(f"{self._sweep}-*-*.json")):
            token = path.name.split("-")[1]
            if token.isdigit() and int(token) < self._lease_token:
                found.append(path)
        return found


def _read(path: Path) -> dict[str, Any]:
    """Its content; nothing when it is not there, not readable, or not ours."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class LeaseWatch:
    """A rank's side."""

    gang: str
    lease: GangLease
    now: Callable[[], float] = time.monotonic
    _beat: Any = None
    _named: bool = False
    _given_up: bool = False
    _renewed_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._renewed_at = self.now()

    def look(self) -> None:
        """Read the file: every ``lease.period_seconds``."""
        content = _read(Path(self.lease.path))
        beat = content.get("beat")
        if beat is None or beat == self._beat:
            return
        self._beat = beat
        if self.gang in content.get("gangs", []):
            self._named = True
            self.heard()
        elif self._named:
            self._given_up = True

    def heard(self) -> None:
        """The controller has called: as good as a renewal."""
        self._renewed_at = self.now()

    def move(self, lease: GangLease) -> None:
        """Another controller has adopted the gang."""
        self.lease, self._beat, self._named, self._given_up = lease, None, False, False
        self.heard()

    def silent_seconds(self) -> float:
        return self.now() - self._renewed_at

    @property
    def is_over(self) -> bool:
        return self._given_up or self.silent_seconds() > self.lease.grace_seconds

    def reason(self) -> str:
        if self._given_up:
            return "its controller has given this gang up"
        return f"no controller was heard of for {self.lease.grace_seconds:g} s"
