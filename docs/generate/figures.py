"""Pictures of the pages' Mermaid figures: `python -m docs.generate.figures` makes those that are missing.

A picture is named by its figure's text, so one that is out of date is missing. Making one needs Chromium, the
development dependencies, and npm, for the one version of Mermaid that all of them are drawn with.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1]
FOLDER = DOCS / "images" / "figures"
FIGURE = re.compile(r"^```mermaid\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
MERMAID = "mermaid@11.17.2"

_DRAW = """async (text) => {
    mermaid.initialize({ startOnLoad: false, theme: "neutral", fontFamily: "sans-serif" });
    document.body.innerHTML = (await mermaid.render("figure", text)).svg;
    const picture = document.querySelector("svg");
    // As a file it has no page around it: its own size and background, and well-formed XML.
    picture.setAttribute("width", picture.viewBox.baseVal.width);
    picture.setAttribute("height", picture.viewBox.baseVal.height);
    picture.style.background = "white";
    return new XMLSerializer().serializeToString(picture);
}"""


def picture_of(source: str) -> Path:
    """The file with the picture of a figure."""
    return FOLDER / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def sources() -> list[str]:
    """The figures of all pages of docs/."""
    return [text for page in sorted(DOCS.rglob("*.md")) for text in FIGURE.findall(page.read_text("utf-8"))]


def main() -> None:
    missing = [text for text in sources() if not picture_of(text).exists()]
    wanted = {picture_of(text) for text in sources()}
    for old in set(FOLDER.glob("*.svg")) - wanted:
        old.unlink()
    if not missing:
        return
    from tests.fakes import browser as browsers

    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="orgworker-figures-") as folder, browsers.launched() as browser:
        packed = ["npm", "pack", "--silent", MERMAID]
        name = subprocess.run(packed, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
        with tarfile.open(Path(folder, name)) as archive:
            archive.extract("package/dist/mermaid.min.js", folder, filter="data")
        page = browser.new_page()
        page.set_content("<!doctype html><body></body>")
        page.add_script_tag(path=str(Path(folder, "package/dist/mermaid.min.js")))
        for text in missing:
            picture = page.evaluate(_DRAW, text)
            picture_of(text).write_text(picture + "\n", encoding="utf-8")
            print(picture_of(text).relative_to(DOCS))


if __name__ == "__main__":
    main()
