"""Next steps as data: a verb and its subject. A verb declares its command and its page once. Pure."""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass, field

# Pairs of a key and a value of the search language.
Terms = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Verb:
    """How one verb reads on the command line and on the console. Names in braces are of its subject.

    `page` is an address of the console, with `search` that of a search for these terms. `right` is a change
    that the page offers only to callers with that right.
    """

    command: str
    text: str
    page: str = ""
    search: Terms = ()
    right: str = ""


_RUN = "/runs/{run}"
_ORG = "/orgs/{org}"
_DEFINITION = _ORG + "/definitions/{definition}"
_OF_DEFINITION: Terms = (("org", "{org}"), ("definition", "{definition}"))

VERBS: Mapping[str, Verb] = {
    "show_run": Verb("runs show {run}", "Open the run", _RUN),
    "explain_run": Verb("runs why {run}", "Open the retry", _RUN),
    "retry": Verb("runs retry {run}", "Retry it", _RUN + "#retry", right="retry"),
    "retry_from_checkpoint": Verb(
        "runs retry {run} --from-checkpoint",
        "Retry it from its checkpoint",
        _RUN + "#retry-from-checkpoint",
        right="retry",
    ),
    "read_log": Verb("runs logs {run}", "Read its log", _RUN + "#log"),
    "follow_log": Verb("runs logs {run} --follow", "Read its log", _RUN + "#log"),
    "answer": Verb("runs answer {run} {wait} --data {data}", "Answer it", _RUN + "#waits", right="answer"),
    "answer_again": Verb(
        "runs answer {run} {wait} --occurrence {occurrence} --data {data}",
        "Answer it",
        _RUN + "#waits",
        right="answer",
    ),
    "list_runs": Verb(
        "runs list --org {org} --definition {definition}", "See its other runs", "/search", _OF_DEFINITION
    ),
    "list_running": Verb(
        "runs list --org {org} --definition {definition} --state running",
        "See its running runs",
        "/search",
        (*_OF_DEFINITION, ("state", "running")),
    ),
    "list_running_of_org": Verb(
        "runs list --org {org} --state running",
        "See the org's running runs",
        "/search",
        (("org", "{org}"), ("state", "running")),
    ),
    "search_runs": Verb("runs list -q {query}", "Runs", "/search", (("", "{query}"),)),
    "show_failures": Verb("failures --state {state}", "Failures", "/failures?state={state}"),
    "check_org": Verb("orgs check {org}", "Check the org's credentials and claims", _ORG),
    "show_org": Verb("orgs show {org}", "Open the org", _ORG),
    "resume_org": Verb("orgs resume {org}", "Resume the org", _ORG, right="pause_org"),
    "list_broken_orgs": Verb("orgs list --broken", "Orgs", "/orgs?broken=true"),
    "list_late_orgs": Verb("orgs list --late", "Orgs", "/orgs?late=true"),
    "add_secret": Verb("secrets add {org} {secret}", "Open the org that lacks the secret", _ORG),
    "list_secrets": Verb("secrets list {org}", "Open the org", _ORG),
    "list_credentials": Verb("credentials list", "Credentials", "/credentials"),
    "list_usage": Verb("usage list --by org", "See what orgs spent", "/usage"),
    "show_budgets": Verb("budgets list --org {org}", "See the org's budgets", "/usage?org={org}"),
    "show_definition": Verb("definitions show {org} {definition}", "Open the definition", _DEFINITION),
    "list_paused": Verb("definitions list --state paused", "Definitions", "/definitions?state=paused"),
    "next_times": Verb("definitions next {org} {definition}", "Open the definition", _DEFINITION),
    "next_times_from": Verb(
        "definitions next {org} {definition} --from {from}", "Open the definition", _DEFINITION
    ),
    "backfill": Verb(
        "definitions backfill {org} {definition} --from {from} --until {until}",
        "Backfill it",
        _DEFINITION + "#backfills",
        right="backfill",
    ),
    "show_calendar": Verb("calendars show {calendar}", "Open the definition", _DEFINITION),
    "list_handlers": Verb("handlers list", "See the handlers", "/handlers"),
    "show_handler": Verb("handlers show {handler}", "See the handlers", "/handlers"),
    "list_in_handler": Verb("handlers show {handler}", "See what its handler lists", "/handlers"),
    "list_in_definition": Verb(
        "definitions show {org} {definition}", "See what its definition lists", _DEFINITION
    ),
    "list_in_settings": Verb("config show", "See the handlers", "/handlers"),
    "list_approvals": Verb("pools approvals {pool}", "See what hosts declare", "/workers#approvals"),
    "list_all_approvals": Verb("pools approvals", "See what hosts declare", "/workers#approvals"),
    "approve": Verb(
        "pools approve {pool} {handler} {digest}",
        "See what hosts declare",
        "/workers#approvals",
        right="approve",
    ),
    "check_workers": Verb("doctor", "See the workers", "/workers"),
    "restart_workers": Verb("handlers show {handler}", "Restart the workers", "/workers"),
    "correct_installation": Verb("installation show", "Orgs", "/orgs"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NextStep:
    """What to do next. `subject` has each name that the verb's templates use."""

    verb: str
    subject: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, verb: str, values: Mapping[str, str]) -> NextStep:
        """The step with those of these values that the verb uses."""
        declared = VERBS[verb]
        templates = (declared.command, declared.page, *(value for _, value in declared.search))
        used = {name for text in templates for _, name, _, _ in string.Formatter().parse(text) if name}
        return cls(verb, {name: values[name] for name in sorted(used)})

    @property
    def declared(self) -> Verb:
        return VERBS[self.verb]

    @property
    def command(self) -> str:
        """The command, quoted for a shell."""
        quoted = {name: shlex.quote(value) for name, value in self.subject.items()}
        return self.declared.command.format_map(quoted)

    @property
    def text(self) -> str:
        return self.declared.text

    def as_row(self) -> dict[str, object]:
        return {"verb": self.verb, "subject": dict(self.subject)}
