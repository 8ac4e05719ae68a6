"""Django: middleware and a decorator for views that need a valid token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache, wraps
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.signals import setting_changed
from django.http import HttpRequest, HttpResponse
from django.utils.module_loading import import_string

from .access import AccessRules, Denied, guard_of, parted
from .errors import ConfigurationError
from .guard import Guard, texts
from .issuer import Issuer

SETTING = "ORGWORKER_GUARD"
# Their values may be dotted paths.
_IMPORTED = ("guard", "org_of", "client_of", "scopes_of")

View = Callable[..., Any]
FromRequest = Callable[[HttpRequest], Any]


@dataclass(frozen=True, slots=True)
class _Setting:
    guard: Guard
    scopes: frozenset[str]
    org_of: FromRequest | None
    client_of: FromRequest | None
    scopes_of: FromRequest | None
    open_paths: frozenset[str]

    def rules(
        self,
        scopes: frozenset[str] = frozenset(),
        org_of: FromRequest | None = None,
        client_of: FromRequest | None = None,
    ) -> AccessRules[HttpRequest]:
        """What a request needs: these scopes too, and of this org and client where they are given."""
        return AccessRules(
            self.guard,
            scopes=self.scopes | scopes,
            org_of=org_of or self.org_of,
            client_of=client_of or self.client_of,
            scopes_of=self.scopes_of,
        )


KEYS = ("issuer", "audience", "profile", *(each.name for each in fields(_Setting)))


@cache
def _setting() -> _Setting:
    """`ORGWORKER_GUARD`, read once; raises ConfigurationError."""
    given = getattr(settings, SETTING, None)
    if not isinstance(given, dict):
        raise ConfigurationError(
            f"{SETTING} is not in the settings",
            fix=f'write {SETTING} = {{"issuer": "https://…", "audience": "…"}}',
        )
    if unknown := sorted(given.keys() - set(KEYS)):
        raise ConfigurationError(f"{SETTING}: unknown key {unknown[0]!r}", fix=f"use {', '.join(KEYS)}")
    values = dict(given)
    for key in _IMPORTED:
        if isinstance(value := values.get(key), str):
            try:
                values[key] = import_string(value)
            except ImportError as error:
                raise ConfigurationError(
                    f"{SETTING}: {key} {value!r} cannot be imported: {error}",
                    fix="write its dotted path, such as product.api.org_of",
                ) from error
    return _Setting(
        guard=guard_of(
            values.get("guard"),
            values.get("issuer", ""),
            values.get("audience", ""),
            values.get("profile", "kinde"),
        ),
        **{key: values.get(key) for key in ("org_of", "client_of", "scopes_of")},
        scopes=frozenset(texts(f"{SETTING}: scopes", values.get("scopes", ()))),
        open_paths=frozenset(texts(f"{SETTING}: open_paths", values.get("open_paths", ()))),
    )


def _forget(*, setting: str, **ignored: Any) -> None:
    if setting == SETTING:
        _setting.cache_clear()


# Of `override_settings` in tests.
setting_changed.connect(_forget)


class RequireTokenMiddleware:
    """Middleware: a request with a valid bearer token gets its `Claims` in `request.claims`.

    `ORGWORKER_GUARD` in the settings has what a request needs. Responses without access are those
    of the ASGI `RequireToken`. Works with synchronous and with asynchronous views.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        setting = _setting()
        rules = setting.rules()
        self._get_response = get_response
        self._guarded = _guarded(get_response, lambda: rules)
        self._open_paths = setting.open_paths
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        is_open = request.path_info in self._open_paths
        return self._get_response(request) if is_open else self._guarded(request)


def require_token(
    guard: Guard | None = None,
    *,
    issuer: str | Issuer = "",
    audience: str = "",
    profile: str = "kinde",
    scopes: Iterable[str] = (),
    org_of: Callable[[HttpRequest], str | None] | None = None,
    client_of: Callable[[HttpRequest], str | None] | None = None,
) -> Callable[[View], View]:
    """A decorator: the view is called with the token's `Claims` in `request.claims`, or not at all.

    Without a guard or an issuer it uses `ORGWORKER_GUARD`, whose scopes are needed too, and whose `org_of`
    and `client_of` hold where they are not given. They get the request, which has the parameters of
    the route in `resolver_match.kwargs`. The view is exempt from Django's CSRF check: no browser adds a
    bearer token to a request by itself.
    """
    own = guard_of(guard, issuer, audience, profile) if guard is not None or issuer else None
    wanted = frozenset(texts("scopes", scopes))

    def rules() -> AccessRules[HttpRequest]:
        if own is not None:
            return AccessRules(own, scopes=wanted, org_of=org_of, client_of=client_of)
        return _setting().rules(wanted, org_of, client_of)

    def decorate(view: View) -> View:
        guarded = _guarded(view, rules)
        guarded.csrf_exempt = True  # type: ignore[attr-defined]
        return guarded

    return decorate


def _guarded(view: View, rules: Callable[[], AccessRules[HttpRequest]]) -> View:
    """The view, called with the token's `Claims` in `request.claims`, or not at all."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            request.claims = rules().claims_sync(request, _headers(request))
        except Denied as denied:
            return _response(denied)
        return view(request, *args, **kwargs)

    @wraps(view)
    async def guarded_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            request.claims = await rules().claims_threadsafe(request, _headers(request))
        except Denied as denied:
            return _response(denied)
        return await view(request, *args, **kwargs)

    return guarded_async if iscoroutinefunction(view) else guarded


def _headers(request: HttpRequest) -> list[str]:
    return parted(request.META.get("HTTP_AUTHORIZATION"))


def _response(denied: Denied) -> HttpResponse:
    return HttpResponse(denied.body, status=denied.status, headers=denied.headers)
