"""Find names that break the rules: `python -m docs.names`.

A public class of `worker/` has one home; those of `worker/client`, which products import as a distribution of
its own, are counted apart. A maximum is called `MAX_` with its noun, and each constant has a statement of its
own. Prints `FILE:LINE: what is wrong` for each problem of a rule in `ENFORCED`, and exits 1
if there is one; of the other rules it prints how many problems there are.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ENFORCED = frozenset({"class", "max", "tuple"})
MAX_EXCEPTIONS = 5
# Classes that may have several homes, and why.
EXCEPTIONS: Mapping[str, str] = {
    "LogLine": "worker.testing publishes it as what a test of a handler reads",
    "RequireToken": "worker.guard publishes it for ASGI and for WSGI",
}

# A distribution that shares no module with the rest, unlike the guard.
APART = "worker/client/"
_CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
_OLD_MAXIMUM = re.compile(r"_?MOST(_[A-Z0-9_]+)?")


class Problem(NamedTuple):
    """What is wrong at a place; `rule` is `class`, `max` or `tuple`."""

    rule: str
    place: str
    text: str


def problems(sources: Mapping[str, str], exceptions: Mapping[str, str] = EXCEPTIONS) -> list[Problem]:
    """The problems of these texts of modules by path."""
    found = []
    homes: dict[str, list[str]] = defaultdict(list)
    for path, text in sources.items():
        statements = list(_statements(ast.parse(text).body))
        found += _constants(statements, path)
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                found += _constants(_statements(statement.body), path)
                if not statement.name.startswith("_"):
                    own = APART if path.startswith(APART) else ""
                    homes[own + statement.name].append(f"{path}:{statement.lineno}")
    for name, places in homes.items():
        if len(places) > 1 and name not in exceptions:
            text = f"class {name} has {len(places)} homes, rename all but one: {', '.join(places)}"
            found.append(Problem("class", places[-1], text))
    for name in exceptions:
        if len(homes[name]) < 2:
            found.append(
                Problem("class", "docs/names.py", f"{name} has one home now: drop it from EXCEPTIONS")
            )
    if len(exceptions) > MAX_EXCEPTIONS:
        found.append(Problem("class", "docs/names.py", f"there are more than {MAX_EXCEPTIONS} EXCEPTIONS"))
    return found


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, with those under a condition or in a `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, name, []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _constants(statements: Iterable[ast.stmt], path: str) -> Iterator[Problem]:
    for statement in statements:
        if isinstance(statement, ast.AnnAssign):
            targets: list[ast.expr] = [statement.target]
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            continue
        place = f"{path}:{statement.lineno}"
        for target in targets:
            together = target.elts if isinstance(target, ast.Tuple) else [target]
            names = [one.id for one in together if isinstance(one, ast.Name) and _CONSTANT.fullmatch(one.id)]
            for name in names:
                if _OLD_MAXIMUM.fullmatch(name):
                    yield Problem("max", place, f"{name}: call a maximum MAX_ and its noun")
            if len(names) > 1 and isinstance(statement.value, ast.Tuple):
                yield Problem(
                    "tuple", place, f"{', '.join(names)}: give each constant a statement of its own"
                )


def main() -> int:
    found = problems(
        {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("worker/**/*.py"))}
    )
    failures = [problem for problem in found if problem.rule in ENFORCED]
    for problem in failures:
        print(f"{problem.place}: {problem.text}")
    others = Counter(problem.rule for problem in found if problem.rule not in ENFORCED)
    for rule, count in sorted(others.items()):
        print(f"not enforced yet: {rule}: {count}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
