"""The products of docs/recipes, imported from their pages."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fakes.pages import ROOT, blocks


@contextlib.contextmanager
def product(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The modules of a page by name, written to an empty folder; no scripts, relays and parts of files."""
    page = ROOT / "docs" / "recipes" / f"{name}.md"
    files = {
        block.file: block.text
        for block in blocks(page.read_text())
        # What is tested by name needs more than the page's own files.
        if block.language == "python" and block.file and not block.argument
    }
    names = []
    for file, text in files.items():
        (folder / str(file)).write_text(text)
        if "django.setup()" not in text and "lifespan_context" not in text:
            names.append(str(file).removesuffix(".py"))
    with (
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
        mock.patch.dict("os.environ", ORGWORKER_TOKEN="token-of-crm"),
    ):
        try:
            yield {module: importlib.import_module(module) for module in names}
        finally:
            for module in names:
                sys.modules.pop(module, None)
