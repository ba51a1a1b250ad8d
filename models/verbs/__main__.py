"""``python -m models.verbs export|diagnose``: what ``gatesweep export`` and ``gatesweep diagnose`` run.

A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path

from models import run_dir
from models.corpus import CorpusError
from models.export import FORMS, Refused
from models.verbs.diagnose import Wanted, diagnose_folder, diagnose_trial
from models.verbs.export_trial import export_trial

USER_ERROR_EXIT = 2


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.ERROR)
    asked = _parser().parse_args(arguments)
    try:
        if asked.verb == "export":
            print(export_trial(asked.trial, asked.format, asked.to))
        else:
            wanted = Wanted(**{field.name: getattr(asked, field.name) for field in fields(Wanted)})
            measured = diagnose_trial(asked.trial, wanted) if asked.trial else diagnose_folder(asked.folder, wanted)
            run_dir.write_json(asked.out, measured)
    except (Refused, CorpusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.verbs")
    verbs = parser.add_subparsers(dest="verb", required=True)
    export = verbs.add_parser("export")
    export.add_argument("trial", type=Path, help="the trial's run dir")
    export.add_argument("--format", choices=FORMS, required=True)
    export.add_argument("--to", type=Path, required=True)
    diagnose = verbs.add_parser("diagnose")
    source = diagnose.add_mutually_exclusive_group(required=True)
    source.add_argument("--trial", type=Path, help="a trial's run dir")
    source.add_argument("--folder", type=Path, help="a published model")
    diagnose.add_argument("--out", type=Path, required=True, help="where the result is written, as JSON")
    diagnose.add_argument("--data-dir", type=Path, required=True)
    diagnose.add_argument("--corpus")
    diagnose.add_argument("--tokenizer")
    diagnose.add_argument("--sequence-length", type=int)
    diagnose.add_argument("--validation-every", type=int)
    diagnose.add_argument("--split", choices=("slice", "full"), default="slice")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
