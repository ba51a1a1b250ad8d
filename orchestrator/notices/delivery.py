"""One try to hand a notice over: to an address that was judged, by TLS for the host's name, following no redirect.

Proxies of the environment are not used: behind one, it would not be us who choose the address.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from orchestrator.notices.addresses import Network, checked_addresses
from orchestrator.notices.delivery_errors import Refused, Unreached
from orchestrator.sweep import UserError, check_https

TIMEOUT_SECONDS = 10.0
_ONCE_MORE = {408, 425, 429}


@dataclass(frozen=True, repr=False)
class Target:
    """An https URL, taken apart. Without a repr: it may be a secret."""

    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Target:
        try:
            check_https(url)
            parts = urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode()
        except ValueError as error:
            raise UserError(f"notices.webhook: {error}") from None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(host, parts.port or 443, path)


class _ToAddress(http.client.HTTPSConnection):
    """Speaks to ``host``, at an address that is given."""

    def __init__(self, target: Target, address: str, context: ssl.SSLContext) -> None:
        super().__init__(target.host, target.port, timeout=TIMEOUT_SECONDS, context=context)
        self._address, self._tls = address, context

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), TIMEOUT_SECONDS)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def deliver(
    target: Target, headers: dict[str, str], body: bytes, networks: Sequence[Network], context: ssl.SSLContext
) -> None:
    """Return once the receiver has taken it; Unreached or Refused otherwise."""
    failed = Unreached("it has no address")
    for address in checked_addresses(target.host, target.port, networks):
        connection = _ToAddress(target, address, context)
        try:
            connection.request("POST", target.path, body, {"Content-Type": "application/json", **headers})
            status = connection.getresponse().status
        except ssl.SSLCertVerificationError:
            raise Refused("its certificate is not valid for its name, or not trusted") from None
        except (OSError, http.client.HTTPException) as error:
            failed = Unreached(f"{type(error).__name__}: {getattr(error, 'strerror', None) or 'no answer'}")
        else:
            _judge(status)
            return
        finally:
            connection.close()
    raise failed


def _judge(status: int) -> None:
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise Refused(f"it answered {status}: redirects are not followed")
    if status >= 500 or status in _ONCE_MORE:
        raise Unreached(f"it answered {status}")
    raise Refused(f"it answered {status}")
