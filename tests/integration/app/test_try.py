"""`try` runs one handler in front of its author: made-up claims or a real token, and nothing stored."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import copied
from tests.fakes.cli import CommandLine
from tests.fakes.kernel import require_landlock
from tests.fakes.plugins import make_plugin
from tests.fakes.traffic import traffic
from worker.demo.provider import Application, serve_provider
from worker.handlers.catalogue import HandlerEntry
from worker.model.egress import placeholder_of
from worker.process import installed_handlers
from worker.settings import Settings

SOURCE = """\
import sys
import time
from pydantic import BaseModel, Field
from worker import BlockingContext, Context, EgressDenied, Retry, Snooze, job

class Params(BaseModel):
    pages: int
    title: str = "none"

class Settings(BaseModel):
    model_version: str = "gpt-4"
    max_tokens: int = Field(1000, ge=1)

@job("acme.read", params=Params, settings=Settings, scopes={"read:kb"})
async def read(ctx: Context[Params, Settings]) -> dict:
    for page in range(1, ctx.params.pages + 1):
        ctx.log.info("page %d under %s", page, (await ctx.token()).reveal())
        ctx.progress(page, ctx.params.pages, "pages")
        await ctx.save({"done": page})
    return {"org": ctx.org.code, "name": ctx.org.name, "title": ctx.params.title, "loud": ctx.flag("loud"),
            "max_tokens": ctx.settings.max_tokens, "scopes": sorted(ctx.claims.scopes)}

def deep(secret):
    return secret["missing"]

@job("acme.count", state=True)
async def count(ctx: Context) -> int:
    ctx.state["runs"] = ctx.state.get("runs", 0) + 1
    return ctx.state["runs"]

@job("acme.keyed", secrets={"openai"})
def keyed(ctx: BlockingContext) -> int:
    print(f"the key is {ctx.secret('openai')}")
    return len(ctx.secret("openai"))

@job("acme.spend")
async def spend(ctx: Context) -> None:
    for number in range(2):
        await ctx.step("call", lambda: ctx.spend("llm_tokens", 10) and None)

@job("acme.fail")
async def fail(ctx: Context) -> None:
    print("about to fail")
    deep({})

@job("acme.fail_blocking")
def fail_blocking(ctx: BlockingContext) -> None:
    (lambda: deep({}))()

@job("acme.ask", egress=["api"], secrets={"openai"})
async def ask(ctx: Context) -> None:
    token, headers = (await ctx.token()).reveal(), {"X-Key": ctx.secret("openai")}
    answer = await ctx.http.get("echo", headers=headers)
    try:
        await ctx.http.get(ctx.params["other"])
    except EgressDenied as error:
        denied = error
    deep({})

@job("acme.ask_blocking", egress=["api"], secrets={"openai"})
def ask_blocking(ctx: BlockingContext) -> None:
    token, headers = ctx.token().reveal(), {"X-Key": ctx.secret("openai")}
    answer = ctx.http.get("echo", headers=headers)
    try:
        ctx.http.get(ctx.params["other"])
    except EgressDenied as error:
        denied = error
    deep({})

@job("acme.ask_openly", egress=["open"])
async def ask_openly(ctx: Context) -> None:
    token = (await ctx.token()).reveal()
    answer = await ctx.http.get(ctx.params["other"])
    deep({})

@job("acme.exit")
def exit(ctx: BlockingContext) -> None:
    sys.exit(3)

@job("acme.snooze")
def snooze(ctx: BlockingContext) -> Snooze:
    return Snooze("1h", "nothing to do yet")

@job("acme.slow", timeout="200ms")
def slow(ctx: BlockingContext) -> None:
    time.sleep(30)

@job("acme.wait")
async def wait(ctx: Context) -> None:
    print("started", flush=True)
    await ctx.cancelled.wait()
    raise RuntimeError(ctx.cancelled.reason)

@job("acme.open")
def opens(ctx: BlockingContext) -> str:
    with open(ctx.params["file"]) as file:
        return file.read()

@job("acme.fetch")
async def fetch(ctx: Context) -> str:
    return str((await ctx.http.get("contacts")).request.url)

@job("acme.page")
async def page(ctx: Context) -> dict:
    if ctx.params["number"] == 2:
        raise RuntimeError("page 2 is gone")
    return {"number": ctx.params["number"], "org": ctx.org.code}

