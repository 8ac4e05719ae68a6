"""Helm's own engine and linter, as a library: charts are rendered without a cluster and the `helm` program.

They run in a process of their own, because a Go runtime leaves threads and signal handlers behind, and
other tests fork.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MISSING = (
    None
    if platform.machine() == "x86_64" and sys.platform == "linux"
    else "there is no wheel of Helm's engine for this machine: the chart is not rendered"
)


@dataclass(frozen=True)
class Rendered:
    """What Helm made of one set of values: objects, or an error."""

    objects: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    notes: str = ""
    error: str = ""

    def one(self, kind: str, name: str) -> dict[str, Any]:
        """The object of that kind and name."""
        [found] = [each for each in self.objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
        return found

    def names(self, kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.objects if each["kind"] == kind}


def render(
    chart: Path, cases: Mapping[str, Mapping[str, Any]], *, release: str = "orgworker"
) -> dict[str, Rendered]:
    """Lint and render the chart with the values of each case, as `helm install` of the release does."""
    asked = {"chart": str(chart), "release": release, "cases": cases}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.helm"],
        cwd=Path(__file__).parents[2],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return {name: _read(**made) for name, made in json.loads(done.stdout).items()}


def _read(files: dict[str, str], findings: list[str], error: str) -> Rendered:
    notes = "".join(text for path, text in files.items() if path.endswith("NOTES.txt"))
    texts = (text for path, text in files.items() if path.endswith(".yaml"))
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    return Rendered(objects, findings, notes, error)


def _main() -> None:
    import helm_python as helm

    asked = json.load(sys.stdin)
    made: dict[str, dict[str, Any]] = {}
    with helm.Chart.load(asked["chart"]) as chart:
        for name, values in asked["cases"].items():
            report = helm.lint(asked["chart"], values, strict=True)
            # 1 is information: a chart may have an icon.
            findings = [one["error"] for one in report["messages"] if one["severity"] > 1]
            files, error = {}, ""
            try:
                files = chart.render(values, name=asked["release"], namespace="jobs")
            except helm.HelmError as refused:
                error = str(refused)
            made[name] = {"files": files, "findings": findings + report["errors"], "error": error}
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    _main()
