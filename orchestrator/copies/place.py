"""A folder on another file system, by URL. Credentials come from where the file system's own tools have them.

``s3://bucket/prefix`` takes AWS's environment variables, ``~/.aws`` and the machine's role, and AWS_ENDPOINT_URL for a
server that is not AWS's. None is taken from a URL, which is stored and shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from models.redaction import redacted
from orchestrator.sweep import UserError

T = TypeVar("T")

TRIES = 3
"""Of each request, beside those that a client makes by itself."""
_CHARACTERS_TOLD = 300
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
_ALLOWED = "allowed: PROTOCOL://PLACE/PREFIX such as s3://bucket/prefix, or an absolute path"

_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"}
"""Object stores: to ask them for a folder would make a bucket that nobody asked for."""
_S3_PATIENCE = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2, "mode": "standard"}}


class CopyError(Exception):
    """The place was not reached, or did not take or give what it should. Nothing here is lost; trying again helps or
    the words say what is wrong. Never holds a credential."""


def is_url(text: str) -> bool:
    """Whether it names a place by URL, and not a path of this machine."""
    return _URL.match(text) is not None


class Place:
    """A folder by URL. Making one asks nobody; UserError for a URL that can't be, or a package that is missing."""

    def __init__(self, url: str, said_by: str) -> None:
        """``said_by``: the variable or option that holds the URL, for messages. They never repeat a secret."""
        _refuse_secrets(url, said_by)
        if not is_url(url) and not Path(url).is_absolute():
            raise UserError(f"{said_by} {url}: {_ALLOWED}")
        self.url, self._said_by = url.rstrip("/"), said_by

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> str:
        return f"{self.url}/{name}"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the folder's name in it. UserError where it needs a package that is not there."""
        from fsspec.core import url_to_fs

        protocol = self.url.partition("://")[0].lower() if is_url(self.url) else "file"
        options = {"config_kwargs": _S3_PATIENCE} if protocol in ("s3", "s3a") else {}
        try:
            system, root = url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            mend = "pip install 'gatesweep[s3]'" if options else "pip install it"
            raise UserError(f"{self._said_by} {self.url}: {redacted(str(error))}; {mend}") from error
        except ValueError as error:
            raise UserError(f"{self._said_by} {self.url}: {redacted(str(error))}; {_ALLOWED}") from error
        except Exception as error:
            raise self._error("opened", "", error) from error
        return system, root

    def open(self) -> Place:
        """Itself, with its packages loaded: what is missing is told before it is needed."""
        _ = self._opened
        return self

    # -- one file -------------------------------------------------------------------------------------------

    def put(self, source: Path, name: str) -> None:
        """Copy a file there. Its size is compared; what it holds on the way is the client's to check, and S3's is."""
        size = source.stat().st_size

        def send(system: Any, path: str) -> None:
            self._make_folder(system, path)
            system.put_file(str(source), path)
            found = system.info(path)["size"]
            if found != size:
                raise OSError(f"{found:,} bytes are there of {size:,}")

        self._ask("written", name, send)

    def get(self, name: str, target: Path) -> None:
        self._ask("read", name, lambda system, path: system.get_file(path, str(target)))

    def write(self, name: str, content: bytes) -> None:
        def send(system: Any, path: str) -> None:
            self._make_folder(system, path)
            system.pipe_file(path, content)

        self._ask("written", name, send)

    def read(self, name: str) -> bytes | None:
        """What the file holds; None when there is none."""

        def receive(system: Any, path: str) -> bytes | None:
            try:
                content: bytes = system.cat_file(path)
            except FileNotFoundError:
                return None
            return content

        return self._ask("read", name, receive)

    def remove(self, name: str) -> None:
        self._ask("removed", name, lambda system, path: system.rm_file(path))

    # -- several --------------------------------------------------------------------------------------------

    def names(self, folder: str) -> list[str]:
        """Names right in a folder of the place; none when it is not there."""

        def look(system: Any, path: str) -> list[str]:
            try:
                found = system.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(one).rstrip("/").rpartition("/")[2] for one in found})

        return self._ask("listed", folder, look)

    def put_folder(self, source: Path, names: Iterable[str], folder: str, last: str) -> None:
        """Copy files of ``source``; ``last`` is written when all others are there: who finds it finds the whole."""
        for name in (*(one for one in names if one != last), last):
            self.put(source / name, f"{folder}/{name}" if folder else name)

    # -- asking ---------------------------------------------------------------------------------------------

    def _ask(self, what: str, name: str, request: Callable[[Any, str], T]) -> T:
        """With a few tries; CopyError when none of them did. What trying again does not mend is not tried again."""
        from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_random_exponential

        system, root = self._opened
        hopeless = (PermissionError, FileNotFoundError, NotImplementedError, TypeError)
        tries = Retrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.3, max=5),
            retry=retry_if_not_exception_type(hopeless),
            reraise=True,
        )
        try:
            return tries(request, system, f"{root.rstrip('/')}/{name}".rstrip("/"))
        except Exception as error:
            raise self._error(what, name, error) from error

    def _error(self, what: str, name: str, error: Exception) -> CopyError:
        """``from None`` would hide a defect; the text of the cause is shown by nobody but through the redactor."""
        said = redacted(f"{type(error).__name__}: {error}").partition("\n")[0][:_CHARACTERS_TOLD]
        return CopyError(f"{self.at(name).rstrip('/')} can't be {what}: {said}")

    def _make_folder(self, system: Any, path: str) -> None:
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if not protocols & _WITHOUT_FOLDERS:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)


def _refuse_secrets(url: str, said_by: str) -> None:
    """It never repeats the URL, which may hold one."""
    place = url.partition("://")[2] if is_url(url) else url
    if "@" in place.partition("/")[0] or "?" in url or "#" in url or not url.isprintable() or "::" in url:
        raise UserError(
            f"{said_by}: a URL with a user, a password, a query or several parts; {_ALLOWED}. Credentials come from "
            "the environment or the file system's own configuration (for S3: AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws)"
        )
