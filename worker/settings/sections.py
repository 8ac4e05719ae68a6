"""The sections of worker.toml as frozen values; config/worker.toml explains every setting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from worker.guard.urls import is_loopback
from worker.model.batches import MAX_BATCH_BYTES, root_of
from worker.model.bindings import parse_bound_origin, parse_header
from worker.model.definitions.origins import parse_base_url, parse_origin, unencrypted
from worker.model.definitions.pools import DEFAULT_POOL, parse_pool
from worker.model.definitions.units import parse_duration, parse_memory
from worker.model.egress import check_wildcards, parse_items
from worker.model.money import DEFAULT_CURRENCY, parse_currency
from worker.model.prices import KINDS, Kind, OwnPrice, Prices, model_name
from worker.model.provider import parse_rule
from worker.telemetry.masking import shown_url


def _duration(value: Any) -> Any:
    return value if isinstance(value, timedelta) else parse_duration(value)


def _listed(value: Any) -> Any:
    """A variable or secret file has a JSON array, or text separated by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _each(check: Callable[[str], object]) -> BeforeValidator:
    """Validates a list with a function that raises ValueError for an invalid item."""

    def checked(value: Any) -> Any:
        items = _listed(value)
        for item in items if isinstance(items, list | tuple) else ():
            check(str(item))
        return items

    return BeforeValidator(checked)


def _path(path: str) -> None:
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not absolute; write the whole path, such as /srv/models")


def _control(url: str) -> None:
    parse_origin(url)
    if unencrypted((url,), ()):
        raise ValueError(f"{shown_url(url)!r} would carry orgs' tokens unencrypted; write https://")


def _egress(value: Any) -> Any:
    items = _listed(value)
    if isinstance(items, list | tuple):
        items = parse_items(items)
        check_wildcards(items)
    return items


def _header(name: str | None) -> str | None:
    return None if name is None else parse_header(name)


def _network(network: str) -> None:
    try:
        ip_network(network)
    except ValueError as error:
        raise ValueError(f"{error}; write networks as CIDR: 10.0.0.0/8 or 192.0.2.7/32") from None


def _matching(pattern: str, expected: str) -> AfterValidator:
    def checked(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"write {expected}")
        return value

    return AfterValidator(checked)


def _url(value: Any) -> Any:
    if isinstance(value, str) and value:
        try:
            parts = urlsplit(value)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # its message may contain the password
            known = False
        if not known:
            raise ValueError("not a URL; write https://host/path")
    return value


def _base_url(value: str) -> str:
    return parse_base_url(value) if value else value


def _model_url(value: str) -> str:
    if value and not value.startswith("https://") and not is_loopback(urlsplit(value).hostname or ""):
        raise ValueError(f"{shown_url(value)!r} would carry keys and prompts unencrypted; write https://")
    return root_of(value)


def _size(value: str) -> str:
    if parse_memory(value) < 2**20:
        raise ValueError("write at least 1MiB")
    return value


def _listen(value: Any) -> Any:
    if isinstance(value, str) and value:
        found = re.fullmatch(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]+):(\d{1,5})", value)
        if found is None or int(found[1]) > 65_535:
            raise ValueError(
                f"{value!r} is not an address; write host and port: 127.0.0.1:8470 or [::1]:8470"
            )
    return value


def _public_url(value: Any) -> Any:
    if isinstance(value, str) and value:
        parts = urlsplit(_url(value))
        is_bare = parts.path in ("", "/") and not (parts.query or parts.fragment or "@" in parts.netloc)
        if not is_bare:
            raise ValueError("write scheme, host and port only: https://jobs.acme.com")
    return value


def _tables(value: Any) -> Any:
    """A variable or secret file has a JSON array of objects."""
    return json.loads(value) if isinstance(value, str) else value


