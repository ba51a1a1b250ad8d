"""``gatesweep data``: prepare corpora ahead of a sweep, and show what one holds. The work is done by ``models.corpus``
in a child process, since it needs torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import models

app = typer.Typer(
    help="Corpora made ahead: text in, a folder out that a sweep names as its data.corpus.", no_args_is_help=True
)


class TxtDocuments(StrEnum):
    FILES = "files"
    LINES = "lines"


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help=".jsonl, .txt or .parquet files (the first two also .gz, .xz, .bz2, .zst), folders of them, or globs.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="The folder to make.", show_default=False)],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or the path of a tokenizer.json, a SentencePiece .model or a .tiktoken file.")
    ] = "bytes",
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize. The result is the same.")] = 1,
    text_field: Annotated[str, typer.Option(help="The field, or parquet column, that holds the text.")] = "text",
    txt: Annotated[TxtDocuments, typer.Option(help="What is a document in a .txt file.")] = TxtDocuments.FILES,
    validation_every: Annotated[
        int, typer.Option(min=1, help="Every n-th document is validation; 1: all of a held-out corpus.")
    ] = 20,
    slice_bytes: Annotated[int, typer.Option(min=1, help="Text in the validation slice.")] = 32_768,
    slice_documents: Annotated[
        int, typer.Option(min=1, help="At most so many documents give a head to the slice.")
    ] = 64,
) -> None:
    """Tokenize files into one dataset on disk. Run again, it is recognised; interrupted, nothing is left half-made."""
    options = {
        "--to": to,
        "--tokenizer": tokenizer,
        "--workers": workers,
        "--text-field": text_field,
        "--txt": txt.value,
        "--validation-every": validation_every,
        "--slice-bytes": slice_bytes,
        "--slice-documents": slice_documents,
    }
    flat = [f"{name}={value}" for name, value in options.items()]
    raise typer.Exit(_child(["prepare", *flat, "--", *inputs]))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A prepared folder.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read all of it and compare with its hash.")] = False,
) -> None:
    """What a prepared folder holds: documents, tokens, bytes of text, and what it was made from."""
    raise typer.Exit(_child(["show", *(["--verify"] if verify else []), "--", str(path)]))


def _child(arguments: list[str]) -> int:
    """Its exit code. A signal is the child's to answer: it clears away what is half-made."""
    own = str(Path(models.__file__).parents[1])
    path = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: this program's own models, whatever the working folder holds.
    command = [sys.executable, "-P", "-m", "models.corpus", *arguments]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            try:
                code = child.wait()
                if code < 0:  # killed, it could say nothing itself
                    name = signal.Signals(-code).name
                    typer.echo(f"error: {name} ended the process that did the work; run it again", err=True)
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:  # the terminal sends it to both
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)
