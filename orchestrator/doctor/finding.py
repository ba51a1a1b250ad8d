"""What a check found: one line, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Also the exit code: a warning does not fail a script."""

    OK = 0
    WARNING = 1
    PROBLEM = 2


@dataclass(frozen=True)
class Finding:
    check: str
    level: Level
    said: str
    mend: str = ""
    host: str = ""
    """Empty: this one."""


def worst(findings: Iterable[Finding]) -> Level:
    return max((one.level for one in findings), default=Level.OK)
