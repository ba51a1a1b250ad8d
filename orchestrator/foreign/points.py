"""What the readers of all formats share: numbers with their place in the file, and points that become curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.store import ImportedCurve, ImportedPoint
from orchestrator.sweep import UserError

TRAINING_NAMES = ("training_loss_nats", "loss", "train/loss", "train_loss", "training_loss", "training loss", "lm loss",
                  "lm-loss-training/lm loss")  # fmt: skip
VALIDATION_NAMES = ("validation_loss_nats", "validation_loss", "val/loss", "val_loss", "valid/loss", "valid_loss",
                    "validation/loss", "eval/loss", "eval_loss", "validation loss", "lm loss validation",
                    "lm-loss-validation/lm loss validation")  # fmt: skip
"""What such columns and metrics tend to be called, the surest first; compared without case."""


@dataclass(frozen=True)
class ForeignText:
    """A file as it was read, and which names in it the user calls losses."""

    path: Path
    text: str
    training: str | None = None
    validation: str | None = None

    def splits(self, names: Iterable[str]) -> dict[str, str]:
        """Of the names in the file, those of losses: by name ``training`` or ``validation``. UserError without any."""
        known = list(dict.fromkeys(names))
        found = {}
        for split, asked, usual in (
            ("training", self.training, TRAINING_NAMES),
            ("validation", self.validation, VALIDATION_NAMES),
        ):
            if asked is not None and asked not in known:
                raise UserError(f"{self.path}: --{split}-loss {asked}: not there; allowed: {self._listed(known)}")
            by_fold = {name.casefold(): name for name in reversed(known)}
            name = asked or next((by_fold[one] for one in usual if one in by_fold), None)
            if name is not None:
                found[name] = split
        if not found:
            raise UserError(
                f"{self.path}: no loss among {self._listed(known)}; allowed: name one with --validation-loss or "
                "--training-loss"
            )
        return found

    @staticmethod
    def _listed(names: Sequence[str]) -> str:
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "(nothing)"

    def number(self, line: int, name: str, got: object) -> float:
        """UserError for what is none; NaN and infinities are numbers here."""
        try:
            if isinstance(got, bool):
                raise ValueError
            return float(str(got))
        except ValueError:
            raise UserError(f"{self.path}:{line}: {name}: got {str(got)[:60]!r}; allowed: a number") from None

    def whole(self, line: int, name: str, got: object) -> int:
        value = self.number(line, name, got)
        if not 0 <= value < 2**63 or value != int(value):
            raise UserError(f"{self.path}:{line}: {name}: got {str(got)[:60]!r}; allowed: a whole number from 0")
        return int(value)


@dataclass
class CurveMaker:
    """Gathers points by curve. ``repeats``: a step may come again, as after a resumption; then the later one holds."""

    given: ForeignText
    repeats: bool
    curves: dict[tuple[str, int | None], dict[tuple[str, int], ImportedPoint]] = field(default_factory=dict)

    def add(
        self, line: int, split: str, step: int, loss: float, run: str = "", seed: int | None = None,
        tokens: int | None = None,
    ) -> None:  # fmt: skip
        points = self.curves.setdefault((run, seed), {})
        if (split, step) in points and not self.repeats:
            of = f" of seed {seed}" if seed is not None else ""
            raise UserError(f"{self.given.path}:{line}: step {step}{of} comes twice; allowed: once, or a column seed")
        points[split, step] = ImportedPoint(split, step, loss if math.isfinite(loss) else None, tokens)

    def made(self) -> list[ImportedCurve]:
        """In the order in which they came; their points by split and step."""
        seeds = [seed for _, seed in self.curves if seed is not None]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise UserError(f"{self.given.path}: seed {twice[0]} is of several runs; allowed: a curve a seed")
        return [
            ImportedCurve(seed, tuple(sorted(points.values(), key=lambda one: (one.split, one.step))))
            for (_, seed), points in self.curves.items()
        ]
