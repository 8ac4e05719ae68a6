"""How little it takes: the built-in handler `http.request`, tested without a network."""

import httpx

from worker.testing import ProviderDown, SecretRotated


def test_a_busy_api_is_called_again_under_the_same_key_with_whatever_token_is_good(orgworker):
    answers = iter(
        [httpx.Response(503, headers={"Retry-After": "60"}), httpx.Response(200, json={"rows": 7})]
    )
    params = {"url": "https://api.example.com/{org_code}/export"}
    faults = [ProviderDown(), SecretRotated(after=1)]

    finished = orgworker.run("http.request", params=params, api=lambda _: next(answers), faults=faults)

    assert [attempt.reason for attempt in finished.attempts] == ["no_token", "retry", None]
    assert finished.result == {"status": 200, "body": {"rows": 7}}
    assert len({request.headers["Authorization"] for request in finished.requests}) == 2
    assert len({request.headers["Idempotency-Key"] for request in finished.requests}) == 1
