"""worker.toml, variables and secret files make one frozen Settings, or an error that names the place."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest

from worker import settings as settings_module
from worker.errors import ConfigurationError
from worker.settings import (
    HOST_SECTIONS,
    NOT_OF_HOSTS,
    TOLD_TO_HOSTS,
    BatchSettings,
    ExecutionSettings,
    IssuerSettings,
    PoolSettings,
    Settings,
    TemporalSettings,
    gather,
    load,
)

SHIPPED_PLACES = settings_module.CONFIG_PLACES
LOGIN = """
[issuers.main]
url = "https://acme.kinde.com"
[web.login]
issuer = "main"
client_id = "console"
"""
SHIPPED = Path(__file__).parents[2] / "config" / "worker.toml"


@pytest.fixture(autouse=True)
def _nothing_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings_module, "CONFIG_PLACES", ("worker.toml",))
    monkeypatch.setattr(settings_module, "MOUNTED_SECRETS", str(tmp_path / "no-such-mount"))


def written(text: str, name: str = "worker.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_the_shipped_file_changes_nothing():
    """config/worker.toml explains the defaults, so it must be the defaults."""
    assert load(str(SHIPPED), environ={}) == Settings() == load(environ={})


def test_the_shipped_file_names_every_setting():
    text = SHIPPED.read_text(encoding="utf-8")
    uncommented = re.sub(r"(?m)^# ((?:# |\[issuers|\[pools|\[batches|\w+ = ).*)$", r"\1", text)
    tree = tomllib.loads(uncommented)

    for name, field in Settings.model_fields.items():
        assert name in tree
        if isinstance(field.default, Settings.__base__):
            assert set(tree[name]) == set(type(field.default).model_fields)
    assert set(tree["issuers"]["main"]) == set(IssuerSettings.model_fields)
    assert set(tree["pools"]["eu"]) == set(PoolSettings.model_fields)
    assert set(tree["batches"]["openai"]) == set(BatchSettings.model_fields)


def test_the_issuer_explained_in_the_shipped_file_is_one_of_defaults():
    text = SHIPPED.read_text(encoding="utf-8")
    uncommented = re.sub(r"(?m)^# ((?:# |\[issuers|\[pools|\[batches|\w+ = ).*)$", r"\1", text)

    issuer = load(written(uncommented), environ={}).issuers["main"]

    assert issuer == IssuerSettings(url="https://acme.kinde.com")


def test_a_file_in_the_working_folder_gives_way_to_the_administrators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A handler may have written ./worker.toml; that is said on stderr, once."""
    etc = tmp_path / "etc" / "worker.toml"
    etc.parent.mkdir()
    monkeypatch.setattr(settings_module, "CONFIG_PLACES", (str(etc), "worker.toml"))
    written('[log]\nlevel = "debug"\n')
    assert load(environ={}).log.level == "debug"
    assert capsys.readouterr().err == ""

    etc.write_text('[log]\nlevel = "error"\n')

    assert load(environ={}).log.level == load(environ={}).log.level == "error"
    said = f"{tmp_path}/worker.toml is ignored because {etc} exists; --config chooses another\n"
    assert capsys.readouterr().err == said
    assert load("worker.toml", environ={}).log.level == "debug"
    assert load(environ={"WORKER_CONFIG": "worker.toml"}).log.level == "debug"
    assert capsys.readouterr().err == ""


def test_the_administrators_place_comes_first():
    assert SHIPPED_PLACES == ("/etc/orgworker/worker.toml", "worker.toml")


def test_a_command_given_where_the_administrators_file_lies_ignores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(settings_module, "CONFIG_PLACES", (str(tmp_path / "worker.toml"), "worker.toml"))
    written('[log]\nlevel = "debug"\n')

    assert load(environ={}).log.level == "debug"
    assert capsys.readouterr().err == ""


