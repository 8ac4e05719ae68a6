"""Command lines with a migrated database, and with the test handlers installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import copied, migrated_on
from tests.fakes import postgres
from tests.fakes.cli import CommandLine
from tests.fakes.handlers import install_handlers, store_handlers
from tests.fakes.kinde.server import MANAGER, Kinde, serve_kinde
from worker.store import schema

AUDIENCE = "https://api.acme.com"
TEMPLATE = """
[[template]]
name = "nightly"
orgs = "all"
handler = "acme.fetch"
schedule = "0 3 * * *"
scopes = ["read:kb"]
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the distribution `acme-jobs`, seen by this process and by the catalogue's children."""
    folder = tmp_path_factory.mktemp("plugins")
    install_handlers(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        patched.setenv("PYTHONPATH", str(folder))
        yield folder


@pytest.fixture(scope="session")
def migrated_sqlite_file(migrated_sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the handlers of `plugins` in its catalogue, so that no command starts a process to read them."""
    folder = tmp_path_factory.mktemp("with_handlers")
    store_handlers(copied(migrated_sqlite_file, folder))
    return folder / migrated_sqlite_file.name


@pytest.fixture
def migrated_postgres_url(postgres_server: postgres.Server) -> Iterator[str]:
    """The same of PostgreSQL."""
    migrated = postgres_server.template("migrated", schema.upgrade)
    with postgres_server.new_database(
        postgres_server.template("with_handlers", store_handlers, base=migrated)
    ) as url:
        yield url


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite_file: Path, plugins: Path) -> CommandLine:
    """The command line of an installation on SQLite, shared by the tests of a module."""
    folder = tmp_path_factory.mktemp("cli")
    return CommandLine(folder, copied(migrated_sqlite_file, folder))


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest) -> str:
    """On SQLite, but where a test asks for either: those execute every statement that commands have."""
    return migrated_on(getattr(request, "param", "sqlite"), request)


@pytest.fixture
def own_cli(tmp_path: Path, migrated_url: str, plugins: Path) -> CommandLine:
    """The same, new for each test, with a key ring."""
    made = CommandLine(tmp_path, migrated_url)
    made("keys", "generate")
    return made


@pytest.fixture
def kinde() -> Iterator[Kinde]:
    """Kinde with Acme's API and without orgs; every request to it has to be a documented one."""
    with serve_kinde() as served:
        served.api.add_api("Acme's API", AUDIENCE, ("read:kb", "write:kb"))
        yield served
        assert served.undocumented() == []


@pytest.fixture
def kinde_cli(own_cli: CommandLine, kinde: Kinde) -> CommandLine:
    """The same of an installation at Kinde, with a management application."""
    before, _, _ = own_cli.settings.read_text().partition("[issuers.main]")
    own_cli.settings.write_text(
        f'{before}[issuers.main]\nurl = "{kinde.url}"\naudience = "{AUDIENCE}"\n'
        f'max_requests_per_second = 1000\n[issuers.main.management]\nclient_id = "{MANAGER}"\n'
    )
    (own_cli.settings.parent / "management__main").write_text(kinde.secret)
    return own_cli
