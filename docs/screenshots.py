"""Take the screenshots of docs/console.md from the demo's data: `python -m docs.screenshots`.

It needs Chromium and the development dependencies, and takes half a minute. Each picture is as wide as a
desktop's window; `-dark` and `-phone` are the morning page in the dark and on a phone.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.console import Console, serving
from tests.fakes.site import wait_until

FOLDER = Path(__file__).parent / "images"
PAGE = Path(__file__).parent / "console.md"
SIZE = (1280, 860)
PHONE = (390, 860)
# The digests of every three seconds that a picture of a busy console needs.
ENDED = 4


def addresses(console: Console) -> dict[str, str]:
    """The address of each picture's page, by name."""
    digest = console.runs("--org", "org_acme", "--definition", "nightly-digest", "--limit", "1")[0]["id"]
    return {
        "morning": "/",
        "search": "/search?q=acme+state:failed",
        "failures": "/failures",
        "run": f"/runs/{digest}",
        "retry": f"/runs/{digest}#retry-from-checkpoint",
        "orgs": "/orgs",
        "org": "/orgs/org_acme",
        "definition": "/orgs/org_acme/definitions/crm-sync",
        "templates": "/templates",
        "handlers": "/handlers",
        "credentials": "/credentials",
        "workers": "/workers",
        "audit": "/audit",
    }


def named_in(text: str) -> set[str]:
    """The pictures that the page shows."""
    return set(re.findall(r"\]\(images/([\w-]+)\.png\)", text))


def pictures(console: Console) -> Iterator[tuple[str, str, tuple[int, int], bool]]:
    """Name, address, size and whether it is dark."""
    for name, address in addresses(console).items():
        yield name, address, SIZE, False
    yield "morning-dark", "/", SIZE, True
    yield "morning-phone", "/", PHONE, False


def shoot(tab: Tab, name: str, address: str) -> int:
    """Take one picture; returns its size in bytes."""
    status = tab.go(address)
    if status != 200:
        raise SystemExit(f"{address} answered {status}")
    # A page is not loaded again for another place in it.
    tab.page.wait_for_load_state()
    picture = tab.page.screenshot(path=FOLDER / f"{name}.png", animations="disabled")
    return len(picture)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    wanted, total = named_in(PAGE.read_text(encoding="utf-8")), 0
    with (
        tempfile.TemporaryDirectory(prefix="orgworker-screenshots-") as folder,
        browsers.launched() as browser,
        serving(Path(folder), browser) as console,
    ):
        wait_until(
            lambda: len(console.runs("--state", "succeeded", "--definition", "support-digest")) >= ENDED,
            "some digests to succeed",
            timeout=60,
        )
        made = set()
        for name, address, size, dark in pictures(console):
            with browsers.tab(browser, console.base, size=size, dark=dark, state=console.state) as tab:
                size_in_bytes = shoot(tab, name, address)
            made.add(name)
            total += size_in_bytes
            print(f"{name}.png  {size_in_bytes / 1000:.0f} kB  {address}")
    print(f"{total / 1e6:.2f} MB in all")
    if made != wanted:
        raise SystemExit(f"docs/console.md does not show exactly these: {', '.join(sorted(made ^ wanted))}")


if __name__ == "__main__":
    main()
