"""Masks and injection: nothing of a value is in an answer, however it is cut, nor in how it arrives."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from html import escape
from itertools import pairwise
from urllib.parse import quote, quote_plus

import pytest

from worker.features.egress.injection import (
    MASK,
    InjectedValue,
    Mask,
    MaskForms,
    decoder_of,
    inject,
)

SECRET = b"sk-proj-0123456789/abc+def~&<x>\"y'"
TOKEN = base64.urlsafe_b64encode(bytes(range(60))).rstrip(b"=")
PLACEHOLDER = b"orgworker-placeholder-0123"
KEY = InjectedValue(PLACEHOLDER, SECRET)


def through(forms: MaskForms, *parts: bytes) -> list[bytes]:
    """What a mask passes on for each part, and at the end."""
    mask = Mask(lambda: forms)
    return [*(mask.feed(part) for part in parts), mask.end()]


TEXT = SECRET.decode()
GIVEN_BACK = {
    "raw": SECRET,
    "percent": quote(SECRET, safe="").encode(),
    "percent, paths": quote(SECRET).encode(),
    "percent, lower case": quote(SECRET, safe="")
    .encode()
    .replace(b"%2F", b"%2f")
    .replace(b"%2B", b"%2b")
    .replace(b"%26", b"%26")
    .replace(b"%3C", b"%3c")
    .replace(b"%3E", b"%3e"),
    "form": quote_plus(SECRET).encode(),
    "all percent": b"".join(b"%%%02X" % byte for byte in SECRET),
    "JSON": json.dumps(TEXT).encode(),
    "JSON for HTML": json.dumps(TEXT)
    .replace("&", "\\u0026")
    .replace("<", "\\u003c")
    .replace(">", "\\u003e")
    .replace("'", "\\u0027")
    .replace("+", "\\u002b")
    .encode(),
    "HTML": escape(TEXT).encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "base64": base64.b64encode(SECRET),
    "base64 for URLs": base64.urlsafe_b64encode(SECRET),
    "Basic": base64.b64encode(b"user:" + SECRET),
    "base64 in the middle": base64.b64encode(b"an" + SECRET + b"d more"),
}


@pytest.mark.parametrize("form", GIVEN_BACK)
def test_a_value_is_masked_in_each_form_wherever_the_answer_is_cut(form: str) -> None:
    body = b"before " + GIVEN_BACK[form] + b" after"
    forms = MaskForms([SECRET])
    whole = forms.mask(body)
    assert MASK in whole and len(whole) < len(body)

    for at in range(len(body) + 1):
        assert b"".join(through(forms, body[:at], body[at:])) == whole, at
    assert b"".join(through(forms, *(body[at : at + 1] for at in range(len(body))))) == whole


@pytest.mark.parametrize(
    "secret", [b"a", b"pin1", b"line one\nline two", "grüße €".encode(), b"%41%42", b"[masked]"]
)
def test_values_with_special_characters_and_short_ones_are_masked(secret: bytes) -> None:
    forms = MaskForms([secret])
    body = b"<" + secret + b"> <" + quote(secret, safe="").encode() + b">"

    for at in range(len(body)):
        found = b"".join(through(forms, body[:at], body[at:]))
        assert found == b"<[masked]> <[masked]>"


def test_a_value_that_begins_with_another_is_masked_whole() -> None:
    """Masked as soon as the shorter one was there, the rest of the longer one would pass."""
    forms = MaskForms([b"sk-one", b"sk-one-and-more"])

    assert b"".join(through(forms, b"x sk-one", b"-and-more y")) == b"x [masked] y"


def test_values_that_overlap_leave_nothing_of_either() -> None:
    assert MaskForms([b"abcde", b"defgh"]).mask(b"-abcdefgh-") == b"-[masked]-"


def test_what_is_held_back_does_not_tell_who_guesses_right() -> None:
    """A run that has a service give its guess back sees the same parts, whatever the value is."""
    guesses = [TOKEN[:length] for length in (1, 5, 20, 40)] + [
        TOKEN[:39] + b"!",
        b"Z" * 40,
        b"Bearer " + TOKEN[:9],
    ]
    right, wrong = MaskForms([TOKEN]), MaskForms([TOKEN[::-1]])
    for guess in guesses:
        for parts in ([guess], [guess, b"x"], [guess * 9, guess], [b"data: " + guess, b"\n\n"]):
            sizes = [[len(part) for part in through(forms, *parts)] for forms in (right, wrong)]
            assert sizes[0] == sizes[1], guess


def test_an_event_of_a_stream_is_passed_on_at_once() -> None:
    event = b'data: {"delta": "word"}\n\n'
    assert through(MaskForms([TOKEN]), event, event) == [event, event, b""]


def test_what_is_held_back_has_an_end() -> None:
    forms = MaskForms([TOKEN])
    mask = Mask(lambda: forms)
    held = max(sum(map(len, through_so_far)) for through_so_far in [[mask.feed(b"x")] for _ in range(5000)])
    assert held == 1
    assert len(mask.end()) < 1024


def test_a_placeholder_is_replaced_in_headers_and_basic_credentials_only() -> None:
    basic = base64.b64encode(b"user:" + PLACEHOLDER)
    headers = [
        (b"Authorization", b"Basic " + basic),
        (b"X-Key", b"key=" + PLACEHOLDER + b";"),
        (PLACEHOLDER, b"1"),
        (b"Cookie", basic),
    ]

    assert inject(headers, [KEY]) == [
        (b"Authorization", b"Basic " + base64.b64encode(b"user:" + SECRET)),
        (b"X-Key", b"key=" + SECRET + b";"),
        (PLACEHOLDER, b"1"),
        (b"Cookie", basic),
    ]
    broken = [(b"Authorization", b"Basic " + PLACEHOLDER[:-1]), (b"Authorization", b"basic"), (b"A", b"")]
    assert inject(broken, [KEY]) == broken


def test_a_header_of_a_secret_replaces_what_the_run_sends() -> None:
    value = InjectedValue(PLACEHOLDER, SECRET, b"x-api-key")
    assert inject([(b"X-Api-Key", b"mine"), (b"A", b"b")], [value]) == [(b"A", b"b"), (b"x-api-key", SECRET)]


@pytest.mark.parametrize("size", [0, 1, 257, 65_535, 65_536, 65_537, 131_072, 200_001, 1_000_000])
@pytest.mark.parametrize("kind", ["gzip", "deflate"])
def test_a_body_is_decoded_whole(kind: str, size: int) -> None:
    plain = bytes(size)
    packed = gzip.compress(plain) if kind == "gzip" else zlib.compress(plain)
    for step in (1, 7, len(packed)):
        decoder = decoder_of(kind.encode())
        assert decoder is not None
        parts = [part for at in range(0, len(packed), step) for part in decoder.feed(packed[at : at + step])]
        assert b"".join(parts) == plain
        assert all(len(part) <= 65_536 for part in parts)


def test_a_bomb_is_unpacked_a_part_at_a_time() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    decoder = decoder_of(b"gzip")
    assert decoder is not None
    most = 0
    for part in decoder.feed(bomb):
        most = max(most, len(part))
    assert most == 65_536


def test_files_that_follow_one_another_are_all_decoded() -> None:
    decoder = decoder_of(b"gzip")
    assert decoder is not None
    assert b"".join(decoder.feed(gzip.compress(b"one") + gzip.compress(SECRET))) == b"one" + SECRET


def test_what_is_not_as_it_says_is_not_passed_on() -> None:
    decoder = decoder_of(b" GZIP ")
    assert decoder is not None
    with pytest.raises(zlib.error):
        list(decoder.feed(SECRET))


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip", b"gzip,identity", b"compress", b"\xff"])
def test_an_encoding_that_is_not_known_has_no_decoder(encoding: bytes) -> None:
    assert decoder_of(encoding) is None


def test_values_have_no_readable_form() -> None:
    assert SECRET.decode() not in repr(KEY) + repr(MaskForms([SECRET]))
    assert all(first <= second for first, second in pairwise(sorted(MaskForms([SECRET]).spans(SECRET * 3))))
