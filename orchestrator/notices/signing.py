"""Signatures by the Standard Webhooks specification, 1.0.0: receivers check them with a library of their language.

Signed is ``ID.TIMESTAMP.BODY`` with HMAC-SHA256. The ID stays the same over all tries of a notice, so that a receiver
can drop one that it has; the timestamp is that of the try, so that it can refuse old ones.
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from orchestrator.sweep import UserError

PREFIX = "whsec_"
SHORTEST_KEY = 16
"""Bytes. The specification asks for 24 to 64 and makers of keys give 32."""


def key_of(secret: str) -> bytes:
    """``whsec_`` and base64, or any other text as its bytes. UserError for one that could be guessed."""
    key = secret.encode()
    if secret.startswith(PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            raise UserError(
                f"the key that notices.secret names: after {PREFIX} comes base64, and this is none"
            ) from None
    if len(key) < SHORTEST_KEY:
        raise UserError(f"the key that notices.secret names has {len(key)} bytes; allowed: at least {SHORTEST_KEY}")
    return key


def signed_headers(notice_id: str, timestamp: int, body: bytes, key: bytes) -> dict[str, str]:
    signature = hmac.new(key, f"{notice_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": notice_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
