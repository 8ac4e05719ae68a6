"""`handlers` where there is no database."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.cli import CommandLine


def test_without_a_database_the_installed_handlers_are_listed_and_none_is_made(plugins: Path, tmp_path: Path):
    file = tmp_path / "none.db"
    cli = CommandLine(tmp_path, f"sqlite:///{file}")

    listed = cli("handlers", "list", "-o", "json")
    shown = cli("handlers", "show", "acme.note", "-o", "json")

    names = [row["name"] for row in listed.json()]
    assert names == sorted(names)
    assert "acme.note" in names
    assert f"there is no database {file}; these are the handlers of the plug-ins installed here" in listed.err
    assert shown.json()["distribution"] == "acme-jobs"
    described = {row["name"]: row["description"] for row in listed.json()}
    assert described["acme.note"] == "Write one line, and return what the context says about the run."
    assert not file.exists()
