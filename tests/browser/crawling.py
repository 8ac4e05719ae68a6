"""Finds every page of the console as a person does: by following the links from the morning page."""

from __future__ import annotations

import re
from collections import deque
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Not pages: what programs ask for, files, streams, and what ends the session.
LEFT_OUT = re.compile(r"/(api|static|docs|livez|readyz|metrics|logout)\b|/(live|events|log\.txt)$")
MAX_PAGES = 400


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and (link := values.get("href")):
            self.found.append(link)
        if tag == "form" and values.get("method", "get") == "get" and (action := values.get("action")):
            self.found.append(action)


def kind_of(path: str) -> str:
    """What pages have in common that differ in org, definition or run alone."""
    path = UUID.sub("{id}", urlsplit(path).path)
    path = re.sub(r"^/orgs/(?!\{)[^/]+", "/orgs/{org}", path)
    path = re.sub(r"/definitions/(?!\{)[^/]+", "/definitions/{name}", path)
    return re.sub(r"^/(handlers|templates|workers)/(?!\{)[^/]+", r"/\1/{name}", path)


def client_of(base: str, state: Any) -> httpx.Client:
    """A client with the cookies of a browser's context."""
    cookies = {cookie["name"]: cookie["value"] for cookie in state["cookies"]}
    return httpx.Client(base_url=base, cookies=cookies, timeout=30)


def crawl(
    base: str, state: Any, *, each: int = 1, first: tuple[str, ...] = ("/",), also: tuple[int, ...] = ()
) -> dict[str, list[str]]:
    """The addresses of up to `each` pages of every kind, those in `first` among them.

    `also` are statuses of pages besides 200: of what cannot be searched for, with the reason.

    Raises:
        AssertionError: a link leads to an error, or away from the console.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    ahead = deque(first)
    wrong: list[str] = []
    with client_of(base, state) as client:
        while ahead and len(seen) < MAX_PAGES:
            address = ahead.popleft().partition("#")[0]
            kind = kind_of(address)
            if address in seen or len(found.get(kind, ())) >= each or LEFT_OUT.search(urlsplit(address).path):
                continue
            seen.add(address)
            response = client.get(address)
            if response.status_code not in (200, *also):
                if not response.is_redirect:
                    wrong.append(f"{address}: {response.status_code}")
                continue
            found.setdefault(kind, []).append(address)
            links = _Links()
            links.feed(response.text)
            for link in links.found:
                whole = urlsplit(urljoin(f"{base}{address}", link))
                if f"{whole.scheme}://{whole.netloc}" != base:
                    wrong.append(f"{address} links to {link}")
                else:
                    ahead.append(whole.path + (f"?{whole.query}" if whole.query else ""))
    assert not wrong, wrong
    return found
