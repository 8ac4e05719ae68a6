"""What a product's login must not do: all denied, and each a thing that someone else can do.

Every attack is tried by the login of the product and by its control, the operator who may: one that fails for
both would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from tests.fakes.product import Product, start
from worker.ids import new_id
from worker.model.runs.run import TOO_FAR_AHEAD
from worker.operations.product import allow, list_logins, revoke
from worker.store import roles, start_functions, tables

DENIED = (errors.InsufficientPrivilege, errors.UndefinedObject)
FORGED = (
    "INSERT INTO starts (id, org_id, definition_id, key, state, login, created_at) SELECT gen_random_uuid()"
)
OTHER_ORG = "SELECT orgworker_start('org_globex', 'digest', NULL, 'k')"
# Statements that a login of the product must not execute, and that the superuser can.
ATTACKS = {
    "read starts": "SELECT * FROM starts",
    "read a key": "SELECT key FROM starts LIMIT 1",
    "count starts": "SELECT count(*) FROM starts",
    "read orgs": "SELECT code FROM orgs",
    "read definitions": "SELECT name FROM definitions",
    "read who may start": "SELECT * FROM product_logins",
    "read runs": "SELECT id FROM runs",
    "read what runs": "SELECT id FROM live_runs",
    "read the view of runs": "SELECT id FROM run_view",
    "read credentials": "SELECT client_id FROM credentials",
    "read the audit": "SELECT action FROM audit",
    "read secrets": "SELECT sealed FROM org_secrets",
    "read logs": "SELECT text FROM run_logs",
    "insert a start of another org": f"{FORGED}, o.id, d.id, 'x', 'due', 'me', now() FROM orgs o, "
    "definitions d WHERE d.org_id = o.id AND o.code = 'org_globex'",
    "insert a start with values": f"{FORGED}, gen_random_uuid(), gen_random_uuid(), 'x', 'due', 'me', now()",
    "change a start": "UPDATE starts SET params = NULL",
    "delete a start": "DELETE FROM starts",
    "truncate starts": "TRUNCATE starts",
    "lock starts": "LOCK TABLE starts IN SHARE MODE",
    "lock what runs": "LOCK TABLE live_runs IN ACCESS SHARE MODE",
    "lock a definition": "SELECT 1 FROM definitions FOR UPDATE",
    "allow itself": "INSERT INTO product_logins (id, login, created_at, created_by) "
    "VALUES (gen_random_uuid(), session_user, now(), 'me')",
    "refer to a start": "CREATE TABLE mine (id uuid REFERENCES starts)",
    "make a trigger": "CREATE TRIGGER t AFTER INSERT ON starts EXECUTE FUNCTION runs_put()",
    "dump starts": "DECLARE dump CURSOR FOR TABLE starts",
    "replace the function": "CREATE OR REPLACE FUNCTION public.orgworker_start(org text, definition text, "
    "params jsonb, key text, not_before timestamptz DEFAULT NULL) RETURNS uuid LANGUAGE sql "
    "AS 'SELECT NULL::uuid'",
    "overload the function": "CREATE FUNCTION public.orgworker_start(org text, definition text, params json, "
    "key text) RETURNS uuid LANGUAGE sql AS 'SELECT NULL::uuid'",
    "change the function": f"ALTER FUNCTION public.{start_functions.START} RESET ALL",
    "drop the function": f"DROP FUNCTION public.{start_functions.START}",
    "give the function away": f"ALTER FUNCTION public.{start_functions.START} OWNER TO CURRENT_USER",
    "become the owner of the functions": f"SET ROLE {start_functions.OWNER}",
    "become a worker": f"SET ROLE {roles.WORKER}",
    "become an operator": f"SET ROLE {roles.OPERATOR}",
    "become an org": f"SET ROLE {roles.WEB}",
    "become another login": "SET SESSION AUTHORIZATION postgres",
    "join the owner": f"GRANT {start_functions.OWNER} TO CURRENT_USER",
    "find a caller": "SELECT * FROM find_caller('org_globex', 'x')",
    "switch row-level security off": "ALTER TABLE starts DISABLE ROW LEVEL SECURITY",
    "comment on a table": "COMMENT ON TABLE starts IS 'mine'",
}


@pytest.fixture
def started(product: Product) -> Iterator[Product]:
    """With one start of the org that the login may start, and one of the other."""
    other = product.new_login("org_globex")
    product.start("mine")
    product.start("theirs", org="org_globex", login=other)
    yield product


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_products_login_is_denied_what_an_operator_of_the_database_can(
    started: Product, attack: str
) -> None:
    with started.transaction() as connection, pytest.raises(errors.InsufficientPrivilege):
        connection.execute(ATTACKS[attack].encode())
    with psycopg.connect(started.url) as superuser:
        superuser.execute(ATTACKS[attack].encode())
        superuser.rollback()


def test_at_least_thirty_attacks_are_tried() -> None:
    assert len(ATTACKS) >= 30


def tries(product: Product, login: str, *before: str, org: str = "org_globex") -> None:
    with product.transaction(login) as connection:
        for statement in before:
            connection.execute(statement.encode())
        start(connection, new_id(), org=org)


# What a login may set or make before it calls the function.
DISGUISES: dict[str, Callable[[Product], tuple[str, ...]]] = {
    "a session variable": lambda product: ("SET app.org = 'org_globex'",),
    "the id of the org in app.org": lambda product: (f"SET app.org = '{product.id_of_org('org_globex')}'",),
    "the role of the product": lambda product: (f"SET ROLE {start_functions.PRODUCT}",),
    "the role of another login": lambda product: (f"SET ROLE {product.logins[-1]}",),
    "temporary tables": lambda product: (
        "CREATE TEMP TABLE product_logins AS SELECT session_user::text AS login, NULL::uuid AS org_id",
        "CREATE TEMP TABLE orgs AS SELECT gen_random_uuid() AS id, 'org_globex'::text AS code",
        "SET search_path = pg_temp, public",
    ),
    "temporary functions": lambda product: (
        "CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'",
        "CREATE FUNCTION pg_temp.jsonb_typeof(jsonb) RETURNS text LANGUAGE sql AS $$SELECT 'array'$$",
        "SET search_path = pg_temp, public",
    ),
    "an operator of its own schema": lambda product: (
        "CREATE FUNCTION pg_temp.always(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        "CREATE OPERATOR pg_temp.= (FUNCTION = pg_temp.always, LEFTARG = text, RIGHTARG = text)",
        "SET search_path = pg_temp, pg_catalog, public",
    ),
    "its own time zone and dates": lambda product: (
        "SET TimeZone = 'Asia/Tokyo'",
        "SET DateStyle = 'SQL, DMY'",
    ),
    "no triggers": lambda product: ("SET row_security = on",),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_what_a_session_sets_or_makes_starts_no_other_org(product: Product, disguise: str) -> None:
    other = product.new_login("org_globex")
    before = DISGUISES[disguise](product)
    if disguise == "the role of another login":
        # A member of it: only the session's own login counts.
        product.change(f"GRANT {other} TO {product.login}")

    with pytest.raises(errors.UndefinedObject, match=f"that login {product.login} may start"):
        tries(product, product.login, *before)

    assert product.query("SELECT * FROM starts") == []
    # The control: the other login can, whatever else it sets.
    tries(product, other, *(() if disguise == "the role of another login" else before))
    assert len(product.query("SELECT * FROM starts")) == 1


def test_with_a_search_path_of_the_session_the_disguise_would_work(product: Product) -> None:
    """The control of the functions' fixed `search_path` and qualified names."""
    insecure = start_functions.CREATE[0].replace(" SET search_path = pg_catalog, pg_temp", "")
    with psycopg.connect(product.url) as superuser:
        superuser.execute(f"GRANT CREATE ON SCHEMA public TO {start_functions.OWNER}".encode())
        superuser.execute(f"SET ROLE {start_functions.OWNER}".encode())
        superuser.execute(insecure.replace("public.product_logins", "product_logins").encode())

    before = DISGUISES["temporary tables"](product)
    with product.transaction() as connection:
        for statement in (before[0], f"GRANT SELECT ON product_logins TO {start_functions.OWNER}", before[2]):
            connection.execute(statement.encode())
        start(connection, "stolen", org="org_globex")

    assert [row["key"] for row in product.query("SELECT key FROM starts")] == ["stolen"]


