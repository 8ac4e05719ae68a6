"""Pages name files, headings, commands and options that exist; tests/acceptance/test_docs.py runs them."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs.generate import figures, site
from tests.fakes.pages import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    commands,
    installs_by_name,
    links,
    missing_lines,
    treatment,
    unknown_words,
)
from worker import settings
from worker.features.provisioning.management.kinde import SCOPES
from worker.guard.profile import parse as parse_profile
from worker.handlers.job import Job
from worker.model.definitions.file import parse_file
from worker.model.runs.causes import CAUSES

pytestmark = pytest.mark.feature("checkout")

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [(page, block) for page, text in TEXTS.items() for block in blocks(text)]


def test_no_link_is_dead():
    named = {(page, *link.partition("#")[::2]) for page, text in TEXTS.items() for link in links(text)}
    dead = []
    for page, name, anchor in named:
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(f"{page.name}: {name}#{anchor}")

    assert named and dead == []


@functools.cache
def anchors_of(page: Path) -> set[str]:
    return set(anchors(page.read_text(encoding="utf-8")))


def test_every_command_that_is_named_exists():
    named = {(page.name, command) for page, text in TEXTS.items() for command in commands(text)}

    assert {each: wrong for each in named if (wrong := unknown_words(each[1]))} == {}


def test_each_block_has_a_known_kind():
    """So that no shell block escapes being run by being called `bash`."""
    kinds = {"sh", "console", "text", "toml", "python", "json", "sql", "mermaid", "yaml", "ini", "dockerfile"}

    assert [f"{page.name}:{block.line}" for page, block in BLOCKS if block.language not in kinds] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_is_run_or_says_what_it_is(page: Path):
    all_blocks = blocks(TEXTS[page])
    shown = [block for block in all_blocks if not block.is_hidden]

    assert len(re.findall(r"(?m)^ *```", TEXTS[page])) == 2 * len(shown), "a fence without a language"
    for before, block in zip([None, *all_blocks], all_blocks, strict=False):
        place = f"{page.name}:{block.line}"
        assert treatment(block, before, all_blocks), f"{place}: tests/fakes/pages.py says how to mark it"
        assert set(block.marks) <= {"by", "dev", "exit", "other", "output"}, place
        if "by" in block.marks:
            tests = (ROOT / "tests").rglob(f"{block.marks['by']}.py")
            named = [page.name in test.read_text(encoding="utf-8") for test in tests]
            assert any(named), f"{place}: no such test names this page"
        if block.language == "console" and "by" not in block.marks:
            for command in re.findall(r"(?m)^\$ (.*)", block.text):
                owner = "other" if "other" in block.marks else "dev" if "dev" in block.marks else "ours"
                assert owner_of(command) == owner, f"{place}: {command}"


def owner_of(command: str) -> str:
    """Whose command it is, as the mark of its block says."""
    if re.match(r"(PYTHONSAFEPATH=1 )?(python( -P)? -m worker|orgworker)\b", command):
        return "ours"
    return "dev" if re.match(r"(\./dev|git|ls|\. \.venv/|mkdir|sha256sum)\b", command) else "other"


def test_python_on_a_page_compiles_and_imports_what_there_is():
    own = {(page, block.file.removesuffix(".py")) for page, block in BLOCKS if block.file}
    for page, block in BLOCKS:
        if block.language == "python":
            tree = ast.parse(block.text, f"{page.name}:{block.line}")
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and (page, node.module) not in own:
                    there = [is_there(node.module, each.name) for each in node.names]
                    assert all(there), f"{page.name}: {ast.unparse(node)}"


def test_toml_on_a_page_is_what_its_reader_takes(tmp_path: Path):
    """Files for `apply`, profiles and settings; what another program reads is left out."""
    for page, block in BLOCKS:
        keys = set(tomllib.loads(block.text)) if block.language == "toml" else set()
        if "org_asserted_by" in keys:
            parse_profile(block.text, source=page.name)
        elif keys & {"org", "definition", "template", "calendar", "budget", "limit", "rollout"}:
            parse_file(block.text)
        elif keys and keys != {"project"}:
            file = tmp_path / f"{page.stem}-{block.line}.toml"
            file.write_text(block.text)
            settings.load(str(file), environ={})


def is_there(module: str, name: str) -> bool:
    # The same modules, in a distribution of their own.
    module = re.sub(r"^orgworker_(guard|client)\b", r"worker.\1", module)
    owner = importlib.import_module(module)
    return hasattr(owner, name) or importlib.util.find_spec(f"{module}.{name}") is not None


def test_the_handler_of_the_readme_is_one():
    [example] = [block.text for block in blocks(PAGES[0].read_text()) if block.language == "python"]
    module: dict[str, object] = {}

    exec(compile(example, "README.md", "exec"), module)

    declared = module["digest"]
    assert isinstance(declared, Job)
    assert (declared.name, declared.scopes, declared.timeout) == ("acme.digest", {"read:kb"}, "2h")
    assert len(example.splitlines()) <= 15


def test_every_state_and_reason_of_a_run_is_explained():
    page = (ROOT / "docs" / "run-states.md").read_text()
    waiting, ended = (part.partition("\n## ")[0] for part in page.split("## ")[1:3])
    explained = {("waiting", reason) for reason in re.findall(r"(?m)^\| `(\w+)`", waiting)}
    state = ""
    for new, reason in re.findall(r"(?m)^\| (?:`(\w+)`)? *\| (?:`(\w+)`)? *\|", ended):
        state = new or state
        explained.add((state, reason or None))

    assert explained == set(CAUSES) - {("running", None)}


def test_every_page_can_be_reached_from_the_readme():
    """Links of links: a page that nobody finds is none."""
    reached = {PAGES[0]}
    ahead = [PAGES[0]]
    while ahead:
        page = ahead.pop()
        for link in links(TEXTS[page]):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target in PAGES and target not in reached:
                reached.add(target)
                ahead.append(target)

    assert sorted(set(PAGES) - reached) == []


def test_every_page_is_in_the_navigation_of_the_site_once():
    """`nav` of config/mkdocs.yml."""
    named = list(named_in(yaml.safe_load(site.CONFIG.read_text(encoding="utf-8"))["nav"]))

    assert sorted(named) == sorted(str(page.relative_to(site.DOCS)) for page in site.DOCS.rglob("*.md"))


def named_in(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from named_in(list(nav.values()))
    elif isinstance(nav, list):
        for each in nav:
            yield from named_in(each)


def test_no_page_installs_by_a_name_that_is_not_ours():
    """Pages, and the files and messages that readers get: the name may be another's on the index."""
    files = [
        *PAGES,
        *sorted((ROOT / "worker").rglob("*.py")),
        *(ROOT / name for name in ("CHANGELOG.md", "dev", "worker/guard/README.md")),
    ]
    for folder in ("config", "worker/app/verbs/skeleton"):
        files += [file for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]

    found = {file: installs_by_name(file.read_text(encoding="utf-8", errors="replace")) for file in files}

    assert {str(file.relative_to(ROOT)): calls for file, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "text",
    [
        "$ pip install orgworker\n",
        "Then `pip install 'orgworker[otel]'`.\n",
        "(PostgreSQL 15 or newer, `pip install\n'orgworker[postgresql]'`)\n",
        "# so many workers (pip install\n# 'orgworker[postgresql]').\n",
        "pip install --quiet django \\\n    orgworker>=0.1\n",
        "python -m pip install --upgrade orgworker-guard==0.1.0\n",
        "Use `pip\ninstall orgworker`.\n",
        "pipx install orgworker\n",
        "uv tool install orgworker\n",
        "uv pip install orgworker_guard\n",
        "uvx orgworker demo\n",
        "RUN /opt/orgworker/bin/pip install --no-cache-dir orgworker\n",
    ],
)
def test_an_installation_by_name_is_found(text: str):
    assert len(installs_by_name(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "$ pipx install dist/orgworker-*.whl\n$ orgworker demo\n",
        "$ /opt/orgworker/bin/pip install 'dist/orgworker-VERSION-py3-none-any.whl[otel]'\n",
        "```sh\npip install --quiet -e ./acme-greet\norgworker try acme.greet\n```\n",
        "`pip install` takes the wheel; orgworker is not on the index.\n",
        "pipx uninstall orgworker, pipx inject orgworker ./acme-greet\n",
        "pip install --no-deps --no-index dist/orgworker_guard-0.1.0-py3-none-any.whl\n",
    ],
)
def test_an_installation_from_a_file_is_not(text: str):
    assert installs_by_name(text) == []


