"""Webhook: an alert posted as signed JSON.

The signature is that of Standard Webhooks: HMAC-SHA256 over `id.timestamp.body`, as
`webhook-signature: v1,BASE64`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json

import httpx

from worker.clock import Clock
from worker.telemetry.alerts import Alert
from worker.telemetry.masking import masker

WRITTEN = "whsec_"


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of the header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()}"


class Webhook:
    """A receiver of alerts; it knows one sent twice by its id."""

    def __init__(self, url: str, secret: str, clock: Clock, *, client: httpx.Client | None = None) -> None:
        self._url = url
        self._secret = secret
        self._clock = clock
        # No redirect is followed: the secret's signature is for this receiver.
        self._client = client or httpx.Client(timeout=10.0)
        masker.register(secret)

    def close(self) -> None:
        self._client.close()

    def post(self, alert: Alert) -> str | None:
        """Post it once; why it was not taken, or None."""
        status = alert.status
        body = masker.mask(json.dumps(alert.as_json(), default=str)).encode()
        timestamp = int(self._clock.now().timestamp())
        message_id = f"{alert.id}-{status}"
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, message_id, timestamp, body),
        }
        try:
            answer = self._client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            return type(error).__name__
        return None if answer.is_success else f"status {answer.status_code}"


def _key(secret: str) -> bytes:
    """Standard Webhooks writes a key as `whsec_` and its base64; any other text is the key itself."""
    if secret.startswith(WRITTEN):
        with contextlib.suppress(ValueError):
            return base64.b64decode(secret.removeprefix(WRITTEN), validate=True)
    return secret.encode()