def test_an_org_that_it_may_not_start_looks_like_one_that_does_not_exist(product: Product) -> None:
    def said(org: str, definition: str) -> tuple[Any, ...]:
        with product.transaction() as connection, pytest.raises(errors.UndefinedObject) as caught:
            start(connection, "k", definition, org=org)
        found = caught.value.diag
        text = str(found.message_primary).replace(org, "ORG").replace(definition, "NAME")
        return text, found.sqlstate, found.message_hint, found.message_detail, found.context, found.table_name

    answers = {
        said(org, name)
        for org, name in (
            ("org_globex", "digest"),
            ("org_globex", "absent"),
            ("org_none", "digest"),
            ("org_acme", "absent"),
        )
    }

    assert len(answers) == 1


def test_no_login_is_allowed_without_a_row_and_all_orgs_with_a_star(product: Product) -> None:
    nobody, anybody = product.new_login(), product.new_login("*")
    for org in ("org_acme", "org_globex"):
        with pytest.raises(errors.UndefinedObject):
            tries(product, nobody, org=org)
        tries(product, anybody, org=org)

    revoke(product.database, anybody, [], actor="tester")
    with pytest.raises(errors.UndefinedObject):
        tries(product, anybody, org="org_acme")


def test_a_row_without_the_role_starts_nothing(product: Product) -> None:
    outsider = product.new_login("*", roles="pg_monitor")

    with pytest.raises(errors.InsufficientPrivilege, match="permission denied for function"):
        tries(product, outsider, org="org_acme")

    rows = {row["login"]: row["member"] for row in list_logins(product.database)}
    assert rows == {outsider: False, product.login: True}


