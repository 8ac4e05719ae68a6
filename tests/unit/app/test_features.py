"""The list of features: each name in it is there, and nothing is imported before it is used."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import suites
from worker.app.features import FEATURES
from worker.errors import ConfigurationError, UsageError
from worker.kit import feature as features
from worker.kit.feature import Feature, Point, refuse_settings
from worker.settings import Settings
from worker.store import tables

WORKER = Path(__file__).parents[3] / "worker"
MADE_OF = """import json, sys; {}
print(json.dumps([each for each in sys.modules if each.startswith("worker.features.")]))"""
installed = [each for each in FEATURES if each.is_installed()]


@pytest.mark.parametrize("feature", installed, ids=lambda each: each.name)
def test_what_a_feature_names_is_there(feature: Feature):
    for place in (*feature.verbs.values(), *feature.gives.values()):
        assert feature.load(place) is not None
    for name in feature.tables:
        assert name in tables.metadata.tables
    for path in feature.settings:
        assert path.split(".")[0] in Settings.model_fields


def test_every_feature_is_here_unless_a_suite_runs_without_it():
    """Else tests that ask which commands there are would leave out those of a feature that does not load."""
    suite = os.environ.get(suites.VARIABLE)

    assert {each.name for each in installed} == set(suites.NAMES if suite is None else suite.split())


def test_a_process_that_forgot_its_features_does_not_run_without_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "_features", None)

    with pytest.raises(RuntimeError, match="use"):
        Point("hosts.worker", "[attempts] listen").find()


def test_each_folder_is_a_feature_and_no_table_has_two():
    folders = {path.parent.name for path in (WORKER / "features").glob("*/__init__.py")}
    named = [name for feature in FEATURES for name in feature.tables]

    assert folders == {feature.name for feature in installed}
    assert len(named) == len(set(named))


@pytest.mark.parametrize("feature", installed, ids=lambda each: each.name)
def test_to_look_whether_a_feature_is_installed_costs_nothing(feature: Feature):
    """That imports its package: so the package has a docstring and no code."""
    package = ast.parse((WORKER / "features" / feature.name / "__init__.py").read_text(encoding="utf-8"))

    assert ast.get_docstring(package) and len(package.body) == 1


def test_each_point_of_the_core_is_one_that_a_feature_gives():
    asked = {
        name
        for path in WORKER.rglob("*.py")
        if "features" not in path.relative_to(WORKER).parts
        for name in re.findall(r'Point\(\s*"([\w.]+)"', path.read_text(encoding="utf-8"))
    }

    assert asked == {name for feature in FEATURES for name in feature.gives}
    assert all(name.split(".")[0] in suites.NAMES for name in asked)


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("from worker.app.shell import invoke; invoke(['runs', 'list'])", set()),
        ("import worker.app.process", set()),
        # The control: a verb of a feature loads that one.
        pytest.param(
            "from worker.app.shell import invoke; invoke(['hosts', 'list'])",
            {"hosts"},
            marks=pytest.mark.feature("hosts"),
        ),
    ],
)
def test_a_feature_is_imported_only_by_what_uses_it(code: str, loaded: set[str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", MADE_OF.format(code)], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    found = {name.split(".")[2] for name in json.loads(done.stdout.splitlines()[-1])}
    assert found == loaded


def test_without_the_feature_a_point_gives_nothing_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    absent = Feature("nowhere", gives={"nowhere.thing": "module:thing"}, settings=("attempts",))
    monkeypatch.setattr(features, "_features", (absent,))
    point: Point[object] = Point("nowhere.thing", "`things list`")

    assert point.find() is None
    with pytest.raises(UsageError, match="`things list` needs the feature nowhere, which is not installed"):
        point.require()
    refuse_settings(Settings())
    with pytest.raises(ConfigurationError, match=r"\[attempts\] needs the feature nowhere") as caught:
        refuse_settings(Settings.model_validate({"attempts": {"listen": "127.0.0.1:1"}}))
    assert "remove the section" in caught.value.fix


def test_a_fault_within_a_feature_is_no_missing_feature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What a feature needs and lacks must not look as if the feature was left out."""
    package = tmp_path / "broken"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(features, "FOLDER", tmp_path.name)

    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_nowhere"):
        Feature("broken").is_installed()
