"""Wheels made from installed distributions, and a lock with their hashes: what `pip download` brings."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import re
import zipfile
from pathlib import Path

# What an installer adds.
_NOT_OF_WHEELS = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}
_LOCKED = re.compile(r"(?m)^(?P<name>[\w.-]+)==(?P<rest>[^\\\n]+)\\\n(?:    --hash=\S+(?: \\)?\n)+")


def download(lock: Path, folder: Path) -> None:
    """Put the wheels of a lock file into a folder; the lock then has the hashes of these files.

    A package of the lock that is not installed, because of its marker, keeps its hashes and gets no wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def rehashed(entry: re.Match[str]) -> str:
        try:
            found = importlib.metadata.distribution(entry["name"])
        except importlib.metadata.PackageNotFoundError:
            assert ";" in entry["rest"], f"{entry['name']} is not installed"
            return entry[0]
        digest = hashlib.sha256(wheel_of(found, folder).read_bytes()).hexdigest()
        return f"{entry['name']}=={entry['rest']}\\\n    --hash=sha256:{digest}\n"

    lock.write_text(_LOCKED.sub(rehashed, lock.read_text()))


def wheel_of(installed: importlib.metadata.Distribution, folder: Path) -> Path:
    """A wheel with the files of an installed distribution; pip generates its scripts again."""
    text = installed.read_text("WHEEL") or "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    tags = re.findall(r"(?m)^Tag: (\S+)$", text)
    # Several tags of one file are one compressed tag: the parts that occur, joined.
    python, abi, platform = (
        ".".join(dict.fromkeys(part)) for part in zip(*(tag.split("-") for tag in tags), strict=True)
    )
    name = installed.metadata["Name"].replace("-", "_").replace(".", "_")
    info = f"{name}-{installed.version}.dist-info"
    wheel = folder / f"{name}-{installed.version}-{python}-{abi}-{platform}.whl"
    rows = io.StringIO()
    record = csv.writer(rows, lineterminator="\n")
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in _contents(installed):
            path = re.sub(r"^[^/]+\.dist-info/", f"{info}/", path)
            archive.writestr(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.writerow([path, f"sha256={digest}", len(content)])
        if installed.read_text("WHEEL") is None:
            archive.writestr(f"{info}/WHEEL", text)
            record.writerow([f"{info}/WHEEL", "", ""])
        record.writerow([f"{info}/RECORD", "", ""])
        archive.writestr(f"{info}/RECORD", rows.getvalue())
    return wheel


def _contents(installed: importlib.metadata.Distribution) -> list[tuple[str, bytes]]:
    home = Path(str(installed.locate_file("")))
    listed = [Path(file) for file in installed.files or ()]
    # One of `make_plugin`, alone in its folder, lists nothing.
    files = listed or [path.relative_to(home) for path in sorted(home.rglob("*")) if path.is_file()]
    contents = []
    for file in files:
        if ".." in file.parts or "__pycache__" in file.parts or not (home / file).exists():
            continue
        if file.parent.name.endswith(".dist-info") and file.name in _NOT_OF_WHEELS:
            continue
        contents.append((str(file), (home / file).read_bytes()))
    return contents
