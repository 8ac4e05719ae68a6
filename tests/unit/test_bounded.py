"""What is kept of many orgs has a limit."""

from __future__ import annotations

from worker.bounded import Sized


def test_the_entries_used_longest_ago_go_first():
    kept: Sized[str, int] = Sized(10, lambda value: value)
    kept.put("a", 4)
    kept.put("b", 4)
    kept.get("a")
    kept.peek("b")

    kept.put("c", 4)

    assert [kept.peek(key) for key in "abc"] == [4, None, 4]
    assert (len(kept), kept.bytes) == (2, 8)


def test_an_entry_that_is_replaced_or_removed_gives_its_bytes_back():
    kept: Sized[str, int] = Sized(10, lambda value: value)
    kept.put("a", 6)
    kept.put("a", 2)
    kept.put("b", 8)

    assert (len(kept), kept.bytes) == (2, 10)
    assert (kept.pop("a"), kept.pop("a"), kept.bytes) == (2, None, 8)
    kept.drop_where(lambda key: key == "b")
    assert (len(kept), kept.bytes) == (0, 0)


def test_an_entry_above_the_limit_is_kept_alone():
    kept: Sized[str, int] = Sized(10, lambda value: value)
    kept.put("a", 4)
    kept.put("b", 40)

    assert [kept.peek(key) for key in "ab"] == [None, 40]
