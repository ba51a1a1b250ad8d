"""Secrets by reference: ``env:NAME`` or ``file:/PATH``. What is read is never told, only where it was looked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from models.redaction import hide
from orchestrator.sweep import UserError

LONGEST = 64 * 1024


def read_reference(reference: str, key: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text behind a reference, without blanks around it. ``key`` names the option in messages; UserError when there
    is nothing."""
    kind, _, place = reference.partition(":")
    if kind == "env":
        text = environment.get(place, "")
        missing = "the environment variable is not set"
    else:
        missing = "the file is empty"
        try:
            with Path(place).expanduser().open(encoding="utf-8") as stream:
                text = stream.read(LONGEST)
        except UnicodeDecodeError:
            raise UserError(f"{key} ({reference}): the file is not text in UTF-8") from None
        except OSError as error:
            raise UserError(f"{key} ({reference}): the file can't be read: {error.strerror}") from None
    text = text.strip()
    if not text:
        raise UserError(f"{key} ({reference}): {missing}")
    hide(text)
    return text
