"""Host access: the token and the certificates of a host, and whether its workers accept them."""

from __future__ import annotations

import json
import ssl

import httpx

from worker.errors import ConfigurationError, Diagnostic
from worker.features.hosts.wire import PREFIX, VERSIONS
from worker.settings.sections import HostSettings
from worker.settings.token_files import read_token

# Seconds that `doctor` waits for each worker.
PATIENCE = 5.0


def token_of(settings: HostSettings) -> str:
    """The host's token. Raises ConfigurationError."""
    return read_token(settings.token_file, setting="host.token_file", made_by="python -m worker hosts add")


def trusting(ca_file: str) -> ssl.SSLContext:
    """Trusts the authorities in this file, or those of the system. Raises ConfigurationError."""
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"host.ca_file: {ca_file} cannot be used: {error}", fix="name a file with certificates in PEM"
        ) from None


def check_access(settings: HostSettings, *, transport: httpx.BaseTransport | None = None) -> list[Diagnostic]:
    """Whether the token can be read, and what each worker says to it. Changes nothing."""
    try:
        token, context = token_of(settings), trusting(settings.ca_file)
    except ConfigurationError as error:
        return [Diagnostic("token", False, error.message, error.fix)]
    found = [Diagnostic("token", True, f"{settings.token_file} has one, and others cannot read it")]
    with httpx.Client(verify=context, transport=transport, timeout=PATIENCE, trust_env=False) as client:
        return found + [_check_worker(client, url.rstrip("/"), token) for url in settings.control]


def _check_worker(client: httpx.Client, url: str, token: str) -> Diagnostic:
    try:
        response = client.get(f"{url}/attempts")
        spoken = response.json()["versions"] if response.status_code == 200 else None
    except httpx.TransportError as error:
        detail = f"{url} does not answer: {type(error).__name__}"
        fix = "start a worker with [attempts] listen there, let this machine reach it, and check host.ca_file"
        return Diagnostic("control", False, detail, fix)
    except (ValueError, KeyError, TypeError):
        spoken = None
    if not isinstance(spoken, list):
        detail = f"{url} is not the attempt API of a worker"
        return Diagnostic("control", False, detail, "name the address of [attempts] listen")
    if not set(VERSIONS) & set(map(str, spoken)):
        detail = f"{url} speaks {', '.join(map(str, spoken))}, this host {', '.join(VERSIONS)}"
        return Diagnostic("control", False, detail, "upgrade the older of the two")
    try:
        # Names no incarnation, so it renews nothing.
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        answer = client.post(f"{url}{PREFIX}/renew", content=json.dumps({}), headers=headers)
    except httpx.TransportError as error:
        return Diagnostic("control", False, f"{url} does not answer: {type(error).__name__}", "try again")
    if answer.status_code == 401:
        detail = f"{url} does not accept the token in host.token_file"
        return Diagnostic("control", False, detail, "make another one with `hosts add` at a worker")
    return Diagnostic("control", True, f"{url} answers and accepts the token")
