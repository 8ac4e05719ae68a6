"""The installation of the demo: four orgs, their definitions, and the commands of an operator."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from worker.demo import handlers
from worker.demo.api import CustomerApi
from worker.demo.handlers import METER
from worker.demo.management import Application, Organization
from worker.demo.model_apis import ModelApis, serving
from worker.demo.people import Person, WebApplication
from worker.demo.provider import Fault, Provider, serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.guard import Guard

AUDIENCE = "https://api.demo.example"
SCOPE = "read:kb"
# The definition that every org has from a template; the demo tells its story.
DIGEST = "support-digest"
FLAG = "agent-v2"
# The definition in the middle of whose run the demo kills its worker, and its org.
HANDBOOK = "handbook"
HANDBOOK_ORG = "org_globex"
# The definition that waits for an approval, and its org.
REFUND = "refund"
REFUND_ORG = "org_acme"
# The template for orgs with the tag `pro`, and the one of them whose budget its run uses up.
LETTERS = "letters"
LETTERS_ORG = "org_globex"
# The template for the same orgs whose model requests go into batches, and the seconds that a batch takes.
REVIEWS = "reviews"
BATCH = 6.0
# The org of the people who run the installation, the console's client id, and the folder with secrets.
VENDOR = "org_vendor"
CONSOLE = "console"
# The client id of the application that manages the others.
MANAGER = "orgworker"
SECRETS = "secrets"
# Becomes the command in its arguments, which the kernel kills when the thread that started it ends. A parent
# that was gone before sends no signal.
ATTACHED = """
import os, sys
from worker.engine.runners.child.linux import die_with_parent

parent, *command = sys.argv[1:]
die_with_parent()
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""
# Seconds that the chat endpoint takes to answer, so that progress can be watched.
CHAT_DELAY = 0.2


def make_org(name: str, *, model: str = "gpt-4", plan: str = "free", **flags: bool) -> Organization:
    return Organization(
        f"org_{name.lower()}",
        name,
        properties={"plan": plan},
        token_properties={"model_version": model, "max_tokens": 400, "language": "en"},
        token_flags=flags,
    )


def make_orgs() -> list[Organization]:
    """Acme has the flag, Globex does not; Initech and Umbrella are about to have trouble."""
    return [
        make_org("Acme", model="gpt-4o", plan="pro", **{FLAG: True, "beta-tools": False}),
        make_org("Globex", plan="pro"),
        make_org("Initech"),
        make_org("Umbrella"),
    ]


@dataclass(frozen=True, slots=True)
class World:
    """What surrounds the demo's worker: the identity provider, the customer API, a model and their orgs."""

    orgs: list[Organization]
    provider: Provider
    api: CustomerApi
    api_url: str
    chat_key: str
    management_secret: str
    models_url: str

    def environment(self) -> dict[str, str]:
        """The environment of the commands and the worker: this process's, without worker settings."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
        return own | {"ASSISTANT_API_KEY": self.chat_key}

    def break_two(self) -> None:
        """Revoke the secret of Initech, and let Umbrella get tokens of Acme; both have an application."""
        applications = {app.org_code: app for app in self.provider.applications.values()}
        applications["org_initech"].client_secret = secrets.token_urlsafe(24)
        self.provider.misbehave(
            Fault(replace={"org_code": "org_acme"}), applications["org_umbrella"].client_id
        )


@contextlib.contextmanager
def world(*, delay: float = CHAT_DELAY, news_every: float | None = None) -> Iterator[World]:
    """Serve the provider, the API and a model's batches from threads.

    The chat endpoint takes `delay` seconds to answer.
    """
    orgs = make_orgs()
    chat_key, secret = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    provider, provider_thread = serve_provider()
    add_orgs(provider, orgs, secret)
    guard = Guard(provider.url, audience=AUDIENCE, scopes={SCOPE})
    names = {org.code: org.name for org in orgs}
    api = CustomerApi(guard, orgs=names, chat_key=chat_key, delay=delay, news_every=news_every)
    listener = bind_loopback()
    models = ModelApis(time.time, lambda: BATCH, reply=summary)
    with provider_thread, ServerThread(api.asgi(), listener), serving(models) as models_url:
        yield World(orgs, provider, api, url_of(listener), chat_key, secret, models_url)


def summary(request: Mapping[str, Any]) -> str:
    """The model's answer."""
    return f"Most are content. ({request['input']})"


