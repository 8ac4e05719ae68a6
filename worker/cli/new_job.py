"""`new-job`: a plug-in distribution to begin with: one handler, its entry point and its test."""

from __future__ import annotations

import keyword
import re
import sys
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from worker.cli.output import printable, say
from worker.errors import Conflict, UsageError
from worker.handlers.installed import distributions, normalised

EXAMPLE = "such as `new-job acme.digest`"
# What a handler may be called, and a distribution as well: that also ends with a letter or digit.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,198}[A-Za-z0-9])?")


def new_job(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What the handler is to be called, such as acme.digest.")
    ],
) -> None:
    """Make a distribution with one handler, its entry point and its test, in a new folder here.

    `new-job acme.digest` makes the folder acme-digest with a module acme_digest. Nothing
    is installed; what to do next is printed.
    """
    distribution, module = _names(name)
    _refuse_what_is_taken(name, distribution, module)
    folder = Path(distribution)
    words = {"handler": name, "distribution": distribution, "module": module}
    try:
        folder.mkdir()
        (folder / "tests").mkdir()
        for place, template in {
            "pyproject.toml": "pyproject.toml",
            "README.md": "README.md",
            f"{module}.py": "job.py",
            f"tests/test_{module}.py": "test_job.py",
        }.items():
            (folder / place).write_text(_template(template).substitute(words), encoding="utf-8")
            print(folder / place)
    except FileExistsError:
        raise Conflict(
            f"there is something called {folder} here", fix="choose another name, or go to another folder"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}", fix="go to a folder in which you may write"
        ) from None
    say(f"next: `pip install -e './{folder}[test]'`, then `pytest {folder}`")
    say(f"then: `try {name} --param 'items=[\"Ada\"]'`; {folder}/README.md says how to go on")


def _names(name: str) -> tuple[str, str]:
    """What the distribution and its module are called.

    Raises:
        UsageError: the name cannot be that of a handler, of a distribution or of a module.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{printable(name)!r} is no handler name",
            fix=f"letters and digits, between them also '.', '_' and '-', at most 200: {EXAMPLE}",
        )
    distribution = normalised(name)
    module = distribution.replace("-", "_")
    if not module.isidentifier() or keyword.iskeyword(module):
        raise UsageError(
            f"{name} would need a module called {module}, which Python cannot import",
            fix=f"begin it with a word of yours: {EXAMPLE}",
        )
    return distribution, module


def _refuse_what_is_taken(name: str, distribution: str, module: str) -> None:
    """Two of a name hide each other, and neither would run.

    Raises:
        Conflict: says what has the name.
    """
    fix = f"choose another name, one that begins with your company's: {EXAMPLE}"
    for found in distributions():
        if any(point.name == name for point in found.points):
            raise Conflict(f"{found.name} {found.version} offers a handler {name} already", fix=fix)
    spec = find_spec(module)
    # A folder of that name somewhere on the path is no module, though Python would take it for one.
    if module in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
        raise Conflict(f"a module {module} is installed already", fix=fix)
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return
    raise Conflict(f"a distribution {distribution} is installed already", fix=fix)


def _template(name: str) -> Template:
    file = resources.files("worker.cli").joinpath("skeleton", f"{name}.txt")
    return Template(file.read_text(encoding="utf-8"))
