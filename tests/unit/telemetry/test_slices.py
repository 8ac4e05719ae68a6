"""A long text is read in slices, and everything is found as in the whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.ids import ALL_ORGS
from worker.telemetry import escapes, masking, slices
from worker.telemetry.escapes import ESCAPES, LONGEST, Escape
from worker.telemetry.masking import Masker
from worker.telemetry.secret_index import BASE64, ESCAPED_BASE64, PERHAPS_TOKEN
from worker.telemetry.slices import Literals, Words

SMALL = LONGEST + 4
PIECES = [
    *(
        "\\",
        "\\\\",
        '\\"',
        "\\n",
        "\\u00e9",
        "\\ud83d",
        "\\udd11",
        "\\ud83d\\udd11",
        "\\U0001f511",
        "\\u{1F511}",
    ),
    *("\\x41", "\\101", "%", "%2", "%22", "%C3%A9", "+", "&", "&quot;", "&#34;", "&#x22;", "&hellip;", "&lt"),
    *("a", "e9", "ordinary", 'pa"ss&w', "é", " ", "\n", "8ae4f1b2-0000-4000-8000-0123456789ab"),
    *("QUFBQUFB", "QUFBQUFBQUFBQUFBQUFB", "canary", "canary-5ecret", "canary-5ecret-value", "…"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
SECRETS = ['pa"ss&w', "canary-5ecret-value", "se cr et", "QUFBQUFB", "aaaaaa"]


@pytest.fixture(autouse=True)
def in_small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (slices, escapes, masking):
        monkeypatch.setattr(module, "SLICE", SMALL)
    monkeypatch.setattr(masking, "_FEW", 2)
    monkeypatch.setattr(slices, "_SHORTEST_STEP", 3)
    monkeypatch.setattr(slices, "_COMPARED", 12)


def whole(escape: Escape, text: str) -> tuple[str, list[int], list[int], str] | None:
    """What `undo` finds in a text, taken from the definition."""
    found = list(escape.pattern.finditer(text))
    if escape.sign not in text or not found:
        return None
    said, at, shifts, upto, shift = "", list[int](), [0], 0, 0
    for match in found:
        said += text[upto : match.start()]
        at.append(len(said))
        said += escape.meaning(match[0])
        upto = match.end()
        shift += len(match[0]) - 1
        shifts.append(shift)
    return said + text[upto:], at, shifts, "".join(escape.meaning(match[0]) for match in found)


def cut_anywhere(escape: Escape, text: str) -> list[str]:
    """The control: the slices of one that does not look where it cuts."""
    return [
        part
        for start in range(0, len(text), SMALL)
        for part in escape.pattern.split(text[start : start + SMALL])
    ]


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.sign)
@given(text=texts)
def test_escapes_are_undone_in_slices_as_in_the_whole(escape: Escape, text: str) -> None:
    undone = escape.undo(text)

    expected = whole(escape, text)
    if undone is None:
        assert expected is None
    else:
        assert (undone.text, list(undone.at), list(undone.shifts), undone.characters) == expected


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.sign)
def test_a_slice_ends_outside_of_an_escape(escape: Escape) -> None:
    written = {"\\": "\\ud83d\\udd11", "%": "%C3", "+": "%2B", "&": "&quot;"}[escape.sign]
    broken = 0
    for before in range(len(written) + SMALL):
        text = "." * before + written * 9
        parts = [part for slice_ in escape._slices(text) for part in slice_]

        assert "".join(parts) == text
        assert parts.count(written) == 9
        broken += cut_anywhere(escape, text).count(written) < 9
    assert broken


def test_no_step_reads_more_than_a_slice() -> None:
    text = "\\\\" * 5_000

    def longest() -> int:
        return max(len("".join(parts)) for escape in ESCAPES[:1] for parts in escape._slices(text))

    assert longest() <= SMALL
    with pytest.MonkeyPatch.context() as patched:  # the control
        patched.setattr(escapes, "SLICE", len(text))
        assert longest() == len(text)


WORDS = [*(BASE64, ESCAPED_BASE64, PERHAPS_TOKEN), Words("a-z", "[a-z]{3,}")]


@pytest.mark.parametrize("words", WORDS, ids=["base64", "escaped base64", "tokens", "words"])
@given(text=texts)
def test_words_are_found_in_slices_as_in_the_whole(words: Words, text: str) -> None:
    found = [match.span() for match in words.find(text)]

    assert found == [match.span() for match in words._pattern.finditer(text)]


@given(literals=st.sets(st.text("ab", min_size=1, max_size=7), min_size=1), text=st.text("abc", max_size=80))
def test_literals_are_found_in_slices_as_in_the_whole(literals: set[str], text: str) -> None:
    pattern = re.compile("|".join(sorted(literals, key=len, reverse=True)))

    found = [text[start:end] for start, end in Literals(literals).spans(text)]

    assert found == pattern.findall(text)


def in_one_slice() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for module in (slices, escapes, masking):
            patched.setattr(module, "SLICE", 1_000_000)
        patched.setattr(slices, "_COMPARED", 1_000_000_000)
        patched.setattr(masking, "_FEW", 1_000_000)
        yield


@given(text=texts)
def test_a_text_is_masked_in_slices_as_in_the_whole(text: str) -> None:
    known = Masker()
    for secret in SECRETS:
        known.register(secret)
    masked = known.mask(text, ALL_ORGS)

    another = Masker()
    for secret in SECRETS:
        another.register(secret)
    for _ in in_one_slice():
        assert masked == another.mask(text, ALL_ORGS)
