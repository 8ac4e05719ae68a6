"""How a command ends: exit codes, and errors for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from worker.app import shell
from worker.app.shell import invoke
from worker.app.verbs import keys
from worker.errors import Busy, DefinitionError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORKER_DEBUG", raising=False)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make every command that needs settings fail with an exception."""

    def fail_with(error: BaseException) -> None:
        def load(*_: object) -> None:
            raise error

        monkeypatch.setattr("worker.settings.load", load)

    return fail_with


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["runs"],
        ["runs", "nonsense"],
        ["runs", "show"],
        ["runs", "list", "--limit", "many"],
        ["runs", "list", "-o", "xml"],
        ["credentials", "add", "org_acme", "--client-id", "abc"],
        ["--set", "execution.poll", "config", "show"],
        ["definitions", "next", "org_acme"],
        ["definitions", "next", "org_acme", "a", "--schedule", "@daily"],
    ],
)
def test_what_is_not_understood_exits_2_and_says_so(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
):
    assert invoke(arguments) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("option", ["--config", "--set", "--debug"])
def test_an_option_behind_the_verb_is_told_its_place(option: str, capsys: pytest.CaptureFixture[str]):
    assert invoke(["runs", "list", option, "x"]) == 2

    assert f"fix: {option} goes before the verb: `" in capsys.readouterr().err


def test_a_mistyped_command_is_told_the_one_that_is_close(capsys: pytest.CaptureFixture[str]):
    invoke(["runs", "lsit"])

    assert "Did you mean 'list'?" in capsys.readouterr().err


@pytest.mark.parametrize("noun", ["", "orgs", "runs list", "definitions next", "apply"])
def test_help_is_there_at_every_level(noun: str, capsys: pytest.CaptureFixture[str]):
    assert invoke([*noun.split(), "--help"]) == 0

    assert capsys.readouterr().out.startswith("Usage: ")


def test_an_error_of_ours_ends_with_its_own_exit_code(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
):
    failing(Busy("another worker holds it", fix="stop it first"))

    assert invoke(["runs", "list", "-o", "json"]) == 75
    assert json.loads(capsys.readouterr().err) == {
        "error": {"code": "busy", "message": "another worker holds it", "fix": "stop it first"}
    }


def test_an_error_of_a_file_names_entry_and_field_once(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
):
    failing(DefinitionError("no time zone is named 'X'", entry="definition a/b", field="timezone"))
    invoke(["runs", "list"])
    failing(DefinitionError("definition a/b, timezone: no such", entry="definition a/b", field="timezone"))
    invoke(["runs", "list"])

    assert capsys.readouterr().err.splitlines() == [
        "error: definition a/b: timezone: no time zone is named 'X'",
        f"fix: {DefinitionError.usual_fix}",
        "error: definition a/b, timezone: no such",
        f"fix: {DefinitionError.usual_fix}",
    ]


def test_an_unexpected_error_is_one_line_and_exit_1(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
):
    failing(RuntimeError("broken\nin many lines"))

    assert invoke(["runs", "list"]) == 1

    error = capsys.readouterr().err
    assert error.startswith("error: unexpected RuntimeError: broken\nfix: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_debug_shows_where_an_unexpected_error_came_from(
    by: str,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    failing(RuntimeError("broken"))
    if by == "variable":
        monkeypatch.setenv("WORKER_DEBUG", "1")

    assert invoke([*(["--debug"] if by == "flag" else []), "runs", "list"]) == 1

    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_exits_130(failing: Callable[[BaseException], None]):
    failing(KeyboardInterrupt())

    assert invoke(["runs", "list"]) == 130


@pytest.mark.parametrize("verb", [[], ["run"]])
def test_the_module_without_a_verb_means_run(verb: list[str], monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["/opt/worker/__main__.py"])
    monkeypatch.setattr("worker.app.process.run", lambda settings: seen.append(settings) or 75)
    Path("var").mkdir()
    Path("var/worker.db").touch()

    assert invoke(["--set", "execution.poll=2s", *verb]) == 75
    assert [settings.execution.poll.total_seconds() for settings in seen] == [2.0]
    assert shell.run is not None


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        pytest.param("host", "orgworker-host", marks=pytest.mark.feature("hosts")),
        pytest.param("serve", "orgworker-serve", marks=pytest.mark.feature("console")),
        pytest.param("relay", "orgworker-relay", marks=pytest.mark.feature("outbox")),
        pytest.param("provision", "orgworker-prov", marks=pytest.mark.feature("provisioning")),
        # The control: a command that ends at once has the name that `main` gave it.
        ("runs list", None),
    ],
)
def test_ps_shows_what_a_process_does(verb: str, shown: str | None):
    own = Path("/proc/self/comm")
    before = own.read_text()
    try:
        assert invoke(verb.split()) == 78

        assert own.read_text() == (f"{shown}\n" if shown else before)
    finally:
        own.write_text(before)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert invoke(["--version"]) == 0

    assert capsys.readouterr().out.strip().count(".") == 2


def test_keys_are_generated_once(capsys: pytest.CaptureFixture[str]):
    """A second key ring in its place would lose every secret that the first one seals."""
    assert invoke(["keys", "generate", "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    ring = Path(made["keyring"])
    assert ring == Path("var/keyring")
    assert ring.stat().st_mode & 0o777 == 0o600
    before = ring.read_bytes()

    assert invoke(["keys", "generate"]) == 5
    assert ring.read_bytes() == before
    assert keys.app is not None


def test_the_console_script_without_a_verb_prints_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["/opt/bin/orgworker"])
    monkeypatch.setattr(shell, "run", lambda context: pytest.fail("a worker was started"))

    assert invoke([]) == 0

    printed = capsys.readouterr()
    assert printed.out.startswith("Usage: orgworker ")
    assert "definitions" in printed.out
    assert printed.err == ""


def test_all_errors_of_a_file_are_printed(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
):
    error = DefinitionError("a: no such", entry="a", field="b", fix="one")
    error.others = (DefinitionError("c: nor this", entry="c", fix="two"),)
    failing(error)
    assert invoke(["runs", "list"]) == 78
    shown = capsys.readouterr().err.splitlines()
    assert invoke(["runs", "list", "-o", "json"]) == 78

    assert shown == ["error: b: a: no such", "fix: one", "error: c: nor this", "fix: two"]
    assert json.loads(capsys.readouterr().err)["error"] == {
        "code": "definition",
        "message": "b: a: no such",
        "fix": "one",
        "others": [{"code": "definition", "message": "c: nor this", "fix": "two"}],
    }
