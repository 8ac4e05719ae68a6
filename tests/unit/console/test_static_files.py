"""Vendored files are those whose checksum is documented; the style reaches the contrast of WCAG 2.2 AA."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import worker.features.console

STATIC = Path(worker.features.console.__file__).with_name("static")
CSS = (STATIC / "console.css").read_text()


def test_a_vendored_script_has_the_documented_checksum_and_a_licence():
    rows = re.findall(
        r"(?m)^\| `([\w.]+)` \|.*\|.*`([\w.]+)` \| `([0-9a-f]{64})` \|$", (STATIC / "README.md").read_text()
    )

    assert [name for name, _, _ in rows] == ["htmx.min.js"]
    for name, licence, digest in rows:
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest
        assert "Zero-Clause BSD" in (STATIC / licence).read_text()


def tokens() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text))
        for name, text in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_reaches_a_contrast_of_4_5_and_edges_of_3(theme: str):
    colours = tokens()[theme]
    kinds = ("bad", "warn", "good", "busy", "quiet")
    pairs = [
        (text, ground, 4.5) for text in ("ink", "muted", "accent") for ground in ("paper", "card", "sunk")
    ]
    pairs += [(kind, f"{kind}-tint", 4.5) for kind in kinds] + [(kind, "card", 4.5) for kind in kinds]
    pairs += [("on-accent", "accent", 4.5), ("edge", "card", 3.0), ("quiet", "sunk", 4.5)]

    low = {
        (one, other): contrast(colours[one], colours[other])
        for one, other, least in pairs
        if contrast(colours[one], colours[other]) < least
    }
    assert low == {}
