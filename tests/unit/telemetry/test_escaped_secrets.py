"""A secret is masked however it is written: by any encoder, and by one within another."""

from __future__ import annotations

import base64
import html
import json
import re
import tracemalloc
from collections.abc import Callable
from itertools import product
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape as xml_escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.ids import ALL_ORGS
from worker.telemetry import secret_index
from worker.telemetry.masking import MASK, Masker
from worker.telemetry.secret_forms import lines_of

Encoder = Callable[[str], str]


def lower_percents(text: str) -> str:
    return re.sub("%..", lambda found: found[0].lower(), text)


# Each writes a text, such as the message that a secret is in, within another.
ENCODERS: dict[str, Encoder] = {
    "as it is": str,
    "repr": repr,
    "repr of bytes": lambda text: repr(text.encode()),
    "ascii": ascii,
    "unicode_escape": lambda text: text.encode("unicode_escape").decode(),
    "json": json.dumps,
    "json utf-8": lambda text: json.dumps(text, ensure_ascii=False),
    "json for html": lambda text: json.dumps(text).replace("&", "\\u0026").replace("/", "\\/"),
    "html": html.escape,
    "html but quotes": lambda text: html.escape(text, quote=False),
    "html by number": lambda text: html.escape(text).encode("ascii", "xmlcharrefreplace").decode(),
    "xml": lambda text: xml_escape(text, {'"': "&#34;", "'": "&apos;"}),
    "percent": lambda text: quote(text, safe=""),
    "percent of a path": quote,
    "percent, lower case": lambda text: lower_percents(quote(text, safe="")),
    "percent, Latin-1": lambda text: quote(text.encode("latin-1", "replace"), safe=""),
    "form": quote_plus,
    "form, lower case": lambda text: lower_percents(quote_plus(text)),
    "UTF-8 read as Latin-1": lambda text: text.encode().decode("latin-1"),
}
AWKWARD = [
    'pa"ss\\wo/rd+%&=é~ß☃',
    "a'b\"c\\d&e<f>g",
    "¡señal&'secreta'!",
    "密码是很长的秘密",
    "to\\n%41&amp;\\u0041+b",
    "p 🔑 key",
]


def known(*secrets: str) -> Masker:
    masker = Masker()
    for secret in secrets:
        masker.register(secret)
    return masker


def loses(encode: Encoder, secret: str) -> bool:
    """Whether an encoder does not keep the secret, so that nobody could read it."""
    return encode is ENCODERS["percent, Latin-1"] and any(ord(letter) > 255 for letter in secret)


def masked_whole(secret: str, outer: str, inner: str) -> str | None:
    """What is shown of a secret between two words that no encoder changes; None if an encoder loses it."""
    within = ENCODERS[inner](f"AAAA{secret}ZZZZ")
    if loses(ENCODERS[inner], secret) or loses(ENCODERS[outer], within):
        return None
    masked = known(secret).mask(ENCODERS[outer](within), ALL_ORGS)
    return masked[masked.index("AAAA") + 4 : masked.rindex("ZZZZ")]


@pytest.mark.parametrize("secret", AWKWARD)
def test_an_awkward_secret_is_masked_in_each_encoding_of_another(secret: str) -> None:
    shown = {pair: masked_whole(secret, *pair) for pair in product(ENCODERS, repeat=2)}

    assert {pair: text for pair, text in shown.items() if text not in (MASK, None)} == {}


secrets = st.one_of(
    st.text(alphabet="\"'\\&%<>/+=~ a1B-._é߀☃🔑\u200b", min_size=6, max_size=24),
    st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), min_size=6, max_size=24),
).filter(lambda text: lines_of(text) == [text] and not set("AZ") & set(text))
names = st.sampled_from(sorted(ENCODERS))


@settings(max_examples=200)
@given(secret=secrets, outer=names, inner=names)
def test_any_secret_is_masked_in_each_encoding_of_another(secret: str, outer: str, inner: str) -> None:
    assert masked_whole(secret, outer, inner) in (MASK, None)


@settings(max_examples=100)
@given(secret=secrets, outer=names, shift=st.integers(0, 2))
def test_any_secret_is_masked_in_base64_of_any_encoding(secret: str, outer: str, shift: int) -> None:
    if loses(ENCODERS[outer], secret):
        return
    written = base64.b64encode(("x" * (12 + shift) + ENCODERS[outer](secret) + "y" * 12).encode()).decode()

    masked = known(secret).mask(written, ALL_ORGS)

    # Up to three letters on each side also hold what stands around the secret.
    assert re.fullmatch(r"eHh4.{12,24}\[masked\].{12,24}", masked), masked


def test_base64_is_found_in_a_url() -> None:
    secret = "".join(map(chr, (0x6F, 0x7E, 0x7E, 0x3F, 0x3E, 0x3E))) * 5
    pair = base64.b64encode(b"user:" + secret.encode()).decode()

    assert "%2F" in quote(pair, safe="")
    assert known(secret).mask(f"?auth={quote(pair, safe='')}", ALL_ORGS).startswith("?auth=dXNlcj")
    assert MASK in known(secret).mask(f"?auth={quote(pair, safe='')}", ALL_ORGS)


def test_json_with_an_escaped_secret_stays_json() -> None:
    secret = AWKWARD[0]
    text = json.dumps({"said": json.dumps({"key": secret}), "repr": repr(secret), "n": 1})

    masked = json.loads(known(secret).mask(text, ALL_ORGS))

    assert json.loads(masked["said"]) == {"key": MASK}
    assert masked == {"said": masked["said"], "repr": f"'{MASK}'", "n": 1}


def test_text_with_escapes_and_without_a_secret_stays_as_it_is() -> None:
    text = json.dumps([json.dumps({"a": 'b"c\\d'}), "%41%2F+x&amp;&lt;", "\\u00e9\\x41 \\"])

    assert known(*AWKWARD).mask(text, ALL_ORGS) == text


def test_an_escaped_secret_that_is_forgotten_leaves_nothing() -> None:
    masker = known(*AWKWARD)
    for secret in AWKWARD:
        masker.forget(secret)

    for secret in AWKWARD:
        assert masker.mask(json.dumps(secret), ALL_ORGS) == json.dumps(secret)
    assert vars(vars(masker)["_all"])["_anchors"] == {}
    assert vars(vars(masker)["_all"])["_words"] == {}


def test_the_memory_of_a_secret_does_not_grow_with_the_number_of_encodings() -> None:
    """Fifty thousand of them, which is the limit, take a few hundred MB at most."""
    tracemalloc.start()
    try:
        masker = known(*(f'{number:06}"\\&%é+/=<ß' for number in range(1000)))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert masker.mask('000500\\"\\\\&%\\u00e9+/=<\\u00df', ALL_ORGS) == MASK
    assert taken / 1000 < 12_000


def test_control_without_looking_at_escapes_the_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_index, "ESCAPES", ())
    secret = AWKWARD[0]

    assert known(secret).mask(repr(secret), ALL_ORGS) == repr(secret)
    assert known(secret).mask(json.dumps(json.dumps(secret)), ALL_ORGS) == json.dumps(json.dumps(secret))
