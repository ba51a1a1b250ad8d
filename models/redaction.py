"""Credentials out of text: the one function that all text passes before it is stored, shown or logged.

It knows them by their place (a URL's password, ``password=``, an Authorization header), by the shapes of well-known
tokens, and by value: what the environment holds under a secret's name or in a URL, and what ``hide`` was told.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

REDACTED = "***"
_LEAST_CHARACTERS = 6
"""A shorter value is no secret worth the name, and would be cut out of innocent words."""

_SHORT_CHARACTERS = 200

_SECRET_NAME = re.compile(
    r"(^|_)(PASSWORDS?|PASSWD|PASS|PGPASSWORD|SECRETS?|TOKEN|API_?KEY|ACCESS_?KEY|SECRET_?KEY|PRIVATE_?KEY|CREDENTIALS?)"
    r"(_ID|_JSON|_VALUE)?$",
    re.I,
)
_URL_PASSWORD = re.compile(r"(://[^\s:/@'\"]*):[^\s'\"/]*@")
_ANY_URL_PASSWORD = re.compile(r"://[^\s:/@]*:(\S*)@")
"""SQLAlchemy takes an unescaped slash in a password, which in running text would be the beginning of a path."""

_BY_PLACE = (
    (_URL_PASSWORD, rf"\1:{REDACTED}@"),
    (
        re.compile(r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token)\s+)?)[^\s\"',]+"),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{16,}"), rf"\1{REDACTED}"),
    (
        re.compile(
            r"(?i)(\b|_)((?:(?:pg)?password|passwd|pwd|sslpassword|secret|client_secret|api_?key|access_?key|secret_?key|"
            r"access_?token|auth_?token|account_?key)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&}\]]+"
        ),
        rf"\1\2{REDACTED}",
    ),
    (
        re.compile(r"(?i)([?&](?:token|signature|sig|x-amz-(?:signature|security-token))=)[^\s\"'&]+"),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(hooks\.slack\.com/(?:services|workflows)/)\S+"), rf"\1{REDACTED}"),
)
_BY_SHAPE = re.compile(
    r"\b(?:gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|hf_[A-Za-z0-9]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|npm_\w{30,}|pypi-[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.S,
)

_hidden: set[str] = set()


def hide(secret: str | None) -> None:
    """Cut this value out of all text from now on; for what was read from a file."""
    if secret and len(secret) >= _LEAST_CHARACTERS:
        _hidden.add(secret)


def redacted(text: str) -> str:
    """``text`` with ``***`` in the place of every credential that is known for one."""
    return _without(text, _known_values())


def redacted_content(content: Any) -> Any:
    """The same of every text in what becomes JSON; keys stay."""
    return _content_without(content, _known_values())


def _content_without(content: Any, values: Iterable[str]) -> Any:
    if isinstance(content, str):
        return _without(content, values)
    if isinstance(content, dict):
        return {key: _content_without(value, values) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_content_without(value, values) for value in content]
    return content


def _without(text: str, values: Iterable[str]) -> str:
    text = _told_by_form(text) if len(text) > _SHORT_CHARACTERS else _short_told_by_form(text)
    for value in values:
        if value in text:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", REDACTED, text)
    return text


def _told_by_form(text: str) -> str:
    for pattern, replacement in _BY_PLACE:
        text = pattern.sub(replacement, text)
    return _BY_SHAPE.sub(REDACTED, text)


_short_told_by_form = lru_cache(maxsize=256)(_told_by_form)
"""Every attempt stores the same versions and hashes."""


_known: tuple[dict[Any, Any], set[str], tuple[str, ...]] = {}, set(), ()
"""The environment and what was hidden when it was last searched for secrets, which takes a millisecond; and those."""


def _known_values() -> tuple[str, ...]:
    """What is cut out by value. The longest first: one may be the beginning of another."""
    global _known
    # Its own dictionary, where there is one: by the mapping's face every look decodes all of it.
    seen = dict(getattr(os.environ, "_data", os.environ)), set(_hidden)
    if seen != _known[:2]:
        _known = *seen, tuple(sorted(_hidden.union(_of_environment()), key=len, reverse=True))
    return _known[2]


def _of_environment() -> Iterator[str]:
    """Values under the names that secrets have, and the passwords in URLs under any name."""
    for name, value in os.environ.items():
        found = [value] if _SECRET_NAME.search(name) else []
        if "://" in value:
            passwords = _ANY_URL_PASSWORD.findall(value)
            found += [*passwords, *map(unquote, passwords)]
        yield from (one for one in found if len(one) >= _LEAST_CHARACTERS and not one.isdigit())


class RedactingFormatter(logging.Formatter):
    """Lines of a log without credentials, tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
