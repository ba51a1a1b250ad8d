"""Whom a sweep tells of what happens to it. Secrets are named here, by environment variable or file, and never held."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from models.config import Count, Frozen, Positive

NoticeKind = Literal["trial_failed", "divergence_wave", "budget", "sweep_done"]
NOTICE_KINDS: tuple[NoticeKind, ...] = ("trial_failed", "divergence_wave", "budget", "sweep_done")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_reference(text: str) -> bool:
    kind, _, place = text.partition(":")
    return kind in ("env", "file") and bool(place)


def check_https(url: str) -> None:
    """ValueError for a URL that no notice is sent to. It never repeats the URL, which may be a secret."""
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError("this is no URL; allowed: https://HOST/PATH") from None
    if parts.scheme != "https" or not parts.hostname or not port_is_right or not url.isprintable() or " " in url:
        raise ValueError("allowed: https://HOST/PATH, env:NAME or file:/PATH")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a user or a password; allowed: none in it, as every request is signed")


class WaveConfig(Frozen):
    """When diverging trials are a wave: too many that were not expected to, too close together."""

    trials: Count = 3
    """At least so many in the window."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """And at least this share of all trials that ended in it."""
    minutes: Positive = 60.0
    """The window's length."""


class NoticesConfig(Frozen):
    """Checked as a whole, not by field: messages about a single value repeat it, and these may be secrets."""

    webhook: str | None = None
    """``https://HOST/PATH``, or ``env:NAME`` or ``file:/PATH`` where the URL itself is a secret."""
    secret: str | None = None
    """``env:NAME`` or ``file:/PATH``: where the key that signs is read from."""
    on: Annotated[tuple[NoticeKind, ...], BeforeValidator(_as_tuple)] = Field(
        default=NOTICE_KINDS, description=f"a list of {', '.join(NOTICE_KINDS)}"
    )
    """What the webhook gets. The store and MLflow get everything."""
    wave: WaveConfig = WaveConfig()

    @model_validator(mode="after")
    def _checked(self) -> NoticesConfig:
        if (self.webhook is None) != (self.secret is None):
            raise ValueError("webhook and secret go together: every notice is signed")
        if self.secret is not None and not _is_reference(self.secret):
            raise ValueError("a secret is not written here; allowed: env:NAME or file:/PATH, where it is read from")
        if self.webhook is not None and not _is_reference(self.webhook):
            check_https(self.webhook)
        return self
