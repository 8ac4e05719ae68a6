"""Accounts: whose key sends a request, and the APIs with that key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from worker.engine.attempt.tools import SecretSource
from worker.errors import ConfigurationError
from worker.features.batches.anthropic import Anthropic
from worker.features.batches.openai import OpenAI
from worker.features.batches.remote import BatchApi, Http
from worker.handlers.completions import ANTHROPIC_VERSION
from worker.ids import OrgId
from worker.model.batches import BASE_URLS, ModelApi
from worker.model.orgs import OrgRef
from worker.model.prices import Prices
from worker.settings import Settings
from worker.store.spending import CountedSpends
from worker.telemetry.masking import masker
from worker.wiring.issuers import read_secret


def apis_of(settings: Settings) -> tuple[ModelApi, ...]:
    """The APIs of `[batches]`."""
    return tuple(
        ModelApi(name, one.provider, one.base_url or BASE_URLS[one.provider], one.secret)
        for name, one in settings.batches.items()
    )


class Ledger(Protocol):
    """What prices the requests, and reports what they were counted as."""

    async def prices(self) -> Prices:
        """The prices of now. Raises Unavailable."""

    def report(self, counted: CountedSpends) -> None:
        """Emit what was counted."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """Reads keys at each use, so that a rotation holds at once."""

    apis: Mapping[str, ModelApi]
    secrets_dir: str
    secrets: SecretSource
    client: httpx.AsyncClient

    async def own_key(self, api: ModelApi, org: OrgRef) -> str | None:
        """The org's own key of an API; None if it has none, or one that is bound to another origin.

        Raises Unavailable.
        """
        if not api.secret:
            return None
        try:
            found = (await self.secrets.of(org, (api.secret,))).get(api.secret)
        except ConfigurationError:
            return None
        if found is None or (found.binding is not None and found.binding.origin != api.origin):
            return None
        masker.register(found.value, org.id)
        return found.value

    def operators_key(self, api: ModelApi) -> str | None:
        """The operator's key: the file `model_key__NAME` in `secrets_dir`; None without one."""
        name = f"model_key__{api.name}"
        if not self.secrets_dir or not (Path(self.secrets_dir) / name).exists():
            return None
        try:
            return read_secret(name, self.secrets_dir, "", "")
        except ConfigurationError:
            return None

    async def open(self, name: str, org_id: OrgId | None) -> BatchApi | None:
        """The API with the key of an org, or of the operator; None if there is no such key now."""
        api = self.apis.get(name)
        if api is None:
            return None
        key = self.operators_key(api) if org_id is None else await self.own_key(api, OrgRef(org_id, ""))
        if key is None:
            return None
        if api.provider == "openai":
            return OpenAI(Http(self.client, api.base_url, {"Authorization": f"Bearer {key}"}))
        headers = {"x-api-key": key, "anthropic-version": ANTHROPIC_VERSION}
        return Anthropic(Http(self.client, api.base_url, headers))
