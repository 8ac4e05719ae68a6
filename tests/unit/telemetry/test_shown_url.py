"""A URL is shown without what is secret in it, also where it is malformed."""

from __future__ import annotations

import pytest

from worker.telemetry.masking import Masker, secrets_of_url, shown_url

SHOWN = {
    "postgresql://worker:hunter2@127.0.0.1/worker": "postgresql://worker:***@127.0.0.1/worker",
    "postgresql+psycopg://worker@[::1]:5432/w": "postgresql+psycopg://worker@[::1]:5432/w",
    "postgresql://h/w?user=worker&password=hunter2": "postgresql://h/w?user=worker&password=***",
    "postgresql:///w?host=/run/postgresql&sslpassword=hunter2": "postgresql:///w?host=/run/postgresql&sslpassword=***",
    "sqlite:////srv/a@b/worker.db": "sqlite:////srv/a@b/worker.db",
    "sqlite:///var/worker.db?key=hunter2": "sqlite:///var/worker.db?***",
    "https://acme.kinde.com/": "https://acme.kinde.com/",
    "https://token@acme.kinde.com": "https://***@acme.kinde.com",
    "https://hooks.acme.com/services?key=hunter2": "https://hooks.acme.com/services?***",
    "": "***",
}
# Each has hunter2 where a person may put a password by mistake.
MALFORMED = (
    "postgresql://worker:p@hunter2@127.0.0.1/w",
    "postgresql://worker:hunter2@x@127.0.0.1/w",
    "postgresql://worker:hunter2/x@127.0.0.1/w",
    "postgresql://worker:hunter2?x@127.0.0.1/w",
    "postgresql://worker:hunter2#x@127.0.0.1/w",
    "postgresql://worker:x?host=hunter2@127.0.0.1/w",
    "postgresql://worker:hunter2",
    "postgresql://worker:hunter2/w",
    "postgresql://worker:hunter2\n@127.0.0.1/w",
    "postgresql://worker:hunter2 @127.0.0.1/w",
    "postgresql://worker:hunter2℀@127.0.0.1/w",
    "postgresql://worker: hunter2@127.0.0.1/w",
    " postgresql://worker:hunter2@127.0.0.1/w",
    "postgresql:worker:hunter2@127.0.0.1/w",
    "//worker:hunter2@127.0.0.1/w",
    "worker:hunter2@127.0.0.1/w",
    "hunter2",
    "postgresql://h/w?pass%77ord=hunter2",
    "postgresql://h/w?passwordhunter2",
    "postgresql://h/w#hunter2",
    "sqlite://worker:hunter2@h/w",
    "mysql://hunter2@h/w",
    "https://h:hunter2/x",
)


@pytest.mark.parametrize("url", SHOWN)
def test_what_is_no_secret_is_shown(url: str) -> None:
    assert shown_url(url) == SHOWN[url]


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_shows_no_password(url: str) -> None:
    for path in (True, False):
        assert "hunter2" not in shown_url(url, path=path)


def test_a_path_that_is_secret_is_left_out() -> None:
    url = "https://hooks.acme.com/services/T000/hunter2"

    assert shown_url(url, path=False) == "https://hooks.acme.com/***"
    assert shown_url("https://hooks.acme.com/", path=False) == "https://hooks.acme.com"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://worker:correct-horse-battery@h/w", "login correct-horse-battery failed"),
        ("postgresql://worker:p@correct-horse-battery@h/w", 'no host "correct-horse-battery"'),
        ("postgresql://worker:correct%2Dhorse%2Dbattery@h/w", "login correct-horse-battery failed"),
        ("postgresql://h/w?password=correct-horse-battery", "login correct-horse-battery failed"),
        ("https://hooks.acme.com/services/correct-horse-battery", "404 for /services/correct-horse-battery"),
    ],
)
def test_the_masker_knows_what_libraries_may_quote(url: str, said: str) -> None:
    masker = Masker()
    for secret in secrets_of_url(url, path=True):
        masker.register(secret)

    assert "correct-horse" not in masker.mask(said)
    assert masker.mask("worker on h, database w, /api/v1/runs") == "worker on h, database w, /api/v1/runs"
