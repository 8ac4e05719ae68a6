"""The seam: what an adapter of a provider's management API does, and the values that it returns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from worker.model.provider import ApplicationName
from worker.secret import Secret

PropertyValue = str | bool
NoticeKind = Literal["org_created", "org_updated", "org_deleted", "other"]


@dataclass(frozen=True, slots=True)
class ProviderOrg:
    """An org as the provider lists it; its properties are read separately."""

    code: str
    name: str
    external_id: str | None = None
    handle: str | None = None
    is_default: bool = False


@dataclass(frozen=True, slots=True)
class ListedApplication:
    """A machine-to-machine application in a list; `made_as` is None if orgworker did not make it.

    Nothing is changed by what a list says: read the application first, with `Management.application`.
    """

    id: str
    name: str
    made_as: ApplicationName | None = None


@dataclass(frozen=True, slots=True)
class OrgApplication:
    """One org's application, with its secret. Adapters return only what they checked to be the org's."""

    org: str
    id: str
    client_id: str
    secret: Secret = field(repr=False)
    name: str


@dataclass(frozen=True, slots=True)
class Notice:
    """What a genuine webhook is about. What it says of the org is to be read from the provider."""

    kind: NoticeKind
    org: str | None
    at: datetime


class Management(Protocol):
    """One provider's management API, with the credentials of `[issuers.NAME.management]`.

    All methods wait for the provider's limits. Reads are repeated while the provider fails. A change
    that is harmless to repeat is repeated too; `make` never is.

    Raises:
        ProviderUnavailable: no response, or a broken one, several times.
        Unclear: a change may or may not have been carried out; look before you repeat it.
        Throttled: the provider asks for a pause of more than five minutes.
        ProviderRefused: the provider refuses this request; `detail` is its code.
        ForeignApplication: a response names another application than the one asked for, or another
            org's; nothing was written with it.
        ConfigurationError: the provider does not accept the management credentials, or they lack a scope.
        InstallationMismatch: a change was not sent, since the applications may be another installation's.
    """

    @property
    def carried_out(self) -> Mapping[str, int]:
        """How many requests succeeded, by method and route."""

    def orgs(self) -> AsyncIterator[Sequence[ProviderOrg]]:
        """All orgs, by page; each org once. An error may come after some pages: then the list is unusable."""

    async def org(self, code: str) -> ProviderOrg | None:
        """One org, or None if the provider has none with this code."""

    async def org_properties(self, code: str) -> Mapping[str, PropertyValue]:
        """The properties of an org that have a value."""

    def applications(self) -> AsyncIterator[Sequence[ListedApplication]]:
        """All machine-to-machine applications, by page; each once."""

    async def application(
        self, id: str, *, org: str, name: ApplicationName | None = None, client_id: str | None = None
    ) -> OrgApplication | None:
        """One org's application with its secret, or None if it does not exist (any more).

        Pass its `name`, or for one that orgworker did not make the `client_id` of a credential whose
        token was verified for the org: whatever is passed must match.
        """

    async def make(self, name: ApplicationName) -> OrgApplication:
        """Make an application of the org in the name, without any API or scope.

        After any error but ProviderRefused it may exist: look for the name in `applications` before
        you call this again.
        """

    async def delete(self, id: str, *, org: str, name: ApplicationName) -> bool:
        """Delete an application; False if it did not exist any more."""

    async def authorise(self, application: OrgApplication, audience: str) -> None:
        """Let it request tokens for an audience. Harmless if it already may."""

    async def scopes(self, application: OrgApplication, audience: str) -> frozenset[str] | None:
        """Its scopes for an audience; None if the provider does not tell: then see its token."""

    async def add_scopes(self, application: OrgApplication, audience: str, scopes: Collection[str]) -> None:
        """Give it scopes of an audience that it is authorised for. Harmless if it already has them.

        Some providers do not say whether it worked: verify a token afterwards.
        """

    async def remove_scopes(
        self, application: OrgApplication, audience: str, scopes: Collection[str]
    ) -> None:
        """Take scopes of an audience away. Harmless if it does not have them."""

    async def properties(self, application: OrgApplication) -> Mapping[str, PropertyValue]:
        """Its properties that have a value."""

    async def set_property(self, application: OrgApplication, key: str, value: PropertyValue | None) -> None:
        """Set one of its properties; None removes its value."""

    async def webhook(self, body: bytes) -> Notice:
        """What a webhook is about, if this provider sent it lately.

        Raises:
            WebhookRefused: it is not genuine, too old, or no webhook; `detail` says which.
            IssuerUnavailable: the provider's keys cannot be read, so there is no verdict.
        """
