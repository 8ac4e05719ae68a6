"""Tables with long names of each kind, at three widths: no word is cut in two, and nothing is too wide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from playwright.sync_api import Browser
from sqlalchemy import Connection, Table, insert

from tests.browser.conftest import migrated
from tests.browser.crawling import crawl
from tests.browser.test_hostile import serving
from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from worker.ids import new_id
from worker.store import tables

WIDTHS = (390, 1024, 1280)
# Kinds of pages that the crawl finds at least.
KINDS = 13
# A long name with marks, one with spaces, one of a single word, and one that is none of these.
NAMES = (
    "_".join(["consolidated", "customer-reports.of", "northern:subsidiaries"] * 3),
    "Reports on customers of the northern branch " * 4 + "office",
    "w" * 120,
    "assistant.digest",
)
TEXT = "The API answered 503 at https://crm.example/v2/accounts?page=17 after " + "x" * 90

# Each check returns what is wrong in the tables of the page.
SHOWN = "const shown = (cell) => cell.checkVisibility() && !cell.closest('.hidden-text');"
CELLS = "[...document.querySelectorAll('main td, main th')].filter(shown)"
BROKEN = f"""() => {{ {SHOWN} return {CELLS}.flatMap((cell) => {{
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = document.createRange();
    const wrong = [];
    for (let node; (node = texts.nextNode());) {{
        if (!shown(node.parentElement)) continue;
        for (const word of node.data.matchAll(/[\\p{{L}}\\p{{N}}]+/gu)) {{
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            const lines = [...range.getClientRects()].filter((each) => each.width > 0);
            if (new Set(lines.map((each) => Math.round(each.top))).size > 1) wrong.push(word[0]);
        }}
    }}
    return wrong;
}}); }}"""
# Cards clip what is wider than they are, so that the page alone does not tell.
SPILT = f"""() => {{ {SHOWN} const right = document.querySelector('main').getBoundingClientRect().right;
    const tables = [...document.querySelectorAll('main table')].filter(
        (table) => shown(table) && !table.closest('.wide, .scroll'));
    const wide = tables.filter((table) => {{
        const card = table.closest('.card');
        return table.getBoundingClientRect().right > (card ?? table).getBoundingClientRect().right + 1
            || table.getBoundingClientRect().right > right;
    }});
    const spilt = tables.flatMap((table) => [...table.querySelectorAll('td, th')]).filter(
        (cell) => shown(cell) && cell.scrollWidth > cell.clientWidth + 1);
    return [...wide, ...spilt].map((each) => each.tagName + ' ' + each.textContent.trim().slice(0, 60));
}}"""
UNTITLED = f"""() => {{ {SHOWN} return {CELLS}.flatMap((cell) => [...cell.querySelectorAll('*')]).filter(
    (each) => each.scrollWidth > each.clientWidth && getComputedStyle(each).textOverflow === 'ellipsis'
).filter((each) => {{
        const titled = each.closest('[title]');
        return titled?.title !== titled?.textContent.trim();
    }}).map((each) => each.textContent.slice(0, 60)); }}"""
TIMES = f"""() => {{ {SHOWN} return {CELLS}.filter((cell) => {{
    const times = cell.innerText.match(/\\d{{4}}-\\d\\d-\\d\\d[T ]\\d\\d:\\d\\d/g) ?? [];
    return times.length > 1
        || [...cell.querySelectorAll('time')].some((time) => !/ UTC$/.test(time.title) || !time.dateTime);
}}).map((cell) => cell.innerText); }}"""
# What reads as a count, a size or a duration is aligned right, and so is the header of its column.
LEFT = f"""() => {{ {SHOWN} return {CELLS}.filter((cell) => cell.tagName === 'TD'
    && (cell.matches('.number')
        || !cell.querySelector('code, a')
            && /^[\\d,.]+( ?(ms|s|min|h|d|bytes)( \\d+ ?(s|min|h))?)?$/.test(cell.innerText.trim())))
    .flatMap((cell) => [cell, cell.closest('table').tHead.rows[0].cells[cell.cellIndex]])
    .filter((cell) => getComputedStyle(cell).textAlign !== 'right').map((cell) => cell.innerText); }}"""
COLUMNS = """() => [...document.querySelectorAll('main table:not(.days)')]
    .map((table) => table.rows[0].cells.length).filter((columns) => columns > 7)"""
# Not a style of the page: the policy refuses those.
RESTYLE = """(css) => {
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(css);
    document.adoptedStyleSheets = [sheet];
}"""


def fill(connection: Connection, now: datetime) -> str:
    """Rows with long names in each column that tables show; the path of a run."""

    def put(table: Table, **values: Any) -> None:
        connection.execute(insert(table).values(**values))

    run = ""
    for number, name in enumerate(NAMES):
        org, definition, host, worker = (new_id() for _ in range(4))
        at = now - timedelta(seconds=3 * number)
        pool = f"pool.{name}"[:63]
        who = {"created_at": at, "created_by": f"operator:{name}"}
        put(
            tables.orgs,
            **{
                "id": org,
                "code": f"org_{name}",
                "name": f"Bureau {name}",
                "issuer": name,
                "tags": [name, "pro"],
            },
            **{"state": "active", "created_at": at, "updated_at": at},
        )
        put(
            tables.credentials,
            **{"id": new_id(), "org_id": org, "generation": 1, "client_id": name, "reference": name},
            **{"last_error": TEXT if number else None, "last_used_at": at, "uses": 12_345, **who},
        )
        put(
            tables.audit,
            **{"id": new_id(), "at": at, "actor": f"operator:{name}", "action": "definition.change"},
            **{
                "org_id": org,
                "subject": f"org_{name} {name}",
                "detail": {name: {"before": name, "after": TEXT}},
            },
        )
        put(
            tables.hosts,
            **{"id": host, "name": name[:63], "pool": pool, "token_sha256": f"{number}" * 64, **who},
        )
        put(
            tables.workers,
            **{"id": worker, "host": f"{name}.internal", "pid": 1, "version": "1.2.0rc1", "host_id": host},
            **{"handlers": [name], "capacity": {"children": 50, "inline": 1000}, "pools": ["default", pool]},
            **{"started_at": at, "renewed_at": at, "lease_until": at, "ended_at": at if number else None},
            **{"outcome": "crashed" if number else None, "recovered_runs": number, "recovered_by": new_id()},
        )
        put(
            tables.catalogue,
            **{"name": name, "distribution": name, "version": "1.0", "entry_point": name, "scopes": [name]},
            **{"seen_at": at, "of_worker": True},
            params_schema={"type": "object", "properties": {name: {"type": "string", "description": TEXT}}},
        )
        put(
            tables.definitions,
            **{"id": definition, "org_id": org, "name": name, "revision": 1, "enabled": True},
            **{"created_at": now, "updated_at": now, "pause_note": TEXT, "paused_by": name, "paused_at": now},
        )
        spec = {"handler": name, "schedule": "0 3 * * *", "timezone": "America/Argentina/Buenos_Aires"}
        spec |= {"pool": pool, "params": {name: TEXT}, "variants": []}
        put(tables.definition_revisions, definition_id=definition, revision=1, spec=spec, at=now, by=name)
        put(tables.schedule, definition_id=definition, org_id=org, next_scheduled_for=at, next_fire_at=at)
        put(
            tables.backfills,
            **{"id": new_id(), "org_id": org, "definition_id": definition, "revision": 1, "instants": 70_000},
            **{"range_from": at, "range_until": now, "made": 12, **who},
        )
        put(
            tables.meter_days,
            day=now.date(),
            org_id=org,
            meter=name,
            definition_id=definition,
            used=9_999_999,
        )
        for kind, units in (("input", 123_456_789), ("cache_write_1h", 0)):
            put(
                tables.model_days,
                **{"day": now.date(), "org_id": org, "definition_id": definition, "provider": "openai"},
                **{"model": name, "kind": kind, "tariff": "standard", "units": units, "unpriced": units},
                money=1_234_567_890_123 + number,
            )
        put(
            tables.budgets,
            **{"id": new_id(), "target": f"org:{org}", "org_id": org, "meter": "money", "per": "month"},
            **{"limit": 1_999_999_999_999, "at_limit": "wait", "warn_at": 0.8, "updated_by": name},
            **{"created_at": at, "updated_at": at},
        )
        month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        put(tables.meters, org_id=org, meter="money", per="month", starts_at=month, used=1_234_567_890_123)
        money = {"meter": "money", "definition_id": definition, "used": 1_234_567_890_123}
        put(tables.meter_days, day=now.date(), org_id=org, **money)
        made = put_run(connection, org, definition, worker, name, at)
        run = run or made
    return f"/runs/{run}"


def put_run(connection: Connection, org: str, definition: str, worker: str, name: str, at: datetime) -> str:
    """A failed run of one attempt, with a step and a wait."""
    run, error = new_id(), {"type": f"errors.{name}", "message": TEXT, "trace": TEXT}
    later = at + timedelta(minutes=41, seconds=7)
    rows: list[tuple[Table, dict[str, Any]]] = [
        (
            tables.runs,
            {"id": run, "definition_id": definition, "revision": 1, "origin": "schedule", "created_by": name}
            | {"scheduled_for": at, "created_at": at, "idempotency_key": run, "state": "failed"}
            | {"reason": "error", "detail": TEXT, "attempt": 1, "worker_id": worker, "error": error}
            | {"started_at": at, "finished_at": later, "handler": name},
        ),
        (
            tables.attempts,
            {"run_id": run, "attempt": 1, "worker_id": worker, "fencing_token": 1, "handler": name}
            | {"started_at": at, "handler_started_at": at, "ended_at": later, "error": error}
            | {"outcome": "failed", "error_cause": f"{name} answered", "claims": {}},
        ),
        (
            tables.steps,
            {"run_id": run, "seq": 1, "name": name, "occurrence": 1, "attempt": 1, "fencing_token": 1}
            | {"handler": name, "started_at": at, "ended_at": later, "size": 90, "result": {name: TEXT}},
        ),
        (
            tables.waits,
            {"run_id": run, "name": name, "occurrence": 1, "kind": "answer", "opened_at": at, "until": later}
            | {"answered_at": later, "answered_by": f"operator:{name}", "answer": {name: name}},
        ),
    ]  # fmt: skip
    for table, values in rows:
        connection.execute(insert(table).values(org_id=org, **values))
    return run


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Browser, dialect: str
) -> Iterator[tuple[str, Any, str]]:
    """The address of a console of long names, the cookies of an operator, and the path of a run."""
    folder = tmp_path_factory.mktemp(f"lists-{dialect}")
    with migrated(request, folder) as url, serving(folder, browser, url, fill) as found:
        yield found


@pytest.fixture
def tab(browser: Browser, site: tuple[str, Any, str]) -> Iterator[Tab]:
    base, state, _ = site
    with browsers.tab(browser, base, state=state) as opened:
        opened.page.context.add_cookies([{"name": "orgworker_zone", "value": "Asia/Kolkata", "url": base}])
        yield opened
    assert opened.wrongs == []


def wrongs_of(tab: Tab, width: int) -> dict[str, Any]:
    """What is wrong with the tables of the page at this width."""
    tab.page.set_viewport_size({"width": width, "height": 860})
    checks = {"broken": BROKEN, "spilt": SPILT, "untitled": UNTITLED, "times": TIMES, "columns": COLUMNS}
    # On a phone there are no columns.
    checks |= {"left": LEFT} if width > 640 else {}
    found = {name: tab.page.evaluate(check) for name, check in checks.items()}
    return {name: wrong for name, wrong in (found | {"overflow": tab.overflow()}).items() if wrong}


def test_no_table_cuts_a_word_or_is_too_wide(site: tuple[str, Any, str], tab: Tab):
    base, state, run = site
    lists = ("/search", "/credentials?risk=all", "/usage?by=definition", f"/retry?q=definition:{NAMES[-1]}")
    lists += ("/usage?by=definition,model", "/usage?by=kind,tariff", f"/usage?org=org_{NAMES[0]}&by=org")
    pages = crawl(base, state, first=("/", *lists, run), each=2)
    assert len(pages) >= KINDS
    wrong = []
    for address in itertools.chain.from_iterable(pages.values()):
        tab.go(address)
        tab.page.evaluate(
            "() => document.querySelectorAll('details').forEach((each) => { each.open = true; })"
        )
        for scheme, width in itertools.product(("light", "dark"), WIDTHS):
            tab.page.emulate_media(color_scheme=scheme)
            wrong += [f"{address} {width} {scheme}: {found}" for found in wrongs_of(tab, width).items()]
    assert "\n".join(wrong) == ""


def test_the_checks_find_what_is_wrong(site: tuple[str, Any, str], tab: Tab):
    """The controls: with the styles of before, with cells that stay left, and without titles."""
    tab.go("/search")
    assert wrongs_of(tab, 1024) == {}

    tab.page.evaluate(
        RESTYLE, "td, td * { overflow-wrap: anywhere; white-space: normal !important } td { max-width: 3rem }"
    )
    assert wrongs_of(tab, 1024)["broken"]
    tab.page.evaluate(RESTYLE, "table { width: 2000px !important } td.number { text-align: left !important }")
    assert {"spilt", "left"} <= wrongs_of(tab, 1024).keys()
    tab.page.evaluate(RESTYLE, "")
    tab.page.evaluate("() => document.querySelectorAll('[title]').forEach((each) => { each.title = ''; })")
    assert {"untitled", "times"} <= wrongs_of(tab, 390).keys()


def test_rows_that_are_seconds_apart_show_seconds(site: tuple[str, Any, str], tab: Tab):
    tab.go("/orgs")

    times = tab.page.locator("main td time").all_inner_texts()

    assert len(times) == len(set(times)) == len(NAMES)
    assert "Times are in Asia/Kolkata." in tab.page.inner_text("footer")
