"""What the parts of the controller share: a sweep that is being run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.controller.announcing import Announcer
from orchestrator.controller.clock import Clock
from orchestrator.controller.disk import DiskWatch
from orchestrator.controller.gang_pool import GangPool
from orchestrator.controller.known_trials import KnownTrials
from orchestrator.controller.pace import Pace
from orchestrator.controller.running import RunningAttempt
from orchestrator.controller.snapshot import View
from orchestrator.copies import Copier
from orchestrator.plan import PlannedTrial
from orchestrator.search import Search
from orchestrator.store import Lease, Store
from orchestrator.sweep import Sweep
from orchestrator.tracking import Mirror


@dataclass
class SweepRun:
    """One sweep in the hands of one controller."""

    sweep: Sweep
    sweep_id: int
    lease: Lease
    store: Store
    mirror: Mirror
    home: Path
    view: View
    clock: Clock
    pool: GangPool
    search: Search
    trials: KnownTrials
    disk: DiskWatch
    announcer: Announcer
    micro_batches: dict[str, int]
    """Sequences that a rank takes at once, by fingerprint."""
    pace: Pace
    running: list[RunningAttempt] = field(default_factory=list)
    copier: Copier | None = None
    """Where checkpoints are copied, when they are."""
    json_logs: bool = False
    """Ranks also write JSON lines."""

    def add(self, trials: Sequence[PlannedTrial]) -> None:
        """Trials that may join the sweep; those that are known stay as they are."""
        new = [trial for trial in trials if trial.fingerprint not in self.micro_batches]
        if new:
            self.micro_batches |= {trial.fingerprint: trial.micro_batch_sequences for trial in new}
            self.search.add(new)
