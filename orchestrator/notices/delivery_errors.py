"""Why a notice was not taken. Their words hold neither URL nor host: these may be secrets."""

from __future__ import annotations


class Unreached(Exception):
    """This time; it is tried again."""


class Refused(Exception):
    """By us or by the receiver, and so it would be again."""
