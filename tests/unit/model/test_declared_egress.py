"""Lists of egress that are compared: a definition with a handler's, a host's with what is approved."""

from __future__ import annotations

import pytest

from worker.model.egress import is_wider, parse_audiences, parse_items, wider

ORIGIN, WILD = "https://a.example.com", "https://*.example.com"


@pytest.mark.parametrize(
    ("item", "than", "is_beyond"),
    [
        ("api", ["api"], False),
        ("api", [ORIGIN], True),
        ("api", ["public"], True),  # an API may have a private address
        ("api", ["open"], False),
        ("public", [ORIGIN, "api"], True),
        ("public", ["open"], False),
        ("open", ["api", "public"], True),
        (ORIGIN, ["public"], False),
        (ORIGIN, ["api"], True),
        (ORIGIN, [f"{ORIGIN}:443/"], False),
        (ORIGIN, ["https://a.example.com:8443"], True),
        (ORIGIN, [WILD], False),
        ("https://example.com", [WILD], True),
        ("https://a.example.com.evil.test", [WILD], True),
        ("https://evil-example.com", [WILD], True),
        (WILD, [ORIGIN], True),
        (WILD, ["public"], False),
        ("https://*.eu.example.com", [WILD], False),
        (WILD, ["https://*.eu.example.com"], True),
        ("https://*.evil-example.com", [WILD], True),
        ("https://*.example.com:8443", [WILD], True),
        ("http://127.0.0.1:9", ["http://127.0.0.1:9"], False),
        ("http://127.0.0.1:9", [ORIGIN], True),
        (ORIGIN, [], True),
    ],
)
def test_an_item_is_wider_than_a_list_that_does_not_cover_it(item: str, than: list[str], is_beyond: bool):
    assert is_wider([item], than) is is_beyond
    assert is_wider([*than, item], than) is is_beyond


def test_the_wider_items_come_in_their_order():
    assert list(wider(["open", "api", ORIGIN], ["api"])) == ["open", ORIGIN]
    assert list(wider([], [])) == []


def test_a_list_is_a_list_of_texts():
    for wrong in ("api", {"api": 1}, 5, None, [["api"]], [None], [{}]):
        for parse in (parse_items, parse_audiences):
            with pytest.raises(ValueError, match="text"):
                parse(wrong)


def test_a_set_has_one_order():
    assert parse_items({"public", "api"}) == ("api", "public")
    assert parse_audiences(frozenset({"b", "a"})) == ("a", "b")
