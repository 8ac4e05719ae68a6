"""Kinde's management API: the requests and responses of its published OpenAPI document."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeGuard
from urllib.parse import quote

from worker.clock import Clock
from worker.errors import (
    ConfigurationError,
    ForeignApplication,
    ProviderRefused,
    ProviderUnavailable,
    Throttled,
    Unclear,
)
from worker.features.provisioning.management.calls import Calls, Response
from worker.features.provisioning.management.contract import (
    ListedApplication,
    Notice,
    OrgApplication,
    PropertyValue,
    ProviderOrg,
)
from worker.features.provisioning.management.webhooks import SignedMessage, read_notice
from worker.model.provider import ApplicationName
from worker.secret import Secret
from worker.telemetry.masking import masker

PAGE_SIZE = 500  # the most that Kinde gives
MAX_PAGES = 2_000
DELETIONS = 3
# Seconds: how long the APIs and their scopes are cached, and the pause before they are read again for an
# unknown audience or scope.
APIS_CACHED = 300.0
APIS_READ_AGAIN = 10.0
# Codes of 400: an API or scope that was read before is gone; an application is.
STALE = ("API_NOT_FOUND", "SCOPE_NOT_FOUND")
UNKNOWN = ("APPLICATION_NOT_FOUND", "APPLICATION_REQUIRED")
LONGEST_TEXT = 1_000
_CODE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the API knows; one that is `repeatable` may be carried out twice."""

    method: str
    route: str
    scope: str
    repeatable: bool = False


ORGS = Request("GET", "/api/v1/organizations", "read:organizations")
ORG = Request("GET", "/api/v1/organization", "read:organizations")
ORG_PROPERTIES = Request("GET", "/api/v1/organizations/{org_code}/properties", "read:organization_properties")
_APPLICATION = "/api/v1/applications/{application_id}"
APPLICATIONS = Request("GET", "/api/v1/applications", "read:applications")
APPLICATION = Request("GET", _APPLICATION, "read:applications")
MAKE = Request("POST", "/api/v1/applications", "create:applications")
DELETE = Request("DELETE", _APPLICATION, "delete:applications")
PROPERTIES = Request("GET", f"{_APPLICATION}/properties", "read:application_properties")
SET_PROPERTY = Request(
    "PUT", f"{_APPLICATION}/properties/{{property_key}}", "update:application_properties", repeatable=True
)
APIS = Request("GET", "/api/v1/apis", "read:apis")
API_SCOPES = Request("GET", "/api/v1/apis/{api_id}/scopes", "read:api_scopes")
AUTHORISE = Request("PATCH", "/api/v1/apis/{api_id}/applications", "update:apis", repeatable=True)
_API_SCOPE = "/api/v1/apis/{api_id}/applications/{application_id}/scopes/{scope_id}"
ADD_SCOPE = Request("POST", _API_SCOPE, "create:api_application_scopes", repeatable=True)
REMOVE_SCOPE = Request("DELETE", _API_SCOPE, "delete:apis_application_scopes", repeatable=True)

_REQUESTS = (
    *(ORGS, ORG, ORG_PROPERTIES, APPLICATIONS, APPLICATION, MAKE, DELETE, PROPERTIES, SET_PROPERTY),
    *(APIS, API_SCOPES, AUTHORISE, ADD_SCOPE, REMOVE_SCOPE),
)
# All that the application in [issuers.NAME.management] needs.
SCOPES = tuple(dict.fromkeys(request.scope for request in _REQUESTS))


@dataclass(frozen=True, slots=True)
class KindeApi:
    """An API of the provider: its id, and its scopes' ids by key."""

    id: str
    scopes: Mapping[str, str]


