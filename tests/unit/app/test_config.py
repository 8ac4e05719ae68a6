"""`config show`: what is in force, who said it, and no password."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker.app.shell import invoke
from worker.app.verbs.config import masked


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://worker:hunter2@db/x", "postgresql://worker:***@db/x"),
        ("postgresql://worker:hun:ter2@db:5432/x", "postgresql://worker:***@db:5432/x"),
        ("postgresql://worker@db/x", "postgresql://worker@db/x"),
        ("postgresql://db/x?user=worker&password=hunter2", "postgresql://db/x?user=worker&password=***"),
        ("postgresql://db/x?sslpassword=hunter2&a=b", "postgresql://db/x?sslpassword=***&***"),
        ("sqlite:////srv/worker.db", "sqlite:////srv/worker.db"),
        ("https://acme.kinde.com:8443", "https://acme.kinde.com:8443"),
    ],
)
def test_a_password_in_a_url_is_masked(url: str, shown: str):
    assert masked({"section": {"url": url}}) == {"section": {"url": shown}}


def test_a_setting_that_is_a_secret_is_masked():
    alerts = {
        "webhook_secret": "hunter2",
        "webhook_url": "https://a/hunter2",
        "deadman_url": "https://a/hunter2",
    }

    shown = masked({"alerts": alerts, "tracing": {"headers": "key=hunter2"}})

    assert shown == {
        "alerts": {"webhook_secret": "***", "webhook_url": "https://a/***", "deadman_url": "***"},
        "tracing": {"headers": "***"},
    }


def test_a_list_of_egress_is_shown_as_it_is():
    items = ("api", "https://*.openai.com", "https://a.example:8443")

    assert masked({"execution": {"egress": items}}) == {"execution": {"egress": items}}


def test_who_said_a_table_of_origins_is_known_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("worker.toml").write_text('[execution.bind_environment]\nKEY = "https://a.example"\n[pools.eu]\n')
    assert invoke(["config", "show", "-o", "jsonl"]) == 0
    monkeypatch.setenv("WORKER_EXECUTION__BIND_ENVIRONMENT", '{"KEY": "https://b.example"}')
    assert invoke(["config", "show", "-o", "jsonl"]) == 0

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    setting = "execution.bind_environment.KEY.origin"
    assert [(row["value"], row["said_by"]) for row in rows if row["setting"] == setting] == [
        ("https://a.example", "worker.toml"),
        ("https://b.example", "WORKER_EXECUTION__BIND_ENVIRONMENT"),
    ]
    assert {row["said_by"] for row in rows if row["setting"] == "pools.eu.placer"} == {"default"}


def test_every_setting_is_shown_with_who_said_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("worker.toml").write_text('[issuers.main]\nurl = "https://acme.kinde.com"\n')
    monkeypatch.setenv("WORKER_DATABASE__URL", "postgresql://worker:hunter2@db/x")

    assert invoke(["--set", "execution.drain=90s", "config", "show", "-o", "jsonl"]) == 0

    rows = {row["setting"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["database.url"] == {
        "setting": "database.url",
        "value": "postgresql://worker:***@db/x",
        "said_by": "WORKER_DATABASE__URL",
    }
    assert rows["issuers.main.url"]["said_by"] == "worker.toml"
    assert rows["execution.drain"]["value"] == "1m30s"
    assert rows["execution.drain"]["said_by"] == "--set execution.drain"
    assert rows["execution.lease"] == {"setting": "execution.lease", "value": "30s", "said_by": "default"}


def test_json_is_one_object_as_worker_toml_has_it(capsys: pytest.CaptureFixture[str]):
    assert invoke(["config", "show", "-o", "json"]) == 0

    shown = json.loads(capsys.readouterr().out)
    assert shown["execution"]["renew"] == "5s"
    assert shown["issuers"] == {}


def test_a_bad_setting_exits_78_and_is_named(capsys: pytest.CaptureFixture[str]):
    assert invoke(["--set", "execution.renew=20s", "config", "show"]) == 78

    assert "renew is 20s, more than a quarter of the lease" in capsys.readouterr().err
