"""What the shells are given, and what they get when they ask."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worker.cli.app import COMPLETION_VARIABLE, invoke


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_orgworker(shell: str, capfd: pytest.CaptureFixture[str]):
    assert invoke(["completion", shell]) == 0

    script = capfd.readouterr().out
    assert COMPLETION_VARIABLE in script
    assert f"complete_{shell}" in script
    assert "orgworker" in script


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("orgworker runs l", ["list", "logs"]),
        ("orgworker runs list -o j", ["json", "jsonl"]),
        ("orgworker runs list --st", ["--state"]),
        ("orgworker completion f", ["fish"]),
    ],
)
def test_bash_completes_verbs_options_and_values(line: str, offered: list[str], tmp_path: Path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    program = tmp_path / "orgworker"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom worker.cli import main\nsys.argv[0] = 'orgworker'\nmain()\n"
    )
    program.chmod(0o755)
    words = line.split()
    script = (
        f"source <({program} completion bash); "
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        f'_orgworker_completion {program}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )

    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, timeout=60)

    assert done.stderr == ""
    assert done.stdout.split() == offered
