"""Webhook: alerts posted as signed JSON, in order, from a thread of its own.

The signature is that of Standard Webhooks: HMAC-SHA256 over `id.timestamp.body`, as
`webhook-signature: v1,BASE64`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import queue
import threading

import httpx

from worker.clock import Clock
from worker.telemetry.alerts import Alert
from worker.telemetry.events import emit
from worker.telemetry.masking import masker

# Seconds before each further try.
AGAIN = (1.0, 5.0, 30.0, 120.0)
# Alerts that wait to be posted.
MOST_WAITING = 1000
# Seconds that the last alerts are given at the end.
LAST_POSTS = 5.0


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of the header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()}"


class Webhook:
    """Posts each alert until it is taken, a few times at most; a receiver knows one sent twice by its id."""

    def __init__(self, url: str, secret: str, clock: Clock, *, client: httpx.Client | None = None) -> None:
        self._url = url
        self._secret = secret
        self._clock = clock
        # No redirect is followed: the secret's signature is for this receiver.
        self._client = client or httpx.Client(timeout=10.0)
        self._waiting: queue.Queue[Alert | None] = queue.Queue(MOST_WAITING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        masker.register(secret)

    def start(self) -> None:
        self._thread.start()

    def send(self, alert: Alert) -> None:
        """Post it as soon as those before it are; never waits."""
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            _tell_undelivered(alert, "too many wait")

    def stop(self) -> None:
        """Post what waits, once each, and end."""
        self._stop.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout=LAST_POSTS)

    def post(self, alert: Alert) -> str | None:
        """Post it once; why it was not taken, or None. A fault that will not mend begins with `refused`."""
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
        if answer.is_success:
            return None
        mends = answer.status_code >= 500 or answer.status_code in (408, 429)
        return f"status {answer.status_code}" if mends else f"refused with status {answer.status_code}"

    def _run(self) -> None:
        while (alert := self._waiting.get()) is not None:
            try:
                self._deliver(alert)
            except Exception as error:
                emit("loop.failed", loop="webhook", error=type(error).__name__)
        self._client.close()

    def _deliver(self, alert: Alert) -> None:
        fault = self.post(alert)
        for pause in AGAIN:
            if fault is None or fault.startswith("refused") or self._stop.wait(pause):
                break
            fault = self.post(alert)
        if fault is None:
            emit("alert.sent", kind=alert.kind, status=alert.status, alert=alert.id)
        else:
            _tell_undelivered(alert, fault)


def _tell_undelivered(alert: Alert, error: str) -> None:
    emit("alert.undelivered", kind=alert.kind, status=alert.status, alert=alert.id, error=error)
