"""Webhooks of Kinde: signed messages about an event, without issuer, audience or lifetime."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from worker.clock import from_text
from worker.errors import TokenRefused, WebhookRefused
from worker.features.provisioning.management.contract import Notice, NoticeKind

# Kinde repeats a webhook for 36 hours.
OLDEST = timedelta(hours=37)
LEEWAY = timedelta(minutes=5)
MAX_BODY = 16 * 1024  # bytes; those of organizations have less than 1 KiB
# A token has these and a webhook does not: a token of the same issuer has the same signature.
OF_TOKENS = frozenset({"iss", "aud", "exp", "nbf", "iat", "sub", "azp", "gty", "scp", "scope", "jti"})
KINDS: Mapping[str, NoticeKind] = {
    "organization.created": "org_created",
    "organization.updated": "org_updated",
    "organization.deleted": "org_deleted",
}

SignedMessage = Callable[[Mapping[str, Any]], object]


async def read_notice(
    body: bytes, verify: Callable[[str, SignedMessage], Awaitable[Mapping[str, Any]]], *, now: datetime
) -> Notice:
    """What a webhook is about; `verify` checks signature and form, and calls the check that it is given.

    A repeated webhook is accepted again: what it says is read from the provider anyway.

    Raises:
        WebhookRefused: see its `detail`.
        IssuerUnavailable: from `verify`, if there is no verdict on the signature.
    """
    if len(body) > MAX_BODY:
        raise WebhookRefused("oversize", f"it is larger than {MAX_BODY // 1024} KiB")
    try:
        text = body.decode("ascii").strip()
    except UnicodeDecodeError:
        raise WebhookRefused("text", "it is not a signed message") from None
    try:
        payload = await verify(text, lambda claims: _check(claims, now))
    except TokenRefused as refused:
        raise WebhookRefused(refused.detail, "its form or signature is invalid") from None
    kind = KINDS.get(payload["type"], "other")
    return Notice(kind, _org_of(payload) if kind != "other" else None, _time_of(payload))


def _check(payload: Mapping[str, Any], now: datetime) -> None:
    """Raise WebhookRefused for a payload that is not a recent webhook about an event."""
    if found := sorted(OF_TOKENS & payload.keys()):
        raise WebhookRefused("token", f"it is a token, not a webhook: it has {found[0]}")
    kind, data = payload.get("type"), payload.get("data")
    if not isinstance(kind, str) or not isinstance(data, dict) or not payload.get("event_id"):
        raise WebhookRefused("payload", "it lacks type, data or event_id")
    at = _time_of(payload)
    if now - at > OLDEST:
        raise WebhookRefused("old", "its timestamp is more than 37 hours ago")
    if at - now > LEEWAY:
        raise WebhookRefused("future", "its timestamp is in the future")
    if kind in KINDS:
        _org_of(payload)


def _time_of(payload: Mapping[str, Any]) -> datetime:
    value = payload.get("timestamp")
    try:
        if isinstance(value, str) and len(value) <= 40:
            return from_text(value)
    except ValueError:
        pass
    raise WebhookRefused("timestamp", "its timestamp is not a time with an offset")


def _org_of(payload: Mapping[str, Any]) -> str:
    organization = payload["data"].get("organization")
    code = organization.get("code") if isinstance(organization, dict) else None
    if not isinstance(code, str) or not 0 < len(code) <= 200:
        raise WebhookRefused("org", "it names no organization")
    return code
