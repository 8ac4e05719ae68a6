"""The webhook: signed, in order, tried again where that may help, and never waited for."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable

import httpx
import pytest

from tests.fakes.clock import ManualClock
from worker.telemetry import webhook as module
from worker.telemetry.alerts import Alert
from worker.telemetry.webhook import Webhook

SECRET = "a-secret-to-sign-with"
Answer = Callable[[httpx.Request], httpx.Response]


def alert(clock: ManualClock, summary: str = "acme.digest fails") -> Alert:
    now = clock.now()
    return Alert("c1-1", "c1", "failed", "firing", summary, now, now, 1, 1, {"org": "org_a"})


def make(clock: ManualClock, answer: Answer) -> Webhook:
    client = httpx.Client(transport=httpx.MockTransport(answer))
    return Webhook("https://alerts.example/hook", SECRET, clock, client=client)


def run(webhook: Webhook, *alerts: Alert) -> None:
    """Post them all, in the webhook's own thread."""
    for one in alerts:
        webhook.send(one)
    webhook._waiting.put(None)
    webhook._run()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", (0.0, 0.0))


def test_a_post_is_signed_over_id_time_and_body(clock):
    seen: list[httpx.Request] = []
    webhook = make(clock, lambda request: (seen.append(request), httpx.Response(204))[1])

    assert webhook.post(alert(clock)) is None

    [request] = seen
    assert json.loads(request.content)["summary"] == "acme.digest fails"
    signed = f"c1-1-firing.{int(clock.now().timestamp())}.".encode() + request.content
    digest = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{digest}"
    assert SECRET not in str(request.headers)


def test_what_may_mend_is_tried_again_and_told_once_taken(clock, emitted):
    answers = iter([httpx.Response(503), httpx.Response(429), httpx.Response(200)])

    run(make(clock, lambda request: next(answers)), alert(clock))

    assert [one.event.name for one in emitted] == ["alert.sent"]


def test_what_will_not_mend_or_never_does_is_told_as_undelivered(clock, emitted):
    seen: list[int] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append(404)
        return httpx.Response(404)

    run(make(clock, refuse), alert(clock))
    run(make(clock, lambda request: httpx.Response(500)), alert(clock))

    assert len(seen) == 1
    assert [one.fields["error"] for one in emitted] == ["refused with status 404", "status 500"]


def test_a_redirect_is_not_followed(clock, emitted):
    run(make(clock, lambda request: httpx.Response(302, headers={"location": "https://x"})), alert(clock))

    assert emitted[0].fields["error"] == "refused with status 302"


def test_alerts_without_end_are_dropped_rather_than_waited_for(clock, emitted, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    webhook = make(clock, lambda request: httpx.Response(200))
    for _ in range(3):
        webhook.send(alert(clock))

    assert [one.fields["error"] for one in emitted] == ["too many wait"]


def test_no_secret_travels_in_an_alert(clock):
    seen: list[bytes] = []
    webhook = make(clock, lambda request: (seen.append(request.content), httpx.Response(200))[1])

    webhook.post(alert(clock, f"it said {SECRET}"))

    assert SECRET.encode() not in seen[0]