def test_the_owner_of_the_functions_inserts_starts_and_reads_names_and_nothing_else(product: Product) -> None:
    granted = product.query(
        "SELECT table_name, privilege_type, string_agg(column_name, ' ' ORDER BY column_name) AS columns "
        "FROM information_schema.column_privileges WHERE grantee = %s GROUP BY 1, 2 ORDER BY 1, 2",
        start_functions.OWNER,
    )
    assert [tuple(row.values()) for row in granted] == [
        ("definitions", "SELECT", "id name org_id"),
        ("orgs", "SELECT", "code id"),
        ("product_logins", "SELECT", "login org_id"),
        ("starts", "INSERT", " ".join(sorted(tables.starts.c.keys()))),
        ("starts", "SELECT", "definition_id id key org_id"),
    ]
    whole = product.query(
        "SELECT * FROM information_schema.table_privileges WHERE grantee IN (%s, %s)",
        start_functions.OWNER,
        start_functions.PRODUCT,
    )
    assert [(row["table_name"], row["privilege_type"]) for row in whole] == [("starts", "INSERT")]
    [owner] = product.query("SELECT * FROM pg_roles WHERE rolname = %s", start_functions.OWNER)
    assert not (owner["rolcanlogin"] or owner["rolsuper"] or owner["rolbypassrls"] or owner["rolcreaterole"])
    made = product.query(
        "SELECT proowner::regrole::text AS owner, prosecdef, proconfig, proacl::text FROM pg_proc "
        "WHERE proname LIKE 'orgworker%%'"
    )
    assert len(made) == 2
    for function in made:
        assert function["owner"] == start_functions.OWNER
        assert function["prosecdef"]
        assert function["proconfig"] == ["search_path=pg_catalog, pg_temp"]
        assert "{=" not in function["proacl"]
        assert ",=" not in function["proacl"]
    assert not product.query(
        "SELECT 1 WHERE has_schema_privilege(%s, 'public', 'CREATE')", start_functions.OWNER
    )


