"""What the controller shows while it runs: a snapshot a tick, and one line for what happens. No terminal here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Running:
    """A running trial, for one line of the live view."""

    name: str
    attempt: int
    step: int
    num_steps: int
    loss_nats: float | None
    tokens_per_second: float | None
    eta_seconds: float | None


@dataclass(frozen=True)
class Snapshot:
    sweep: str
    states: Mapping[str, int]
    """Number of trials by state, in the order of a trial's life."""
    running: tuple[Running, ...]
    gangs_starting: int
    seconds: float
    eta_seconds: float | None
    """Of the whole sweep, from the speed so far; None before anything is known."""
    stopping: str | None
    """Why the sweep is being stopped, if it is."""


_about: ContextVar[Mapping[str, str | int] | None] = ContextVar("about", default=None)


@contextmanager
def about(trial: str, attempt: int) -> Iterator[None]:
    """What is told within is about this attempt; views that write for machines say so."""
    token = _about.set({"trial": trial, "attempt": attempt})
    try:
        yield
    finally:
        _about.reset(token)


def told_about() -> Mapping[str, str | int]:
    """``trial`` and ``attempt``, or nothing, of what is being told now."""
    return _about.get() or {}


class View(Protocol):
    """Where a sweep is watched from."""

    def tick(self, snapshot: Snapshot) -> None:
        """Called several times a second."""

    def tell(self, line: str) -> None:
        """Something happened: a trial started or ended, a gang was lost."""
