"""A newcomer's path: the products' pages begin in an empty folder and take few commands, without accounts.

tests/acceptance/test_docs.py runs them from their first command to their last.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fakes.pages import ROOT, blocks

PATHS = [ROOT / "docs" / "recipes" / f"{name}.md" for name in ("fastapi", "django")]
_HEREDOC = re.compile(r"<<'(\w+)'(.*?)\n\1$", re.DOTALL | re.MULTILINE)


def typed(page: str) -> list[str]:
    """The commands of a page, hidden ones included; a heredoc is one command with the line that begins it."""
    shell = "\n".join(block.text for block in blocks(page) if block.language == "sh")
    lines = _HEREDOC.sub("", shell).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_commands_are_counted_as_they_are_typed():
    page = "```sh\ncat > x <<'EOF'\nfirst\n# second\nEOF\n# why\nrun \\\n    --it\n```\n<!-- sh\nwait\n-->\n"

    assert typed(page) == ["cat > x ", "run      --it", "wait"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_path_takes_fewer_than_25_commands_and_none_needs_an_account(path: Path):
    page = path.read_text()

    assert 10 < len(typed(page)) < 25
    # Nothing was there before: neither an installation nor a provider.
    assert "<!-- installation" not in page and "<!-- provider" not in page
    assert not [block for block in blocks(page) if block.language == "console"]
    # Addresses that are contacted are this machine's; those of `.example` are names only.
    hosts = {host.split(":")[0] for host in re.findall(r"https?://([^\s\"'/`)]+)", page)}
    assert hosts <= {"127.0.0.1", "api.example.com"}