def test_every_figure_has_its_picture():
    """`python -m docs.generate.figures` makes it."""
    assert {figures.picture_of(text) for text in figures.sources()} == set(figures.FOLDER.iterdir())


def test_the_developers_commands_that_pages_name_exist():
    usage = (ROOT / "dev").read_text()

    for page, text in TEXTS.items():
        for verb in re.findall(r"\./dev ([a-z]+)", text):
            assert re.search(rf"(?m)^{verb}\)", usage), f"{page.name}: ./dev {verb}"


def test_every_measurement_that_is_named_can_be_repeated():
    named = {name for text in TEXTS.values() for name in re.findall(r"\bbench\.(\w+)", text)}

    assert named - {path.stem for path in (ROOT / "bench").iterdir()} == set()


@pytest.mark.parametrize("name", ["docs/benchmarks.md", "bench/README.md"])
def test_each_measurement_has_a_command(name: str):
    _, *sections = TEXTS[ROOT / name].split("\n## ")

    assert [each.partition("\n")[0] for each in sections if not re.search(r"\bbench\.\w|pytest ", each)] == []


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("runs list --org org_acme -o id", []),
        ("--config FILE runs list --since 2h", []),
        ("runs lst", ["lst"]),
        ("runs list --organisation org_acme", ["--organisation"]),
        ("definitions run org_acme NAME --param k=v --request-key --odd", []),
        ("VERB --help", []),
        ("", []),
    ],
)
def test_a_verb_or_option_that_is_not_there_is_found(command: str, wrong: list[str]):
    assert unknown_words(command) == wrong


def test_what_is_printed_may_differ_in_ids_and_instants_only():
    shown = (
        "id                                    org       state\n"
        "01912345-89ab-7cde-8f01-23456789abcd  org_acme  failed  2026-11-25T03:00:00Z  0.25 s\n"
    )

    assert missing_lines("id org state\n… org_acme failed 2027-01-01T02:00:00Z 1.5 s\n", shown) == []
    assert missing_lines("… org_acme succeeded …\n", shown) == ["… org_acme succeeded …"]
    assert missing_lines("… org_acme …\nid org state\n", shown) == ["id org state"]


def test_the_page_about_kinde_names_the_scopes_that_its_adapter_needs():
    page = (ROOT / "docs" / "providers" / "kinde.md").read_text()
    step = page.partition("## 2. ")[2].partition("\n## ")[0]

    assert re.findall(r"`(\w+:\w+)`", step) == list(SCOPES)
