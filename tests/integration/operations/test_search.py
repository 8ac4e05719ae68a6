"""The search of runs and orgs: every key, words and ids, pages by key, what is near a wrong word."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
from sqlalchemy import delete, insert, update

from tests.conftest import on_either
from tests.fakes.site import definition, org_entry
from worker.errors import NotFound
from worker.handlers.catalogue import HandlerEntry
from worker.ids import ALL_ORGS, new_id
from worker.model.orgs import OrgEntry
from worker.model.search import parsed
from worker.operations.chores import Chores
from worker.operations.orgs import add_org
from worker.operations.runs import retry, run_now
from worker.store import catalogue, orgs, roles, tables, workers
from worker.store.lists import Page, matching
from worker.store.lists import search as search_module
from worker.store.lists.search import Suggestion, orgs_of, runs_of, suggestions

pytestmark = on_either


def file_of(code, name):
    digest = definition(code, "digest", "acme.plain", overlap="allow")
    export = definition(code, "export", "acme.note", params={"text": "x"}, overlap="allow")
    return org_entry(code, name=name) + digest + export


ORGS = {"org_acme": "Acme GmbH", "org_beta": "Müller & Söhne West", "acme-two": "Second"}


@pytest.fixture
def site(apply, database, rows):
    for code, name in ORGS.items():
        apply(file_of(code, name))

    class Site:
        def run(self, org="org_acme", name="digest", state=None, reason="error", cause=None):
            run = run_now(database, org, name, actor="tester")["id"]
            if state is not None:
                rows.set_ended(run, state, None if state == "succeeded" else reason)
            if cause is not None:
                self.fail_with(run, cause)
            return run

        def fail_with(self, run, cause, attempt=1):
            rows.add_attempt(run, attempt=attempt, error_cause=cause)

        def say(self, run, *words, org="org_acme", shown=True):
            with database.transaction() as connection:
                org_id = orgs.scope_of(connection, org)
                rows = [{"word": word, "run_id": run, "org_id": org_id, "shown": shown} for word in words]
                connection.execute(insert(tables.run_words), rows)

        def find(self, text, scope=ALL_ORGS, **page):
            with database.acting(roles.ALL_ORGS).autocommit() as connection:
                query = parsed(text, now=database.now(connection))
                return [row["id"] for row in runs_of(connection, scope, query, Page(**page)).rows]

        def orgs(self, text, scope=ALL_ORGS, **page):
            with database.acting(roles.ALL_ORGS).autocommit() as connection:
                query = parsed(text, now=database.now(connection))
                return [row["code"] for row in orgs_of(connection, scope, query, Page(**page))]

        def near(self, text, scope=ALL_ORGS):
            with database.acting(roles.ALL_ORGS).autocommit() as connection:
                return suggestions(connection, scope, parsed(text, now=database.now(connection)))

    return Site()


def test_each_key_narrows_the_runs(site, database, rows):
    failed = site.run(state="failed", cause="CrmError: CRM answers <n>")
    refused = site.run(state="refused", reason="scope_missing")
    export = site.run(name="export", state="failed", reason="timed_out")
    other = site.run("org_beta", state="succeeded")
    waiting = site.run("org_beta")
    again = retry(database, failed, actor="tester")["id"]

    every = [again, waiting, other, export, refused, failed]
    found = {
        text: site.find(text)
        for text in (
            "", "org:org_acme", "org:acme", "org:gmbh", "org:müller", "acme", "muller söhne", "acme muller",
            "state:failed,refused", "state:waiting", "state:waiting,succeeded", "state:running",
            "definition:export", "handler:acme.note", "handler:acme", "reason:scope_missing", "reason:due",
            "origin:retry", 'cause:"crm ANSWERS"', 'acme cause:crm state:failed', "cause:%", "cause:_rm",
            "since:1h", "until:1h", "acme state:failed definition:digest", "org:nothing", failed, failed[:24],
        )
    }  # fmt: skip

    assert found == {
        "": every,
        "org:org_acme": [again, export, refused, failed],
        "org:acme": [again, export, refused, failed],
        "org:gmbh": [again, export, refused, failed],
        "org:müller": [waiting, other],
        "acme": [again, export, refused, failed],
        "muller söhne": [waiting, other],
        "acme muller": [],
        "state:failed,refused": [export, refused, failed],
        "state:waiting": [again, waiting],
        "state:waiting,succeeded": [again, waiting, other],
        "state:running": [],
        "definition:export": [export],
        "handler:acme.note": [export],
        "handler:acme": [],
        "reason:scope_missing": [refused],
        "reason:due": [again, waiting],
        "origin:retry": [again],
        'cause:"crm ANSWERS"': [failed],
        "acme cause:crm state:failed": [failed],
        "cause:%": [],
        "cause:_rm": [],
        "since:1h": every,
        "until:1h": [],
        "acme state:failed definition:digest": [failed],
        "org:nothing": [],
        failed: [failed],
        failed[:24]: [failed],
    }


def test_free_text_finds_words_of_errors_and_names(site):
    failed, retried = site.run(state="failed"), site.run()
    other = site.run("org_beta", state="refused")
    site.run("org_beta", state="succeeded")
    site.say(failed, "503", "crm", "httperror", "digest")
    site.say(retried, "504", "crm", "httperror")
    site.say(other, "acme", "503", org="org_beta")
    crm = [retried, failed]

    found = {
        text: site.find(text)
        for text in (
            "503", "50", "crm", "CRM 503", '"HttpError:503"', "crm-sync", "state:failed crm", "org:beta 503",
            "org:org_acme 50", "acme 503", "acme", "acme crm reason:due", "crm nothing", "5030", "“crm”",
        )
    }  # fmt: skip

    assert found == {
        "503": [other, failed],
        "50": [other, retried, failed],
        "crm": crm,
        "CRM 503": [failed],
        '"HttpError:503"': [failed],
        "crm-sync": [],
        "state:failed crm": [failed],
        "org:beta 503": [other],
        "org:org_acme 50": crm,
        # The org's name, or a word of the run.
        "acme 503": [other, failed],
        "acme": [other, *crm],
        "acme crm reason:due": [retried],
        "crm nothing": [],
        "5030": [],
        "“crm”": crm,
    }
    assert site.near("50 timeout") == [Suggestion("timeout", [])]


def test_an_org_finds_its_runs_only_by_what_it_may_read(site, monkeypatch):
    mine, other = site.run(state="failed"), site.run("org_beta", state="failed")
    site.say(mine, "503")
    site.say(mine, "org_rival", "worker", shown=False)
    site.say(other, "503", "secret", org="org_beta")

    assert site.find("503", "org_acme") == [mine]
    for text in ("org_rival", "worker", "secret", "503 worker", "state:failed worker"):
        assert site.find(text, "org_acme") == [], text
    assert site.near("worker secret 503", "org_acme") == [Suggestion("worker", []), Suggestion("secret", [])]
    # The control: an operator finds it, and so would the org, if it searched as one.
    assert site.find("worker") == [mine]
    monkeypatch.setattr(matching, "seen_words", lambda scope, words=None: [])
    monkeypatch.setattr(search_module, "seen_words", lambda scope, words=None: [])
    assert site.find("worker", "org_acme") == [mine]


def test_a_worker_is_found_by_its_machine_its_id_and_the_end_of_it(site, database, rows):
    running, ended, other, waiting = (site.run() for _ in range(4))
    ids = {host: new_id() for host in ("build-7", "build-8")}
    with database.transaction() as connection:
        for host, worker in ids.items():
            lease = timedelta(minutes=1)
            identity = {"host": host, "pid": 1, "version": "1.0"}
            workers.register(connection, worker, lease=lease, handlers=[], capacity={}, **identity)
    for run, host in ((running, "build-7"), (ended, "build-7"), (other, "build-8")):
        rows.set_running(run)
        of_live = update(tables.live_runs).where(tables.live_runs.c.id == run)
        rows.insert(of_live.values(worker_id=ids[host]))
    for run, host in ((ended, "build-7"), (other, "build-8")):
        rows.insert(update(tables.runs).where(tables.runs.c.id == run).values(worker_id=ids[host]))
        rows.set_ended(run)

    seven = ids["build-7"]
    for text in ("build-7", seven, seven.upper(), seven[-12:], seven[-12:].upper()):
        assert site.find(f"worker:{text}") == [ended, running], text
    assert site.find("worker:build-7 state:running") == [running]
    assert site.find("worker:build-8", "org_acme") == [other]
    for text in ("build", "%", seven[-3:], seven[:12], new_id()):
        assert site.find(f"worker:{text}") == [], text
    assert waiting in site.find("")


def test_a_revision_is_that_of_the_definition(site, apply):
    before = site.run()
    apply(file_of("org_acme", "Acme GmbH").replace("2099", "2098"))
    after = site.run()

    assert (site.find("revision:1 definition:digest"), site.find("revision:2")) == ([before], [after])
    assert site.find("revision:3") == []


def test_an_org_finds_only_its_own_runs_and_words(site, apply):
    mine, other = site.run(cause="Error: x"), site.run("org_beta", cause="Error: x")

    for text in ("", "cause:error", "state:waiting", other, "müller", "org:org_beta"):
        assert other not in site.find(text, "org_acme"), text
    assert site.find("cause:error", "org_acme") == [mine]
    assert (site.find("acme", "org_acme"), site.find("müller", "org_acme")) == ([mine], [])
    assert site.orgs("", "org_acme") == ["org_acme"]
    assert site.near("mulle gmbx", "org_acme") == [Suggestion("mulle", []), Suggestion("gmbx", ["gmbh"])]
    apply(file_of("org_beta", "Beta").replace('"export"', '"payroll"'))
    assert site.near("definition:payrol") == [Suggestion("payrol", ["payroll"], "definition")]
    assert site.near("definition:payroll", "org_acme") == [Suggestion("payroll", [], "definition")]
    with pytest.raises(NotFound):
        site.find("", "org_nobody")


def test_an_org_is_told_only_of_handlers_of_its_definitions(site, database, apply, monkeypatch):
    """Whether another org's handler exists shows neither in a suggestion nor by the lack of one."""
    with database.transaction() as connection:
        entries = [
            HandlerEntry(name, "acme-jobs", "1.0", "acme_jobs:x")
            for name in ("acme.plain", "acme.note", "beta.secret_project")
        ]
        catalogue.put(connection, entries, at=database.now(connection))
    asked = (
        "handler:beta.secret_project",
        "handler:beta.secret_projekt",
        "handler:no.such",
        "handler:acme.plaim",
    )

    def told(scope):
        return [[(each.word, each.near) for each in site.near(text, scope)] for text in asked]

    own = [
        [("beta.secret_project", [])],
        [("beta.secret_projekt", [])],
        [("no.such", [])],
        [("acme.plaim", ["acme.plain"])],
    ]
    assert told("org_acme") == own
    assert site.near("handler:acme.note", "org_acme") == []
    # An operator is told of all.
    assert told(ALL_ORGS)[:2] == [[], [("beta.secret_projekt", ["beta.secret_project"])]]
    # The control: with every handler of the catalogue, an org finds the other's name, and that it is known.
    everything = search_module.handler_names(ALL_ORGS)
    monkeypatch.setattr(search_module, "handler_names", lambda scope: everything)
    assert told("org_acme") == told(ALL_ORGS) != own


