"""Measures tokens: a cached look-up, one verification, one cold acquisition, for 20 orgs.

    .venv/bin/python -m bench.tokens [--orgs N] [--lookups N] [--no-peers]

Against the development provider, as a process of its own on loopback. Beside it Authlib and
httpx-auth do the same in a virtual environment that is made for the purpose (pip needs an index)
and removed again. Theirs is a token in a client; ours is one of the right org, client and scopes,
verified before it was kept: an acquisition contains a verification.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from worker.clock import SystemClock
from worker.guard.issuer import Issuer
from worker.guard.jwks import KeySet
from worker.guard.profile import load
from worker.guard.verify import verify
from worker.ids import OrgId
from worker.model.orgs import OrgRef, TokenWant
from worker.outbound import open_client
from worker.secret import Secret
from worker.tokens.cache import Tokens
from worker.tokens.credentials import Credential

AUDIENCE = "https://api.bench.example"
PEERS = ("authlib>=1.6,<2", "httpx-auth>=0.22,<1", "joserfc>=1,<2")
VERIFICATIONS = 1_000
# The fastest of this many rounds counts, because the machine is shared.
ROUNDS = 5


def applications(count: int) -> list[dict[str, Any]]:
    """The provider's applications, one per org."""
    return [
        {
            "org_code": f"org_{number}",
            "client_id": f"client-{number}",
            "client_secret": f"secret-of-client-{number}",
            "scopes": ["read:kb"],
            "audiences": [AUDIENCE],
            "properties": {"model_version": "gpt-4", "max_tokens": 1000},
            "flags": {"agent-v2": True},
        }
        for number in range(count)
    ]


class Given:
    """Credentials in memory, so that no database is measured."""

    def __init__(self, apps: Sequence[dict[str, Any]]) -> None:
        self._apps = {app["org_code"]: app for app in apps}

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        app = self._apps[org_id]
        return [
            Credential(app["client_id"], org_id, org_id, 1, app["client_id"], Secret(app["client_secret"]))
        ]

    async def active_of(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[Credential]]:
        return {org_id: await self.active(org_id) for org_id in org_ids}

    async def active_ids(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[str]]:
        return {org_id: [self._apps[org_id]["client_id"]] for org_id in org_ids}

    async def used(self, credential: Credential, error: str | None) -> None: ...


@contextlib.contextmanager
def provider(apps: Sequence[dict[str, Any]], folder: Path) -> Iterator[str]:
    """The URL of a development provider that serves these applications."""
    file = folder / "applications.json"
    file.write_text(json.dumps(apps))
    command = [sys.executable, "-m", "worker.demo.provider", "--orgs", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield json.loads(next(iter(process.stdout or ())))["url"]
        finally:
            process.terminate()


async def ours(url: str, apps: Sequence[dict[str, Any]], lookups: int) -> None:
    """The token cache of the worker."""
    clock = SystemClock()
    issuer = Issuer("main", load("kinde"), url, AUDIENCE, max_requests_per_second=10_000)
    orgs = [OrgRef(OrgId(app["org_code"]), app["org_code"]) for app in apps]
    scopes = frozenset({"read:kb"})
    async with open_client() as client:
        cold, warm, verified = [], [], []
        for _ in range(ROUNDS):
            tokens = Tokens({"main": issuer}, Given(apps), client=client, clock=clock)
            began = time.perf_counter()
            for org in orgs:
                enforced = await tokens.ensure(TokenWant(org, "main", scopes=scopes))
            cold.append((time.perf_counter() - began) / len(orgs))
            began = time.perf_counter()
            for number in range(lookups):
                await tokens.ensure(TokenWant(orgs[number % len(orgs)], "main", scopes=scopes))
            warm.append((time.perf_counter() - began) / lookups)
            await tokens.close()

        keys = KeySet(issuer, client, clock=clock)
        text = enforced.token.reveal()
        await verify(text, issuer=issuer, audience=AUDIENCE, keys=keys, clock=clock)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(VERIFICATIONS):
                await verify(text, issuer=issuer, audience=AUDIENCE, keys=keys, clock=clock)
            verified.append((time.perf_counter() - began) / VERIFICATIONS)
        await keys.close()
    report("orgworker", "cold acquisition", min(cold))
    report("orgworker", "cached look-up", min(warm))
    report("orgworker", "verification", min(verified))


def peers(url: str, apps: Sequence[dict[str, Any]], lookups: int, folder: Path) -> None:
    """The same with the peers, in a separate environment."""
    home = folder / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
    given = json.dumps({"url": url, "apps": list(apps), "lookups": lookups})
    done = subprocess.run(
        [python, Path(__file__).with_name("token_peers.py")],
        input=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        row = json.loads(line)
        report(row["by"], row["what"], row["seconds"])


def report(by: str, what: str, seconds: float) -> None:
    print(f"{by:<28} {what:<18} {1e6 * seconds:>9.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--orgs", type=int, default=20)
    parser.add_argument("--lookups", type=int, default=20_000)
    parser.add_argument("--no-peers", action="store_true", help="only orgworker")
    given = parser.parse_args()
    apps = applications(given.orgs)
    with tempfile.TemporaryDirectory() as name, provider(apps, Path(name)) as url:
        asyncio.run(ours(url, apps, given.lookups))
        if not given.no_peers:
            peers(url, apps, given.lookups, Path(name))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