def _once(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _tags(tags: dict[str, str]) -> dict[str, str]:
    for tag, rule in tags.items():
        parse_rule(tag, rule)
    return tags


Tags = Annotated[dict[str, str], BeforeValidator(_tables), AfterValidator(_tags)]
Duration = Annotated[timedelta, BeforeValidator(_duration)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Paths = Annotated[tuple[str, ...], _each(_path)]
Origins = Annotated[tuple[str, ...], _each(parse_origin)]
Egress = Annotated[tuple[str, ...], BeforeValidator(_egress)]
Networks = Annotated[tuple[str, ...], _each(_network)]
Url = Annotated[str, BeforeValidator(_url)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
Size = Annotated[str, AfterValidator(_size)]
Listen = Annotated[str, BeforeValidator(_listen)]
PublicUrl = Annotated[str, BeforeValidator(_public_url)]
Pools = Annotated[tuple[str, ...], _each(parse_pool), AfterValidator(_once)]
PoolName = Annotated[str, AfterValidator(parse_pool)]
Requires = Annotated[dict[str, bool | int | float | str], BeforeValidator(_tables)]
IssuerName = Annotated[str, _matching(r"[a-z0-9][a-z0-9_-]*", "a name of a-z, 0-9, _ and -, such as main")]
InstallationWord = Annotated[
    str,
    _matching(
        r"|[a-z0-9][a-z0-9._-]{0,62}",
        "a word of at most 63 characters of a-z, 0-9, ., _ and -, such as production",
    ),
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class DatabaseSettings(Section):
    """`[database]`; the URLs may contain a password, so the repr omits them."""

    url: str = Field("sqlite:///var/worker.db", repr=False)
    owner_url: str = Field("", repr=False)

    @property
    def sqlite_file(self) -> Path | None:
        """The SQLite file in `url`, relative to the working directory; None for PostgreSQL."""
        named = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", self.url)
        return Path(named[1]) if named else None


class ManagementSettings(Section):
    """`[issuers.NAME.management]`: the provider's management API, if it has a `client_id`.

    Its secret is not a setting: `features.provisioning` reads it, for the commands that need it.
    """

    client_id: Annotated[str, _matching(r"\S{0,200}", "the client id of an application at the provider")] = ""
    url: PublicUrl = ""
    audience: str = ""
    max_requests_per_second: float = Field(0.0, ge=0, le=10_000)
    tags: Tags = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> ManagementSettings:
        if not self.client_id and self.model_fields_set and self != ManagementSettings():
            raise ValueError("client_id is missing: that of the application that may use the management API")
        return self


class IssuerSettings(Section):
    """`[issuers.NAME]`: an identity provider."""

    profile: str = "kinde"
    url: str
    audience: str = ""
    api_origins: Origins = ()
    api_base_url: BaseUrl = ""
    max_requests_per_second: float = Field(10.0, gt=0, le=10_000)
    token_endpoint: str = ""
    keys_url: str = ""
    management: ManagementSettings = ManagementSettings()


_OF_EVERY_RUN = ("PATH", "HOME", "LANG", "TZ", "TMPDIR")


class BoundVariable(Section):
    """`[execution.bind_environment]`: the only origin that gets a variable's value; runs get a placeholder.

    With `header` the value is sent in that header, without any placeholder.
    """

    origin: Annotated[str, AfterValidator(parse_bound_origin)]
    header: Annotated[str | None, AfterValidator(_header)] = None


def _bindings(value: Any) -> Any:
    """A variable has an origin, or a table with `origin` and `header`."""
    table = _tables(value)
    if not isinstance(table, dict):
        return table
    for name in table:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if name in _OF_EVERY_RUN:
            raise ValueError(f"{name} is passed to every run; bind a variable that has a secret")
    return {name: {"origin": one} if isinstance(one, str) else one for name, one in table.items()}


Bindings = Annotated[dict[str, BoundVariable], BeforeValidator(_bindings)]


class ExecutionSettings(Section):
    """`[execution]`: pools, concurrency, sandbox, network, lease and drain of a worker."""

    pools: Pools = (DEFAULT_POOL,)

    max_children: int = Field(50, ge=0, le=10_000)
    spare_children: int = Field(2, ge=0, le=1000)
    max_inline: int = Field(1000, ge=0, le=1_000_000)
    inline: Texts = ()
    preload: Texts = ()
    pass_environment: Texts = ()
    bind_environment: Bindings = Field(default_factory=dict)
    network: Literal["auto", "require", "open"] = "auto"
    egress: Egress = ()
    private_origins: Origins = ()
    insecure_origins: Origins = ()
    sandbox: Literal["auto", "require", "off"] = "auto"
    read_paths: Paths = ()
    write_paths: Paths = ()
    lease: Duration = Field(timedelta(seconds=30), ge=timedelta(seconds=1))
    renew: Duration = Field(timedelta(seconds=5), ge=timedelta(milliseconds=50))
    poll: Duration = Field(timedelta(seconds=1), ge=timedelta(milliseconds=10), le=timedelta(minutes=1))
    drain: Duration = timedelta(seconds=60)
    max_freeze: Duration = timedelta(minutes=10)

    @model_validator(mode="after")
    def _bound_or_passed(self) -> ExecutionSettings:
        for name in self.bind_environment:
            if name in self.pass_environment:
                raise ValueError(
                    f"{name} is in bind_environment and in pass_environment, which gives handlers its value; "
                    "remove it from pass_environment"
                )
        return self

    @model_validator(mode="after")
    def _sealed_or_open(self) -> ExecutionSettings:
        if self.egress and self.network == "open":
            raise ValueError(
                'network = "open" seals no run, so that egress would cap nothing; remove egress, or set '
                "network to auto"
            )
        return self

    @model_validator(mode="after")
    def _renew_often_enough(self) -> ExecutionSettings:
        if self.renew * 4 > self.lease:
            raise ValueError(
                f"renew is {self.renew.total_seconds():g}s, more than a quarter of the lease of "
                f"{self.lease.total_seconds():g}s; lower renew or raise lease"
            )
        return self


class PoolSettings(Section):
    """`[pools.NAME]`: what a token must carry so that a run may execute there, and what places its runs."""

    requires: Requires = Field(default_factory=dict)
    placer: Literal["pull", "temporal"] = "pull"


class TemporalSettings(Section):
    """`[temporal]`: the Temporal that places runs of pools with `placer = "temporal"`."""

    address: Listen = ""
    namespace: Annotated[str, _matching(r"[^\s/]{1,200}", "the name of a namespace")] = "default"
    place_timeout: Duration = Field(timedelta(seconds=30), ge=timedelta(seconds=1), le=timedelta(hours=1))
    tls: bool = False
    ca_file: str = ""
    certificate: str = ""
    key: str = ""

    @model_validator(mode="after")
    def _encrypted(self) -> TemporalSettings:
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key must be given together")
        if (self.certificate or self.ca_file) and not self.tls:
            raise ValueError("certificate, key and ca_file are for tls = true")
        return self


class OperatorSettings(Section):
    """`[[web.operators]]`: a person or program with access to all orgs, known by the hash of its token."""

    name: Annotated[str, _matching(r"[^\s:][^\n:]{0,99}", "a name of 1 to 100 characters without a colon")]
    role: Literal["starter", "viewer", "operator", "admin"] = "viewer"
    token_sha256: Annotated[
        str, _matching(r"[0-9a-f]{64}", "the SHA-256 of the token: 64 characters 0-9 and a-f")
    ] = Field(repr=False)


Operators = Annotated[tuple[OperatorSettings, ...], BeforeValidator(_tables)]


OVER_ALL_ORGS = ("viewer", "operator", "admin")


class LoginRole(Section):
    """`[[web.login.roles]]`: the role of people whose token has a claim."""

    claim: Annotated[str, _matching(r"\S{1,200}", "the name of a claim, such as permissions")]
    value: Annotated[str, _matching(r".{1,200}", "the text that the claim has, or that is in its list")]
    role: Literal["viewer", "operator", "admin", "manager", "member"]
    org: str = ""

    @model_validator(mode="after")
    def _of_the_operators_org(self) -> LoginRole:
        if self.role in OVER_ALL_ORGS and not self.org:
            raise ValueError(
                f"the role {self.role} sees all orgs, and customers can grant {self.value!r} to their own "
                'people; add org = "CODE", the code of your own org at the provider'
            )
        return self


LoginRoles = Annotated[tuple[LoginRole, ...], BeforeValidator(_tables)]


class LoginSettings(Section):
    """`[web.login]`: people log in at an identity provider; not without an `issuer`."""

    issuer: str = ""
    client_id: str = ""
    claims_from: Literal["id_token", "access_token"] = "id_token"
    default_role: Literal["none", "member"] = "none"
    scopes: Texts = ("openid", "profile", "email")
    acr: Texts = ()
    max_age: Duration = Field(timedelta(), ge=timedelta())
    roles: LoginRoles = ()

    @model_validator(mode="after")
    def _complete(self) -> LoginSettings:
        if bool(self.issuer) != bool(self.client_id):
            raise ValueError("issuer and client_id must be given together")
        if self.issuer and "openid" not in self.scopes:
            raise ValueError('scopes must contain "openid"')
        if self.issuer and not self.roles and self.default_role == "none":
            raise ValueError(
                'the rules give no role to anyone: add [[web.login.roles]], or default_role = "member"'
            )
        return self


class PortalSettings(Section):
    """`[web.portal]`: what people with the role manager may do in their org."""

    may: Annotated[
        tuple[Literal["run", "pause", "retry", "cancel", "answer"], ...], BeforeValidator(_listed)
    ] = ("run", "pause", "retry")


class WebSettings(Section):
    """`[web]`: health, metrics, API and console; an empty address turns a listener off."""

    listen: Listen = "127.0.0.1:8470"
    health_listen: Listen = ""
    connections_per_address: int = Field(100, ge=0, le=10_000)
    operators: Operators = ()
    org_role: Literal["viewer", "operator"] = "viewer"
    org_scope: Annotated[str, _matching(r"[!#-\[\]-~]*", "one scope, without spaces or quotes")] = ""
    public_url: PublicUrl = ""
    trusted_proxies: Networks = ()
    logins_per_minute: int = Field(10, ge=1, le=100_000)
    calls_per_second: int = Field(50, ge=1, le=100_000)
    metrics_top_orgs: int = Field(0, ge=0, le=1000)
    mcp: bool = False
    org_usage: bool = False
    login: LoginSettings = LoginSettings()
    portal: PortalSettings = PortalSettings()

    @model_validator(mode="after")
    def _two_addresses(self) -> WebSettings:
        if self.health_listen and self.health_listen == self.listen:
            raise ValueError('health_listen equals listen; use another port, or leave it ""')
        return self


class AttemptsSettings(Section):
    """`[attempts]`: where hosts reach the attempt API of a worker; an empty address turns it off."""

    listen: Listen = ""
    certificate: str = ""
    key: str = ""

    @model_validator(mode="after")
    def _encrypted(self) -> AttemptsSettings:
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key must be given together")
        is_local = is_loopback(self.listen.rpartition(":")[0].strip("[]"))
        if self.listen and not is_local and not self.certificate:
            raise ValueError(
                f"listen = {self.listen!r} is reachable from other machines, and tokens of orgs pass there: "
                "set certificate and key, or listen on 127.0.0.1"
            )
        return self


class AlertSettings(Section):
    """`[alerts]`: the webhook for alerts and the dead man's switch."""

    webhook_url: Url = ""
    webhook_secret: str = Field("", repr=False)
    overdue: Duration = Field(timedelta(seconds=10), ge=timedelta(seconds=1))
    deadman_url: Url = Field("", repr=False)
    deadman_every: Duration = Field(timedelta(minutes=1), ge=timedelta(seconds=1))

    @model_validator(mode="after")
    def _signed(self) -> AlertSettings:
        if self.webhook_url and len(self.webhook_secret) < 16:
            raise ValueError("webhook_url needs webhook_secret, at least 16 characters, for the signature")
        return self


def _decimal(value: Any) -> Any:
    """An exact number that is not negative; of a float, the digits that TOML has."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("write a number, such as 0.25")
    text = format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,12})?", text):
        raise ValueError(f"{text[:40]!r} is not a price; write a number, such as 0.25")
    return Decimal(text)


def _rate(value: Any) -> Any:
    return None if value in ("", None) else _decimal(value)


def _day(value: Any) -> Any:
    try:
        return date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{value[:40]!r} is not a day; write a UTC day such as 2027-01-01") from None


Amount = Annotated[Decimal, BeforeValidator(_decimal)]


class OwnPriceSettings(Section):
    """`[[prices.own]]`: a price of your own, which counts instead of that of the price list."""

    model: Annotated[str, AfterValidator(model_name)]
    provider: Annotated[str, AfterValidator(model_name)] | None = None
    org: str | None = None
    tariff: Literal["standard", "batch"] | None = None
    start: Annotated[date | None, BeforeValidator(_day)] = Field(None, alias="from")
    factor: Amount | None = None
    input: Amount | None = None
    cache_read: Amount | None = None
    cache_write: Amount | None = None
    cache_write_1h: Amount | None = None
    output: Amount | None = None
    reasoning: Amount | None = None
    web_search: Amount | None = None
    file_search: Amount | None = None
    code_execution: Amount | None = None
    request: Amount | None = None

    @property
    def rates(self) -> dict[Kind, Fraction]:
        """The prices that are given, by kind."""
        given = ((kind, getattr(self, kind)) for kind in KINDS)
        return {kind: Fraction(amount) for kind, amount in given if amount is not None}

    @model_validator(mode="after")
    def _priced(self) -> OwnPriceSettings:
        if not self.rates and self.factor is None:
            raise ValueError("give a price, such as input = 0.25, or a factor of the price list's")
        return self


class PriceSettings(Section):
    """`[prices]`: what models cost."""

    currency: Annotated[str, AfterValidator(parse_currency)] = DEFAULT_CURRENCY
    per_usd: Annotated[Decimal | None, BeforeValidator(_rate)] = None
    own: Annotated[tuple[OwnPriceSettings, ...], BeforeValidator(_tables)] = ()

    @property
    def prices(self) -> Prices:
        """The own prices, without a list."""
        own = tuple(
            OwnPrice(
                each.model,
                each.rates,
                None if each.factor is None else Fraction(each.factor),
                each.provider,
                each.org,
                each.tariff,
                each.start,
            )
            for each in self.own
        )
        per_usd = Fraction(1) if self.currency == DEFAULT_CURRENCY else None
        return Prices(
            own=own,
            currency=self.currency,
            per_usd=per_usd if self.per_usd is None else Fraction(self.per_usd),
        )


class TracingSettings(Section):
    """`[tracing]`: OpenTelemetry traces of runs; the standard variables OTEL_* apply to empty settings."""

    enabled: bool = False
    endpoint: Url = ""
    headers: Annotated[
        str, _matching(r"|[^=,]+=[^,]*(,[^=,]+=[^,]*)*", "NAME=VALUE, separated by commas")
    ] = Field("", repr=False)
    dashboard_url: Url = ""


class TelemetrySettings(Section):
    """`[telemetry]`: what telemetry has of the content of runs."""

    record_content: bool = False


class TokenSettings(Section):
    """`[tokens]`: how workers come by access tokens."""

    shared: bool = True
    ahead: Duration = Field(timedelta(minutes=15), ge=timedelta(seconds=60))
    memory: Size = "512MiB"

    @property
    def memory_bytes(self) -> int:
        return parse_memory(self.memory)


class ProvisioningSettings(Section):
    """`[provisioning]`: orgs and credentials that come from the provider."""

    every: Duration = Field(timedelta(minutes=15), ge=timedelta(seconds=1))
    listen: Listen = ""
    announce: Duration = Field(timedelta(), ge=timedelta())
    overlap: Duration = Field(timedelta(hours=1), ge=timedelta())
    rotate_after: Duration = Field(timedelta(), ge=timedelta())
    trim_scopes: bool = False
    max_suspended: Annotated[
        str, _matching(r"(100|\d{1,2}(\.\d{1,3})?)%", "a share of the orgs, such as 5%")
    ] = "5%"
    concurrency: int = Field(8, ge=1, le=64)

    @property
    def suspended_share(self) -> float:
        """`max_suspended` as a fraction."""
        return float(self.max_suspended.removesuffix("%")) / 100


class BatchSettings(Section):
    """`[batches.NAME]`: an API that answers model requests in batches. The operator's key is in a file."""

    provider: Literal["openai", "anthropic"]
    base_url: Annotated[Url, AfterValidator(_model_url)] = ""
    secret: str = ""
    every: Duration = Field(timedelta(minutes=10), ge=timedelta(milliseconds=100), le=timedelta(hours=24))
    poll: Duration = Field(timedelta(minutes=1), ge=timedelta(milliseconds=100), le=timedelta(hours=1))
    max_requests: int = Field(10_000, ge=1, le=50_000)
    max_bytes: Size = "100MiB"

    @property
    def bytes(self) -> int:
        return parse_memory(self.max_bytes)

    @model_validator(mode="after")
    def _within_the_provider(self) -> BatchSettings:
        if self.bytes > MAX_BATCH_BYTES:
            raise ValueError("max_bytes is at most 190MiB: OpenAI takes no larger file")
        return self


class RetentionSettings(Section):
    """`[retention]`: how long finished runs, skips, logs and keys of starts are retained."""

    succeeded: Duration = timedelta(days=30)
    failed: Duration = timedelta(days=90)
    skipped: Duration = timedelta(days=7)
    logs: Duration = timedelta(days=14)
    start_keys: Duration = timedelta(days=7)


class HostSettings(Section):
    """`[host]`: how a host reaches the workers that control it. The token is not a setting, its file is."""

    control: Annotated[tuple[str, ...], _each(_control)] = ()
    token_file: str = ""
    ca_file: str = ""


class RelaySettings(Section):
    """`[relay]`: the outbox of a product, and the API where its starts go. The token is in a file."""

    api: Url = ""
    token_file: str = ""
    ca_file: str = ""
    plain_http: bool = False
    outbox_url: str = Field("", repr=False)
    table: str = "orgworker_outbox"
    key_holds: Duration = timedelta(days=6)


class LogSettings(Section):
    """`[log]`: the log on stderr; the default style is console on a terminal and json elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    style: Literal["", "console", "json"] = ""
