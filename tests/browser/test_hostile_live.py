"""A handler that says hostile things while its page is open: nothing of it runs, streamed or polled."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.browser.conftest import migrated
from tests.browser.hostile import strings
from tests.browser.test_hostile import RUNNING, TOKEN, armed
from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.cli import Completed
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.provider import serve_provider

# With a NUL, with half a character, and what ends an event of the stream.
NUL = "nul \0 <script>pwned()</script>"
EVIL = [*strings(), NUL, "\ud83d<svg onload=pwned()>", "\n\nevent: state\ndata: {}\n\n"]
# A line of 64 KiB, the last: the rest of a log beyond 128 KiB comes at the end of its run.
HUGE = "<img src=x onerror=pwned()>" + "x" * 65_536
NOTES = ["<img src=x onerror=pwned()>", "\x1b[31m\u2028</script><script>pwned()</script>\0"]
LAST = "that was the last line"
PATIENCE = 20_000
POLL = 5_000

HANDLER = """\
import json, logging, os, time

from worker import job

EVIL, NOTES = json.loads({data!r})


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.05)


@job("evil.talk", max_attempts=1)
def talk(ctx):
    log = logging.getLogger("evil")
    wait_for(ctx.params["go"])
    for number, note in enumerate(NOTES, 1):
        ctx.progress(number, len(NOTES) + 1, note)
        time.sleep(1.2)
    for number, text in enumerate(EVIL):
        if number % 2 and text.isprintable():
            print(text)
        else:
            log.error("%s", text)
    log.error({last!r})
    print({huge!r})
    wait_for(ctx.params["end"])
    if ctx.params["fails"]:
        raise type(EVIL[0], (RuntimeError,), {{}})("\\n".join(EVIL))
    kept = [text.replace("\\0", "").encode("utf-8", "replace").decode() for text in EVIL]
    return {{text: [text] for text in kept}}
"""


class ByProcesses(Site):
    """Its commands are processes: Playwright has an event loop in this thread."""

    def cli(self, *arguments: str, stdin: str = "", check: bool = True) -> Completed:
        return self.process(*arguments, stdin=stdin, check=check)


@dataclass
class Talk:
    """A worker with the handler, and how to let a run of it talk and end."""

    site: Site
    base: str
    state: Any = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self, *, fails: bool) -> tuple[str, Path, Path]:
        """Start a run; its id, and the files that let it talk and end."""
        number = next(self.numbers)
        go, end = self.site.out / f"go-{number}", self.site.out / f"end-{number}"
        given = {"go": str(go), "end": str(end), "fails": "yes" if fails else ""}
        params = [text for name, value in given.items() for text in ("--param", f"{name}={value}")]
        run = self.site.cli("definitions", "run", "org_a", "talk", *params, "-o", "json").json()
        wait_until(
            lambda: (
                self.site.query("SELECT state FROM live_runs WHERE id = ?", run["id"])[0]["state"]
                == "running"
            ),
            "it to start",
        )
        return run["id"], go, end


@pytest.fixture(scope="module")
def talk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Browser, dialect: str
) -> Iterator[Talk]:
    folder, port = tmp_path_factory.mktemp(f"talk-{dialect}"), free_port()
    base, digest = f"http://127.0.0.1:{port}", hashlib.sha256(TOKEN.encode()).hexdigest()
    source = HANDLER.format(data=json.dumps([EVIL, NOTES]), last=LAST, huge=HUGE)
    provider, thread = serve_provider()
    with migrated(request, folder) as url, thread, opened(ByProcesses(folder, url, provider)) as site:
        operator = f'[[web.operators]]\nname = "ada"\nrole = "admin"\ntoken_sha256 = "{digest}"'
        site.configure(web=f'listen = "127.0.0.1:{port}"\ncalls_per_second = 1000', extra=operator)
        make_plugin(site.plugins, modules={"evil_jobs": source}, entry_points={"evil.talk": "evil_jobs:talk"})
        site.migrate()
        site.add_orgs(application("org_a"))
        site.apply(definition("org_a", "talk", "evil.talk", overlap="allow"))
        site.start_worker()
        site.wait_for_handlers("evil.talk")
        made = Talk(site, base)
        wait_until(lambda: browsers.is_ready(base), "the console to answer")
        with browsers.tab(browser, base) as first:
            first.log_in(TOKEN)
            made.state = first.page.context.storage_state()
        yield made


def lines_of(tab: Tab) -> list[str]:
    """The texts of the log's lines, as the page has them."""
    found: list[str] = tab.page.locator("#log-lines li > span").evaluate_all(
        "all => all.map(e => e.textContent)"
    )
    return found