def test_words_begin_in_name_or_code_and_follow_a_new_name(site, database, apply):
    assert site.orgs("acme") == ["acme-two", "org_acme"]
    assert site.orgs("acme-t") == site.orgs("SECOND") == ["acme-two"]
    assert site.orgs("mull sohn") == ["org_beta"]
    assert site.orgs("cme") == site.orgs("acme muller") == []
    assert site.orgs("org", limit=1) == ["org_beta"]
    assert site.orgs("org:acme-two") == ["acme-two"]

    apply(file_of("org_beta", "Gamma"))
    with database.transaction() as connection:
        connection.execute(update(tables.orgs).where(tables.orgs.c.code == "acme-two").values(state="paused"))

    assert (site.orgs("mull"), site.orgs("gam"), site.orgs("beta")) == ([], ["org_beta"], ["org_beta"])
    assert site.orgs("acme", state="paused") == ["acme-two"]


def test_a_wrong_word_is_told_what_is_near(site):
    assert site.near("acne") == [Suggestion("acne", ["acme"])]
    assert site.near("acm state:failed org:gmbh") == []
    assert site.near("definition:digst state:failed") == [Suggestion("digst", ["digest"], "definition")]
    assert site.near("definition:digest") == []
    assert site.near("org:mullr zzz") == [Suggestion("zzz", []), Suggestion("mullr", ["muller"])]


