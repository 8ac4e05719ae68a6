"""`new-job` makes a distribution that is right as it stands."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests.fakes.plugins import make_plugin
from worker.app.shell import invoke


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which the commands are given."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    ("name", "distribution", "module"),
    [
        ("acme.digest", "acme-digest", "acme_digest"),
        ("Acme_Usage.Export-2", "acme-usage-export-2", "acme_usage_export_2"),
        ("greet", "greet", "greet"),
    ],
)
def test_a_name_is_that_of_handler_distribution_and_module(folder, capsys, name, distribution, module):
    assert invoke(["new-job", name]) == 0

    home = folder / distribution
    project = tomllib.loads((home / "pyproject.toml").read_text())
    assert project["project"]["name"] == distribution
    assert project["project"]["entry-points"]["worker.jobs"] == {name: f"{module}:run"}
    files = {str(file.relative_to(folder)) for file in home.rglob("*") if file.is_file()}
    assert files == set(capsys.readouterr().out.split())
    assert {"README.md", f"{module}.py", f"test_{module}.py"} <= {Path(file).name for file in files}
    assert "$" not in "".join((folder / file).read_text() for file in files)


def test_what_it_makes_is_short(folder):
    invoke(["new-job", "acme.digest"])

    handler = ast.parse((folder / "acme-digest" / "acme_digest.py").read_text()).body[-1]
    test = (folder / "acme-digest" / "tests" / "test_acme_digest.py").read_text()
    assert isinstance(handler, ast.AsyncFunctionDef)
    assert handler.end_lineno - handler.lineno < 10
    assert len(test.splitlines()) < 20


def test_it_says_what_to_do_next(folder, capsys):
    invoke(["new-job", "acme.digest"])

    said = capsys.readouterr().err
    assert "pip install -e './acme-digest[test]'" in said
    assert "pytest acme-digest" in said
    assert "try acme.digest" in said


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("", 2, "'' is not a handler name"),
        (".x", 2, "'.x' is not a handler name"),
        ("acme.", 2, "'acme.' is not a handler name"),
        ("a b", 2, "'a b' is not a handler name"),
        ("../up", 2, "'../up' is not a handler name"),
        ("größe", 2, "'größe' is not a handler name"),
        ("a" * 201, 2, "at most 200"),
        ("3d.render", 2, "a module called 3d_render, which Python cannot import"),
        ("class", 2, "a module called class, which Python cannot import"),
        ("json", 5, "a module json is installed already"),
        ("worker", 5, "a module worker is installed already"),
        ("http.request", 5, "orgworker 0.1.0 offers a handler http.request already"),
        ("orgworker", 5, "a distribution orgworker is installed already"),
        ("acme.jobs", 5, "a distribution acme-jobs is installed already"),
    ],
)
def test_a_name_that_would_not_do_is_refused_and_nothing_made(
    folder, tmp_path, capsys, monkeypatch, name, code, message
):
    monkeypatch.syspath_prepend(make_plugin(tmp_path / "site", dist="acme-jobs"))

    assert invoke(["new-job", name]) == code

    said = capsys.readouterr().err
    assert message in said
    assert "such as `new-job acme.digest`" in said
    assert list(folder.iterdir()) == []


def test_nothing_that_is_there_is_touched(folder, capsys):
    (folder / "acme-digest").mkdir()

    assert invoke(["new-job", "acme.digest"]) == 5

    assert "acme-digest exists here already" in capsys.readouterr().err
    assert list((folder / "acme-digest").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(folder, capsys):
    folder.rmdir()

    assert invoke(["new-job", "acme.digest"]) == 2

    assert "acme-digest cannot be created: No such file or directory" in capsys.readouterr().err
