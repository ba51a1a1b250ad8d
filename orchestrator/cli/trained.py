"""The verbs on trained models: they find the trial; a process of its own that loads torch does the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import models
from orchestrator import report
from orchestrator.cli.copies import publish
from orchestrator.cli.home import Home
from orchestrator.copies import Place, is_url
from orchestrator.sweep import UserError

NAMED = 4
"""Trials that a message lists when a prefix fits several."""


class ExportFormat(StrEnum):
    """The forms of ``models.export``."""

    QWEN3_NEXT = "qwen3-next"
    RELEASED = "released"
    QWEN3 = "qwen3"


class MeasuredFormat(StrEnum):
    TABLE = "table"
    JSON = "json"


def register(app: typer.Typer, console: Console) -> None:
    """Add these verbs to ``app``; they print on ``console``."""

    @app.command()
    def export(
        trial: Annotated[str, typer.Argument(help="A fingerprint or its beginning.", show_default=False)],
        format: Annotated[
            ExportFormat,
            typer.Option("--format", help="qwen3-next: elementwise gate. released: the paper's layout. qwen3: no gate"),
        ],
        to: Annotated[str, typer.Option("--to", help="The folder to write, or s3://... by URL; not there, or empty.")],
    ) -> None:
        """Write a trial's newest checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer."""
        directory = find_trial(Home.of(), trial)
        given = ("export", str(directory), "--format", format.value, "--to")
        if is_url(to):
            _export_to_url(given, to, console)
        else:
            raise typer.Exit(_models_verb(*given, to))

    @app.command()
    def diagnose(
        target: Annotated[
            str, typer.Argument(help="A Hugging Face folder; or a fingerprint or its beginning.", show_default=False)
        ],
        corpus: Annotated[
            str | None, typer.Option(help="Default: the trial's own; for a folder the built-in one.")
        ] = None,
        tokenizer: Annotated[str | None, typer.Option(help="For a folder that has no tokenizer.json: a path.")] = None,
        sequence_length: Annotated[
            int | None, typer.Option(min=2, help="Tokens of context. Default: the model's; for a folder at most 2048.")
        ] = None,
        validation_every: Annotated[
            int | None, typer.Option(min=2, help="Every so many documents of the corpus are measured. For a folder 20.")
        ] = None,
        full: Annotated[bool, typer.Option("--full", help="The whole validation split, not its slice.")] = False,
        format: Annotated[MeasuredFormat, typer.Option("--format")] = MeasuredFormat.TABLE,
    ) -> None:
        """Measure a trained model: loss, bits per byte, attention and activations by layer. Runs no folder's code."""
        options = {
            "corpus": corpus,
            "tokenizer": tokenizer,
            "sequence-length": sequence_length,
            "validation-every": validation_every,
        }
        measured = _measured(Home.of(), target, options, full=full)
        if format is MeasuredFormat.JSON:
            sys.stdout.write(json.dumps(measured, indent=2) + "\n")
        else:
            console.print(report.measured_table(measured))


def _export_to_url(given: Sequence[str], url: str, console: Console) -> None:
    """Written here, then copied; config.json, which makes it a model, last. Exits when the child does."""
    if Place(url, "--to").open().names(""):
        raise UserError(f"--to {url}: something is there already; allowed: a place that is empty")

    def write(folder: Path) -> list[Path]:
        code = _models_verb(*given, str(folder))
        if code:
            raise typer.Exit(code)
        return sorted(path for path in folder.rglob("*") if path.is_file())

    names = publish(url, "--to", "config.json", write)
    console.print(f"{len(names)} files copied to {url}", soft_wrap=True, highlight=False, markup=False)


def find_trial(home: Home, name: str) -> Path:
    """The run dir of the one trial whose fingerprint begins with ``name``; UserError when it is none, or several."""
    folder = home.directory / "trials"
    found = sorted(path for path in folder.glob("*") if path.name.startswith(name)) if name else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"no trial in {folder} begins with {name!r}")
    names = ", ".join(path.name for path in found[:NAMED]) + (", ..." if len(found) > NAMED else "")
    raise UserError(f"{len(found)} trials begin with {name!r}: {names}")


def _measured(home: Home, target: str, options: Mapping[str, object], *, full: bool) -> dict[str, Any]:
    """What a trial, or a published folder when ``target`` is one, is measured as. Exits when the child does."""
    # What could only be a path is one, so that a mistyped one is called so.
    is_path = Path(target).is_dir() or os.sep in target
    source = ["--folder", target] if is_path else ["--trial", str(find_trial(home, target))]
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "measured.json"
        place = ["--data-dir", str(home.directory / "data"), "--out", str(out)]
        code = _models_verb("diagnose", *source, *given, "--split", "full" if full else "slice", *place)
        if code:
            raise typer.Exit(code)
        measured: dict[str, Any] = json.loads(out.read_text())
        return measured


def _models_verb(*arguments: str) -> int:
    """Run ``python -m models.verbs``. -P and the path: this program's own models, whatever the working folder holds."""
    own = str(Path(models.__file__).parents[1])
    path = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-W", "ignore", "-m", "models.verbs", *arguments]
    return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})