@dataclass(eq=False, repr=False)
class KindeManagement:
    """Implements `contract.Management` for one Kinde environment.

    Kinde's responses about an application name no org. What proves the org is the name that orgworker
    gave, read again by id before anything is written, or a client id that a verified token had.
    """

    calls: Calls
    verify_message: Callable[[str, SignedMessage], Awaitable[Mapping[str, Any]]]
    clock: Clock
    _apis: dict[str, KindeApi] = field(default_factory=dict, init=False)
    _apis_read_at: float | None = field(default=None, init=False)
    _reading_apis: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    # The name of each id that a response had: a client id that belongs to another name is refused.
    _names: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def carried_out(self) -> Mapping[str, int]:
        return self.calls.carried_out

    async def orgs(self) -> AsyncIterator[Sequence[ProviderOrg]]:
        async for items in self._pages(ORGS, "organizations"):
            yield [self._read_org(item) for item in items]

    async def org(self, code: str) -> ProviderOrg | None:
        response = await self._ask(ORG, query={"code": code})
        if response.status in (400, 404):
            return None
        self._accept(response, f"org {code}")
        org = self._read_org(response.body)
        if org.code != code:
            raise ProviderUnavailable(f"{self._who}: asked for org {code}, it responded with another one")
        return org

    async def org_properties(self, code: str) -> Mapping[str, PropertyValue]:
        response = await self._ask(ORG_PROPERTIES, org_code=code)
        return self._read_properties(self._accept(response, f"the properties of org {code}"))

    async def applications(self) -> AsyncIterator[Sequence[ListedApplication]]:
        async for items in self._pages(APPLICATIONS, "applications"):
            page = []
            for item in items:
                id, name = self._text(item, "id"), self._optional_text(item, "name") or ""
                self._names[id] = name
                made_as = ApplicationName.parse(name)
                # The document does not say how lists write the type.
                if made_as is not None or "m2m" in str(item.get("type")).lower():
                    page.append(ListedApplication(id, name, made_as))
            yield page

    async def application(
        self, id: str, *, org: str, name: ApplicationName | None = None, client_id: str | None = None
    ) -> OrgApplication | None:
        if (name is None) == (client_id is None):
            raise ValueError("pass the name or the client id that the application must have")
        response = await self._ask(APPLICATION, application_id=id)
        if response.status in (400, 404):
            return None
        self._accept(response, f"application {id}")
        shown = _read_application(response, org)
        if shown is None:
            raise self._malformed("application")
        found, kind, org_shown = shown
        made_as = ApplicationName.parse(found.name)
        mismatch = (
            found.id != id
            or kind != "m2m"
            or (name is not None and (made_as != name or name.org != org))
            or (client_id is not None and found.client_id != client_id)
            or (made_as is not None and made_as.org != org)
            # Not documented, but then it counts.
            or org_shown not in (None, "", org)
            # Its list may have told another name for that client.
            or (name is not None and self._names.get(found.client_id, found.name) != found.name)
        )
        if mismatch:
            raise ForeignApplication(
                f"{self._who}: it responded with another application than that of org {org}: {id}"
            )
        self._names[found.id] = found.name
        masker.register(found.secret.reveal())
        return found

    async def make(self, name: ApplicationName) -> OrgApplication:
        what = f"an application of org {name.org}"
        body = {"name": str(name), "type": "m2m", "org_code": name.org}
        response = await self._ask(MAKE, body=body)
        self._accept(response, what)
        id = _id_of_made(response)
        if id is None:
            raise Unclear(f"{self._who}: the response to making {what} names none")
        # That response has no name: only by this one is known whose application the id is.
        try:
            found = await self.application(id, org=name.org, name=name)
        except (ProviderUnavailable, Throttled, ConfigurationError) as error:
            raise Unclear(f"{self._who}: it made {what}, and does not show it: {error.message}") from None
        if found is None:
            raise Unclear(f"{self._who}: it made {what}, and does not know it yet")
        return found

    async def delete(self, id: str, *, org: str, name: ApplicationName) -> bool:
        for _ in range(DELETIONS):
            if await self.application(id, org=org, name=name) is None:
                return False
            try:
                response = await self._ask(DELETE, application_id=id)
            except Unclear:
                continue
            if response.ok:
                return True
            if await self.application(id, org=org, name=name) is None:
                return False  # Kinde answers 400 for an unknown application
            self._refuse(response, f"to delete application {id} of org {org}")
        raise Unclear(f"{self._who}: application {id} of org {org} may or may not be deleted")

    async def authorise(self, application: OrgApplication, audience: str) -> None:
        api = await self._api(audience)
        what = f"to let application {application.id} of org {application.org} use {audience}"
        body = {"applications": [{"id": application.client_id}]}
        response = await self._ask(AUTHORISE, api_id=api.id, body=body)
        connected = self._accept(response, what).get("applications_connected", [])
        own = (application.client_id, application.id)
        if not isinstance(connected, list) or not all(each in own for each in connected):
            raise ForeignApplication(f"{self._who}: asked {what}, it did so for another one")

    async def scopes(self, application: OrgApplication, audience: str) -> frozenset[str] | None:
        return None  # no route tells them

    async def add_scopes(self, application: OrgApplication, audience: str, scopes: Collection[str]) -> None:
        for scope in sorted(scopes):
            response = await self._add_scope(application, audience, scope)
            if _code_of(response) in STALE:
                # Made again meanwhile, with another id.
                self._apis_read_at = None
                response = await self._add_scope(application, audience, scope)
            # The document does not say how Kinde responds to a scope that the application has already.
            # It is taken for that unless the code says otherwise; a token shows what is there.
            if not response.ok and (response.status != 400 or _code_of(response) in (*STALE, *UNKNOWN)):
                self._refuse(response, f"scope {scope} for application {application.id}")

    async def remove_scopes(
        self, application: OrgApplication, audience: str, scopes: Collection[str]
    ) -> None:
        api = await self._api(audience)
        for scope in sorted(api.scopes.keys() & set(scopes)):
            id = api.scopes[scope]
            response = await self._ask(
                REMOVE_SCOPE, api_id=api.id, application_id=application.id, scope_id=id
            )
            # Likewise for one that it does not have.
            if not response.ok and (response.status not in (400, 404) or _code_of(response) in UNKNOWN):
                self._refuse(response, f"to take scope {scope} from application {application.id}")

    async def properties(self, application: OrgApplication) -> Mapping[str, PropertyValue]:
        response = await self._ask(PROPERTIES, application_id=application.id)
        return self._read_properties(
            self._accept(response, f"the properties of application {application.id} of org {application.org}")
        )

    async def set_property(self, application: OrgApplication, key: str, value: PropertyValue | None) -> None:
        # No route removes a value.
        body = {"value": "" if value is None else value}
        response = await self._ask(SET_PROPERTY, application_id=application.id, property_key=key, body=body)
        is_unknown = _code_of(response) in UNKNOWN
        fix = "" if is_unknown else "define the property at the provider, for applications, then set it"
        what = f"property {key} of application {application.id} of org {application.org}"
        self._accept(response, what, fix=fix)

    async def webhook(self, body: bytes) -> Notice:
        return await read_notice(body, self.verify_message, now=self.clock.now())

    @property
    def _who(self) -> str:
        return f"issuer {self.calls.issuer}"

    async def _add_scope(self, application: OrgApplication, audience: str, scope: str) -> Response:
        api = await self._api(audience, [scope])
        id = api.scopes[scope]
        return await self._ask(ADD_SCOPE, api_id=api.id, application_id=application.id, scope_id=id)

    async def _ask(
        self,
        request: Request,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        **parts: str,
    ) -> Response:
        """Send a request. Each of the parts fills one segment of its route, whatever it contains."""
        method, route, scope = request.method, request.route, request.scope
        # A segment of only dots would be resolved away by clients and proxies.
        quoted = {name: quote(part, safe="").replace(".", "%2E") for name, part in parts.items()}
        path = route.format(**quoted)
        if method == "GET":
            return await self.calls.read(route, path, scope=scope, query=query)
        repeatable = request.repeatable
        return await self.calls.write(method, route, path, scope=scope, body=body, repeatable=repeatable)

    async def _api(self, audience: str, scopes: Collection[str] = ()) -> KindeApi:
        """The API of an audience; it has these scopes."""
        for attempt in range(2):
            await self._read_apis(again=bool(attempt))
            api = self._apis.get(audience)
            if api is not None and all(scope in api.scopes for scope in scopes):
                return api
        if api is None:
            raise ProviderRefused(
                f"{self._who}: it has no API with the audience {audience}",
                detail="unknown_audience",
                fix=f"register an API with the identifier {audience} there, or correct the audience",
            )
        missing = ", ".join(sorted(scope for scope in scopes if scope not in api.scopes))
        raise ProviderRefused(
            f"{self._who}: the API {audience} has no scope {missing}",
            detail="unknown_scope",
            fix="add the scope to the API at the provider, or correct the definitions that need it",
        )

    async def _read_apis(self, *, again: bool) -> None:
        async with self._reading_apis:
            now = self.clock.monotonic()
            age = APIS_READ_AGAIN if again else APIS_CACHED
            if self._apis_read_at is None or now - self._apis_read_at >= age:
                self._apis, self._apis_read_at = await self._fetch_apis(), now

    async def _fetch_apis(self) -> dict[str, KindeApi]:
        response = await self._ask(APIS, query={"expand": "scopes"})
        found: dict[str, KindeApi] = {}
        for entry in self._items(self._accept(response, "the APIs"), "apis"):
            if entry.get("is_management_api") is True:
                continue
            audience, id = self._text(entry, "audience"), self._text(entry, "id")
            if audience in found:
                raise ProviderUnavailable(f"{self._who}: two APIs have the audience {audience}")
            shown: Mapping[str, Any] = entry
            if "scopes" not in entry:
                response = await self._ask(API_SCOPES, api_id=id)
                shown = self._accept(response, f"the scopes of {audience}")
            listed = self._items(shown, "scopes")
            scopes = {self._text(each, "key"): self._text(each, "id") for each in listed}
            found[audience] = KindeApi(id, scopes)
        return found

    async def _pages(self, request: Request, member: str) -> AsyncIterator[list[dict[str, Any]]]:
        """The items of each page, each id or code once; raises if the pages do not end."""
        query, tokens, known = {"page_size": str(PAGE_SIZE)}, set[str](), set[str]()
        key = "code" if member == "organizations" else "id"
        for _ in range(MAX_PAGES):
            response = await self._ask(request, query=query)
            body = self._accept(response, f"the list of {member}")
            items = []
            for item in self._items(body, member):
                # Those that are made meanwhile may move others to the next page.
                if (identity := self._text(item, key)) not in known:
                    known.add(identity)
                    items.append(item)
            yield items
            token = body.get("next_token")
            if token is None or token == "":
                return
            if not isinstance(token, str) or token in tokens:
                break
            tokens.add(token)
            query = query | {"next_token": token}
        raise ProviderUnavailable(f"{self._who}: the list of {member} does not end")

    def _items(self, body: Mapping[str, Any], member: str) -> list[dict[str, Any]]:
        items = body.get(member)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise self._malformed(member)
        return items

    def _read_org(self, body: Mapping[str, Any]) -> ProviderOrg:
        code = self._text(body, "code")
        return ProviderOrg(
            code=code,
            name=self._optional_text(body, "name") or code,
            external_id=self._optional_text(body, "external_id"),
            handle=self._optional_text(body, "handle"),
            is_default=body.get("is_default") is True,
        )

    def _read_properties(self, body: Mapping[str, Any]) -> dict[str, PropertyValue]:
        values: dict[str, PropertyValue] = {}
        for item in self._items(body, "properties"):
            value = item.get("value")
            if value is not None and not isinstance(value, str | bool):
                raise self._malformed("value")
            if value is not None and value != "":
                values[self._text(item, "key")] = value
        return values

    def _text(self, body: Mapping[str, Any], member: str) -> str:
        value = body.get(member) if isinstance(body, Mapping) else None
        if not _is_text(value):
            raise self._malformed(member)
        return value

    def _optional_text(self, body: Mapping[str, Any], member: str) -> str | None:
        return None if body.get(member) in (None, "") else self._text(body, member)

    def _malformed(self, member: str) -> ProviderUnavailable:
        return ProviderUnavailable(f"{self._who}: a malformed response: {member}")

    def _accept(self, response: Response, what: str, *, fix: str = "") -> Mapping[str, Any]:
        """The body of a success; raises ProviderRefused."""
        if not response.ok:
            self._refuse(response, what, fix=fix)
        return response.body

    def _refuse(self, response: Response, what: str, *, fix: str = "") -> NoReturn:
        code = _code_of(response)
        raise ProviderRefused(
            f"{self._who}: it refuses {what}: status {response.status}{f', {code}' if code else ''}",
            detail=code,
            fix=fix,
        )


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT


# These two raise nothing: no frame of an error may have a body with a secret.
def _read_application(response: Response, org: str) -> tuple[OrgApplication, object, object] | None:
    """The application that a response shows, its type and org (if it says them); None if malformed."""
    body = response.body.get("application")
    if not isinstance(body, dict):
        return None
    if not all(_is_text(body.get(member)) for member in ("id", "client_id", "client_secret", "name")):
        return None
    secret = Secret(body["client_secret"])
    found = OrgApplication(org, body["id"], body["client_id"], secret, body["name"])
    return found, body.get("type", "m2m"), body.get("org_code")


def _id_of_made(response: Response) -> str | None:
    body = response.body.get("application")
    id = body.get("id") if isinstance(body, dict) else None
    return id if _is_text(id) else None


def _code_of(response: Response) -> str:
    """The code of the first error; the provider's own prose is never repeated."""
    errors = response.body.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    code = first.get("code") if isinstance(first, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""