def add_orgs(provider: Provider, orgs: Iterable[Organization], management_secret: str) -> None:
    """Add the orgs, the API and the application that manages others; the orgs have no application yet."""
    management = provider.management
    management.add_api("Knowledge base", AUDIENCE, (SCOPE,))
    management.org_properties.add("plan")
    for org in orgs:
        management.orgs[org.code] = org
        management.application_properties |= org.token_properties.keys()
    audience = f"{provider.url}/api"
    provider.add(Application("", MANAGER, management_secret, management.scopes(), (audience,), name=MANAGER))


def settings_file(database: Path, surroundings: World, *, listen: str, token: str) -> str:
    """The demo's worker.toml; `token` is the operator's, for the console at `listen`.

    Registers that console at the provider, with people. Its secret there, that of the application that
    manages the others, and the key of the model are files beside the database.
    """
    folder = database.parent / SECRETS
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "management__main").write_text(surroundings.management_secret, encoding="utf-8")
    (folder / "model_key__openai").write_text(secrets.token_urlsafe(24), encoding="utf-8")
    add_people(surroundings.provider, folder, surroundings.orgs, listen)
    return f"""\
secrets_dir = "{database.parent / SECRETS}"

[database]
url = "sqlite:///{database}"

[issuers.main]
profile = "kinde"
url = "{surroundings.provider.url}"
audience = "{AUDIENCE}"
api_origins = ["{surroundings.api_url}"]

[issuers.main.management]
client_id = "{MANAGER}"
max_requests_per_second = 100
tags = {{ pro = "properties.plan=pro" }}

[execution]
bind_environment = {{ ASSISTANT_API_KEY = "{surroundings.api_url}" }}
drain = "3s"

[batches.openai]
provider = "openai"
base_url = "{surroundings.models_url}"
every = "3s"
poll = "1s"

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


def add_people(provider: Provider, folder: Path, orgs: Iterable[Organization], listen: str) -> None:
    """People at the provider, and the console's application there; its secret is a file of `folder`."""
    secret = secrets.token_urlsafe(24)
    (folder / "login__main").write_text(secret, encoding="utf-8")
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


def template_file(api_url: str) -> str:
    """The file for the first `apply`: a digest every three seconds, for every org that comes."""
    return f"""\
[[template]]
name = "{DIGEST}"
orgs = "all"
handler = "assistant.digest"
variants = [{{ flag = "{FLAG}", handler = "assistant.digest_v2" }}]
schedule = "every 3s"
spread = "off"
scopes = ["{SCOPE}"]
params = {{ {_services(api_url)} }}
"""


def definitions_file(orgs: list[Organization], api_url: str, *, now: datetime) -> str:
    """The file for the second `apply`: what each org ran yesterday, too."""
    zone = zone_of(last_night(now))
    articles = f'params = {{ url = "{api_url}/v1/collections/faq/articles" }}\n'
    digest = f'scopes = ["{SCOPE}"]\nparams = {{ {_services(api_url)}, page_size = 1 }}\n'
    tables = []
    for org in orgs:
        tables += [
            _table(org, "crm-sync", "http.request", "*/15 * * * *") + articles,
            _table(org, "nightly-digest", "assistant.digest", "0 2 * * *", zone) + digest,
        ]
        if org.properties["plan"] == "pro":
            tables.append(_table(org, "usage-report", "http.request", "5 * * * *") + articles)
    return "\n".join(tables)


def _table(org: Organization, name: str, handler: str, schedule: str, zone: str | None = None) -> str:
    """The first lines of a definition."""
    lines = {"org": org.code, "name": name, "handler": handler, "schedule": schedule, "timezone": zone}
    written = "".join(f'{key} = "{value}"\n' for key, value in lines.items() if value is not None)
    return f'[[definition]]\n{written}spread = "off"\n'


