"""The secret of the console's client is read before a process starts anything, and again at each use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.clock import ManualClock
from worker.errors import ConfigurationError
from worker.features.console.wiring import ConsolePages
from worker.kit.web.health import Health
from worker.kit.web.side import Web
from worker.settings import Settings
from worker.telemetry.metrics import Metrics
from worker.wiring.issuers import login_secret


def settings(folder: str) -> Settings:
    login = {"issuer": "main", "client_id": "console", "default_role": "member"}
    issuers = {"main": {"url": "https://acme.kinde.com"}}
    return Settings.model_validate({"secrets_dir": folder, "issuers": issuers, "web": {"login": login}})


def test_it_is_a_file_named_after_the_issuer_without_its_last_line_break(tmp_path: Path):
    (tmp_path / "login__main").write_text("s3cret\n")

    assert login_secret("main", str(tmp_path)) == "s3cret"


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_without_it_nothing_starts_and_the_error_names_the_file(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "login__main").write_text(content)
    given = (settings(str(tmp_path)), ManualClock(), Health(Metrics(version="1.0")))
    web = Web(*given, ConsolePages(*given))

    with pytest.raises(ConfigurationError, match="login__main") as caught:
        web.bind()

    assert caught.value.exit_code == 78
    assert "secrets_dir" in caught.value.fix
