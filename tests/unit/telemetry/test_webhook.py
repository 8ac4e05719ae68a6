"""The webhook: signed, followed nowhere, and clear on why it was not taken."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable

import httpx
import pytest

from tests.fakes.clock import ManualClock
from worker.telemetry.alerts import Alert, Webhook

SECRET = "a-secret-to-sign-with"
Answer = Callable[[httpx.Request], httpx.Response]


def alert(clock: ManualClock, summary: str = "acme.digest fails") -> Alert:
    now = clock.now()
    return Alert("c1-1", "c1", "failed", "firing", summary, now, now, 1, 1, {"org": "org_a"})


def make(clock: ManualClock, answer: Answer, secret: str = SECRET) -> Webhook:
    client = httpx.Client(transport=httpx.MockTransport(answer))
    return Webhook("https://alerts.example/hook", secret, clock, client=client)


def posted(clock: ManualClock, secret: str = SECRET, summary: str = "acme.digest fails") -> httpx.Request:
    seen: list[httpx.Request] = []
    webhook = make(clock, lambda request: (seen.append(request), httpx.Response(204))[1], secret)
    assert webhook.post(alert(clock, summary)) is None
    return seen[0]


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        (SECRET, SECRET.encode()),
        ("whsec_" + base64.b64encode(b"the key itself 1").decode(), b"the key itself 1"),
        ("whsec_is not base64!", b"whsec_is not base64!"),
    ],
)
def test_a_post_is_signed_over_id_time_and_body(clock, secret, key):
    request = posted(clock, secret)

    assert json.loads(request.content)["summary"] == "acme.digest fails"
    signed = f"c1-1-firing.{int(clock.now().timestamp())}.".encode() + request.content
    digest = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{digest}"
    assert secret not in str(request.headers)


@pytest.mark.parametrize(("status", "fault"), [(200, None), (302, "status 302"), (404, "status 404")])
def test_what_is_not_taken_is_a_fault_and_no_redirect_is_followed(clock, status, fault):
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, headers={"location": "https://elsewhere.example"})

    assert make(clock, answer).post(alert(clock)) == fault
    assert len(seen) == 1


def test_a_receiver_that_is_not_there_is_a_fault(clock):
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody", request=request)

    assert make(clock, answer).post(alert(clock)) == "ConnectError"


def test_no_secret_travels_in_an_alert(clock):
    assert SECRET.encode() not in posted(clock, summary=f"it said {SECRET}").content