def test_starts_has_no_foreign_keys_and_no_triggers(product: Product) -> None:
    assert not tables.starts.foreign_keys
    assert (
        product.query("SELECT 1 FROM pg_constraint WHERE contype = 'f' AND conrelid = 'starts'::regclass")
        == []
    )
    assert product.query("SELECT 1 FROM pg_trigger WHERE tgrelid = 'starts'::regclass") == []


WRONG = {
    "not an array": ("SELECT orgworker_start_many('{}')", "starts must be a JSON array"),
    "null": ("SELECT orgworker_start_many(NULL)", "starts must be a JSON array"),
    "not an object": ("SELECT orgworker_start_many('[1]')", "start 1: expected an object"),
    "too many": (
        "SELECT orgworker_start_many((SELECT jsonb_agg('{}'::jsonb) FROM generate_series(1, 1001)))",
        "at most 1000 runs, not 1001",
    ),
    "params": ("SELECT orgworker_start('org_acme', 'digest', '[1]', 'k')", "params: expected a JSON object"),
    "text": ("SELECT orgworker_start('org_acme', 'digest', '\"x\"', 'k')", "params: expected a JSON object"),
    "size": (
        "SELECT orgworker_start('org_acme', 'digest', jsonb_build_object('a', repeat('x', 65536)), 'k')",
        "bytes, more than 65536",
    ),
    "no key": ("SELECT orgworker_start('org_acme', 'digest', NULL, NULL)", "key: expected 1 to 200"),
    "empty key": ("SELECT orgworker_start('org_acme', 'digest', NULL, '')", "key: expected 1 to 200"),
    "long key": (
        "SELECT orgworker_start('org_acme', 'digest', NULL, repeat('k', 201))",
        "key: expected 1 to 200",
    ),
    "line in a key": (
        "SELECT orgworker_start('org_acme', 'digest', NULL, E'a\\nb')",
        "key: expected 1 to 200",
    ),
    "never": ("SELECT orgworker_start('org_acme', 'digest', NULL, 'k', 'infinity')", TOO_FAR_AHEAD),
    "in a month and a minute": (
        "SELECT orgworker_start('org_acme', 'digest', NULL, 'k', now() + interval '720 hours 1 minute')",
        f"start 1: {TOO_FAR_AHEAD}",
    ),
    "not a time": (
        'SELECT orgworker_start_many(\'[{"org": "org_acme", "definition": "digest", "key": "k", '
        '"not_before": "soon"}]\')',
        "invalid input syntax",
    ),
    "unknown key": (
        'SELECT orgworker_start_many(\'[{"org": "org_acme", "definition": "digest", "key": "k", '
        '"param": {}}]\')',
        "start 1: unknown key param",
    ),
    "no org": ("SELECT orgworker_start(NULL, 'digest', NULL, 'k')", "there is no definition"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_only_names_shape_and_size_are_refused_at_once(product: Product, wrong: str) -> None:
    statement, text = WRONG[wrong]
    with product.transaction() as connection, pytest.raises(psycopg.Error, match=text):
        connection.execute(statement.encode())
    assert product.query("SELECT * FROM starts") == []


def test_a_time_long_past_is_at_once(product: Product) -> None:
    with product.transaction() as connection:
        connection.execute("SELECT orgworker_start('org_acme', 'digest', '{}', 'k', '-infinity')")
    assert [(row["state"], row["not_before"]) for row in product.query("SELECT * FROM starts")] == [
        ("due", None)
    ]
    assert product.make() == 1


def test_what_is_stored_of_who_may_start(product: Product) -> None:
    allow(product.database, "shop", ["org_acme", "org_globex"], actor="tester")
    assert [row["org"] for row in list_logins(product.database) if row["login"] == "shop"] == [
        "org_acme",
        "org_globex",
    ]
    revoke(product.database, "shop", ["org_acme"], actor="tester")
    actions = product.query("SELECT action, detail FROM audit WHERE subject = 'shop' ORDER BY id")
    assert [(row["action"], row["detail"]) for row in actions] == [
        ("product.allow", {"org": "org_acme"}),
        ("product.allow", {"org": "org_globex"}),
        ("product.revoke", {"org": "org_acme"}),
    ]
