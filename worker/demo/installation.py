"""The installation of the demo: four orgs, their definitions, and the commands of an operator."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from worker.demo.api import CustomerApi
from worker.demo.people import Person, WebApplication
from worker.demo.provider import Application, Fault, Provider, serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.guard import Guard

AUDIENCE = "https://api.demo.example"
FLAG = "agent-v2"
# The org of the people who run the installation, the console's client id, and the folder with its secret.
VENDOR = "org_vendor"
CONSOLE = "console"
SECRETS = "secrets"
# Becomes the command in its arguments, which the kernel kills when the thread that started it ends. A parent
# that was gone before sends no signal.
ATTACHED = """
import os, sys
from worker.execution.runners.child.linux import die_with_parent

parent, *command = sys.argv[1:]
die_with_parent()
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""
# Seconds that the chat endpoint takes to answer, so that progress can be watched.
CHAT_DELAY = 0.2


@dataclass(frozen=True, slots=True)
class Org:
    """One org of the demo: its application at the provider, and the secret that the operator has."""

    application: Application
    name: str
    stored_secret: str

    @property
    def code(self) -> str:
        return self.application.org_code

    def as_import_line(self) -> str:
        credential = {"client_id": self.application.client_id, "client_secret": self.stored_secret}
        return json.dumps(
            {"code": self.code, "name": self.name, "issuer": "main", "tags": ["demo"], **credential}
        )


def make_org(
    name: str, *, model: str = "gpt-4", flags: dict[str, bool] | None = None, dead_secret: bool = False
) -> Org:
    code, secret = f"org_{name.lower()}", secrets.token_urlsafe(24)
    application = Application(
        org_code=code,
        client_id=f"m2m-{code}",
        client_secret=secret,
        scopes=("read:kb",),
        audiences=(AUDIENCE,),
        properties={"model_version": model, "max_tokens": 400, "language": "en"},
        flags=flags or {},
    )
    return Org(application, name, secrets.token_urlsafe(24) if dead_secret else secret)


def make_orgs() -> list[Org]:
    """Acme has the flag, Globex does not, Initech's secret is dead, Umbrella gets Acme's token."""
    return [
        make_org("Acme", model="gpt-4o", flags={FLAG: True, "beta-tools": False}),
        make_org("Globex"),
        make_org("Initech", dead_secret=True),
        make_org("Umbrella"),
    ]


@dataclass(frozen=True, slots=True)
class World:
    """What surrounds the demo's worker: the identity provider, the customer API and their orgs."""

    orgs: list[Org]
    provider: Provider
    api_url: str
    chat_key: str

    def environment(self) -> dict[str, str]:
        """The environment of the commands and the worker."""
        return clean_environment() | {"ASSISTANT_API_KEY": self.chat_key}

    def import_lines(self) -> str:
        """The input of `orgs import`."""
        return "".join(f"{org.as_import_line()}\n" for org in self.orgs)


@contextlib.contextmanager
def world(*, delay: float = CHAT_DELAY) -> Iterator[World]:
    """Serve the provider and the API from threads; the chat endpoint takes `delay` seconds to answer."""
    orgs = make_orgs()
    chat_key = secrets.token_urlsafe(24)
    provider, provider_thread = serve_provider(org.application for org in orgs)
    provider.misbehave(Fault(replace={"org_code": "org_acme"}), "m2m-org_umbrella")
    guard = Guard(provider.url, audience=AUDIENCE, scopes={"read:kb"})
    api = CustomerApi(guard, orgs={org.code: org.name for org in orgs}, chat_key=chat_key, delay=delay)
    listener = bind_loopback()
    with provider_thread, ServerThread(api.asgi(), listener):
        yield World(orgs, provider, url_of(listener), chat_key)


def settings_file(database: Path, surroundings: World, *, listen: str, token: str) -> str:
    """The demo's worker.toml; `token` is the operator's, for the console at `listen`.

    Registers that console at the provider, with people; its secret there is a file beside the database.
    """
    add_people(surroundings.provider, database.parent, surroundings.orgs, listen)
    return f"""\
secrets_dir = "{database.parent / SECRETS}"

[database]
url = "sqlite:///{database}"

[issuers.main]
profile = "kinde"
url = "{surroundings.provider.url}"
audience = "{AUDIENCE}"
api_origins = ["{surroundings.api_url}"]

[execution]
pass_environment = ["ASSISTANT_API_KEY"]
drain = "3s"

[web]
listen = "{listen}"

[[web.operators]]
name = "you"
role = "admin"
token_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"

[web.login]
issuer = "main"
client_id = "{CONSOLE}"

[[web.login.roles]]
claim = "permissions"
value = "jobs:support"
role = "operator"
org = "{VENDOR}"

[[web.login.roles]]
claim = "permissions"
value = "jobs:manage"
role = "manager"

[[web.login.roles]]
claim = "permissions"
value = "jobs:read"
role = "member"
"""


