"""``python -m models.corpus prepare | show``: what ``gatesweep data`` runs as a child process."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.corpus.make import Progress

USER_ERROR_EXIT = 2
LINE_EVERY_SECONDS = 10.0


def main(arguments: list[str]) -> int:
    parsed = _parser().parse_args(arguments)
    # A folder half-made is cleared away on SIGTERM as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from models.corpus.text import CorpusError

    try:
        return int(parsed.verb(parsed))
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gatesweep data")
    verbs = parser.add_subparsers(required=True)
    prepare = verbs.add_parser("prepare")
    prepare.add_argument("inputs", nargs="+")
    prepare.add_argument("--to", type=Path, required=True)
    prepare.add_argument("--tokenizer", default="bytes")
    prepare.add_argument("--workers", type=_at_least(1), default=1)
    prepare.add_argument("--text-field", default="text")
    prepare.add_argument("--txt", choices=["files", "lines"], default="files")
    prepare.add_argument("--validation-every", type=_at_least(1), default=20)
    prepare.add_argument("--slice-bytes", type=_at_least(1), default=32_768)
    prepare.add_argument("--slice-documents", type=_at_least(1), default=64)
    prepare.set_defaults(verb=_prepare)
    show = verbs.add_parser("show")
    show.add_argument("path", type=Path)
    show.add_argument("--verify", action="store_true")
    show.set_defaults(verb=_show)
    return parser


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}; allowed: a whole number of at least {least}")
        return int(text)

    return number


def _prepare(arguments: argparse.Namespace) -> int:
    from models.corpus import make
    from models.corpus.encode import Encoding

    encoding = Encoding(
        tokenizer=arguments.tokenizer,
        text_field=arguments.text_field,
        validation_every=arguments.validation_every,
        slice_bytes=arguments.slice_bytes,
        slice_documents=arguments.slice_documents,
    )
    recipe = make.Recipe(tuple(arguments.inputs), encoding, arguments.txt)
    started = time.monotonic()
    with _Bar() as bar:
        directory, was_there = make.make(recipe, arguments.to, arguments.workers, bar.show)
    _print_description(directory)
    if was_there:
        print(f"{directory} was prepared from these inputs before")
    else:
        last, seconds = bar.last, time.monotonic() - started
        rates = f"{last.text_bytes / 1e6 / seconds:,.1f} MB of text/s, {last.num_tokens / seconds:,.0f} tokens/s"
        print(f"prepared in {seconds:,.1f} s: {rates}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from models.corpus import make

    _print_description(arguments.path)
    if arguments.verify:
        make.verify(arguments.path)
        print("verified: every byte is what was written")
    return 0


def _print_description(directory: Path) -> None:
    from models.corpus import make

    for name, value in make.describe(directory):
        print(f"{name:<11} {value}")


class _Bar:
    """A progress bar in a terminal, a line now and then anywhere else. Both on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.last: Progress
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> _Bar:
        from rich import progress

        self.bar = progress.Progress(
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[counts]}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None, counts="hashing the inputs")
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, now: Progress) -> None:
        self.last = now
        seconds = max(time.monotonic() - self.started, 1e-9)
        counts = (
            f"{now.num_documents:,} documents  {now.text_bytes / 1e6:,.1f} MB ({now.text_bytes / 1e6 / seconds:,.1f}/s)"
            f"  {now.num_tokens / 1e6:,.1f} M tokens ({now.num_tokens / 1e6 / seconds:,.2f}/s)"
        )
        if self.console.is_terminal:
            self.bar.update(self.task, total=now.total_bytes, completed=now.read_bytes, counts=counts)
        elif time.monotonic() - self.last_line >= LINE_EVERY_SECONDS:
            self.last_line = time.monotonic()
            print(f"{100 * now.read_bytes / max(now.total_bytes, 1):3.0f} %  {counts}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
