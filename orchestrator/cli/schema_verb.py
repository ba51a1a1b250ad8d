"""``gatesweep schema``: the grammar of sweep files for editors, and as the tables of sweeps/README.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.sweep import UserError


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""

    @app.command()
    def schema(
        keys: Annotated[bool, typer.Option("--keys", help="Tables of all keys in Markdown instead.")] = False,
        plugins: Annotated[bool, typer.Option(help="With the options of the plug-ins that are installed here.")] = True,
        out: Annotated[
            Path | None,
            typer.Option(
                help="Write it to this file; tables go between the two marks that it has.", show_default=False
            ),
        ] = None,
    ) -> None:
        """Print the JSON schema of sweep files. Named in a file's first line, it has editors complete and check it."""
        from orchestrator.sweep.key_table import key_tables, with_key_tables
        from orchestrator.sweep.schema import sweep_schema

        if not keys:
            made = json.dumps(sweep_schema(plugins), indent=1, ensure_ascii=False) + "\n"
        elif out is None:
            made = key_tables()
        else:
            try:
                made = with_key_tables(out.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{out}: {error}") from error
        if out is None:
            sys.stdout.write(made)
        else:
            try:
                out.write_text(made, encoding="utf-8")
            except OSError as error:
                raise UserError(f"{out}: cannot be written: {error}") from error
