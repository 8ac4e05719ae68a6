"""Webhooks as Kinde signs and sends them."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any

import httpx

from worker.clock import to_text
from worker.demo.keys import KeyRotation


def payload(kind: str, org: str, *, at: datetime, **changes: Any) -> dict[str, Any]:
    """The content of a webhook about an organization; a change to None leaves that member out."""
    made = {
        "data": {"organization": {"code": org, "name": f"Name of {org}", "handle": None}},
        "event_id": f"event_{secrets.token_hex(8)}",
        "event_timestamp": to_text(at),
        "source": "admin",
        "timestamp": to_text(at),
        "type": kind,
    } | changes
    return {name: value for name, value in made.items() if value is not None}


def signed(keys: KeyRotation, content: dict[str, Any], *, typ: str = "JWT", forged: bool = False) -> str:
    """The message that Kinde sends; a forged one is signed by another key under the same kid."""
    return keys.sign(content, typ=typ, forged=forged)


async def send(url: str, message: str) -> httpx.Response:
    """POST it as Kinde does."""
    headers = {"Content-Type": "application/jwt", "webhook-id": f"webhook_{secrets.token_hex(8)}"}
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.post(url, content=message, headers=headers)