@job("acme.pages", children={"acme.page"}, max_attempts=1)
async def pages(ctx: Context) -> list:
    pages = [ctx.start("acme.page", {"number": n}, key=n) for n in range(4)]
    return [str(each) if isinstance(each, Exception) else each
            async for each in ctx.gather(pages, on_failure="return")]

@job("acme.list")
def lists(ctx: BlockingContext) -> dict:
    return dict(ctx.settings)
"""
HANDLERS = dict(re.findall(r'@job\("([\w.]+)".*\n(?:async )?def (\w+)', SOURCE))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed distribution `acme-jobs`, away from the folder in which the commands are given."""
    folder = make_plugin(
        tmp_path_factory.mktemp("try") / "site",
        modules={"acme_jobs_of_try": SOURCE},
        entry_points={name: f"acme_jobs_of_try:{function}" for name, function in HANDLERS.items()},
    )
    make_plugin(
        folder,
        dist="acme-broken",
        modules={"acme_broken": "import no_such_module"},
        entry_points={"acme.broken": "acme_broken:run"},
    )
    return folder


@pytest.fixture(scope="module")
def described() -> dict[tuple[str, ...], list[HandlerEntry]]:
    """The handlers of distributions that a command of this module has read."""
    return {}


@pytest.fixture
def plugin(
    site: Path, described: dict[tuple[str, ...], list[HandlerEntry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each distribution is read once: that starts an interpreter, a third of the time of `try`."""
    read_entries = installed_handlers.read_entries

    async def read_once(settings: Settings, names: Sequence[str]) -> list[HandlerEntry]:
        if tuple(names) not in described:
            described[tuple(names)] = await read_entries(settings, names)
        return described[tuple(names)]

    monkeypatch.setattr(installed_handlers, "read_entries", read_once)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "acme_jobs_of_try", raising=False)


@pytest.fixture
def line(plugin: None, tmp_path: Path) -> CommandLine:
    folder = tmp_path / "home"
    folder.mkdir()
    return CommandLine(folder, f"sqlite:///{folder}/worker.db")


def test_it_shows_all_that_a_run_does_and_stores_nothing(line):
    done = line(
        *("try", "acme.read", "--org", "org_acme", "--param", "pages=2", "--param", "title=7"),
        *("--property", "max_tokens=500", "--flag", "loud=true", "-o", "json"),
    )

    row = done.json()
    assert (done.code, row["state"], row["reason"], row["error"]) == (0, "succeeded", None, None)
    assert row["result"] == {
        "org": "org_acme",
        "name": "org_acme",
        "title": "7",
        "loud": True,
        "max_tokens": 500,
        "scopes": ["read:kb"],
    }
    assert (row["checkpoint"], row["progress"]["done"]) == ({"done": 2}, 2)
    assert row["settings"] == [
        {"name": "model_version", "from": "default", "value": "gpt-4"},
        {"name": "max_tokens", "from": "property", "value": "500"},
    ]
    assert [said for said in done.err.splitlines() if said.startswith("info")] == [
        "info    page 1 under [masked]",
        "info    page 2 under [masked]",
    ]
    assert "progress 2/2 pages" in done.err
    assert [file.name for file in line.settings.parent.iterdir()] == ["worker.toml"]


def test_it_runs_the_children_of_a_handler(line):
    done = line("try", "acme.pages", "--org", "org_acme", "-o", "json")

    row = done.json()
    first, second, gone, last = row["result"]
    assert [first, second, last] == [{"number": number, "org": "org_acme"} for number in (0, 1, 3)]
    assert "page 2 is gone" in gone
    assert (done.code, row["state"]) == (0, "succeeded")


def test_a_secret_comes_from_a_file_and_is_masked(line):
    file = line.settings.parent / "openai.key"
    file.write_text("sk-canary-0123456789\n")

    given = line("try", "acme.keyed", "--secret", f"openai={file}", "-o", "json")
    missing = line("try", "acme.keyed", check=False)
    wrong = line("try", "acme.keyed", "--secret", f"a b={file}", check=False)

    assert given.json()["result"] == 20
    assert "the key is [masked]" in given.err
    assert "canary" not in given.out + given.err
    assert (missing.code, "fix: --secret openai=FILE" in missing.err) == (1, True)
    assert (wrong.code, "is not the name of a secret" in wrong.err) == (2, True)


@pytest.mark.feature("egress")
def test_a_bound_secret_reaches_no_handler(line):
    file = line.settings.parent / "openai.key"
    file.write_text("sk-canary-0123456789\n")
    secret = ("try", "acme.keyed", "--secret", f"openai={file}")

    bound = line(*secret, "--secret-for", "openai=https://api.openai.com", "-o", "json")
    clear = line(*secret, "-o", "json")

    # The length of what the handler got: a placeholder, and in the control the value.
    assert (bound.json()["result"], clear.json()["result"]) == (len(placeholder_of("", "")), 20)
    assert "the key is orgworker-placeholder-" in bound.err
    assert "canary" not in bound.out + bound.err
    for wrong, problem in (
        (
            ("--secret-for", "openai=http://api.openai.com"),
            "origin: 'http://api.openai.com' is not one origin",
        ),
        (("--secret-for", "mail=https://api.openai.com"), "--secret-for: there is no --secret mail"),
        (("--secret-header", "openai=x-api-key"), "header: only a bound secret has one"),
    ):
        done = line(*secret, *wrong, check=False)
        assert (done.code, problem in done.err) == (2, True)


def test_a_state_goes_in_and_comes_out(line):
    file = line.settings.parent / "state.json"
    file.write_text('{"runs": 6}')

    given = line("try", "acme.count", "--state", f"@{file}", "-o", "json").json()
    again = line("try", "acme.count", "--state", json.dumps(given["definition_state"]), "-o", "json").json()

    assert (given["result"], given["definition_state"]) == (7, {"runs": 7})
    assert again["result"] == 8


@pytest.mark.parametrize(
    ("handler", "state", "problem"),
    [
        ("acme.count", "[1]", "--state: the state is not a JSON object"),
        ("acme.count", "@nowhere.json", "nowhere.json cannot be read"),
        ("acme.list", "{}", "handler acme.list declares no state"),
    ],
)
def test_a_state_that_makes_no_sense_is_a_usage_error(line, handler, state, problem):
    said = line("try", handler, "--state", state, check=False)

    assert said.code == 2
    assert problem in said.err


def test_it_confines_the_handler_as_a_worker_does(line, tmp_path):
    """So its author sees what the operator has to allow; the control reads the file without the sandbox."""
    require_landlock()
    file = tmp_path / "report"
    file.write_text("numbers")
    command = ("try", "acme.open", "--param", f"file={file}", "-o", "json")

    refused = line(*command, check=False)
    allowed = line("--set", f"execution.read_paths={tmp_path}/report", *command)
    unconfined = line("--set", "execution.sandbox=off", *command)

    assert refused.code == 1
    hint = f"the sandbox denies '{file}': add it to [execution] read_paths or write_paths"
    assert refused.json()["error"]["message"].endswith(hint)
    assert allowed.json()["result"] == unconfined.json()["result"] == "numbers"


def test_for_people_it_is_a_line_a_key_and_a_remark_on_what_is_no_setting(line):
    given = ("max_tokens=500", "max_token=5", "zone=eu")
    done = line("try", "acme.read", "--param", "pages=1", *(f"--property={one}" for one in given))

    words = [text.split() for text in done.out.splitlines()]
    assert ["state", "succeeded"] in words
    assert ["progress", "1/1", "pages"] in words
    assert ["max_tokens", "property", "500"] in words
    assert "property max_token is not a setting of the handler; did you mean max_tokens?" in done.err
    assert "property zone is not a setting of the handler\n" in done.err


@pytest.mark.parametrize(
    ("arguments", "reason", "fix"),
    [
        (["acme.read", "--param", "page=2"], "error", "the handler takes pages (needed), title"),
        (
            ["acme.read", "--param", "pages=1", "--property", "max_tokens=many"],
            "settings_invalid",
            "--property max_tokens=VALUE, or fix the handler's model; its settings are model_version,",
        ),
        (
            ["acme.read", "--param", "pages=1", "--scope", "write:kb"],
            "scope_missing",
            "--scope read:kb as well",
        ),
        (["acme.exit"], "handler_exited", ""),
        (["acme.snooze"], "snoozed", "a worker tries it again later"),
        (["acme.slow"], "timed_out", "give @job a longer timeout"),
    ],
)
def test_what_does_not_succeed_ends_with_1_and_says_what_to_do(line, arguments, reason, fix):
    done = line("try", *arguments, "-o", "json", check=False)

    assert (done.code, done.json()["reason"]) == (1, reason)
    assert fix in done.err


def test_an_error_is_shown_with_its_trace_from_the_handler_on(line):
    done = line("try", "acme.fail", check=False)

    assert done.code == 1
    assert "about to fail" in done.err
    assert "--pdb opens the debugger where it failed" in done.err
    trace = done.err[done.err.index("Traceback") :].splitlines()
    assert "acme_jobs_of_try.py" in trace[1]
    assert "KeyError: 'missing'" in trace
    assert "KeyError: 'missing'" in done.out


def test_ctrl_c_cancels_it(line):
    command = [
        sys.executable,
        "-m",
        "worker",
        "--config",
        str(line.settings),
        "try",
        "acme.wait",
        "-o",
        "json",
    ]
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as tried:
        assert tried.stderr is not None
        assert tried.stderr.readline() == "info    started\n"
        tried.send_signal(signal.SIGINT)
        out, _ = tried.communicate(timeout=60)

    assert tried.returncode == 1
    assert (json.loads(out)["state"], json.loads(out)["reason"]) == ("cancelled", "requested")


def test_without_a_model_all_properties_are_settings(line):
    done = line("try", "acme.list", "--property", "zone=eu", "-o", "json")

    assert done.json()["result"] == {"zone": "eu"}
    assert done.json()["settings"] == [{"name": "zone", "from": "property", "value": "eu"}]
    assert "is not a setting" not in done.err


@pytest.mark.parametrize("handler", ["acme.fail", "acme.fail_blocking"])
def test_the_debugger_stops_in_the_handlers_own_code(line, handler):
    done = line("try", handler, "--pdb", stdin="p sorted(locals())\nquit\n", check=False)

    assert done.code == 1
    assert "KeyError: 'missing'" in done.err
    assert 'return secret["missing"]' in done.out
    assert "['secret']" in done.out
    assert "fix:" not in done.err


@pytest.mark.feature("egress")
@pytest.mark.parametrize("handler", ["acme.ask", "acme.ask_blocking"])
def test_with_the_debugger_requests_go_by_the_broker(line, handler):
    """An open run, the control, has the token and reaches what is not listed."""
    key = line.settings.parent / "key"
    key.write_text("sk-canary-0123456789\n")
    with traffic() as api, traffic() as other:
        base = f'api_origins = ["{api.url}"]\napi_base_url = "{api.url}/"\n'
        line.settings.write_text(line.settings.read_text() + base)
        about = ("--param", f"other={other.url}", "--pdb")
        secret = ("--secret", f"openai={key}", "--secret-for", f"openai={api.url}")
        looks = "up\np token\np answer.text\n"

        done = line("try", handler, *about, *secret, stdin=f"{looks}p denied\nquit\n", check=False)
        assert other.seen == []
        opened = line("try", "acme.ask_openly", *about, stdin=f"{looks}quit\n", check=False)

    [asked] = api.seen
    assert asked.headers["x-key"] == "sk-canary-0123456789"
    assert asked.headers["authorization"].startswith("Bearer made-up.")
    assert "'orgworker-placeholder-" in done.out
    assert f"{other.url} is not in the egress list of this run" in done.out
    assert asked.headers["authorization"].removeprefix("Bearer ") not in done.out
    assert "canary" not in done.out + done.err
    assert (len(other.seen), "'made-up." in opened.out) == (1, True)


@pytest.mark.feature("egress")
def test_a_handler_that_blocks_can_ask_from_the_debugger(line):
    key = line.settings.parent / "key"
    key.write_text("sk-canary-0123456789\n")
    with traffic() as api:
        base = f'api_origins = ["{api.url}"]\napi_base_url = "{api.url}/"\n'
        line.settings.write_text(line.settings.read_text() + base)
        about = ("--param", f"other={api.url}", "--secret", f"openai={key}", "--pdb")

        done = line(
            *("try", "acme.ask_blocking", *about),
            stdin="up\np ctx.http.get('again').status_code\nquit\n",
            check=False,
        )

    assert api.paths()[-1] == "/again"
    assert "200" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no.such"], 3, "install its distribution, or create the handler with `new-job no.such`"),
        (["acme.broken"], 3, "handler acme.broken of acme-broken 1.0 cannot be loaded: ModuleNotFoundError"),
        (["acme.list", "--real"], 2, "--real needs --org"),
        (
            ["acme.list", "--org", "org_acme", "--real", "--flag", "a=1"],
            2,
            "leave them out, or leave out --real",
        ),
        (["acme.list", "--org", "org_acme", "--real"], 78, "`python -m worker db upgrade` creates it"),
        (["acme.list", "--org", ""], 2, "--org is empty"),
        (["acme.list", "--flag", "beta=null"], 2, "fix: use true, false, a number or text"),
        (["acme.list", "--param", "x"], 2, "--param 'x' is not NAME=VALUE"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_a_fix(line, arguments, code, message):
    done = line("try", *arguments, check=False)

    assert done.code == code
    assert message in done.err
    assert [file.name for file in line.settings.parent.iterdir()] == ["worker.toml"]


def test_a_real_orgs_token_is_used_and_leaves_no_trace(line, migrated_sqlite_file):
    copied(migrated_sqlite_file, line.settings.parent)
    application = Application(
        "org_acme",
        "m2m-acme",
        "secret-of-acme",
        ("read:kb",),
        ("https://api.acme.com",),
        properties={"max_tokens": "777"},
    )
    provider, thread = serve_provider([application])
    with thread:
        text = line.settings.read_text().replace("https://acme.kinde.com", provider.url)
        line.settings.write_text(text.replace("[issuers.main]", '[issuers.main]\nprofile = "kinde"'))
        org = {"code": "org_acme", "name": "Acme", "issuer": "main", "client_id": "m2m-acme"}
        line("orgs", "import", "-", stdin=json.dumps({**org, "client_secret": "secret-of-acme"}))
        before = line("credentials", "list", "org_acme", "-o", "json").out

        real = ("--org", "org_acme", "--real", "-o", "json")
        tried = line("try", "acme.read", *real, "--param", "pages=1")
        lacking = line("try", "acme.read", *real, "--param", "pages=1", "--scope", "write:kb", check=False)
        nobody = line("try", "acme.read", "--org", "org_nobody", "--real", check=False)
        line("orgs", "suspend", "org_acme")
        suspended = line("try", "acme.read", *real, "--param", "pages=1", check=False)

        assert line("credentials", "list", "org_acme", "-o", "json").out == before

    assert (tried.json()["result"]["name"], tried.json()["result"]["max_tokens"]) == ("Acme", 777)
    assert tried.json()["settings"][1] == {"name": "max_tokens", "from": "property", "value": "(not shown)"}
    assert line("runs", "list", "-o", "json").json() == []
    assert lacking.code == 1
    assert "`orgs check org_acme` reports what is wrong with its token" in lacking.err
    assert (nobody.code, suspended.code, suspended.out) == (3, 5, "")
    assert "org org_acme is suspended: no handler can run for it" in suspended.err


def test_what_a_run_spends_is_printed_and_limited(line):
    free = line("try", "acme.spend", "-o", "json").json()
    limited = line("try", "acme.spend", "--budget", "llm_tokens=5", "-o", "json", check=False)
    wrong = line("try", "acme.spend", "--budget", "llm_tokens=many", "-o", "json", check=False)

    assert (free["state"], free["spends"]) == ("succeeded", {"llm_tokens": 20})
    assert (limited.code, wrong.code) == (1, 2)
    assert (limited.json()["reason"], limited.json()["spends"]) == ("budget", {"llm_tokens": 10})


SECOND = """
[issuers.second]
url = "https://second.kinde.com"
audience = "https://api.acme.com"
"""


def test_a_made_up_org_uses_the_base_url_of_the_only_issuer(line):
    """With a second issuer, the control, a relative URL has no base."""
    provider, thread = serve_provider()
    with thread:
        api = f'api_origins = ["{provider.url}"]\napi_base_url = "{provider.url}/api/"\n'
        line.settings.write_text(line.settings.read_text() + api)
        tried = line("try", "acme.fetch", "-o", "json")
        line.settings.write_text(line.settings.read_text() + SECOND)
        unclear = line("try", "acme.fetch", "-o", "json", check=False)

    assert tried.json()["result"] == f"{provider.url}/api/contacts"
    assert unclear.code == 1
    assert unclear.json()["state"] == "failed"
