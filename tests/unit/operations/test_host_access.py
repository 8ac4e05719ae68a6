"""`doctor` on a host: whether its token can be used, and what each worker says to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from worker.errors import ConfigurationError
from worker.features.hosts.access import check_access, token_of, trusting
from worker.settings import token_files
from worker.settings.sections import HostSettings

TOKEN = "host-token-canary-9d20"
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "token"
    made.write_text(f"{TOKEN}\n")
    made.chmod(0o640)
    return made


def settings(file: Path, *control: str) -> HostSettings:
    return HostSettings(control=control or ("https://w1:8480",), token_file=str(file))


def worker(status: int, *, versions: object = ("v1",)) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"versions": versions})
        return httpx.Response(status, json={})

    return answer


def test_a_token_is_read_without_its_line_end(file: Path):
    assert token_of(settings(file)) == TOKEN


def test_a_token_that_cannot_be_used_is_an_error_that_does_not_quote_it(file: Path, tmp_path: Path):
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match=f"others may read {file}") as raised:
        token_of(settings(file))
    assert TOKEN not in raised.value.message + raised.value.fix
    for text in ("", "two\nlines"):
        file.chmod(0o600)
        file.write_text(text)
        with pytest.raises(ConfigurationError, match="there is no token in"):
            token_of(settings(file))
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        token_of(settings(tmp_path / "absent"))


def test_a_container_engine_may_give_the_file_any_mode(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.chmod(0o444)
    monkeypatch.setattr(token_files, "MOUNTED_SECRETS", str(file.parent))

    assert token_of(settings(file)) == TOKEN


def test_certificates_that_cannot_be_used_are_an_error(file: Path):
    with pytest.raises(ConfigurationError, match=r"host\.ca_file"):
        trusting(str(file))


@pytest.mark.parametrize(
    ("answer", "ok", "detail"),
    [
        (worker(403), True, "https://w1:8480 answers and accepts the token"),
        (worker(401), False, "https://w1:8480 does not accept the token in host.token_file"),
        (worker(403, versions=["v9"]), False, "https://w1:8480 speaks v9, this host v1"),
        (worker(403, versions="v1"), False, "https://w1:8480 is not the attempt API of a worker"),
        (lambda request: httpx.Response(404), False, "https://w1:8480 is not the attempt API of a worker"),
        (lambda request: httpx.Response(200, text="hello"), False, "https://w1:8480 is not the attempt API"),
    ],
)
def test_what_a_worker_says_is_reported(file: Path, answer: Answer, ok: bool, detail: str):
    token, found = check_access(settings(file), transport=httpx.MockTransport(answer))

    assert token.ok
    assert (found.ok, found.check) == (ok, "control")
    assert found.detail.startswith(detail)
    assert ok or found.fix
    assert TOKEN not in found.detail + found.fix


def test_each_worker_is_asked(file: Path):
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "w1":
            raise httpx.ConnectError("refused")
        return worker(403)(request)

    both = settings(file, "https://w1:8480", "https://w2:8480")
    _, first, second = check_access(both, transport=httpx.MockTransport(answer))

    assert (first.ok, second.ok) == (False, True)
    assert first.detail == "https://w1:8480 does not answer: ConnectError"


def test_without_a_token_no_worker_is_asked(tmp_path: Path):
    [found] = check_access(settings(tmp_path / "absent"), transport=httpx.MockTransport(worker(403)))

    assert (found.check, found.ok) == ("token", False)
