"""No client secret and no token stands in the database, the logs, `-o json` or a traceback."""

from __future__ import annotations

import base64
from urllib.parse import quote

from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

SECRET = "canary+secret/of=acme"
DEAD = "canary-dead-secret-of-acme"
SHOWN = ("definitions", "show", "org_acme", "leak", "-o", "json")


def forms(secret: str) -> list[bytes]:
    """The ways in which a secret could be written down."""
    raw = secret.encode()
    return [raw, quote(secret, safe="").encode(), base64.b64encode(raw), repr(secret)[1:-1].encode()]


def written(site: Site, *more: tuple[str, ...]) -> dict[str, bytes]:
    """All that the installation wrote: its files but the key ring, and what commands print."""
    sinks = {
        str(path.relative_to(site.folder)): path.read_bytes()
        for path in site.folder.rglob("*")
        if path.is_file() and path.name != "keyring" and "plugins" not in path.parts
    }
    assert {"worker.db", "worker.log"} <= set(sinks)
    commands = [
        ("runs", "list", "-o", "json"),
        ("runs", "list"),
        ("orgs", "show", "org_acme", "-o", "json"),
        ("credentials", "list", "org_acme", "-o", "json"),
        ("config", "show"),
        *(("runs", "show", str(run["id"]), "-o", "json") for run in site.runs()),
        *more,
    ]
    for command in commands:
        done = site.cli(*command, check=False)
        sinks[" ".join(command)] = (done.out + done.err).encode()
    return sinks


def test_no_secret_and_no_token_is_written_anywhere(site, provider, journal):
    provider.issued.clear()
    site.add_orgs(application("org_acme", client_secret=SECRET))
    site.add_orgs(application("org_dead"), secret=DEAD)
    params = {"journal": str(journal)}
    site.apply(
        definition("org_acme", "leak", "acme.leak", params=params)
        + definition("org_acme", "leak-result", "acme.leak_result", params=params)
        + definition("org_dead", "note", "acme.note", params=params)
    )
    worker = site.start_worker()
    site.cli("definitions", "run", "org_acme", "leak")
    site.cli("definitions", "run", "org_acme", "leak-result")
    site.cli("definitions", "run", "org_dead", "note")
    failed = site.wait_for_end(definition="leak")
    site.wait_for_end(definition="leak-result")
    site.wait_for_state("note", "waiting")
    assert (failed["state"], failed["error"]["type"]) == ("failed", "RuntimeError")
    assert failed["error"]["message"].startswith("raised ")

    while_running = written(site, SHOWN)
    assert site.stop_worker(worker) == 0
    sinks = while_running | {f"{name} at the end": data for name, data in written(site, SHOWN).items()}

    assert provider.issued
    tokens = [form for token in provider.issued for form in (token, token.rpartition(".")[2])]
    secrets = [form for secret in (SECRET, DEAD) for form in forms(secret)]
    canaries = [*secrets, *(token.encode() for token in tokens)]
    found = {name for name, data in sinks.items() if any(canary in data for canary in canaries)}
    assert found == set()


def test_a_secret_given_on_standard_input_is_not_echoed(site):
    site.add_orgs(application("org_acme"))

    done = site.cli(
        *("credentials", "add", "org_acme", "--client-id", "m2m", "--secret-file", "-"),
        stdin=SECRET,
        check=False,
    )

    assert done.code == 1  # the provider has no such client
    assert SECRET not in done.out + done.err
    assert all(SECRET.encode() not in path.read_bytes() for path in site.folder.glob("worker.db*"))


def test_no_secret_of_the_workers_own_addresses_is_logged(site):
    """Receivers that are away or say no: what the worker and its libraries write of them names no path."""
    gone = f"http://ada:canary-password@127.0.0.1:{free_port()}/services/canary-path-of-the-hook"
    site.environment["OTEL_BSP_SCHEDULE_DELAY"] = "200"
    site.configure(
        extra=f'[alerts]\nwebhook_url = "{gone}"\nwebhook_secret = "canary-secret-of-the-hook"\n'
        f'deadman_url = "{gone}?canary-query"\ndeadman_every = "1s"\n'
        f'[tracing]\nenabled = true\nendpoint = "{gone}"\nheaders = "key=canary-key-of-the-collector"\n'
        '[log]\nlevel = "debug"\n'
    )
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "crash", "acme.segfault", max_attempts=1))
    worker = site.start_worker()
    site.wait_for_handlers("acme.segfault")
    site.cli("definitions", "run", "org_acme", "crash")
    site.wait_for_end(definition="crash")
    for event in ("deadman.failed", "traces.lost"):
        wait_until(lambda event=event: event in site.log_text(), f"{event}")
    shown = site.cli("config", "show")
    # Neither costs a run or the drain.
    assert site.stop_worker(worker) == 0

    assert "canary" not in site.log_text() + shown.out + shown.err
