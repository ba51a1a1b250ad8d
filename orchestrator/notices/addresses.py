"""Which addresses a notice may go to: those of the Internet, and networks that the operator names.

A name is looked up once a try, every address behind it is judged, and the connection goes to one that was: a name that
answers otherwise the second time (DNS rebinding) gains nothing. Refused are loopback, link-local, multicast, private
and reserved ones, and the clouds' metadata services wherever they are; also where IPv6 wraps them as IPv4.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from orchestrator.notices.delivery_errors import Refused, Unreached
from orchestrator.sweep import UserError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA = tuple(
    map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
"""AWS, GCP and most others; AWS by IPv6; Alibaba; Azure's host; Oracle."""

_NEVER_NAMED = (
    *map(ipaddress.ip_network, ("127.0.0.0/8", "169.254.0.0/16", "::1/128", "fe80::/10", "0.0.0.0/8", "::/128")),
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def networks_of(text: str) -> tuple[Network, ...]:
    """``10.0.0.0/8, fd12::/16``: private networks with receivers in them. UserError for one that is never allowed."""
    networks: list[Network] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            network = ipaddress.ip_network(part)
        except ValueError as error:
            raise UserError(f"GATESWEEP_WEBHOOK_NETWORKS: {error}; allowed: such as 10.0.0.0/8") from None
        if any(network.version == one.version and network.overlaps(one) for one in _NEVER_NAMED):
            raise UserError(f"GATESWEEP_WEBHOOK_NETWORKS: {part} holds loopback or link-local addresses")
        networks.append(network)
    return tuple(networks)


def checked_addresses(host: str, port: int, networks: Sequence[Network]) -> list[str]:
    """Where ``host`` is, every address allowed. Refused when one is not, Unreached when the name is not known."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unreached("its name is not known to the DNS") from None
    addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    for text in addresses:
        reason = why_refused(ipaddress.ip_address(text.partition("%")[0]), networks)
        if reason is not None:
            raise Refused(f"it is at {reason}, where no notice goes")
    return addresses


def why_refused(address: Address, networks: Sequence[Network]) -> str | None:
    """What kind of address this is, if it is none for notices."""
    inner = _unwrapped(address)
    if inner in METADATA:
        return "a metadata service's address"
    if any(inner in network for network in networks):
        return None
    if inner.is_loopback:
        return "a loopback address"
    if inner.is_link_local:
        return "a link-local address"
    if inner.is_multicast or inner.is_unspecified or inner.is_reserved:
        return "a reserved address"
    return None if inner.is_global else "a private address (GATESWEEP_WEBHOOK_NETWORKS names those that are meant)"


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address
