"""`new-job`: create a plug-in distribution with one handler, its entry point and its test."""

from __future__ import annotations

import keyword
import re
import sys
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated

from worker.diagnosis.shadow import warning
from worker.errors import Conflict, UsageError
from worker.handlers.installed import distributions, normalised
from worker.kit.options import argument
from worker.kit.output import printable, say

EXAMPLE = "such as `new-job acme.digest`"
# Names that are valid for a handler and for a distribution, which also ends with a letter or digit.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,198}[A-Za-z0-9])?")


def new_job(
    name: Annotated[str, argument("NAME", "The handler's name, such as acme.digest.")],
) -> None:
    """Create a distribution with one handler, its entry point and its test, in a new folder here.

    `new-job acme.digest` creates the folder acme-digest with a module acme_digest. It installs
    nothing and prints the next steps.
    """
    distribution, module = _names(name)
    _refuse_taken_names(name, distribution, module)
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
            f"{folder} exists here already", fix="choose another name, or go to another folder"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be created: {error.strerror}", fix="go to a folder that you can write to"
        ) from None
    if (shadowed := warning(Path.cwd())) is not None:
        say(shadowed)
    say(f"next: `pip install -e './{folder}[test]'`, then `pytest {folder}`")
    say(f"then: `try {name} --param 'items=[\"Ada\"]'`; {folder}/README.md has the next steps")


def _names(name: str) -> tuple[str, str]:
    """The names of the distribution and of its module.

    Raises:
        UsageError: the name is not valid for a handler, a distribution or a module.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{printable(name)!r} is not a handler name",
            fix=f"use at most 200 letters and digits, with '.', '_' and '-' between them: {EXAMPLE}",
        )
    distribution = normalised(name)
    module = distribution.replace("-", "_")
    if not module.isidentifier() or keyword.iskeyword(module):
        raise UsageError(
            f"{name} would need a module called {module}, which Python cannot import",
            fix=f"start it with another word: {EXAMPLE}",
        )
    return distribution, module


def _refuse_taken_names(name: str, distribution: str, module: str) -> None:
    """Refuse names in use: of two handlers with the same name, neither runs.

    Raises:
        Conflict: names what has the name.
    """
    fix = f"choose another name, such as one that starts with your company's: {EXAMPLE}"
    for found in distributions():
        if any(point.name == name for point in found.points):
            raise Conflict(f"{found.name} {found.version} offers a handler {name} already", fix=fix)
    spec = find_spec(module)
    # A mere folder on the path does not count, although Python would import it.
    if module in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
        raise Conflict(f"a module {module} is installed already", fix=fix)
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return
    raise Conflict(f"a distribution {distribution} is installed already", fix=fix)


def _template(name: str) -> Template:
    file = resources.files("worker.app.verbs").joinpath("skeleton", f"{name}.txt")
    return Template(file.read_text(encoding="utf-8"))
