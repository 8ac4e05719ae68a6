"""A URL is shown without what is secret in it, also where it is malformed."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.ids import ALL_ORGS
from worker.telemetry import masking
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
    # An @ in a query, where no password can have begun before it.
    "postgresql://host/db?user=a&password=S3cr@t": "postgresql://host/db?user=a&password=***",
    "postgresql://a@host/db?sslmode=require&password=S3cr@t": "postgresql://a@host/db?sslmode=require&password=***",
    "postgresql:///db?user=a@tenant&password=S3cr@t": "postgresql:///db?user=***&password=***",
    # It may be host and port, or a user and the beginning of a password.
    "postgresql://host:5432/db?password=S3cr@t": "postgresql://***",
    "https://acme.kinde.com/@x": "https://***",
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
    "postgresql://h/w?user=a&password=x@hunter2",
    "postgresql://h:5432/w?user=a&password=hunter2@x",
    "postgresql://h/w#hunter2",
    "sqlite://worker:hunter2@h/w",
    "mysql://hunter2@h/w",
    "https://h:hunter2/x",
)


@pytest.mark.parametrize("url", SHOWN)
def test_what_is_no_secret_is_shown(url: str) -> None:
    assert shown_url(url) == SHOWN[url]


# None of its characters is elsewhere in these URLs, but those that separate parts.
PASSWORDS = st.text("ABCDEFGHJKLMNPQRSTUVWXYZ016789:/?#[]@!$&'()+,;=%-._~ <>^|`{}", min_size=1, max_size=24)
# Where a person puts a password that they did not encode.
PLACES = (
    "postgresql://worker:{}@db.acme.com/jobs",
    "postgresql://worker:{}@db.acme.com:5432/jobs?sslmode=require",
    "postgresql://:{}@db.acme.com/jobs",
    "postgresql://worker:{}@/jobs?host=/run/postgresql",
    "postgresql://db.acme.com/jobs?user=a&password={}",
    "postgresql://db.acme.com/jobs?password={}&user=a",
    "postgresql://db.acme.com:5432/jobs?user=a&password={}",
    "postgresql://a@db.acme.com/jobs?password={}",
    "postgresql+psycopg:///jobs?host=/run/postgresql&sslpassword={}",
    "https://worker:{}@jobs.acme.com/x",
    "https://{}@jobs.acme.com/x",
    "https://jobs.acme.com/x?key={}",
)


def shown_pieces(place: str, password: str) -> set[str]:
    """The pieces of four characters that are shown of a password in this place, but not without it."""
    shown = [shown_url(place.format(password), path=path) for path in (True, False)]
    without = [shown_url(place.format("x"), path=path) for path in (True, False)]
    pieces = {password[at : at + 4] for at in range(len(password) - 3)}
    # A separator alone, such as "://", is no piece of a password.
    return {
        piece
        for piece in pieces
        if re.search("[A-Z016789]", piece)
        and any(piece in text for text in shown)
        and piece not in str(without)
    }


@pytest.mark.parametrize("place", PLACES)
@given(password=PASSWORDS)
@example(password="S3CR@TAIL")
@example(password="AB@CD/EF?GH#IJ")
@example(password="0167/AB?CD@EFGH")
@example(password="AB&CDEF@GHIJ=KL")
def test_no_piece_of_a_password_is_shown(place: str, password: str) -> None:
    assert shown_pieces(place, password) == set()


def test_a_piece_is_found_if_all_before_the_last_at_sign_is_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: by that rule a password in a query goes on as the host."""
    monkeypatch.setattr(masking, "_split", lambda rest, *, is_database: rest.rpartition("@"))

    assert {place for place in PLACES if shown_pieces(place, "S3CR@TAIL")} == {
        place for place in PLACES if place.endswith("={}")
    }


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
        ("postgresql://h/w?user=a&password=correct-horse@battery", "login correct-horse@battery failed"),
        ("postgresql://h/w?user=a&password=correct-horse#battery", "login correct-horse#battery failed"),
        ("postgresql://h:5432/w?password=correct-horse@battery", "login correct-horse@battery failed"),
        ("postgresql://worker:correct-horse/a@h/w", "login correct-horse/a failed"),
        ("https://hooks.acme.com/services/correct-horse-battery", "404 for /services/correct-horse-battery"),
    ],
)
def test_the_masker_knows_what_libraries_may_quote(url: str, said: str) -> None:
    masker = Masker()
    for secret in secrets_of_url(url, path=True):
        masker.register(secret)

    assert "correct-horse" not in masker.mask(said, ALL_ORGS)
    assert (
        masker.mask("worker on h, database w, /api/v1/runs", ALL_ORGS)
        == "worker on h, database w, /api/v1/runs"
    )