@pytest.mark.parametrize(("window", "few"), [(1, 20), (3, 20), (1000, 20), (3, 0)])
def test_pages_go_on_by_key_until_every_match_was_seen(site, database, monkeypatch, window, few):
    monkeypatch.setattr(search_module, "WINDOWS", (window, window, window))
    monkeypatch.setattr(search_module, "FEW", few)
    monkeypatch.setattr(matching, "FEW", few)
    monkeypatch.setattr(search_module, "FEW_CAUSES", few)
    states = itertools.cycle(("failed", "succeeded", None))
    made = [site.run(org, state=next(states)) for org in (*ORGS, *ORGS, *ORGS)]
    for run in made:
        site.fail_with(run, "Error: x")
        site.fail_with(run, "Other: x", attempt=2)
    for place, run in enumerate(made):
        site.say(run, "timeout" if place % 2 else "timer", org=[*ORGS][place % 3])
    wanted = {
        "": made,
        "state:failed": made[::3],
        "state:waiting,failed": [run for place, run in enumerate(made) if place % 3 != 1],
        "acme": [run for place, run in enumerate(made) if place % 3 != 1],
        "acme state:failed": made[::3],
        "org:org_beta state:waiting": [],
        "time": made,
        "timeout": made[1::2],
        "acme timeout": [run for place, run in enumerate(made) if place % 2 and place % 3 != 1],
        "org:acme timeout state:failed": [run for place, run in enumerate(made) if place % 6 == 3],
        "cause:x": made,
        "cause:error": made,
        "acme cause:x state:failed": made[::3],
        "definition:digest state:failed,refused": made[::3],
    }

    for text, runs in wanted.items():
        found, after = [], None
        for _ in range(20):
            with database.autocommit() as connection:
                query = parsed(text, now=database.now(connection))
                page = runs_of(connection, ALL_ORGS, query, Page(limit=2, after=after))
            assert len(page.rows) <= 2
            found += [row["id"] for row in page.rows]
            after = page.next
            if after is None:
                break
        assert found == runs[::-1], text


