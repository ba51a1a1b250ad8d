"""``gatesweep import``: curves from elsewhere, put beside a sweep."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli.home import existing_store
from orchestrator.foreign import read_curves
from orchestrator.store import Imported
from orchestrator.sweep import ArmName, UserError, check_value, known_field


class CurveFormat(StrEnum):
    MEGATRON = "megatron"
    WANDB = "wandb"
    MLFLOW = "mlflow"
    CSV = "csv"


def register(app: typer.Typer, console: Console) -> None:
    @app.command("import")
    def import_curves(
        sweep: Annotated[str, typer.Option(help="Beside which sweep they are shown.", show_default=False)],
        name: Annotated[str, typer.Option("--as", help="What they are called there.", show_default=False)],
        file: Annotated[
            Path | None,
            typer.Argument(help="A Megatron log, an export of W&B or MLflow, or a CSV.", show_default=False),
        ] = None,
        format: Annotated[CurveFormat | None, typer.Option(help="By default what the file looks like.")] = None,
        seed: Annotated[int | None, typer.Option(min=0, help="Of the one curve of a file that names none.")] = None,
        validation_loss: Annotated[str | None, typer.Option(help="The column or metric with it.")] = None,
        training_loss: Annotated[str | None, typer.Option(help="The column or metric with it.")] = None,
        remove: Annotated[bool, typer.Option("--remove", help="Take what was imported by this name away.")] = False,
    ) -> None:
        """Put loss curves from elsewhere beside a sweep: marked, unverified, in no verdict."""
        if remove is (file is not None):
            raise UserError("import: allowed: a FILE, or --remove without one")
        try:
            check_value(known_field(ArmName), name)
        except ValueError as error:
            raise UserError(f"--as: {error}") from None
        with existing_store() as store:
            row = store.sweep(sweep)
            if file is None:
                number = store.remove_imported(row, name)
                console.print(f"{sweep}: {name} removed, {number} curve(s)", highlight=False)
                return
            asked = None if format is None else format.value
            found, curves = read_curves(file, asked, seed, training_loss, validation_loss)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            given = Imported(name, file.name, found, digest, datetime.now(UTC), tuple(curves))
            store.put_imported(row, given)
        points = sum(len(curve.points) for curve in curves)
        console.print(
            f"{sweep}: {name} imported from {file} ({found}): {len(curves)} curve(s), {points} points; unverified, "
            "in no verdict",
            highlight=False,
        )
