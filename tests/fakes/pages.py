"""Pages of the documentation: their fenced blocks, links, headings and commands.

A test runs the `sh` blocks of a page in order in one shell; `exit=N` is the expected exit code. A `text`
block right after one is its output: each line occurs in order, `…` matches anything, and ids, times and
decimals may differ. `<!-- sh` begins a hidden block, which also runs. A block of another language whose
first line is `# NAME.EXT` is that file.

`console` blocks are commands after `$ `. Those of orgworker run one by one, in
tests/integration/app/test_page_commands.py; `toml` is read by the code that reads such files. Everything
else has a mark behind its language: `by=test_x` (the test that runs it, and that names the page), `output`,
`other=Docker` (a command or a file of another product), `dev` (commands of the checkout: `./dev test`).
"""

from __future__ import annotations

import functools
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from worker.app.shell import build

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+) *(?P<argument>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$"
    r"|^<!-- sh\n(?P<hidden>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)
_ANY_FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w.-]+\.\w+)\n")
_CODE = re.compile(r"`([^`\n]+)`")
_PROGRAM = re.compile(
    r"(?:^|[\s(]|/bin/)(?:python3?(?: -P)? -m worker|orgworker)(?= )([^\n|;&>)]*)", re.MULTILINE
)

_INSTALLER = re.compile(
    r"\b(?:(?:pip3?|pipx|uv(?: pip| tool)?|poetry)(?: -[\w=-]+)* (?:install|download|add|run)|uvx)\b"
    r"([^`|;&)]*)"
)
# A command over two lines: in a shell, or in a sentence or comment that breaks around `install`.
_WRAPPED = re.compile(r"\\\n\s*|(?<=install)\n(?:# )?|(?<=pip|ipx)\n(?:# )?(?=install)")
# A requirement by name, unlike the path of a wheel.
_OURS = re.compile(r"['\"]?orgworker([-_](guard|client))?(\[[\w,-]*\])?([=<>~!@].*)?['\"]?[.,:]?$")


@dataclass(frozen=True)
class Block:
    """A fenced or hidden block; `line` is its first line in the page."""

    language: str
    argument: str
    text: str
    line: int
    is_hidden: bool = False

    @property
    def file(self) -> str | None:
        """The name of the file that the block contains, or None."""
        found = None if self.language in ("sh", "text", "console") else _FILE.match(self.text)
        return found[1] if found else None

    @property
    def marks(self) -> dict[str, str]:
        """The words behind the language: `exit=1 by=test_x` is `{"exit": "1", "by": "test_x"}`."""
        return dict(word.partition("=")[::2] for word in self.argument.split())

    @property
    def exit_code(self) -> int:
        return int(self.marks.get("exit", 0))


def treatment(block: Block, before: Block | None, page: list[Block]) -> str | None:
    """What a test does with a block, or what it is if none can run it; None if the page does not say."""
    if block.language == "sh":
        return "run"
    for mark in ("by", "output", "other", "dev"):
        if mark in block.marks:
            return mark
    if block.language == "text" and before is not None and before.language == "sh":
        return "compared"
    if block.file is not None and any(each.language == "sh" for each in page):
        return "run"
    return {"toml": "read", "console": "command", "mermaid": "drawn"}.get(block.language)


def blocks(page: str) -> list[Block]:
    """All blocks of a page with a language, in order."""
    found = []
    for match in _FENCE.finditer(page):
        line = page.count("\n", 0, match.start()) + 2
        if match["hidden"] is not None:
            found.append(Block("sh", "", match["hidden"], line, is_hidden=True))
        else:
            text = textwrap.dedent(match["text"])
            found.append(Block(match["language"], match["argument"].strip(), text, line))
    return found


def installs_by_name(text: str) -> list[str]:
    """The commands that would install a distribution of ours from an index, where the names are not ours."""
    text = _WRAPPED.sub(" ", text)
    found = {call[0].strip(): call[1] for line in text.splitlines() for call in _INSTALLER.finditer(line)}
    return [call for call, words in found.items() if any(map(_OURS.match, words.split()))]


def links(page: str) -> list[str]:
    """The targets of the page's links, without other sites."""
    prose = _ANY_FENCE.sub("", page)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub generates for the page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", _ANY_FENCE.sub("", page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> Iterator[str]:
    """The words after `python -m worker` in blocks and inline code, and code such as `runs list --org`."""
    groups = {name for name, one in _command_line().commands.items() if hasattr(one, "commands")}
    for block in blocks(page):
        if block.language in ("sh", "console"):
            yield from _called(block.text.replace("\\\n", " "))
    for code in _CODE.findall(_ANY_FENCE.sub("", page)):
        # `orgworker worker` in a sentence is the name of a session, as PostgreSQL lists it.
        if not code.startswith("orgworker "):
            yield from _called(code)
        noun, _, rest = code.partition(" ")
        if noun in groups and re.match(r"[a-z-]+\b", rest):
            yield code


def _called(text: str) -> Iterator[str]:
    for rest in _PROGRAM.findall(text):
        # A nested command is a match of its own.
        yield rest.partition("$(")[0].strip(' "')


def unknown_words(command: str) -> list[str]:
    """The verbs and options of a command that the real command line does not have."""
    try:
        words = shlex.split(command.partition(" #")[0])
    except ValueError:
        words = command.split()
    here = _command_line()
    wrong: list[str] = []
    skip = False
    for word in (each.strip("[]") for each in words):
        takes_value = _options(here).get(word.partition("=")[0])
        if skip:
            skip = False
        elif word.startswith("-") and len(word) > 1 and not word[1:].isdigit():
            if takes_value is None and word not in ("--help", "--"):
                wrong.append(word)
            skip = bool(takes_value) and "=" not in word
        elif hasattr(here, "commands"):
            if word in here.commands:
                here = here.commands[word]
            elif re.fullmatch(r"[a-z][a-z-]*", word):
                wrong.append(word)
                break
            else:
                break  # VERB, … and other placeholders
    return wrong


@functools.cache
def _command_line() -> Any:
    return typer.main.get_command(build())


def _options(command: object) -> dict[str, bool]:
    """The names of a command's options, and whether each takes a value."""
    names = {}
    for parameter in getattr(command, "params", ()):
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("-"):
                names[name] = not parameter.is_flag
    return names


def missing_lines(expected: str, shown: str) -> list[str]:
    """The lines of a `text` block that the output lacks in this order."""
    lines = [_stable(line) for line in shown.splitlines()]
    missing = []
    at = 0
    for wanted in expected.splitlines():
        pattern = ".*".join(re.escape(part.strip()) for part in _stable(wanted).split("…"))
        place = next((n for n, line in enumerate(lines[at:], at) if re.fullmatch(pattern, line)), None)
        if place is not None:
            at = place + 1
        elif wanted.strip() not in ("", "…"):
            missing.append(wanted)
    return missing


_VARYING = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?"), "INSTANT"),
    (re.compile(r"\d+\.\d+"), "DECIMAL"),
    (re.compile(r"\s+"), " "),
)


def _stable(line: str) -> str:
    for pattern, word in _VARYING:
        line = pattern.sub(word, line)
    return line.strip()
