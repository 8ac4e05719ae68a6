"""Find phrases that read as translated: `python -m docs.prose [PATH ...]`.

Prints `FILE:LINE: phrase -> suggestion` for each and exits 1 if there is one. Python and SQL files are
checked in comments and strings, other files everywhere but in the generated parts of pages, whose text is
checked where it is written. To quote a phrase, write `prose: ok` in a comment on its line or the line above.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKED = (
    "worker",
    "jobs",
    "config",
    "docs",
    "bench/README.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
SUFFIXES = {"", ".html", ".json", ".md", ".py", ".service", ".sh", ".sql", ".toml", ".txt", ".yaml", ".yml"}
EXEMPTION = "prose: ok"

# A pattern and what to write instead. A blank in a pattern also matches a line break within a paragraph, a
# comment or a docstring, and the seam of two adjacent strings. Case is ignored.
PHRASES: tuple[tuple[str, str], ...] = (
    (r"(?<!there\s)(?-i:(is|are) none)|(?-i:none stays)", "say what it is: 'not a database file'"),
    (r"(?<!there\s)(is|are|was) no (?!longer|more|less|different|better|worse|such|good)\w+", "is not a ..."),
    (r"nobody", "name the actor ('no client', 'no worker'), or use the passive"),
    (r"whoever|(those|they|he) who|those find out", "name the actor ('the operator', 'the caller')"),
    (r"of (itself|themselves)", "automatically, on its own"),
    (r"all the same", "still, anyway"),
    (r"(?<!--)anew|once more", "again"),
    (r"mend(s|ed|ing)?", "fix, fixed"),
    (r"(tell|tells|telling|told) of", "reports, describes"),
    (r"(is|are|was|were|be|been|being) told", "is notified, receives; is logged, is emitted"),
    (r"(stand|stands|stood) in", "replaces; is in, is stored in"),
    (r"an? \w+ less", "one ... fewer, or name what was dropped"),
    (r"does nothing else", "is idle"),
    (r"nothing of (it|its|theirs)", "name what: 'no runs'"),
    (r"with a past", "past-dated"),
    (r"(workers?|release) before (name|names|this)", "the previous release"),
    (r"where the (issuer|provider) does not say", "by default"),
    (r"that no \w+ is for|no more are on|are on than", "state the rule: 'one connection per thread'"),
    (r"what strikes|struck", "affected; 'delivers alerts'"),
    (r"in vain", "failed attempts"),
    (r"which of most", "say what is lazy, and why"),
    (r"is another(?=[.,;:\"'`]|'s\b)|is another(?=\s*$)", "changed; belongs to another"),
    (r"spoke no", "sent an invalid message"),
    (r"kept are", "retained:"),
    (r"what came", "the result, the response"),
    (r"(is|are|it's) no good", "is unusable, is invalid"),
    (r"(after|at most|for|up to) so (long|many|much)(?! as\b)", "a number: 'N seconds', 'at most N'"),
    (r"(?<!not\s)so many(?= [a-z]+s\b)", "the number of ..."),
    (r"asks? nothing", "skips confirmation, does not ask"),
    (r"as --org of", "say what the option does"),
    (r"tokens? (does|do) not hold", "the token is invalid"),
    (r"left alone", "pauses requests to it"),
    (r"the \w+'s word\b(?! for)", "must be enabled by the operator"),
    (r"shall", "must, should; 'desired state'"),
    (r"(?<![.'\"`])instants?(?![`'\"=])", "scheduled time, time"),
    (r"(?<![.'\"`])findings?(?![`'\"=])", "problem, check result, diagnostics"),
    (r"befell|befalls?|befallen", "happened to"),
    (r"for ever", "indefinitely, forever"),
    (r"parted by", "separated by"),
    (r"hangs? on (an?|the|it|them|no)", "depends on"),
    (r"as dear|dearer", "expensive"),
)

_SEAM = r"""\s*["']\s*\n\s*[rbf]*["']\s*"""
_GAP = rf"(?:{_SEAM}|\s*\n\s*(?:\#+|--)\s*|\s+)"
_PATTERNS = [
    (re.compile(rf"\b(?:{phrase.replace(' ', _GAP)})(?!\w)", re.IGNORECASE | re.MULTILINE), suggestion)
    for phrase, suggestion in PHRASES
]
_GENERATED = re.compile(r"^<!-- generated: .*?^<!-- end -->$", re.DOTALL | re.MULTILINE)
_SQL_TEXT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_QUERY = re.compile(r"\W*[rbf]*\W*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|WITH) ")


@dataclass(frozen=True)
class Match:
    """A phrase in a file; `line` counts from 1."""

    line: int
    phrase: str
    suggestion: str


def matches(text: str, suffix: str = "") -> list[Match]:
    """The phrases of a file's text, in the order of its lines."""
    lines = text.splitlines()
    prose = _prose(text, suffix)
    found = []
    for pattern, suggestion in _PATTERNS:
        for match in pattern.finditer(prose):
            line = text.count("\n", 0, match.start()) + 1
            if not any(EXEMPTION in each for each in lines[max(line - 2, 0) : line]):
                found.append(Match(line, re.sub(_GAP, " ", match[0]), suggestion))
    return sorted(found, key=lambda each: each.line)


def files(paths: Sequence[str]) -> Iterator[Path]:
    """The text files below the paths, this one left out."""
    for path in map(ROOT.joinpath, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if (
                file.is_file()
                and file.suffix in SUFFIXES
                and file.name != "LICENSE"
                and file != Path(__file__)
            ):
                yield file


def main(paths: Sequence[str]) -> int:
    """Print the phrases of all files; returns the exit code."""
    code = 0
    for file in files(paths or CHECKED):
        for match in matches(file.read_text(encoding="utf-8"), file.suffix):
            print(f"{_shown(file)}:{match.line}: {match.phrase} -> {match.suggestion}")
            code = 1
    return code


def _shown(file: Path) -> Path:
    return file.relative_to(ROOT) if file.is_relative_to(ROOT) else file


def _prose(text: str, suffix: str) -> str:
    """The text with what is not checked blanked out; lines and columns stay where they are."""
    if suffix == ".py":
        return _keep(text, _python_text(text))
    if suffix == ".sql":
        return _keep(text, (match.span() for match in _SQL_TEXT.finditer(text)))
    return _GENERATED.sub(lambda part: _blank(part[0]), text)


def _python_text(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each comment and each string that is not a query."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    # Python 3.12 and later split an f-string into several tokens.
    names = ("COMMENT", "STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    kinds = {getattr(tokenize, name, tokenize.STRING) for name in names}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds and not _QUERY.match(token.string):
            yield starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]


def _keep(text: str, spans: Iterable[tuple[int, int]]) -> str:
    kept = list(_blank(text))
    for start, end in spans:
        kept[start:end] = text[start:end]
    return "".join(kept)


def _blank(text: str) -> str:
    return re.sub(r"\S", "\0", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
