"""How long a response asks to pause."""

from __future__ import annotations

import subprocess
import sys

import pytest

from worker.model.throttling import asked_pause

NOW = 1_900_000_000.0


class Headers(dict[str, str]):
    """As a response has them, in any case."""

    def get(self, key: str, default: str = "", /) -> str:  # type: ignore[override]
        return super().get(key.lower(), default)


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"retry-after": "30"}, 30),
        (503, {"retry-after": "1.5"}, 1.5),
        (429, {"retry-after": "Thu, 17 Mar 2030 17:46:50 GMT"}, 10),
        (429, {"ratelimit-reset": "12"}, 12),
        (429, {"x-ratelimit-reset": "1900000020"}, 20),
        (429, {"ratelimit": '"burst";r=0;t=5, "day";r=0;t=90, "other";r=7;t=500'}, 90),
        (429, {}, None),
        (429, {"ratelimit": '"default";r=5;t=30'}, None),
        (429, {"retry-after": "soon"}, None),
        (429, {"retry-after": "-5"}, None),
        (200, {"retry-after": "30", "ratelimit-reset": "5"}, None),
        (500, {"retry-after": "30"}, None),
    ],
)
def test_only_throttled_responses_ask_for_a_pause(status, headers, seconds):
    assert asked_pause(status, Headers(headers), NOW) == seconds


@pytest.mark.parametrize("text", ["9" * 400, "1e9", "∞", "Thu, 99 Foo 99999 99:99:99", ";r=0;t=" * 10_000])
def test_hostile_headers_raise_nothing(text):
    asked_pause(429, Headers({"retry-after": text, "ratelimit": text, "ratelimit-reset": text}), NOW)


def test_it_loads_no_http_client():
    code = "import sys, worker.model.throttling; print('httpx' in sys.modules, 'httpcore' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.split() == ["False", "False"]
