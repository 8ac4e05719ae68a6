"""What settings and definitions make of sealed runs, and that none of their values is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_canary import forms, written
from tests.acceptance.test_secrets import served
from tests.fakes.handlers import read_journal
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import AUDIENCE, Site, application, definition
from tests.fakes.traffic import Seen, Traffic, traffic
from worker.demo.provider import Provider

pytestmark = [pytest.mark.feature("egress"), pytest.mark.feature("org_secrets"), pytest.mark.timeout(300)]
KEY = "sk-canary/of+acme-0123456789"
VARIABLE = "canary-of-the-environment-0123456789"
SOURCE = """
import json, os, socket
from worker import BlockingContext, Context, job

def write(ctx, **fields):
    with open(ctx.params["journal"], "a") as file:
        file.write(json.dumps({"who": ctx.params["who"]} | fields) + "\\n")

def connects():
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError as error:
        return type(error).__name__

@job("acme.undeclared", max_attempts=1)
async def undeclared(ctx: Context):
    api = await ctx.http.get(f"{ctx.params['api']}/undeclared")
    write(ctx, socket=connects(), token=(await ctx.token()).reveal(), status=api.status_code)
    await ctx.http.get(f"{ctx.params['other']}/undeclared")

@job("acme.variable", egress=["api", "OTHER"])
async def variable(ctx: Context):
    key = os.environ["CANARY_KEY"]
    bearer = {"Authorization": f"Bearer {key}"}
    for where in ("other", "api"):
        answer = await ctx.http.get(f"{ctx.params[where]}/variable", headers={"X-Key": key} | bearer)
        write(ctx, key=key, echo=answer.text)

@job("acme.resource", egress=["api", "OTHER"], audiences={"OTHER"})
async def resource(ctx: Context):
    token = (await ctx.token(resource="OTHER")).reveal()
    for where in ("other", "api"):
        answer = await ctx.http.get(f"{ctx.params[where]}/mcp", headers={"Authorization": f"Bearer {token}"})
        write(ctx, token=token, echo=answer.text)

@job("acme.reveals", egress=["api"])
def reveals(ctx: BlockingContext):
    import hashlib
    write(ctx, socket=connects(), digest=hashlib.sha256(ctx.token().reveal().encode()).hexdigest())

@job("acme.libraries", egress=["OTHER"], secrets={"openai"})
async def libraries(ctx: Context):
    from openai import AsyncOpenAI

    key = ctx.secret("openai")
    url = f"{ctx.params['other']}/v1"
    async with ctx.http_client("httpx2") as client:
        openai = AsyncOpenAI(api_key=key, base_url=url, http_client=client, max_retries=0)
        messages = [{"role": "user", "content": "why"}]
        answer = await openai.chat.completions.create(model="gpt-5", messages=messages)
        streamed = ""
        async for part in await openai.chat.completions.create(model="gpt-5", messages=messages, stream=True):
            streamed += part.choices[0].delta.content or ""
    async with ctx.http_client() as client:
        plain = await client.get(f"{url}/plain", headers={"X-Key": key})
    write(ctx, key=key, answer=answer.choices[0].message.content, streamed=streamed, echo=plain.text)

@job("acme.leaks", egress=["OTHER"], secrets={"openai"}, max_attempts=1)
async def leaks(ctx: Context):
    "Whatever it has, into all that is kept."
    key, token = ctx.secret("openai"), (await ctx.token()).reveal()
    answer = await ctx.http.get(f"{ctx.params['other']}/leaks?key={key}", headers={"X-Key": key})
    found = [ctx.params["who"] * 3, key, token, answer.text, dict(answer.headers), dict(os.environ)]
    print("printed", found)
    ctx.log.info("logged %s", found)
    ctx.progress(1, 2, answer.text[:100])
    await ctx.save({"saved": found})
    raise RuntimeError(f"raised {found}")