def test_the_first_that_names_a_setting_wins(tmp_path: Path):
    """Flag before variable before secret file before worker.toml before default."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "execution__drain").write_text("3s\n")
    (secrets / "execution__lease").write_text("3s\n")
    (secrets / "execution__renew").write_text("300ms\n")
    (secrets / "keyring").write_text("not a setting")
    (secrets / "other__app").write_text("not ours")
    config = written(
        f'secrets_dir = "{secrets}"\n[execution]\npoll = "4s"\ndrain = "4s"\nlease = "4s"\nrenew = "400ms"\n'
    )

    loaded = load(
        config,
        {"execution.renew": "100ms"},
        {"WORKER_EXECUTION__LEASE": "2s", "WORKER_EXECUTION__RENEW": "200ms"},
    ).execution

    assert loaded.renew == timedelta(milliseconds=100)
    assert loaded.lease == timedelta(seconds=2)
    assert loaded.drain == timedelta(seconds=3)
    assert loaded.poll == timedelta(seconds=4)
    assert loaded.max_freeze == timedelta(minutes=10)


def test_who_said_a_setting_is_known():
    config = written('[execution]\npoll = "4s"\n')

    said = gather(config, {"web.listen": ""}, {"WORKER_LOG__LEVEL": "debug"})

    assert {".".join(keys): where for keys, (_, where) in said.items()} == {
        "execution.poll": "worker.toml",
        "web.listen": "--set web.listen",
        "log.level": "WORKER_LOG__LEVEL",
    }


@pytest.mark.parametrize("text", ['["a", "b"]', "a, b", "a,b,"])
def test_a_list_in_a_variable_is_json_or_parted_by_commas(text: str):
    assert load(environ={"WORKER_EXECUTION__INLINE": text}).execution.inline == ("a", "b")


def test_a_variable_that_names_another_one_keeps_its_case():
    said = gather(
        None,
        {},
        {
            "WORKER_EXECUTION__BIND_ENVIRONMENT__ASSISTANT_API_KEY": "https://a.example",
            "WORKER_EXECUTION__BIND_ENVIRONMENT__SEARCH_KEY__ORIGIN": "https://b.example",
        },
    )

    assert set(said) == {
        ("execution", "bind_environment", "ASSISTANT_API_KEY"),
        ("execution", "bind_environment", "SEARCH_KEY", "origin"),
    }


def test_operators_may_come_from_a_variable():
    operator = {"name": "ada", "role": "admin", "token_sha256": "a" * 64}

    loaded = load(environ={"WORKER_WEB__OPERATORS": json.dumps([operator])}).web.operators

    assert [one.model_dump() for one in loaded] == [operator]
    assert "aaaa" not in repr(loaded)


def test_an_issuer_may_come_from_variables_alone():
    loaded = load(
        environ={
            "WORKER_ISSUERS__MAIN__URL": "https://acme.kinde.com",
            "WORKER_ISSUERS__MAIN__MAX_REQUESTS_PER_SECOND": "2.5",
        }
    )

    assert loaded.issuers["main"].url == "https://acme.kinde.com"
    assert loaded.issuers["main"].max_requests_per_second == 2.5


def test_variables_that_name_no_section_are_left_alone():
    """WORKER_CONFIG names the file, and a container engine sets WORKER_PORT for a service `worker`."""
    config = written("", "other.toml")

    assert load(environ={"WORKER_CONFIG": config, "WORKER_DEBUG": "1", "WORKER_PORT": "tcp://10.0.0.1:80"})


def test_the_file_is_found_by_argument_then_variable_then_place():
    written('[log]\nlevel = "error"\n')
    written('[log]\nlevel = "warning"\n', "by-variable.toml")
    written('[log]\nlevel = "debug"\n', "by-argument.toml")

    assert load(environ={}).log.level == "error"
    assert load(environ={"WORKER_CONFIG": "by-variable.toml"}).log.level == "warning"
    assert load("by-argument.toml", environ={"WORKER_CONFIG": "by-variable.toml"}).log.level == "debug"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[execution]\nrenews = '5s'", "worker.toml: unknown setting execution.renews; did you mean renew?"),
        ("[executions]\nrenew = '5s'", "worker.toml: unknown setting executions; did you mean execution?"),
        ("[execution]\nrenew = '10s'", "renew is 10s, more than a quarter of the lease of 30s"),
        ("[execution]\nlease = 30", "execution.lease: 30 is not a duration; write it as text, such as 30s"),
        ("[execution]\nmax_children = 'many'", "execution.max_children: Input should be a valid integer"),
        ("[execution]\ninline = 3", "execution.inline: Input should be a valid tuple"),
        ("[issuers.main]\nprofile = 'kinde'", "worker.toml: issuers.main.url: Field required"),
        (
            "[issuers.main]\nurl = 'https://a'\napi_origins = ['https://b/path']",
            "issuers.main.api_origins: 'https://b/path' is not an origin",
        ),
        (
            "[issuers.main]\nurl = 'https://a'\napi_origins = ['http://api.acme.com']",
            "worker.toml: issuers.main.api_origins: http://api.acme.com would carry each org's token",
        ),
        (
            "[issuers.main]\nurl = 'https://a'\napi_base_url = 'api.acme.com'",
            "issuers.main.api_base_url: '***' is not a base URL",
        ),
        (
            "[issuers.main]\nurl = 'https://a'\napi_origins = ['https://b']\napi_base_url = 'https://b:444/v1'",
            "worker.toml: issuers.main.api_base_url: its origin is not in api_origins",
        ),
        (
            "[issuers.main]\nurl = 'https://a'\napi_origins = ['https://ada:pass@word@b']",
            "issuers.main.api_origins: 'https://***@b' is not an origin",
        ),
        (
            "[execution]\nprivate_origins = ['10.0.0.5:8080']",
            "execution.private_origins: '10.0.0.5:8080' is not an origin",
        ),
        (
            "[execution]\negress = ['api.acme.com']",
            "worker.toml: execution.egress: 'api.acme.com' is not allowed here; write \"api\"",
        ),
        (
            "[execution]\negress = ['https://*.s3.amazonaws.com']",
            "execution.egress: 'https://*.s3.amazonaws.com': anyone can have a name below s3.amazonaws.com",
        ),
        ("[execution]\negress = [['api']]", "execution.egress: an item is not a text"),
        (
            "[execution]\nnetwork = 'open'\negress = ['api']",
            'execution: network = "open" seals no run, so that egress would cap nothing; remove egress',
        ),
        ("[execution]\nnetwork = 'closed'", "execution.network: Input should be 'auto', 'require' or 'open'"),
        (
            "[execution]\npass_environment = ['KEY']\nbind_environment = { KEY = 'https://a.example' }",
            "execution: KEY is in bind_environment and in pass_environment, which gives handlers its value",
        ),
        (
            "[execution]\nbind_environment = { KEY = 'public' }",
            "execution.bind_environment.KEY.origin: 'public' is not an origin",
        ),
        (
            "[execution]\nbind_environment = { KEY = 'https://*.example.com' }",
            "execution.bind_environment.KEY.origin: ",
        ),
        (
            "[execution]\nbind_environment = { KEY = 'http://a.example' }",
            "'http://a.example' is not one origin that may get a secret; write https and a host",
        ),
        (
            "[execution]\nbind_environment = { KEY = { header = 'x-api-key' } }",
            "execution.bind_environment.KEY.origin: Field required",
        ),
        (
            "[execution]\nbind_environment = { KEY = { origin = 'https://a.example', header = 'x: y' } }",
            "execution.bind_environment.KEY.header: 'x: y' is not the name of a header",
        ),
        (
            "[execution]\nbind_environment = { KEY = { origin = 'https://a.example', header = 'Host' } }",
            "execution.bind_environment.KEY.header: host cannot carry a secret",
        ),
        (
            "[execution]\nbind_environment = { 'A-KEY' = 'https://a.example' }",
            "execution.bind_environment: 'A-KEY' is not the name of an environment variable",
        ),
        (
            "[execution]\nbind_environment = { HOME = 'https://a.example' }",
            "execution.bind_environment: HOME is passed to every run",
        ),
        ("[execution]\nbind_environment = 5", "execution.bind_environment: Input should be a valid dict"),
        ("[issuers.Main]\nurl = 'https://a'", "issuers.Main: write a name of a-z, 0-9, _ and -"),
        ("database = 'x'", "worker.toml: database: Input should be a valid dictionary"),
        ("[log]\nlevel = 'loud'", "log.level: Input should be 'debug', 'info', 'warning' or 'error'"),
        ("[log\n", "worker.toml is not TOML"),
        ("[web]\nlisten = '8470'", "web.listen: '8470' is not an address; write host and port"),
        (
            "[web]\nlisten = '127.0.0.1:1'\nhealth_listen = '127.0.0.1:1'",
            "web: health_listen equals listen; use another port",
        ),
        ("[web]\nconnections_per_address = -1", "web.connections_per_address: "),
        ("[web]\nlisten = 'localhost:99999'", "web.listen: 'localhost:99999' is not an address"),
        ("[[web.operators]]\nname = 'ada'", "worker.toml: web.operators.token_sha256: Field required"),
        ("[[web.operators]]\nnam = 'ada'", "unknown setting web.operators.nam; did you mean name?"),
        (
            "[web]\ntrusted_proxies = ['10.0.0.0/8', '10.0.0.1/8']",
            "web.trusted_proxies: 10.0.0.1/8 has host bits set; write networks as CIDR: 10.0.0.0/8",
        ),
        ("[web]\ntrusted_proxies = ['proxy']", "web.trusted_proxies: 'proxy' does not appear to be an IP"),
        ("[web]\npublic_url = 'jobs.acme.com'", "web.public_url: not a URL"),
        ("[web]\npublic_url = 'https://a/jobs'", "web.public_url: write scheme, host and port only"),
        ("[web]\npublic_url = 'https://a:99999'", "web.public_url: not a URL"),
        ("[web]\norg_scope = 'two words'", "web.org_scope: write one scope"),
        ("[web]\nlogins_per_minute = 0", "web.logins_per_minute: Input should be greater than or equal to 1"),
        ("[web]\ncalls_per_second = 0", "web.calls_per_second: Input should be greater than or equal to 1"),
        (
            f"{LOGIN}[[web.login.roles]]\nclaim = 'permissions'\nvalue = 'jobs:support'\nrole = 'viewer'",
            "the role viewer sees all orgs, and customers can grant 'jobs:support' to their own people; "
            'add org = "CODE"',
        ),
        (
            f"{LOGIN}[[web.login.roles]]\nclam = 'x'",
            "unknown setting web.login.roles.clam; did you mean claim?",
        ),
        (
            f"{LOGIN}default_rol = 'member'",
            "unknown setting web.login.default_rol; did you mean default_role?",
        ),
        (LOGIN, "web.login: the rules give no role to anyone: add [[web.login.roles]]"),
        (f"{LOGIN}scopes = ['email']", 'web.login: scopes must contain "openid"'),
        ("[web.login]\nissuer = 'main'", "web.login: issuer and client_id must be given together"),
        (
            "[web.login]\nissuer = 'main'\nclient_id = 'c'\ndefault_role = 'member'",
            "web.login.issuer: there is no issuer 'main'; worker.toml has none",
        ),
        (
            f"{LOGIN}default_role = 'member'\nclaims_from = 'access_token'",
            'web.login.claims_from = "access_token" needs an audience',
        ),
        (
            "[web.portal]\nmay = ['delete']",
            "web.portal.may: Input should be 'run', 'pause', 'retry', 'cancel' or 'answer'",
        ),
        ("[alerts]\nwebhook_url = 'example.com'", "alerts.webhook_url: not a URL"),
        ("[alerts]\nwebhook_url = 'https://a'", "webhook_url needs webhook_secret"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_named(text: str, message: str):
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        load(written(text), environ={})

    assert caught.value.exit_code == 78


def test_rules_for_logins_are_read_with_the_operators_org():
    text = f"""{LOGIN}