def shown_in_full() -> set[str]:
    """Those of the strings that a page shows as they are: short, of one line, and storable."""
    return {text for text in EVIL if len(text) <= 2000 and text.isprintable() and "\0" not in text}


def no_stream(route: Route) -> None:
    route.fulfill(status=503, body="")


def test_nothing_that_comes_by_the_stream_runs(browser: Browser, talk: Talk):
    run, go, end = talk.start(fails=True)
    with browsers.tab(browser, talk.base, state=talk.state) as tab:
        armed(tab)
        tab.go(f"/runs/{run}")
        expect(tab.page.locator("#live-state")).to_contain_text("Live")
        loads = len(tab.requests)
        go.touch()

        # The first note draws the card, the second is written into it.
        expect(tab.page.locator("#progress")).to_contain_text("</script><script>pwned()", timeout=PATIENCE)
        expect(tab.page.locator("#log-lines")).to_contain_text(LAST, timeout=PATIENCE)
        # Two pipes lead to the worker: lines that were printed may come after those that were logged.
        whole = shown_in_full() | {NUL.replace("\0", "\ufffd")}
        wait_until(lambda: not whole - set(lines_of(tab)), "all lines")
        expect(tab.page.locator("#log-lines")).to_contain_text(f"{HUGE[:2000]} …", timeout=PATIENCE)
        assert tab.page.evaluate(RUNNING) == []
        end.touch()
        expect(tab.page.locator("h1")).to_contain_text("failed", timeout=PATIENCE)

        expect(tab.page.locator(".error-text")).to_contain_text(EVIL[0])
        assert tab.page.evaluate(RUNNING) == []
        assert not [url for url in tab.requests[loads:] if "/static/" in url], "the page was loaded again"
        assert tab.wrongs == []
        assert tab.foreign() == []


def test_nothing_that_is_polled_runs(browser: Browser, talk: Talk):
    run, go, end = talk.start(fails=False)
    with browsers.tab(browser, talk.base, state=talk.state) as tab:
        armed(tab)
        tab.page.context.route("**/live?*", no_stream)
        tab.page.clock.install()
        tab.go(f"/runs/{run}")
        go.touch()

        def polled(selector: str, text: str) -> bool:
            tab.page.clock.fast_forward(POLL)
            tab.page.wait_for_timeout(200)
            return text in tab.page.locator(selector).inner_text()

        wait_until(lambda: polled("#log-lines", LAST), "the last line", timeout=60)
        # A page has the newest 200 lines.
        wait_until(lambda: polled("#log-lines", HUGE[:100]), "the longest line", timeout=60)
        assert len(shown_in_full() & set(lines_of(tab))) > 100
        assert tab.page.evaluate(RUNNING) == []
        end.touch()
        wait_until(lambda: polled("h1", "succeeded"), "the end", timeout=60)

        expect(tab.page.locator("details.value pre").first).to_contain_text(EVIL[0])
        assert tab.page.evaluate(RUNNING) == []
        assert tab.wrongs == []
        assert tab.foreign() == []


@pytest.mark.parametrize("policy", [True, False])
def test_the_alarm_sounds_where_lines_are_not_escaped(browser: Browser, talk: Talk, policy: bool):
    """The control: the same lines as HTML run, and with the policy the browser reports them."""
    run, go, end = talk.start(fails=False)

    def unescaped(route: Route) -> None:
        script = route.fetch().text()
        assert "text.textContent =" in script
        body = script.replace("text.textContent =", "text.innerHTML =")
        route.fulfill(body=body, content_type="text/javascript")

    def without_policy(route: Route) -> None:
        route.fulfill(body=route.fetch().text(), content_type="text/html")

    with browsers.tab(browser, talk.base, state=talk.state) as tab:
        armed(tab)
        tab.page.context.route("**/static/console.js*", unescaped)
        if not policy:
            tab.page.context.route(f"**/runs/{run}", without_policy)
        tab.go(f"/runs/{run}")
        expect(tab.page.locator("#live-state")).to_contain_text("Live")
        go.touch()
        said = "CSP-REPORT" if policy else "PWNED"

        def has_sounded() -> bool:
            # The browser reports only while Playwright listens.
            tab.page.wait_for_timeout(50)
            return any(said in wrong for wrong in tab.wrongs)

        wait_until(has_sounded, said)
    end.touch()
