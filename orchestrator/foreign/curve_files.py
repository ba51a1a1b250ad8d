"""A file of curves, whole or not at all: which format it is in, and its points.

Errors name the file with the line, what was got and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.foreign.column_files import read_csv, read_mlflow, read_wandb
from orchestrator.foreign.megatron_log import looks_like_megatron, read_megatron
from orchestrator.foreign.points import ForeignText
from orchestrator.store import ImportedCurve
from orchestrator.sweep import UserError

MAX_BYTES = 256 * 2**20

FORMATS: Mapping[str, Callable[[ForeignText], list[ImportedCurve]]] = {
    "megatron": read_megatron,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "csv": read_csv,
}


def read_curves(
    path: Path, format: str | None, seed: int | None, training: str | None = None, validation: str | None = None
) -> tuple[str, list[ImportedCurve]]:
    """The format and the curves of a file. ``format`` None: by what the file looks like. ``seed``: of a file that holds
    one curve and names none. ``training``, ``validation``: the columns or metrics with these losses."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: got {path.stat().st_size:,} bytes; allowed: at most {MAX_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    given = ForeignText(path, text, training, validation)
    found = format or _guessed(given)
    curves = FORMATS[found](given)
    if not curves:
        raise UserError(f"{path}: no losses found in it as {found}; allowed: {_wanted(found)}")
    if seed is not None:
        if len(curves) != 1 or curves[0].seed is not None:
            named = f"{len(curves)} curves" if len(curves) != 1 else f"a curve of seed {curves[0].seed}"
            raise UserError(f"--seed {seed}: {path} holds {named}; allowed: for one curve whose seed the file lacks")
        curves = [ImportedCurve(seed, curves[0].points)]
    return found, curves


def _guessed(given: ForeignText) -> str:
    head = given.text[:65536]
    first = head.lstrip()[:1]
    line = head.lstrip().partition("\n")[0]
    if looks_like_megatron(head):
        return "megatron"
    if first in ("[", "{"):
        return "mlflow" if '"key"' in head and '"value"' in head else "wandb"
    columns = {column.strip().strip('"').casefold() for column in line.split(",")}
    if {"key", "value", "step"} <= columns or {"metric", "value", "step"} <= columns:
        return "mlflow"
    if "_step" in columns or any(" - " in column for column in columns):
        return "wandb"
    if "step" in columns:
        return "csv"
    allowed = ", ".join(FORMATS)
    raise UserError(f"{given.path}:1: got {line[:80]!r}, which is none of {allowed}; allowed: --format names it")


def _wanted(format: str) -> str:
    return {
        "megatron": "lines such as ' iteration 100/ 500 | ... | lm loss: 2.9E+00 |' or ' validation loss at iteration "
        "100 | lm loss value: 2.9E+00 |'",
        "wandb": "an exported history with _step, or a chart's CSV with Step and RUN - METRIC",
        "mlflow": "an exported metric with key, value and step",
        "csv": "columns step and loss, or validation_loss; seed and tokens if known",
    }[format]