"""
NAMES = ("undeclared", "variable", "resource", "reveals", "libraries", "leaks")


def chat(seen: Seen) -> tuple[int, dict[str, str], bytes]:
    """A model gateway that says in its answers which key it got."""
    key = seen.headers.get("authorization", "")
    kind = {"Content-Type": "application/json"}
    if not seen.path.endswith("/chat/completions"):
        return 200, kind | {"X-Echo": key}, json.dumps(seen.headers).encode()
    common = {"id": "1", "created": 1, "model": "gpt-5"}
    if not json.loads(seen.body).get("stream"):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": key}}
        body = common | {"object": "chat.completion", "choices": [choice]}
        return 200, kind, json.dumps(body).encode()
    parts = [
        common | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
        for text in ("it was ", key)
    ]
    lines = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
    return 200, {"Content-Type": "text/event-stream"}, lines.encode()


def knowledge_base(seen: Seen) -> tuple[int, dict[str, str], bytes]:
    """One page with an article."""
    page = {"articles": [{"id": "kb-1", "title": "Login", "text": "How to log in."}], "next": None}
    return 200, {"Content-Type": "application/json"}, json.dumps(page).encode()


def prepared(site: Site, api: Traffic, other: Traffic, **network: Any) -> None:
    """A worker with the handlers; `other` is an origin with a bound secret, a variable and a resource."""
    make_plugin(
        site.plugins,
        dist="acme-sealed",
        modules={"acme_sealed": SOURCE.replace("OTHER", other.url)},
        entry_points={f"acme.{name}": f"acme_sealed:{name}" for name in NAMES},
    )
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in network.items())
    bound = f'bind_environment = {{ CANARY_KEY = "{other.url}" }}\n'
    site.configure(execution=f'{bound}private_origins = ["{other.url}"]\n{settings}')
    site.environment["CANARY_KEY"] = VARIABLE
    site.add_orgs(application("org_acme", audiences=(AUDIENCE, other.url)))
    site.cli("secrets", "add", "org_acme", "openai", "--for", other.url, stdin=f"{KEY}\n")


def run(site: Site, api: Traffic, other: Traffic, name: str, **keys: Any) -> dict[str, Any]:
    """The end of a run of one of the handlers."""
    params = {"journal": str(site.out / "journal"), "api": api.url, "other": other.url, "who": name}
    site.apply(definition("org_acme", name, f"acme.{name}", params=params, api_origins=[api.url], **keys))
    site.cli("definitions", "run", "org_acme", name)
    return site.wait_for_end("org_acme", name)


def told(site: Site, name: str) -> list[dict[str, Any]]:
    return read_journal(site.out / "journal", name)


def test_what_declares_nothing_reaches_the_api_only_where_sealing_is_required(site: Site) -> None:
    with traffic() as api, traffic() as other:
        prepared(site, api, other, network="require")
        site.start_worker()
        site.wait_for_handlers("acme.undeclared")

        ended = run(site, api, other, "undeclared")

        assert (ended["state"], other.seen) == ("failed", [])
        assert "EgressDenied" in json.dumps(ended["error"])
        [line] = told(site, "undeclared")
        assert (line["socket"], line["status"]) == ("PermissionError", 200)
        assert line["token"].startswith("orgworker-placeholder-")


def test_values_of_sealed_runs_reach_their_origins_and_are_written_nowhere(
    site: Site, provider: Provider, tmp_path: Path
) -> None:
    """Variables, tokens of a resource, libraries, a definition that reveals, `try`; then all that is kept."""
    provider.issued.clear()
    port = free_port()
    with traffic() as api, traffic(chat) as other:
        prepared(site, api, other)
        site.environment["WORKER_WEB__LISTEN"] = f"127.0.0.1:{port}"
        worker = site.start_worker()
        site.wait_for_handlers("acme.leaks")

        assert run(site, api, other, "variable")["state"] == "succeeded"
        mine, theirs = other.seen[-1].headers, api.seen[-1].headers
        assert (mine["x-key"], mine["authorization"]) == (VARIABLE, f"Bearer {VARIABLE}")
        assert theirs["x-key"].startswith("orgworker-placeholder-")

        assert run(site, api, other, "resource")["state"] == "succeeded"
        token = other.seen[-1].headers["authorization"].removeprefix("Bearer ")
        assert token in provider.issued
        assert api.seen[-1].headers["authorization"].startswith("Bearer orgworker-placeholder-")

        assert run(site, api, other, "libraries")["state"] == "succeeded"
        *chats, plain = other.seen[-3:]
        assert [each.path for each in chats] == ["/v1/chat/completions"] * 2
        assert {each.headers["authorization"] for each in chats} == {f"Bearer {KEY}"}
        assert plain.headers["x-key"] == KEY
        [line] = told(site, "libraries")
        assert line["answer"].startswith("Bearer ")
        assert line["streamed"].startswith("it was Bearer ")

        assert run(site, api, other, "leaks")["state"] == "failed"

        tried = site.cli(
            *("try", "acme.libraries", "--org", "org_acme", "--real"),
            *(
                "--param",
                f"other={other.url}",
                "--param",
                "who=tried",
                "--param",
                f"journal={tmp_path / 'out' / 'tried'}",
            ),
        )
        assert other.seen[-1].headers["x-key"] == KEY

        pages = served(site, f"http://127.0.0.1:{port}")
        bundle = site.folder / "bundle.json"
        site.cli("doctor", "--bundle", str(bundle), check=False)
        assert bundle.stat().st_size > 1000
        shown = [("runs", "logs", str(each["id"])) for each in site.runs()]
        sinks = written(site, ("handlers", "list", "-o", "json"), ("secrets", "list", "org_acme"), *shown)
        assert site.stop_worker(worker) == 0
        sinks |= pages | {"try": (tried.out + tried.err).encode()}
        sinks |= {f"{name} at the end": data for name, data in written(site).items()}

        # Text that is no secret is everywhere that the handler writes it.
        kept_in = {name for name, data in sinks.items() if b"leaks" * 3 in data}
        assert {"worker.db at the end", " ".join(shown[-1])} <= kept_in
        canaries = [*forms(KEY), *forms(VARIABLE)]
        canaries += [form.encode() for each in provider.issued for form in (each, each.rpartition(".")[2])]
        assert {name for name, data in sinks.items() if any(one in data for one in canaries)} == set()


def test_a_definition_that_reveals_gives_a_sealed_run_the_token(site: Site, provider: Provider) -> None:
    import hashlib

    provider.issued.clear()
    with traffic() as api, traffic() as other:
        prepared(site, api, other)
        site.start_worker()
        site.wait_for_handlers("acme.reveals")

        assert run(site, api, other, "reveals", reveal_token=True)["state"] == "succeeded"

        [line] = told(site, "reveals")
        assert line["socket"] == "PermissionError"
        assert line["digest"] in {hashlib.sha256(each.encode()).hexdigest() for each in provider.issued}


@pytest.mark.parametrize(("network", "keys"), [("auto", {}), ("require", {"egress": ["api", "public"]})])
def test_http_request_reaches_private_origins_by_the_broker_and_no_other_private_one(
    site: Site, network: str, keys: dict[str, Any]
) -> None:
    with traffic() as private, traffic() as other:
        site.configure(execution=f'private_origins = ["{private.url}"]\nnetwork = "{network}"')
        site.add_orgs(application("org_acme"))
        site.apply(
            definition(
                "org_acme", "private", "http.request", params={"url": f"{private.url}/{{org_code}}"}, **keys
            )
            + definition("org_acme", "other", "http.request", params={"url": f"{other.url}/x"}, **keys)
        )
        site.start_worker()
        site.wait_for_handlers("http.request")
        for name in ("private", "other"):
            site.cli("definitions", "run", "org_acme", name)

        reached, refused = (site.wait_for_end("org_acme", name) for name in ("private", "other"))

        assert (reached["state"], private.paths()) == ("succeeded", ["/org_acme"])
        assert "authorization" not in private.seen[0].headers
        assert (refused["state"], other.seen) == ("failed", [])
        [row] = site.cli("runs", "show", str(reached["id"]), "-o", "json").json()["egress"]
        assert (row["origin"], row["requests"], row["statuses"]) == (private.url, 1, {"200": 1})
        [row] = site.cli("runs", "show", str(refused["id"]), "-o", "json").json()["egress"]
        assert (row["denied"], row["statuses"]) == (1, {})


def test_the_digest_sends_its_model_a_bound_key_and_never_the_token(site: Site, provider: Provider) -> None:
    """Also a model whose origin is one of the API's. The knowledge base, the control, gets the token."""
    provider.issued.clear()
    with traffic(knowledge_base) as api, traffic(chat) as model:
        site.configure(
            execution=f'bind_environment = {{ ASSISTANT_API_KEY = "{model.url}" }}\n'
            f'private_origins = ["{model.url}"]'
        )
        site.environment["ASSISTANT_API_KEY"] = KEY
        site.add_orgs(application("org_acme"))
        keys = {"params": {"knowledge_base": api.url, "chat": model.url}, "scopes": ["read:kb"]}
        names = {"apart": [api.url], "together": [api.url, model.url]}
        site.apply(
            "".join(
                definition("org_acme", name, "assistant.digest", api_origins=origins, **keys)
                for name, origins in names.items()
            )
        )
        site.start_worker()
        site.wait_for_handlers("assistant.digest")
        for name in names:
            site.cli("definitions", "run", "org_acme", name)
        ended = [site.wait_for_end("org_acme", name) for name in names]

        assert [run["state"] for run in ended] == ["succeeded"] * 2
        # The model says which key it got.
        assert all(run["result"]["digest"].startswith("Bearer ") for run in ended)
        assert KEY not in json.dumps([run["result"] for run in ended])
        assert [seen.headers["authorization"] for seen in model.seen] == [f"Bearer {KEY}"] * 2
        tokens = {seen.headers["authorization"].removeprefix("Bearer ") for seen in api.seen}
        assert tokens
        assert tokens <= set(provider.issued)
        assert not [seen for seen in model.seen if any(token in repr(seen) for token in provider.issued)]
