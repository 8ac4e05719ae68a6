"""Webhooks of identity providers: `POST /hooks/ISSUER`. What they say is only a hint to look at an org."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from worker.clock import Clock
from worker.errors import Busy, IssuerUnavailable, KeyNotPublished, NotFound, TooManyRequests, WebhookRefused
from worker.features.provisioning.management.contract import Management, Notice
from worker.kit.web.clients import Addresses, Buckets
from worker.kit.web.health import Health
from worker.kit.web.listener import RequestLimit
from worker.kit.web.responses import ErrorMiddleware, error_response, read_body
from worker.telemetry.events import emit

MAX_BODY = 16 * 1024  # bytes; webhooks about orgs have less than 1 KiB
# Webhooks that one address may send at once, and a second.
BURST = 200
RATE = 50
# Seconds after which the provider may send one again that could not be taken.
AGAIN = 5.0
# Faults of a body that is not a signed message. All others are about whether it is genuine.
MALFORMED = frozenset({"text", "parts", "base64url", "header", "payload"})


@dataclass(frozen=True, slots=True)
class HookReceiver:
    """What takes the webhooks of one issuer; `notify` raises Busy if it cannot take more."""

    management: Management
    notify: Callable[[Notice], None]


class Hooks:
    """The route of webhooks; `receivers` by issuer."""

    def __init__(self, receivers: Mapping[str, HookReceiver], clock: Clock, addresses: Addresses) -> None:
        self._receivers = receivers
        self._addresses = addresses
        self._buckets = Buckets(clock, size=BURST, rate=RATE)

    def routes(self) -> Sequence[Route]:
        return (Route("/hooks/{issuer}", self._take, methods=["POST"]),)

    async def _take(self, request: Request) -> Response:
        client = self._addresses.client_of(request)
        if not client.is_proxy and (seconds := self._buckets.take(client.key)) > 0:
            raise TooManyRequests(
                "too many webhooks from this address", fix="send them again later", retry_after=seconds
            )
        issuer = request.path_params["issuer"]
        receiver = self._receivers.get(issuer)
        if receiver is None:
            raise NotFound("there is no such receiver of webhooks", fix="send them to /hooks/ISSUER")
        response, reason = await self._answer(receiver, request)
        emit("webhook.received", issuer=issuer, status=response.status_code, reason=reason)
        return response

    async def _answer(self, receiver: HookReceiver, request: Request) -> tuple[Response, str | None]:
        """The response, and for the log why it is not 204. Senders do not learn which check failed."""
        try:
            receiver.notify(await receiver.management.webhook(await _read(request)))
        except HTTPException:
            return _too_large(), "oversize"
        except WebhookRefused as refused:
            return _refusal(refused.detail), refused.detail
        except KeyNotPublished:
            # If it is genuine after all, the provider sends it again, and publishes its key meanwhile.
            return _refusal("unknown_kid"), "unknown_kid"
        except (IssuerUnavailable, Busy) as error:
            response = error_response(
                503, error.code, "this webhook cannot be taken now", "send it again later", AGAIN
            )
            return response, error.code
        return Response(status_code=204), None


def _refusal(detail: str) -> Response:
    if detail == "oversize":
        return _too_large()
    if detail in MALFORMED:
        return error_response(
            400, "usage", "the body is not a signed webhook", "send it as the provider signed it"
        )
    return error_response(
        401, "webhook_refused", "the webhook is not genuine, or not recent", "an operator can see why"
    )


def _too_large() -> Response:
    return error_response(413, "too_large", f"the body is larger than {MAX_BODY} bytes", "")


async def _read(request: Request) -> bytes:
    """The body; raises HTTPException 413 without reading more than MAX_BODY bytes of it."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY:
        raise HTTPException(413)
    return await read_body(request, MAX_BODY)


def build_hooks(health: Health, hooks: Hooks) -> ASGIApp:
    """Webhooks of providers, /livez and /readyz; no metrics, since providers reach this listener."""
    probes = [route for route in health.routes() if route.path != "/metrics"]
    router = Router(routes=[*probes, *hooks.routes()], redirect_slashes=False)
    return ErrorMiddleware(RequestLimit(router, health))