def later_file(api_url: str) -> str:
    """The file for the third `apply`: what had no past, with a budget that is soon used up."""
    return f"""\
[[definition]]
org = "{HANDBOOK_ORG}"
name = "{HANDBOOK}"
handler = "assistant.digest"
schedule = "@yearly"
scopes = ["{SCOPE}"]
params = {{ {_services(api_url)}, collection = "handbook", page_size = 1 }}

[[definition]]
org = "{REFUND_ORG}"
name = "{REFUND}"
handler = "demo.refund"
schedule = "@yearly"
params = {{ customer = "Ada", euros = 40 }}

[[template]]
name = "{LETTERS}"
orgs = {{ tags = ["pro"] }}
handler = "demo.letters"
schedule = "@yearly"
params = {{ customers = 12 }}

[[template]]
name = "{REVIEWS}"
orgs = {{ tags = ["pro"] }}
handler = "demo.reviews"
schedule = "every 30s"
spread = "off"
model_requests = "batch"
batch_within = "1h"

[[budget]]
org = "{LETTERS_ORG}"
meter = "{METER}"
per = "day"
limit = 8
"""


def _services(api_url: str) -> str:
    return f'knowledge_base = "{api_url}", chat = "{api_url}"'


def begin(folder: Path, around: World, run: Callable[..., object], *, now: datetime) -> None:
    """Bring the orgs of the provider here and give them definitions; `run` runs a command.

    What breaks comes after: an application is active only once a token of it is verified.
    """
    template, definitions = folder / "template.toml", folder / "demo.toml"
    template.write_text(template_file(around.api_url), encoding="utf-8")
    definitions.write_text(definitions_file(around.orgs, around.api_url, now=now), encoding="utf-8")
    run("db", "upgrade")
    run("apply", str(template))
    run("orgs", "sync", "--provision")
    around.break_two()
    run("apply", str(definitions))


class DemoFailed(Exception):
    """A command of the demo failed, or its worker ended unexpectedly."""


class DemoInstallation:
    """The folder of one demo: its files, its environment and its worker."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.database = folder / "demo.db"
        self.settings = folder / "worker.toml"
        self.log = folder / "worker.log"
        plugins = folder / "plugins"
        handlers.install(plugins)
        path = os.pathsep.join(filter(None, (str(plugins), environment.get("PYTHONPATH"))))
        self._environment = environment | {"PYTHONPATH": path}
        self._script = folder / "orgworker"
        command = f'PYTHONPATH={shlex.quote(path)} exec {shlex.join(self._command())} "$@"'
        self._script.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        self._script.chmod(0o700)
        self._worker: subprocess.Popen[bytes] | None = None

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "worker", "--config", str(self.settings), *arguments]

    def command_line(self) -> str:
        """What runs a command on this installation, as text for a shell in any folder."""
        script = shlex.quote(str(self._script))
        # No file may be executed on a file system that is mounted with `noexec`.
        return script if os.access(self._script, os.X_OK) else f"sh {script}"

    def run(self, *arguments: str) -> None:
        """Run one command; its failure ends the demo."""
        say(f"$ orgworker {' '.join(Path(item).name for item in arguments)}")
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

    def start_worker(self) -> None:
        # In its own session, so that Ctrl-C reaches only this process, which then drains the worker; if this
        # process is killed, so is the worker, and with that its runs.
        with self.log.open("ab") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", "-c", ATTACHED, str(os.getpid()), *self._command("run")],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check_worker(self) -> None:
        """Raise DemoFailed if the worker has ended."""
        if self._worker is not None and self._worker.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()[-20:]
            raise DemoFailed("\n".join([f"the worker ended with {self._worker.returncode}", *lines]))

    def kill_worker(self) -> None:
        """End the worker by SIGKILL, as a lost machine would."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()

    def end_worker(self) -> None:
        """Drain the worker with SIGTERM, send another to shorten the grace, then kill it."""
        for _ in range(2):
            if self._worker is None or self._worker.poll() is not None:
                return
            self._worker.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._worker.wait(timeout=5)
        if self._worker is not None and self._worker.poll() is None:
            self.kill_worker()


def say(text: str) -> None:
    print(f"# {text}", flush=True)


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
