"""What a notice says, as JSON. sweeps/README.md documents each field: receivers are built on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from models.redaction import redacted_content

LONGEST_TEXT = 2_000


def notice_body(kind: str, sweep: str, message: str, facts: Mapping[str, Any], at: datetime | None = None) -> bytes:
    moment = (at or datetime.now(UTC)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data = redacted_content({"sweep": sweep, "message": message, **facts})
    data = {name: value[:LONGEST_TEXT] if isinstance(value, str) else value for name, value in data.items()}
    return json.dumps({"type": f"gatesweep.{kind}", "timestamp": moment, "data": data}).encode()
