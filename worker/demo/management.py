"""Kinde's management API of the development provider: orgs, applications, APIs with scopes, properties.

Routes, parameters and responses are those of Kinde's published OpenAPI document. It shares no code
with what it tests.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jwt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.clock import Clock
from worker.demo.keys import KeyRotation

T = TypeVar("T")

FLAG_TYPES = {bool: "b", int: "i", float: "i"}
LARGEST_PAGE = 500
PAGE = 10
MANAGEMENT = "management"  # the id of the management API itself


@dataclass(slots=True)
class Organization:
    """An organization; its properties are text or booleans.

    Its new applications have these `token_properties` and `token_flags`, as if people had set them.
    """

    code: str
    name: str
    external_id: str | None = None
    handle: str | None = None
    is_default: bool = False
    properties: dict[str, Any] = field(default_factory=dict)
    token_properties: dict[str, Any] = field(default_factory=dict)
    token_flags: dict[str, Any] = field(default_factory=dict)

    def as_item(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "name": self.name,
            "handle": self.handle,
            "is_default": self.is_default,
            "external_id": self.external_id,
            "is_auto_membership_enabled": False,
        }


@dataclass(slots=True)
class RegisteredApi:
    """An API that tokens can be requested for; `scopes` are its scopes' keys by id."""

    id: str
    name: str
    audience: str
    scopes: dict[str, str] = field(default_factory=dict)

    def as_item(self, *, scopes: bool) -> dict[str, Any]:
        item = {
            "id": self.id,
            "name": self.name,
            "audience": self.audience,
            "is_management_api": self.id == MANAGEMENT,
        }
        listed = [{"id": id, "key": key} for id, key in self.scopes.items()]
        return item | ({"scopes": listed} if scopes else {})


class ManagementRefusal(Exception):
    """A 400 response with an error code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def errors(code: str, status: int) -> JSONResponse:
    text = code.replace("_", " ").capitalize()
    return JSONResponse({"errors": [{"code": code, "message": text}]}, status_code=status)


def done(code: str, **members: Any) -> dict[str, Any]:
    return {"code": code, "message": "Success", **members}


@dataclass(slots=True)
class Application:
    """An M2M application of one org, or of none if `org_code` is empty.

    `properties` and `flags` are plain values; tokens have them in Kinde's form. `lifetime` is in seconds.
    """

    org_code: str
    client_id: str
    client_secret: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()
    properties: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    lifetime: int = 86400
    enabled: bool = True
    name: str = ""

    def accepts(self, client_secret: str) -> bool:
        return self.enabled and secrets.compare_digest(self.client_secret.encode(), client_secret.encode())

    def as_claims(self) -> dict[str, Any]:
        """Org, properties and flags as in a Kinde token."""
        return ({"org_code": self.org_code} if self.org_code else {}) | {
            "application_properties": {
                name: {"v": as_property(value)} for name, value in self.properties.items()
            },
            "feature_flags": {
                name: {"t": FLAG_TYPES.get(type(value), "s"), "v": value}
                for name, value in self.flags.items()
            },
        }


def as_property(value: Any) -> str | bool:
    """A property's value as Kinde stores it: text or a boolean, so 1000 becomes "1000"."""
    return value if isinstance(value, bool) else str(value)


