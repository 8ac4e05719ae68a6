"""Every page is accessible: axe-core's default rules, light and dark, on a desk and on a phone."""

from __future__ import annotations

import hashlib
import re

from tests.fakes import browser as browsers
from tests.fakes.browser import AXE, PHONE


def test_axe_finds_what_is_wrong(browser, console):
    """The control: a page with faults has violations, and one that is too wide overflows."""
    with browsers.tab(browser, console.base, size=PHONE) as tab:
        tab.page.set_content("<div style='width:900px'><img src='x'><button></button></div>")

        found = " ".join(tab.violations())

        assert {"image-alt", "button-name", "document-title"} <= set(re.findall(r"[a-z]+-[a-z]+", found))
        assert tab.overflow() > 500


def test_axe_is_the_released_file():
    readme = AXE.with_name("README.md").read_text()

    assert hashlib.sha256(AXE.read_bytes()).hexdigest() in readme
