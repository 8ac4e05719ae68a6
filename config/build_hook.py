"""Writes the commit into sdist and wheel, where `--version` reads it: see worker/release.py.

A build without the repository, such as the image's, takes it from ORGWORKER_COMMIT.
"""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TARGET = "worker/commit"


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds `worker/commit`, except to an editable installation, which asks git."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        # In an unpacked sdist this reads the file that is there. Adding it anyway keeps it last in the
        # wheel, so that a wheel from the sdist has the same hash as one from the checkout.
        release = runpy.run_path(str(Path(self.root, "worker/release.py")))
        commit = os.environ.get("ORGWORKER_COMMIT") or release["commit"]()
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name, "commit")
        file.write_text(f"{commit}\n", encoding="ascii")
        build_data["force_include"][str(file)] = TARGET

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()
