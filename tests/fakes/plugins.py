"""Makes a plug-in distribution in a folder: its modules, and the metadata that pip would write."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def make_plugin(
    folder: Path | str,
    dist: str = "acme-jobs",
    version: str = "1.0",
    modules: Mapping[str, str] | None = None,
    entry_points: Mapping[str, str] | None = None,
) -> Path:
    """Install a distribution into a folder for sys.path or PYTHONPATH.

    `modules` maps a dotted name to its source; `entry_points` a handler's name to
    `module:attribute`.
    """
    home = Path(folder)
    for name, source in (modules or {}).items():
        path = home.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    info = home / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    lines = [f"{name} = {target}\n" for name, target in (entry_points or {}).items()]
    (info / "entry_points.txt").write_text("[worker.jobs]\n" + "".join(lines))
    (info / "RECORD").write_text("")
    return home


@contextmanager
def plugin_on_path(folder: Path, source: Path, entry_points: Mapping[str, str]) -> Iterator[Path]:
    """The folder of a plug-in with the module of a file, which is found by sys.path alone."""
    home = make_plugin(folder, modules={source.stem: source.read_text()}, entry_points=entry_points)
    sys.path.append(str(home))
    try:
        yield home
    finally:
        sys.path.remove(str(home))
        sys.modules.pop(source.stem, None)
