"""The examples of docs/reference/guard.md, against the real frameworks, as an installed `orgworker_guard`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from django.core.handlers.wsgi import WSGIHandler

from tests.fakes import forms
from tests.fakes.forms import Form
from tests.fakes.key_server import KeyServer
from tests.fakes.pages import ROOT, blocks
from tests.integration.guard.conftest import GUARD

PAGE = ROOT / "docs" / "reference" / "guard.md"
FILES = {block.file: block.text for block in blocks(PAGE.read_text()) if block.language == "python"}


@pytest.fixture
def product(keys: KeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files, and orgworker_guard on the path. The issuer is the test's."""
    (tmp_path / "orgworker_guard").symlink_to(GUARD)
    for name, text in FILES.items():
        assert name
        (tmp_path / name).write_text(text.replace("https://acme.kinde.com", keys.url))
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name in ("settings", "views") or name.startswith("orgworker_guard") or f"{name}.py" in FILES:
            del sys.modules[name]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


async def status(form: Form, path: str, *tokens: str) -> int:
    return (await form(path, [f"Bearer {token}".encode() for token in tokens])).status


@pytest.mark.parametrize("name", ["fastapi", "flask", "asgi", "wsgi"])
async def test_the_product_gives_an_org_its_own_articles(product: Path, keys: KeyServer, name: str) -> None:
    app = load(f"{name}_product").app
    form = forms.by_asgi(app) if name in ("fastapi", "asgi") else forms.by_wsgi(app)

    answer = await form("/orgs/org_a/articles", [f"Bearer {keys.token()}".encode()])

    assert (answer.status, answer.json) == (200, {"org": "org_a", "articles": []})
    assert await status(form, "/orgs/org_b/articles", keys.token()) == 403
    assert await status(form, "/orgs/org_a/articles", keys.token(scope="write:kb")) == 403
    assert await status(form, "/orgs/org_a/articles", keys.token(aud="https://api.other.com")) == 401
    assert await status(form, "/orgs/org_a/articles") == 401
    assert await status(form, "/orgs/org_a/articles", keys.token(), keys.token()) == 400


async def test_the_django_product_guards_every_path(product: Path, keys: KeyServer) -> None:
    settings = load("settings")
    changes = {
        "ROOT_URLCONF": "views",
        "MIDDLEWARE": settings.MIDDLEWARE,
        "ORGWORKER_GUARD": settings.ORGWORKER_GUARD,
    }
    with forms.django_settings(**changes):
        form = forms.by_wsgi(WSGIHandler())
        answer = await form("/orgs/org_a/articles", [f"Bearer {keys.token()}".encode()])

        assert (answer.status, answer.json) == (200, {"org": "org_a", "articles": []})
        assert await status(form, "/orgs/org_b/articles", keys.token()) == 403
        assert await status(form, "/orgs/org_a/publish", keys.token()) == 403
        assert await status(form, "/orgs/org_a/publish", keys.token(scope="read:kb write:kb")) == 200
        assert await status(form, "/orgs/org_a/articles") == 401
        assert await status(form, "/nowhere", keys.token()) == 404
        assert await status(form, "/health") == 200


async def test_the_guard_by_itself_gives_claims(product: Path, keys: KeyServer) -> None:
    anywhere = load("anywhere")
    refused: type[Exception] = load("orgworker_guard").TokenRefused

    assert (await anywhere.handle(keys.token(), "org_a")).org_code == "org_a"
    assert anywhere.handle_in_a_thread(keys.token(), "org_a").org_code == "org_a"
    with pytest.raises(refused):
        anywhere.handle_in_a_thread(keys.token(), "org_b")
    await anywhere.guard.close()


def test_the_readme_of_the_distribution_has_the_example_of_fastapi() -> None:
    [example] = blocks((GUARD / "README.md").read_text())

    assert FILES["fastapi_product.py"] == f"# fastapi_product.py\n{example.text}"


def test_every_example_is_run() -> None:
    run = {"fastapi_product.py", "flask_product.py", "asgi_product.py", "wsgi_product.py", "anywhere.py"}

    assert set(FILES) == run | {"settings.py", "views.py"}