[[web.login.roles]]
claim = "permissions"
value = "jobs:support"
role = "operator"
org = "org_vendor"
[[web.login.roles]]
claim = "permissions"
value = "jobs:manage"
role = "manager"
[web.portal]
may = ["run"]
"""
    web = load(written(text), environ={}).web

    assert [(rule.role, rule.org) for rule in web.login.roles] == [
        ("operator", "org_vendor"),
        ("manager", ""),
    ]
    assert web.portal.may == ("run",)
    assert Settings().web.portal.may == ("run", "pause", "retry")


def test_a_bad_variable_is_refused_by_its_own_name():
    with pytest.raises(ConfigurationError, match=r"^WORKER_EXECUTION__RENEWS: unknown setting"):
        load(environ={"WORKER_EXECUTION__RENEWS": "5s"})


def test_a_section_given_as_a_value_and_as_a_section_is_refused():
    with pytest.raises(ConfigurationError, match="database is a section"):
        load(written("database = 'x'"), environ={"WORKER_DATABASE__URL": "sqlite:///x"})


def test_a_file_named_but_missing_is_refused():
    with pytest.raises(ConfigurationError, match=r"absent\.toml cannot be read: No such file"):
        load("absent.toml", environ={})


def test_no_password_stands_in_a_repr_or_an_error():
    url = "postgresql://worker:hunter2@db/worker"
    said = {"WORKER_DATABASE__URL": url, "WORKER_DATABASE__OWNER_URL": url}

    assert "hunter2" not in repr(load(environ=said))
    with pytest.raises(ConfigurationError) as caught:
        load(environ=said | {"WORKER_DATABASE__OTHER": url})
    assert "hunter2" not in f"{caught.value} {caught.value.fix}"


class TestKeyring:
    """Where the key ring is, or would be made."""

    def test_it_lies_beside_the_sqlite_file(self):
        assert load(environ={}).keyring_file == Path("var/keyring")

    def test_four_slashes_name_an_absolute_sqlite_path(self):
        loaded = load(environ={"WORKER_DATABASE__URL": "sqlite:////srv/worker.db"})

        assert loaded.keyring_file == Path("/srv/keyring")

    def test_one_in_secrets_dir_comes_first(self, tmp_path: Path):
        (tmp_path / "keyring").touch()

        assert load(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}).keyring_file == tmp_path / "keyring"

    def test_a_mounted_secrets_dir_without_one_does_not_hide_the_one_beside_the_sqlite_file(
        self, tmp_path: Path
    ):
        assert load(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}).keyring_file == Path("var/keyring")

    def test_on_postgresql_it_is_in_secrets_dir_only(self, tmp_path: Path):
        said = {"WORKER_DATABASE__URL": "postgresql://db/worker"}

        assert load(environ=said | {"WORKER_SECRETS_DIR": "s"}).keyring_file == Path("s/keyring")
        with pytest.raises(ConfigurationError, match="secrets_dir is not set"):
            load(environ=said).keyring_file  # noqa: B018


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(environ={}).execution.lease = timedelta(seconds=1)  # type: ignore[misc]


def test_an_api_origin_may_be_unencrypted_on_this_machine_or_where_that_is_listed():
    issuer = (
        "[issuers.main]\nurl = 'https://a'\napi_origins = ['http://127.0.0.1:8490', 'http://api.acme.com']\n"
    )

    settings = load(
        written(issuer + "[execution]\ninsecure_origins = ['http://api.acme.com:80']"), environ={}
    )

    assert settings.issuers["main"].api_origins == ("http://127.0.0.1:8490", "http://api.acme.com")
    with pytest.raises(ConfigurationError, match="http://api.acme.com would carry") as refused:
        load(written(issuer), environ={"WORKER_EXECUTION__INSECURE_ORIGINS": "http://api.acme.com:8080"})
    assert "[execution] insecure_origins" in refused.value.fix


def test_settings_know_the_file_they_come_from():
    file = written("", "other.toml")

    assert load(file, environ={}).config_file == file
    assert load(environ={"WORKER_CONFIG": file}).config_file == file
    assert Settings().config_file == ""


MANAGEMENT = """
[issuers.main]
url = "https://acme.kinde.com"
[issuers.main.management]
client_id = "manager"
[issuers.main.management.tags]
pro = "properties.plan=pro"
"big customer" = "external_id"
[provisioning]
overlap = "2h"
max_suspended = "2.5%"
"""


def test_management_and_provisioning_are_sections(tmp_path: Path):
    """The secret lies beside the others and is not read: it is not even text, as each setting must be."""
    (tmp_path / "management__main").write_bytes(b"\xff canary-management-secret")
    settings = load(written(MANAGEMENT), {"secrets_dir": str(tmp_path)}, environ={})

    management = settings.issuers["main"].management
    assert (management.client_id, management.url, management.max_requests_per_second) == ("manager", "", 0)
    assert management.tags == {"pro": "properties.plan=pro", "big customer": "external_id"}
    assert settings.provisioning.overlap == timedelta(hours=2)
    assert settings.provisioning.suspended_share == 0.025
    assert Settings().provisioning.suspended_share == 0.05
    assert "canary" not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('client_id = "manager"', ""), "client_id is missing"),
        (('client_id = "manager"', 'client_id = "a b"'), "write the client id"),
        (('client_id = "manager"', 'client = "manager"'), "did you mean client_id"),
        (
            ('client_id = "manager"', 'client_id = "m"\nurl = "https://acme.kinde.com/api"'),
            "scheme, host and port",
        ),
        (("properties.plan=pro", "plan=pro"), "tag 'pro': write FIELD or FIELD=VALUE"),
        (('"2.5%"', '"2.5"'), "a share of the orgs, such as 5%"),
        (('"2.5%"', '"101%"'), "a share of the orgs, such as 5%"),
        (('overlap = "2h"', 'overlap = "two"'), "provisioning.overlap"),
        (('overlap = "2h"', 'overlapp = "2h"'), "did you mean overlap"),
        (('overlap = "2h"', 'listen = "8480"'), "write host and port"),
    ],
    ids=str,
)
def test_a_wrong_setting_of_provisioning_is_named(change: tuple[str, str], message: str):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(written(MANAGEMENT.replace(*change)), environ={})


# ---- hosts

HOST = """
[host]
control = ["https://jobs.acme.com:8443", "http://127.0.0.1:8480"]
token_file = "token"
"""


def test_the_network_of_runs_has_its_settings():
    config = written(
        "[execution]\nnetwork = 'require'\negress = ['api', 'https://*.openai.com', 'api']\n"
        "[execution.bind_environment]\nOPENAI_API_KEY = 'https://api.openai.com'\n"
        "[execution.bind_environment.ANTHROPIC_API_KEY]\n"
        "origin = 'https://API.anthropic.com:443/'\nheader = 'X-Api-Key'\n"
    )

    execution = load(config, environ={}).execution

    assert (execution.network, execution.egress) == ("require", ("api", "https://*.openai.com"))
    bound = {name: (one.origin, one.header) for name, one in execution.bind_environment.items()}
    assert bound == {
        "OPENAI_API_KEY": ("https://api.openai.com", None),
        "ANTHROPIC_API_KEY": ("https://api.anthropic.com", "x-api-key"),
    }


def test_they_can_be_set_by_variables():
    variables = {
        "WORKER_EXECUTION__EGRESS": "api, https://api.openai.com",
        "WORKER_EXECUTION__BIND_ENVIRONMENT": '{"OPENAI_API_KEY": "https://api.openai.com"}',
    }

    execution = load(written(""), environ=variables).execution

    assert execution.egress == ("api", "https://api.openai.com")
    assert execution.bind_environment["OPENAI_API_KEY"].origin == "https://api.openai.com"


def test_a_host_confines_its_handlers_unless_it_is_told_otherwise():
    config = written(HOST)

    assert load(config, environ={}, of_host=True).execution.sandbox == "require"
    assert load(config, {"execution.sandbox": "off"}, {}, of_host=True).execution.sandbox == "off"
    assert load(config, environ={}).execution.sandbox == "auto"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[database]\nurl = 'postgresql://db/worker'", "worker.toml: a host does not take database.url"),
        ("[database]", "worker.toml: a host does not take database"),
        ("[issuers.main]\nurl = 'https://a'", "worker.toml: a host does not take issuers.main.url"),
        ("[tokens]\nshared = false", "worker.toml: a host does not take tokens.shared"),
        ("[web]\nlisten = ''", "worker.toml: a host does not take web.listen"),
        ("[execution]\npools = ['eu']", "worker.toml: a host does not take execution.pools"),
        ("[execution]\negress = ['api']", "worker.toml: a host does not take execution.egress"),
        ("[alerts]\noverdue = '5s'", "worker.toml: a host does not take alerts.overdue"),
    ],
)
def test_what_a_host_must_not_have_is_named(text: str, message: str):
    config = written(f"{HOST}\n{text}\n")

    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(config, environ={}, of_host=True)


def test_a_database_in_the_environment_of_a_host_is_named():
    with pytest.raises(ConfigurationError, match=r"WORKER_DATABASE__URL: a host does not take database\.url"):
        load(written(HOST), environ={"WORKER_DATABASE__URL": "postgresql://u:secret@db/worker"}, of_host=True)


def test_a_host_must_not_have_a_key_ring(tmp_path: Path):
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "keyring").write_text("k1 secret")

    with pytest.raises(ConfigurationError, match="a host must not have a key ring") as raised:
        load(written(HOST), environ={"CREDENTIALS_DIRECTORY": str(secrets)}, of_host=True)
    assert "secret" not in raised.value.message.replace("secrets", "")


@pytest.mark.parametrize("name", ["control", "token_file"])
def test_what_a_host_needs_is_named(name: str):
    text = "\n".join(line for line in HOST.splitlines() if not line.startswith(name))

    with pytest.raises(ConfigurationError, match=rf"host\.{name} is not set"):
        load(written(text), environ={}, of_host=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://jobs.acme.com", "would carry orgs' tokens unencrypted; write https://"),
        ("https://jobs.acme.com/attempts", "is not an origin; write scheme, host and port"),
    ],
)
def test_a_control_address_that_cannot_be_used_is_an_error(url: str, message: str):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(written(HOST.replace("http://127.0.0.1:8480", url)), environ={}, of_host=True)


def test_the_example_of_a_host_names_every_setting_of_a_host():
    """Beside [host] it has the defaults, except that the sandbox is required."""
    example = SHIPPED.with_name("host.toml")
    tree = tomllib.loads(example.read_text(encoding="utf-8"))

    loaded = load(str(example), environ={}, of_host=True)

    assert loaded == Settings().model_copy(
        update={"host": loaded.host, "execution": ExecutionSettings(sandbox="require")}
    )
    assert set(tree) == {*HOST_SECTIONS, "web", "secrets_dir"}
    assert set(tree["execution"]) == set(ExecutionSettings.model_fields) - set(NOT_OF_HOSTS)
    assert set(tree["temporal"]) == set(TemporalSettings.model_fields) - set(TOLD_TO_HOSTS)
    for name in ("host", "tracing", "log"):
        assert set(tree[name]) == set(type(getattr(loaded, name)).model_fields)


def temporal_pool(tmp_path: Path, rest: str) -> Path:
    file = tmp_path / "worker.toml"
    file.write_text(f'[pools.gpu]\nplacer = "temporal"\n{rest}')
    return file


def test_a_pool_may_be_placed_by_temporal(tmp_path: Path):
    found = load(str(temporal_pool(tmp_path, '[temporal]\naddress = "127.0.0.1:7233"')), environ={})

    assert found.placed_by_temporal == ("gpu",)
    assert found.temporal.place_timeout.total_seconds() == 30


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("", "temporal.address is not set"),
        ('[temporal]\naddress = "temporal"', "write host and port"),
        (
            '[temporal]\naddress = "h:7233"\n[execution]\npools = ["default", "gpu"]',
            "execution.pools names gpu",
        ),
        ('[temporal]\naddress = "h:7233"\nplace_timeout = "0s"', "temporal.place_timeout"),
        ('[temporal]\naddress = "h:7233"\ncertificate = "a.pem"', "certificate and key must be given"),
        ('[temporal]\naddress = "h:7233"\nca_file = "a.pem"', "are for tls = true"),
        ('[temporal]\naddress = "h:7233"\nnamespace = "a/b"', "the name of a namespace"),
    ],
)
def test_what_a_placed_pool_lacks_is_named(tmp_path: Path, rest: str, message: str):
    with pytest.raises(ConfigurationError, match=message):
        load(str(temporal_pool(tmp_path, rest)), environ={})


@pytest.mark.parametrize("setting", ['namespace = "jobs"', 'place_timeout = "5s"'])
def test_a_host_does_not_decide_what_its_workers_tell_it(tmp_path: Path, setting: str):
    file = tmp_path / "host.toml"
    file.write_text(f'[host]\ncontrol = ["http://127.0.0.1:1"]\ntoken_file = "t"\n[temporal]\n{setting}')

    with pytest.raises(ConfigurationError, match=r"a host does not take temporal\."):
        load(str(file), environ={}, of_host=True)


class TestInstallation:
    def test_a_variable_of_its_own_wins_over_the_file(self):
        file = written('installation = "production"\n')

        assert load(file, environ={}).installation == "production"
        assert load(file, environ={"WORKER_INSTALLATION": "staging"}).installation == "staging"
        assert load(file, {"installation": "dev"}, {"WORKER_INSTALLATION": "staging"}).installation == "dev"
        assert load(written(""), environ={}).installation == ""

    @pytest.mark.parametrize("word", ["Production", "-a", "a b", "a\n", "a" * 64, "ä", "a/b"])
    def test_what_is_no_word_is_named_with_its_source(self, word: str):
        with pytest.raises(ConfigurationError, match="WORKER_INSTALLATION: installation: write a word"):
            load(written(""), environ={"WORKER_INSTALLATION": word})

    def test_it_may_be_as_long_as_the_name_of_a_pool(self):
        assert load(written(""), environ={"WORKER_INSTALLATION": "a" * 63}).installation == "a" * 63

    def test_a_host_has_none(self):
        with pytest.raises(ConfigurationError, match="a host does not take installation"):
            load(written('installation = "production"\n'), environ={}, of_host=True)