class ManagementApi:
    """State and routes; keys and `applications` by client id are those of the provider at `url`.

    `carried_out` counts requests with a success by method and route. `others` are listed
    applications that are not machine-to-machine.
    """

    def __init__(
        self, url: str, keys: KeyRotation, applications: dict[str, Application], clock: Clock
    ) -> None:
        self._audience = f"{url}/api"
        self._keys = keys
        self.applications = applications
        self._clock = clock
        self.orgs: dict[str, Organization] = {}
        self.apis: dict[str, RegisteredApi] = {}
        self.org_properties: set[str] = set()
        self.application_properties: set[str] = set()
        self.others: list[dict[str, str]] = []
        self.carried_out: Counter[str] = Counter()
        self._scopes: dict[str, None] = {}
        self.add_api("Management API", self._audience, (), id=MANAGEMENT)

    def add_org(self, code: str, name: str, **values: Any) -> Organization:
        self.orgs[code] = Organization(code, name, **values)
        return self.orgs[code]

    def make_application(self, name: str, org_code: str) -> Application:
        """A new application without APIs and scopes, with ids of its own."""
        made = Application(org_code, secrets.token_hex(16), secrets.token_urlsafe(32), name=name)
        if org := self.orgs.get(org_code):
            made.properties = {key: as_property(value) for key, value in org.token_properties.items()}
            made.flags = dict(org.token_flags)
        self.applications[made.client_id] = made
        return made

    def add_api(self, name: str, audience: str, scopes: Sequence[str], *, id: str = "") -> RegisteredApi:
        api = RegisteredApi(
            id or secrets.token_hex(8), name, audience, {secrets.token_hex(8): key for key in scopes}
        )
        self.apis[api.id] = api
        return api

    def scopes(self) -> tuple[str, ...]:
        """What a token needs to be allowed every request."""
        self.routes()
        return tuple(self._scopes)

    def routes(self) -> list[Route]:
        application = "applications/{application_id}"
        scope = "apis/{api_id}/applications/{application_id}/scopes/{scope_id}"
        of_application = f"{application}/properties/{{property_key}}"
        of_org = "organizations/{org_code}/properties"
        return [
            self._route("GET", "organizations", "read:organizations", self._list_orgs),
            self._route("GET", "organization", "read:organizations", self._show_org),
            self._route("GET", of_org, "read:organization_properties", self._org_properties),
            self._route("GET", "applications", "read:applications", self._list_applications),
            self._route("POST", "applications", "create:applications", self._make, status=201),
            self._route("GET", application, "read:applications", self._show),
            self._route("DELETE", application, "delete:applications", self._delete),
            self._route("GET", f"{application}/properties", "read:application_properties", self._properties),
            self._route("PUT", of_application, "update:application_properties", self._set_property),
            self._route("GET", "apis", "read:apis", self._list_apis),
            self._route("GET", "apis/{api_id}/scopes", "read:api_scopes", self._list_scopes),
            self._route("PATCH", "apis/{api_id}/applications", "update:apis", self._authorise),
            self._route("POST", scope, "create:api_application_scopes", self._add_scope),
            self._route("DELETE", scope, "delete:apis_application_scopes", self._remove_scope),
        ]

    def _route(
        self,
        method: str,
        path: str,
        scope: str,
        work: Callable[[Request, Mapping[str, Any]], dict[str, Any] | None],
        status: int = 200,
    ) -> Route:
        self._scopes[scope] = None
        address = f"/api/v1/{path}"

        async def endpoint(request: Request) -> Response:
            if (denied := self._denied(request, scope)) is not None:
                return denied
            try:
                body = json.loads(await request.body() or b"{}")
                answer = work(request, body)
            except ManagementRefusal as refusal:
                return errors(refusal.code, 400)
            except (ValueError, TypeError, KeyError, AttributeError):
                return errors("INVALID_REQUEST", 400)
            self.carried_out[f"{method} {address}"] += 1
            return Response(status_code=status) if answer is None else JSONResponse(answer, status)

        return Route(address, endpoint, methods=[method])

    def _denied(self, request: Request, scope: str) -> Response | None:
        text = request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            claims = self._keys.read(text, audience=self._audience)
        except jwt.PyJWTError:
            return errors("TOKEN_INVALID", 401)
        now = int(self._clock.now().timestamp())
        if claims["exp"] <= now or claims.get("azp") not in self.applications:
            return errors("TOKEN_INVALID", 401)
        return None if scope in claims["scp"] else errors("INSUFFICIENT_SCOPE", 403)

    def _page(self, request: Request, keys: Sequence[str]) -> tuple[Sequence[str], dict[str, Any]]:
        size = int(request.query_params.get("page_size", PAGE))
        if not 0 < size <= LARGEST_PAGE:
            raise ManagementRefusal("PAGE_SIZE_LIMIT_EXCEEDED")
        after = request.query_params.get("next_token")
        start = keys.index(after) + 1 if after else 0
        page = keys[start : start + size]
        more = start + size < len(keys)
        return page, {"next_token": page[-1]} if more else {}

    def _list_orgs(self, request: Request, _: Any) -> dict[str, Any]:
        page, more = self._page(request, list(self.orgs))
        return done("OK", organizations=[self.orgs[code].as_item() for code in page], **more)

    def _show_org(self, request: Request, _: Any) -> dict[str, Any]:
        return self._org(request.query_params["code"]).as_item()

    def _org_properties(self, request: Request, _: Any) -> dict[str, Any]:
        org = self._org(request.path_params["org_code"])
        return done("OK", properties=_listed(self.org_properties, org.properties))

    def _list_applications(self, request: Request, _: Any) -> dict[str, Any]:
        items = {
            app.client_id: {"id": app.client_id, "name": app.name, "type": "m2m"}
            for app in self.applications.values()
        }
        items |= {other["id"]: other for other in self.others}
        page, more = self._page(request, list(items))
        return done("OK", applications=[items[id] for id in page], **more)

    def _make(self, request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
        if body["type"] != "m2m":
            raise ManagementRefusal("INVALID_TYPE")
        if body.get("org_code"):
            self._org(body["org_code"])
        app = self.make_application(body["name"], body.get("org_code") or "")
        made = {"id": app.client_id, "client_id": app.client_id, "client_secret": app.client_secret}
        return done("APPLICATION_CREATED", application=made)

    def _show(self, request: Request, _: Any) -> dict[str, Any]:
        app = self._application(request)
        shown = {"id": app.client_id, "name": app.name, "type": "m2m"}
        secret = {"client_id": app.client_id, "client_secret": app.client_secret}
        return done("OK", application=shown | secret)

    def _delete(self, request: Request, _: Any) -> dict[str, Any]:
        del self.applications[self._application(request).client_id]
        return done("APPLICATION_DELETED")

    def _properties(self, request: Request, _: Any) -> dict[str, Any]:
        app = self._application(request)
        return done("OK", properties=_listed(self.application_properties, app.properties))

    def _set_property(self, request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
        app, key = self._application(request), request.path_params["property_key"]
        if key not in self.application_properties:
            raise ManagementRefusal("PROPERTY_NOT_FOUND")
        app.properties[key] = body["value"]
        return done("PROPERTY_UPDATED")

    def _list_apis(self, request: Request, _: Any) -> dict[str, Any]:
        scopes = request.query_params.get("expand") == "scopes"
        return done("OK", apis=[api.as_item(scopes=scopes) for api in self.apis.values()])

    def _list_scopes(self, request: Request, _: Any) -> dict[str, Any]:
        return done("OK", scopes=self._api(request).as_item(scopes=True)["scopes"])

    def _authorise(self, request: Request, body: Mapping[str, Any]) -> dict[str, Any]:
        api = self._api(request)
        changed: dict[bool, list[str]] = {True: [], False: []}
        for entry in body["applications"]:
            app = _found(self.applications, entry["id"], "APPLICATION_NOT_FOUND")
            connects = entry.get("operation") != "delete"
            others = tuple(audience for audience in app.audiences if audience != api.audience)
            app.audiences = (*others, api.audience) if connects else others
            changed[connects].append(app.client_id)
        return done(
            "API_APPLICATIONS_UPDATED",
            applications_connected=changed[True],
            applications_disconnected=changed[False],
        )

    def _add_scope(self, request: Request, _: Any) -> None:
        app, key = self._application(request), self._scope(request)
        if key in app.scopes:
            raise ManagementRefusal("SCOPE_ALREADY_ADDED")
        app.scopes = (*app.scopes, key)

    def _remove_scope(self, request: Request, _: Any) -> None:
        app, key = self._application(request), self._scope(request)
        if key not in app.scopes:
            raise ManagementRefusal("SCOPE_NOT_FOUND")
        app.scopes = tuple(scope for scope in app.scopes if scope != key)

    def _org(self, code: str) -> Organization:
        return _found(self.orgs, code, "ORGANIZATION_NOT_FOUND")

    def _application(self, request: Request) -> Application:
        id = request.path_params["application_id"]
        return _found(self.applications, id, "APPLICATION_NOT_FOUND")

    def _api(self, request: Request) -> RegisteredApi:
        return _found(self.apis, request.path_params["api_id"], "API_NOT_FOUND")

    def _scope(self, request: Request) -> str:
        api = self._api(request)
        if api.audience not in self._application(request).audiences:
            raise ManagementRefusal("API_NOT_CONNECTED")
        return _found(api.scopes, request.path_params["scope_id"], "SCOPE_NOT_FOUND")


def _found(known: Mapping[str, T], id: str, code: str) -> T:
    if id not in known:
        raise ManagementRefusal(code)
    return known[id]


def _listed(keys: set[str], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All defined properties; those without a value have null."""
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
    return [
        {"id": f"prop_{key}", "key": key, "name": key, "description": None, "value": shown.get(key)}
        for key in sorted(keys)
    ]