def test_the_page_narrows_the_query(site, rows):
    failed = site.run(state="failed")
    export = site.run(name="export", state="refused")

    assert site.find("acme", state="failed,refused") == [export, failed]
    assert site.find("state:failed", state="refused") == []
    assert site.find("", definition="export") == [export]
    assert site.find("since:2h", since=rows.now() + timedelta(hours=1)) == []


def test_an_imported_org_is_found_at_once(database, site):
    entry = OrgEntry(code="org_new", name="Brand New", issuer="main")
    add_org(database, entry, actor="tester")

    assert site.orgs("brand") == ["org_new"]


async def test_an_org_that_an_older_release_adds_or_renames_is_found_by_its_words_soon(site, database):
    """Its workers write `orgs` alone, during a rolling deploy."""
    with database.transaction() as connection:
        at = database.now(connection)
        row = {"id": new_id(), "code": "org_gamma", "name": "Gämma Labs", "issuer": "main", "tags": []}
        connection.execute(insert(tables.orgs).values(**row, created_at=at, updated_at=at))
        renamed = update(tables.orgs).where(tables.orgs.c.code == "org_acme")
        connection.execute(renamed.values(name="Apex GmbH"))
    # Not by its old name either.
    assert (site.orgs("gamma"), site.orgs("apex"), site.orgs("acme")) == ([], [], ["acme-two"])

    chores = Chores(database, on_runs=lambda: None)
    await chores.words()
    await chores.words()

    assert (site.orgs("gamma labs"), site.orgs("gam")) == (["org_gamma"], ["org_gamma"])
    assert (site.orgs("apex"), site.orgs("gmbh")) == (["org_acme"], ["org_acme"])
    with database.autocommit() as connection:
        assert orgs.without_words(connection, ALL_ORGS) == []


async def test_pages_of_orgs_without_words_end_also_if_a_code_has_none(site, database, monkeypatch):
    """A code of accents alone is no word."""
    monkeypatch.setattr(orgs, "FILLED", 1)
    for code in ("\u0301", "\u0300", "org_delta"):
        add_org(database, OrgEntry(code, "", "main"), actor="tester")
    with database.transaction() as connection:
        connection.execute(delete(tables.org_words))

    await Chores(database, on_runs=lambda: None).words()

    assert (site.orgs("delta"), site.orgs("acme")) == (["org_delta"], ["acme-two", "org_acme"])
