"""A provider's management API in memory, beside a `FakeIssuer` that knows its applications."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tests.fakes.issuer import App, FakeIssuer
from worker.errors import ForeignApplication, ProviderRefused
from worker.features.provisioning.management.contract import (
    ListedApplication,
    Notice,
    OrgApplication,
    PropertyValue,
    ProviderOrg,
)
from worker.model.provider import ApplicationName
from worker.secret import Secret

PAGE = 3


@dataclass
class Made:
    """An application at the provider."""

    name: str
    app: App
    audiences: dict[str, set[str]] = field(default_factory=dict)


class MemoryManagement:
    """Implements `Management`. `before` and `after` see every call, and may raise: before it is carried out,
    or after."""

    def __init__(self, issuer: FakeIssuer, orgs: Mapping[str, str]) -> None:
        self.issuer = issuer
        self.listed = dict(orgs)
        self.hidden: set[str] = set()
        self.tags: dict[str, dict[str, PropertyValue]] = {}
        self.made: dict[str, Made] = {}
        self.calls: list[str] = []
        self.before: Callable[[str], None] = lambda call: None
        self.after: Callable[[str], None] = lambda call: None
        self._count = 0

    @property
    def carried_out(self) -> Mapping[str, int]:
        return Counter(self.calls)

    async def orgs(self) -> AsyncIterator[Sequence[ProviderOrg]]:
        listed = [ProviderOrg(code, name) for code, name in self.listed.items()]
        for start in range(0, max(1, len(listed)), PAGE):
            self._called("orgs")
            yield listed[start : start + PAGE]

    async def org(self, code: str) -> ProviderOrg | None:
        self._called("org")
        known = code in self.listed and code not in self.hidden
        return ProviderOrg(code, self.listed[code]) if known else None

    async def org_properties(self, code: str) -> Mapping[str, PropertyValue]:
        self._called("org_properties")
        return self.tags.get(code, {})

    async def applications(self) -> AsyncIterator[Sequence[ListedApplication]]:
        made = list(self.made.items())
        for start in range(0, max(1, len(made)), PAGE):
            self._called("applications")
            yield [
                ListedApplication(id_, each.name, ApplicationName.parse(each.name))
                for id_, each in made[start : start + PAGE]
            ]

    async def application(
        self, id: str, *, org: str, name: ApplicationName | None = None, client_id: str | None = None
    ) -> OrgApplication | None:
        self._called("application")
        if id not in self.made:
            return None
        found = self._answer(id)
        if name is not None and found.name != str(name):
            raise ForeignApplication(f"{id} has another name")
        return found

    async def make(self, name: ApplicationName) -> OrgApplication:
        self.before("make")
        self.calls.append("make")
        self._count += 1
        app = App(name.org, f"client-{self._count}", f"secret-{self._count}", scopes=())
        app.replace = {"aud": []}
        self.issuer.add(app)
        self.made[f"app-{self._count}"] = Made(str(name), app)
        self.after("make")
        return self._answer(f"app-{self._count}")

    async def delete(self, id: str, *, org: str, name: ApplicationName) -> bool:
        self.before("delete")
        self.calls.append("delete")
        if id in self.made and self.made[id].name != str(name):
            raise ForeignApplication(f"{id} has another name")
        made = self.made.pop(id, None)
        if made is not None:
            del self.issuer.apps[made.app.client_id]
        self.after("delete")
        return made is not None

    async def authorise(self, application: OrgApplication, audience: str) -> None:
        self.before("authorise")
        self.calls.append("authorise")
        made = self._known(application)
        made.audiences.setdefault(audience, set())
        made.app.replace = {"aud": list(made.audiences)}
        self.after("authorise")

    async def scopes(self, application: OrgApplication, audience: str) -> frozenset[str] | None:
        self._called("scopes")
        return frozenset(self._known(application).audiences.get(audience, ()))

    async def add_scopes(self, application: OrgApplication, audience: str, scopes: Collection[str]) -> None:
        self._change_scopes("add_scopes", application, audience, lambda had: had | set(scopes))

    async def remove_scopes(
        self, application: OrgApplication, audience: str, scopes: Collection[str]
    ) -> None:
        self._change_scopes("remove_scopes", application, audience, lambda had: had - set(scopes))

    async def properties(self, application: OrgApplication) -> Mapping[str, PropertyValue]:
        self._called("properties")
        return dict(self._known(application).app.properties)

    async def set_property(self, application: OrgApplication, key: str, value: PropertyValue | None) -> None:
        self.before("set_property")
        self.calls.append("set_property")
        app = self._known(application).app
        app.properties = (
            {**app.properties, key: value}
            if value is not None
            else {name: kept for name, kept in app.properties.items() if name != key}
        )
        self.after("set_property")

    async def webhook(self, body: bytes) -> Notice:
        raise NotImplementedError

    def _called(self, call: str) -> None:
        self.before(call)
        self.calls.append(call)
        self.after(call)

    def _known(self, application: OrgApplication) -> Made:
        if application.id not in self.made:
            raise ProviderRefused(f"there is no application {application.id}")
        return self.made[application.id]

    def _answer(self, id: str) -> OrgApplication:
        made = self.made[id]
        return OrgApplication(made.app.org_code, id, made.app.client_id, Secret(made.app.secret), made.name)

    def _change_scopes(
        self, call: str, application: OrgApplication, audience: str, change: Callable[[set[str]], set[str]]
    ) -> None:
        self.before(call)
        self.calls.append(call)
        made = self._known(application)
        made.audiences[audience] = change(made.audiences[audience])
        made.app.scopes = tuple(sorted(set().union(*made.audiences.values())))
        self.after(call)
