"""The four orgs of the story: their applications at the provider, and what the operator knows of them."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from worker.demo.applications import Application, Fault
from worker.demo.provider import Provider

AUDIENCE = "https://api.demo.example"
DEFINITION = "support-digest"
FLAG = "agent-v2"


@dataclass(frozen=True, slots=True)
class Actor:
    """One org: `stored_secret` is the one that the operator has, right or not."""

    code: str
    name: str
    properties: dict[str, Any]
    flags: dict[str, Any]
    secret: str = field(repr=False)
    stored_secret: str = field(repr=False)

    @property
    def client_id(self) -> str:
        return f"m2m-{self.code}"

    def as_application(self) -> Application:
        return Application(
            org_code=self.code,
            client_id=self.client_id,
            client_secret=self.secret,
            scopes=("read:kb",),
            audiences=(AUDIENCE,),
            properties=dict(self.properties),
            flags=dict(self.flags),
        )

    def as_import_line(self) -> str:
        return json.dumps(
            {
                "code": self.code,
                "name": self.name,
                "issuer": "main",
                "client_id": self.client_id,
                "client_secret": self.stored_secret,
                "tags": ["demo"],
            }
        )


def make_actor(
    code: str, name: str, model: str, flags: dict[str, Any], *, dead_secret: bool = False
) -> Actor:
    secret = secrets.token_urlsafe(24)
    properties = {"model_version": model, "max_tokens": 400, "language": "en"}
    stored = secrets.token_urlsafe(24) if dead_secret else secret
    return Actor(code, name, properties, flags, secret, stored)


def make_cast() -> list[Actor]:
    """Acme has the flag, Globex has not, Initech's secret is dead, Umbrella gets Acme's token."""
    return [
        make_actor("org_acme", "Acme", "gpt-4o", {FLAG: True, "beta-tools": False}),
        make_actor("org_globex", "Globex", "gpt-4", {}),
        make_actor("org_initech", "Initech", "gpt-4", {}, dead_secret=True),
        make_actor("org_umbrella", "Umbrella", "gpt-4", {}),
    ]


def prepare(provider: Provider, cast: list[Actor]) -> None:
    """Register the applications, and make the provider answer Umbrella with a token of Acme's org."""
    for actor in cast:
        provider.add(actor.as_application())
    provider.misbehave(Fault(replace={"org_code": "org_acme"}), "m2m-org_umbrella")


def settings_file(database: str, provider_url: str, api_url: str) -> str:
    """worker.toml of the demo."""
    return f"""\
[database]
url = "sqlite:///{database}"

[issuers.main]
profile = "kinde"
url = "{provider_url}"
audience = "{AUDIENCE}"
api_origins = ["{api_url}"]

[execution]
pass_environment = ["ASSISTANT_API_KEY"]
drain = "3s"

[web]
listen = ""
"""


def definitions_file(cast: list[Actor], api_url: str) -> str:
    """The file that the demo hands to `apply`: the same definition for each org."""
    return "\n".join(
        f"""\
[[definition]]
org = "{actor.code}"
name = "{DEFINITION}"
handler = "assistant.digest"
variants = [{{ flag = "{FLAG}", handler = "assistant.digest_v2" }}]
schedule = "every 3s"
spread = "off"
scopes = ["read:kb"]
params = {{ knowledge_base = "{api_url}", chat = "{api_url}" }}
"""
        for actor in cast
    )
