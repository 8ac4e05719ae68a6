"""What the shells are given, and what they get when they ask."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.site import as_process, wait_until
from worker.app.shell import invoke
from worker.kit.completion import COMPLETION_VARIABLE

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_orgworker(shell: str, capfd: pytest.CaptureFixture[str]):
    assert invoke(["completion", shell]) == 0

    script = capfd.readouterr().out
    assert COMPLETION_VARIABLE in script
    assert f"complete_{shell}" in script
    assert "orgworker" in script


def tab(lines: str, program: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What bash offers for the last word of each line, with `--` in between."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    asked = (
        f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; "
        f'_orgworker_completion {program}; printf "%s\\n" "${{COMPREPLY[@]}}"'
        for line in lines.splitlines()
    )
    command = [bash, "--norc", "-c", f"source <({program} completion bash); {'; echo --; '.join(asked)}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(environment))


def test_bash_completes_verbs_options_and_values(tmp_path: Path):
    lines = "orgworker runs l\norgworker runs list -o j\norgworker runs list --st\norgworker completion f"
    program = tmp_path / "orgworker"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom worker.app import main\nsys.argv[0] = 'orgworker'\nmain()\n"
    )
    program.chmod(0o755)

    done = tab(lines, program, os.environ)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [*("list", "logs"), "--", *("json", "jsonl"), "--", "--state", "--", "fish"]


# As systemd-run: the command gets none of the caller's variables but those that are named.
SYSTEMD_RUN = """\
#!{python}
import os, sys
words = sys.argv[1:]
given = [word.removeprefix("--setenv=").partition("=") for word in words if word.startswith("--setenv=")]
command = words[next(at for at, word in enumerate(words) if not word.startswith("-")):]
command[0] = "{python}"
command[command.index("--config") + 1] = "{settings}"
os.execve(command[0], command, {{"PATH": os.environ["PATH"], "WORKER_CONFIG": "{settings}"}}
          | {{name: value for name, _, value in given}})
"""


def test_behind_the_wrapper_a_tab_offers_names_and_nothing_but_run_starts_a_worker(
    tmp_path: Path, own_cli: CommandLine
):
    fake = tmp_path / "systemd-run"
    fake.write_text(SYSTEMD_RUN.format(python=sys.executable, settings=own_cli.settings))
    fake.chmod(0o755)
    environment = dict(os.environ) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    wrapper = ROOT / "config" / "orgworker"
    own_cli("orgs", "add", "org_acme")
    own_cli("orgs", "add", "org_apex")

    # On a busy machine a database may take longer than a completion waits.
    offered = wait_until(
        lambda: tab("orgworker orgs show org_a", wrapper, environment).stdout.split(),
        "names of orgs",
        timeout=90,
    )
    assert offered == ["org_acme", "org_apex"]

    command = [wrapper, "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no command is named" in done.stderr


@on_either
def test_names_and_states_are_offered_from_the_database(
    own_cli: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def offered(line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", f"orgworker --config {own_cli.settings} {line}")
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) + 2))
        with pytest.raises(SystemExit):
            invoke([])
        return capsys.readouterr().out.split()

    for code in ("org_a", "org_b", "org_b$(touch x)"):
        own_cli("orgs", "add", code)
    entry = {"org": "org_a", "name": "nightly", "handler": "x", "schedule": "@daily"}
    other = entry | {"org": "org_b", "name": "news"}
    own_cli("apply", "-", "--allow-unknown-handlers", stdin=json.dumps({"definition": [entry, other]}))
    monkeypatch.setenv(COMPLETION_VARIABLE, "complete_bash")

    # The shell evaluates what it gets, so a name with $ is not offered.
    assert offered("orgs pause org_b") == ["org_b"]
    assert offered("definitions show org_a n") == ["nightly"]
    assert offered("runs list --org org_b --definition n") == ["news"]
    assert offered("runs list --definition n") == ["news", "nightly"]
    assert offered("runs list --state failed,r") == ["failed,running", "failed,refused"]
    assert offered("orgs list --state p") == ["paused"]
    assert offered("orgs show 100%_") == []


def test_a_process_that_is_asked_for_completions_never_runs_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Also where the program's name is not that of the script: it decided which variable counted."""
    started: list[object] = []
    monkeypatch.setattr("worker.app.shell.run", started.append)
    for asked in ("bash_complete", "complete_bash", "nonsense"):
        monkeypatch.setenv(COMPLETION_VARIABLE, asked)
        monkeypatch.setenv("COMP_WORDS", "orgworker ru")
        monkeypatch.setenv("COMP_CWORD", "1")
        with pytest.raises(SystemExit):
            invoke([])

    assert started == []


def test_a_database_that_hangs_ends_the_tab_in_silence(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://worker@127.0.0.1:{silent.getsockname()[1]}/orgworker?connect_timeout=60"
        imports = "from worker.app import main\nfrom worker.kit import completion\n"
        program = f"{imports}completion.PATIENCE = 0.5\nmain()"
        asked = {
            COMPLETION_VARIABLE: "complete_bash",
            "COMP_WORDS": "orgworker orgs show o",
            "COMP_CWORD": "3",
        }
        environment = {**os.environ, **asked, "WORKER_DATABASE__URL": url}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_database_nothing_is_offered_printed_or_made(tmp_path: Path):
    settings = tmp_path / "worker.toml"
    settings.write_text(f'[database]\nurl = "sqlite:///{tmp_path}/none.db"\n')
    asked = {COMPLETION_VARIABLE: "complete_bash", "COMP_WORDS": "orgworker orgs show o", "COMP_CWORD": "3"}
    with as_process(tmp_path, {**os.environ, **asked}):
        command = [sys.executable, "-m", "worker"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)

    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["worker.toml"]
