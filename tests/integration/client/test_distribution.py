"""orgworker-client by itself: what it installs, what it imports, how long that takes, and that it works."""

from __future__ import annotations

import ast
import os
import resource
import statistics
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integration.guard.conftest import ROOT, distribution_of, installed_alone
from tests.integration.guard.test_distribution import files_of, site_of, size
from tests.integration.test_build import built_checkout

pytestmark = pytest.mark.feature("checkout")

CLIENT = ROOT / "worker" / "client"
SCRIPT = """
import asyncio, sqlite3, sys
from orgworker_client import AsyncClient, Client, NotFound, Outbox

url, path = sys.argv[1:]
connect = lambda: sqlite3.connect(path, check_same_thread=False)
outbox = Outbox("sqlite", connect=connect)
connection = connect()
for statement in outbox.ddl:
    connection.execute(statement)
outbox.start(connection, "org_a", "export", {"a": 1}, key="k")
connection.commit()
print(asyncio.run(AsyncClient(url, "t").relay(outbox, once=True)).sent)
with Client(url, "t") as client:
    print(client.start("org_a", "export", key="k").run.id)
    try:
        client.run("absent")
    except NotFound as error:
        print(error.code)
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"sqlalchemy", "pydantic", "worker"}))
"""


class Handler(BaseHTTPRequestHandler):
    """One run for every start, and none to read."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(201, "json", b'{"id": "r", "org": "org_a", "definition": "export", "state": "waiting"}')

    def do_GET(self) -> None:
        self._answer(404, "problem+json", b'{"code": "not_found", "detail": "there is no run"}')

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", f"application/{kind}")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [built] = built_checkout(tmp_path_factory).glob("dist/orgworker_client-*.whl")
    return built


@pytest.fixture(scope="session")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed_alone(wheel, tmp_path_factory.mktemp("client") / "venv")


def sources() -> Iterable[Path]:
    return sorted(CLIENT.glob("*.py"))


def test_it_imports_only_itself_and_what_it_declares():
    """SQLAlchemy only in a module of its own, and in functions that were given its objects."""
    allowed = {*sys.stdlib_module_names, "httpx"}
    form = "sqlalchemy_form"
    lazily = {("outbox", "sqlalchemy"), (form, "sqlalchemy"), (form, "sqlalchemy.dialects")}
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            wrong += [
                (path.stem, name)
                for name in names
                if name.partition(".")[0] not in allowed and (path.stem, name) not in lazily
            ]

    assert wrong == []


def test_the_wheel_has_the_same_files_as_worker_client(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        built = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}

    here = (*sources(), CLIENT / "py.typed")
    assert built == {f"orgworker_client/{path.name}": path.read_bytes() for path in here}


def test_it_has_the_version_and_license_of_orgworker_and_floors_that_are_not_lower(alone: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    installed = distribution_of(site_of(alone))

    assert (installed.name, installed.version) == ("orgworker-client", project["version"])
    assert client["requires-python"] == project["requires-python"]
    assert set(client["dependencies"]) <= set(project["dependencies"])
    assert (CLIENT / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert [each.partition(">")[0] for each in client["dependencies"]] == ["httpx"]


def test_it_works_without_the_rest(alone: Path, api: str, tmp_path: Path):
    command = [alone, "-P", "-c", SCRIPT, api, tmp_path / "product.db"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": os.defpath})

    assert done.stdout.split("\n") == ["1", "r", "not_found", "", ""], done.stderr


@pytest.mark.parametrize("name", ["sqlalchemy", "pydantic", "cryptography", "worker", "starlette"])
def test_the_environment_really_lacks_the_rest(alone: Path, name: str):
    done = subprocess.run([alone, "-P", "-c", f"import {name}"], capture_output=True, text=True)

    assert "ModuleNotFoundError" in done.stderr


def test_it_installs_at_most_a_tenth_of_orgworker():
    """Both with what they need, and without pip."""
    client = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]["dependencies"]
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    client_size = size(files_of(client)) + size(CLIENT.rglob("*"))
    whole_size = size(files_of(whole)) + size((ROOT / "worker").rglob("*"))
    print(f"{client_size / 1e6:.1f} MB of {whole_size / 1e6:.1f} MB: {client_size / whole_size:.3f}")

    assert client_size <= 0.1 * whole_size


def test_importing_the_client_takes_at_most_a_quarter_longer_than_importing_httpx_and_asyncio(alone: Path):
    """Median processor time of seven imports each, in turn; a product that only inserts imports no httpx."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([alone, "-P", "-c", code], check=True, env={"PATH": os.defpath})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    codes = (
        "import asyncio, httpx",
        "from orgworker_client import AsyncClient, Client",
        "from orgworker_client import Outbox",
    )
    for code in codes:
        seconds(code)  # compiles
    taken = [[seconds(code) for code in codes] for _ in range(7)]
    base, client, outbox = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"httpx: {base * 1000:.0f} ms; Client: {client * 1000:.0f} ms; Outbox: {outbox * 1000:.0f} ms")

    assert client <= 1.25 * base
    assert outbox < base
