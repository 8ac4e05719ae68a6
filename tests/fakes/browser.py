"""A real browser, driven by Playwright, and pages that report what must not happen.

`python -m tests.fakes.browser` prints its path, or says how to install one; `./dev test` does so first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

# The first draws no window around its pages, and needs half the processor time.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
AXE = Path(__file__).parents[1] / "browser" / "vendor" / "axe.min.js"
# The sandbox of Chromium does not start for root.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
DESKTOP = (1280, 800)
PHONE = (390, 844)

# Runs in each document before its own scripts: the browser's reports of the policy reach the console.
REPORTER = """
document.addEventListener('securitypolicyviolation', event => console.error(
    'CSP-REPORT ' + event.violatedDirective + ' ' + event.blockedURI + ' ' + event.sample));
"""


def executable() -> str:
    """The browser's path: one of the machine, else the one that Playwright has installed.

    Raises:
        RuntimeError: there is none on this machine; a missing browser is an error, never a skipped test.
    """
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    with sync_playwright() as playwright:
        if os.access(path := playwright.chromium.executable_path, os.X_OK):
            return path
    raise RuntimeError(
        f"no browser ({', '.join(NAMES)}) for the browser tests. Install one, then call this again:\n"
        "  Debian:     sudo apt-get install chromium-headless-shell\n"
        "  elsewhere:  .venv/bin/playwright install --with-deps chromium"
    )


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser; its profile is gone afterwards."""
    # Debian's wrapper reads the memory of the machine from /proc, and prints about it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHROMIUM")}
    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=list(ARGUMENTS), env=dict(environment)
        )
        try:
            yield browser
        finally:
            browser.close()


def is_ready(base: str) -> bool:
    """Whether a console answers at this address."""
    try:
        return httpx.get(f"{base}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def quoted(text: str) -> str:
    """The text for a query of an address; what cannot be encoded is replaced."""
    return quote(text.encode("utf-8", "replace"), safe="")


@dataclass
class Tab:
    """One page in a context of its own, with everything that it reported.

    `wrongs` are errors of the page: of its scripts, of the policy (CSP), of what it loads from elsewhere.
    """

    page: Page
    base: str
    wrongs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrongs.append(f"script error: {error}"))
        self.page.on("dialog", self._asked)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _said(self, message: ConsoleMessage) -> None:
        # A page that is not allowed or not found is an error for Chromium's console, and none of the page.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.wrongs.append(f"console: {message.text}")

    def _asked(self, dialog: Any) -> None:
        self.wrongs.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def go(self, path: str) -> int:
        """Open a page of the console; returns its status."""
        response = self.page.goto(f"{self.base}{path}")
        assert response is not None
        return response.status

    def path(self) -> str:
        """Where the browser is, without the console's address."""
        return self.page.url.removeprefix(self.base)

    def foreign(self) -> list[str]:
        """Requests that went elsewhere."""
        return [url for url in self.requests if not url.startswith((self.base, "data:", "about:"))]

    def log_in(self, token: str) -> None:
        """Log in with a token, by the form."""
        self.go("/")
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("button", name="Log in", exact=True).click()

    def violations(self, *, colours_only: bool = False) -> list[str]:
        """What axe-core finds on the page with its default rules."""
        if self.page.evaluate("() => typeof axe") != "object":
            self.page.evaluate(AXE.read_text())
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        if colours_only:
            options["runOnly"] = ["color-contrast", "link-in-text-block"]
        found = self.page.evaluate("options => axe.run(document, options)", options)
        return [
            f"{rule['id']} ({rule['impact']}): {node['target']} {node['html'][:160]}"
            for rule in found["violations"]
            for node in rule["nodes"][:3]
        ]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        root = "document.documentElement"
        return int(self.page.evaluate(f"() => {root}.scrollWidth - {root}.clientWidth"))


@contextlib.contextmanager
def tab(
    browser: Browser,
    base: str,
    *,
    size: tuple[int, int] = DESKTOP,
    scripts: bool = True,
    state: Any = None,
    dark: bool = False,
) -> Iterator[Tab]:
    """A page in a fresh context; `state` has the cookies of another one, `scripts` is JavaScript."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        java_script_enabled=scripts,
        color_scheme="dark" if dark else "light",
        storage_state=state,
        timezone_id="Europe/Berlin",
    )
    # What does not come within this time does not come.
    context.set_default_timeout(10_000)
    context.add_init_script(REPORTER)
    opened = Tab(context.new_page(), base)
    opened.watch()
    try:
        yield opened
    finally:
        context.close()


if __name__ == "__main__":
    try:
        print(executable())
    except RuntimeError as missing:
        sys.exit(str(missing))