def add_people(provider: Provider, folder: Path, orgs: Iterable[Org], listen: str) -> None:
    """People at the provider, and the console's application there; its secret is a file of `folder`."""
    secret = secrets.token_urlsafe(24)
    (folder / SECRETS).mkdir(mode=0o700, exist_ok=True)
    (folder / SECRETS / "login__main").write_text(secret, encoding="utf-8")
    console = f"http://{listen}"
    provider.people.add_application(
        WebApplication(CONSOLE, secret, (f"{console}/login/callback",), (f"{console}/login",))
    )
    provider.people.add(Person("kp_sam", "Sam, support", "sam@vendor.example", VENDOR, ("jobs:support",)))
    for org in orgs:
        for name, permission in (("manager", "jobs:manage"), ("member", "jobs:read")):
            who = f"{org.code.removeprefix('org_')}_{name}"
            email = f"{name}@{org.code.removeprefix('org_')}.example"
            provider.people.add(Person(f"kp_{who}", f"{org.name}, {name}", email, org.code, (permission,)))


def last_night(now: datetime) -> datetime:
    """When the nightly digests last started: seven hours ago, at whatever time the demo is watched."""
    return now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=7)


def zone_of(night: datetime) -> str:
    """A zone in which that was two in the morning."""
    ahead = (2 - night.hour + 12) % 24 - 12
    # The sign of these names is that of POSIX: Etc/GMT-2 is two hours ahead of UTC.
    return f"Etc/GMT{-ahead:+d}" if ahead else "UTC"


def definitions_file(orgs: list[Org], api_url: str, *, now: datetime) -> str:
    """The file for `apply`: a digest every three seconds for each org, and what ran yesterday too."""
    zone = zone_of(last_night(now))
    digest = f'knowledge_base = "{api_url}", chat = "{api_url}"'
    articles = f'url = "{api_url}/v1/collections/faq/articles"'
    tables = []
    for org in orgs:
        tables += [
            f"""\
[[definition]]
org = "{org.code}"
name = "support-digest"
handler = "assistant.digest"
variants = [{{ flag = "{FLAG}", handler = "assistant.digest_v2" }}]
schedule = "every 3s"
spread = "off"
scopes = ["read:kb"]
params = {{ {digest} }}
""",
            f"""\
[[definition]]
org = "{org.code}"
name = "crm-sync"
handler = "http.request"
schedule = "*/15 * * * *"
spread = "off"
params = {{ {articles} }}
""",
            f"""\
[[definition]]
org = "{org.code}"
name = "nightly-digest"
handler = "assistant.digest"
schedule = "0 2 * * *"
timezone = "{zone}"
spread = "off"
scopes = ["read:kb"]
params = {{ {digest}, page_size = 1 }}
""",
        ]
        if org.name in ("Acme", "Globex"):
            tables.append(f"""\
[[definition]]
org = "{org.code}"
name = "usage-report"
handler = "http.request"
schedule = "5 * * * *"
spread = "off"
params = {{ {articles} }}
""")
    return "\n".join(tables)


class DemoFailed(Exception):
    """A command of the demo failed, or its worker ended unexpectedly."""


class Installation:
    """The folder of one demo: its files, its environment and its worker."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.database = folder / "demo.db"
        self.settings = folder / "worker.toml"
        self.log = folder / "worker.log"
        self._environment = environment

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "worker", "--config", str(self.settings), *arguments]

    def run(self, *arguments: str) -> None:
        """Run one command; its failure ends the demo."""
        say(f"$ python -m worker {' '.join(Path(item).name for item in arguments)}")
        done = subprocess.run(
            self._command(*arguments),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DemoFailed(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")

    def start_worker(self) -> subprocess.Popen[bytes]:
        # In its own session, so that Ctrl-C reaches only this process, which then drains the worker; if this
        # process is killed, so is the worker, and with that its runs.
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", ATTACHED, str(os.getpid()), *self._command("run")],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def clean_environment() -> dict[str, str]:
    """This process's environment without worker settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}


def free_address() -> str:
    """The console's usual address, or one with a free port if another process has that one."""
    for port in (8470, 0):
        try:
            listener = bind_loopback(port)
        except OSError:
            continue
        with listener:
            return "{}:{}".format(*listener.getsockname()[:2])
    raise DemoFailed("no port of 127.0.0.1 is free")
