"""The functions by which a product starts runs in its own transactions, on PostgreSQL, and their roles.

`orgworker_product` may call them and nothing else. They run as `orgworker_starts`, a role without login:
it inserts rows of `starts`, reads the id of a key that is there already, and reads names. So a transaction
of the product never holds a row that firing, admission or overlap waits for.

Which orgs a login may start is in `product_logins`, by `session_user`: a session can change its
variables and its role, but not that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from worker.model.runs.run import MAX_AHEAD, START_LATER, TOO_FAR_AHEAD
from worker.store import roles

PRODUCT = "orgworker_product"
OWNER = "orgworker_starts"
# Bytes of params as JSON text, starts of one call, and characters of a key.
MAX_PARAMS = 64 * 1024
MAX_STARTS = 1_000
MAX_KEY = 200

START = "orgworker_start(text, text, jsonb, text, timestamptz)"
START_MANY = "orgworker_start_many(jsonb)"

# All names are qualified: nothing that a login makes, in whatever schema, is found in place of ours. Keys are
# inserted in their order, so that two batches with the same ones cannot deadlock; ids are in the order given.
# An id is a UUIDv7: the time at which the run is due, then its place in the batch.
CREATE = (
    f"""
    CREATE OR REPLACE FUNCTION public.orgworker_start_many(starts jsonb) RETURNS uuid[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
      caller text := session_user;
      moment timestamptz := clock_timestamp();
      micros bigint;
      entry jsonb;
      place integer;
      params jsonb;
      start_key text;
      unknown text;
      not_before timestamptz;
      found_org uuid;
      found_definition uuid;
      new_id uuid;
      found_id uuid;
      known_org text;
      known_definition text;
      ids uuid[] := '{{}}';
    BEGIN
      IF jsonb_typeof(starts) IS DISTINCT FROM 'array' THEN
        RAISE EXCEPTION 'starts must be a JSON array of objects'
          USING ERRCODE = 'invalid_parameter_value', HINT = 'pass one object for each run';
      END IF;
      IF jsonb_array_length(starts) > {MAX_STARTS} THEN
        RAISE EXCEPTION 'one call starts at most {MAX_STARTS} runs, not %', jsonb_array_length(starts)
          USING ERRCODE = 'program_limit_exceeded', HINT = 'call it again for the rest';
      END IF;
      ids := array_fill(NULL::uuid, ARRAY[jsonb_array_length(starts)]);
      FOR entry, place IN
        SELECT e.value, e.ordinality FROM jsonb_array_elements(starts) WITH ORDINALITY e
        ORDER BY e.value->>'org', e.value->>'definition', e.value->>'key', e.ordinality
      LOOP
        IF jsonb_typeof(entry) <> 'object' THEN
          RAISE EXCEPTION 'start %: expected an object', place
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'its keys are org, definition, params, key and not_before';
        END IF;
        SELECT k INTO unknown FROM jsonb_object_keys(entry) k
        WHERE k NOT IN ('org', 'definition', 'params', 'key', 'not_before') ORDER BY k LIMIT 1;
        IF unknown IS NOT NULL THEN
          RAISE EXCEPTION 'start %: unknown key %', place, unknown
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'its keys are org, definition, params, key and not_before';
        END IF;
        params := NULLIF(NULLIF(entry->'params', 'null'::jsonb), '{{}}'::jsonb);
        start_key := entry->>'key';
        IF jsonb_typeof(params) <> 'object' THEN
          RAISE EXCEPTION 'start %, params: expected a JSON object', place
            USING ERRCODE = 'invalid_parameter_value', HINT = 'pass {{}} or null if there are none';
        END IF;
        IF octet_length(params::text) > {MAX_PARAMS} THEN
          RAISE EXCEPTION 'start %, params: % bytes, more than {MAX_PARAMS}',
                          place, octet_length(params::text)
            USING ERRCODE = 'program_limit_exceeded', HINT = 'store it, and pass a reference to it';
        END IF;
        IF start_key IS NULL OR length(start_key) NOT BETWEEN 1 AND {MAX_KEY}
           OR start_key ~ '[\\x01-\\x1f\\x7f]' THEN
          RAISE EXCEPTION 'start %, key: expected 1 to {MAX_KEY} printable characters', place
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'the same key makes one run: name what the run is for';
        END IF;
        not_before := entry->>'not_before';
        -- In hours: a day has 23 of them in some nights of the session's time zone.
        IF not_before > moment + interval '{MAX_AHEAD // timedelta(hours=1)} hours' THEN
          RAISE EXCEPTION 'start %: {TOO_FAR_AHEAD}', place
            USING ERRCODE = 'invalid_parameter_value', HINT = '{START_LATER}';
        END IF;
        IF not_before <= moment THEN
          not_before := NULL;
        END IF;
        IF known_org IS DISTINCT FROM entry->>'org' OR known_definition IS DISTINCT FROM entry->>'definition'
           OR found_definition IS NULL THEN
          known_org := entry->>'org';
          known_definition := entry->>'definition';
          SELECT o.id INTO found_org FROM public.orgs o WHERE o.code = known_org AND EXISTS (
            SELECT FROM public.product_logins p
            WHERE p.login = caller AND (p.org_id IS NULL OR p.org_id = o.id));
          SELECT d.id INTO found_definition FROM public.definitions d
          WHERE d.org_id = found_org AND d.name = known_definition;
          IF found_definition IS NULL THEN
            RAISE EXCEPTION 'there is no definition %/% that login % may start', known_org, known_definition,
                            caller
              USING ERRCODE = 'undefined_object',
                    HINT = '`product list` shows the orgs of a login, `definitions list` their definitions';
          END IF;
        END IF;
        micros := floor(extract(epoch FROM COALESCE(not_before, moment)) * 1000000);
        new_id := lpad(to_hex(micros / 1000), 12, '0')
                  || '7' || lpad(to_hex(micros % 1000 * 4096 / 1000), 3, '0')
                  || to_hex(32768 + place) || right(gen_random_uuid()::text, 12);
        FOR try IN 1..3 LOOP
          INSERT INTO public.starts
            (id, org_id, definition_id, key, state, login, created_at, not_before, params)
          VALUES (new_id, found_org, found_definition, start_key,
                  CASE WHEN not_before IS NULL THEN 'due' ELSE 'later' END,
                  caller, moment, not_before, params)
          ON CONFLICT (org_id, definition_id, key) DO NOTHING RETURNING id INTO found_id;
          EXIT WHEN found_id IS NOT NULL;
          SELECT s.id INTO found_id FROM public.starts s
          WHERE s.org_id = found_org AND s.definition_id = found_definition AND s.key = start_key;
          -- Without a row the key has just ended: try again.
          EXIT WHEN found_id IS NOT NULL;
        END LOOP;
        IF found_id IS NULL THEN
          RAISE EXCEPTION 'start %, key: other transactions keep changing it', place
            USING ERRCODE = 'serialization_failure', HINT = 'repeat the transaction';
        END IF;
        ids[place] := found_id;
      END LOOP;
      RETURN ids;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION public.orgworker_start(
      org text, definition text, params jsonb, key text, not_before timestamptz DEFAULT NULL
    ) RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
      RETURN (public.orgworker_start_many(jsonb_build_array(jsonb_build_object(
        'org', org, 'definition', definition, 'params', params, 'key', key, 'not_before', not_before))))[1];
    END $$
    """,
)

# What the owner of the functions may do: only what they need.
_RIGHTS = (
    "GRANT INSERT ON starts",
    "GRANT SELECT (id, org_id, definition_id, key) ON starts",
    "GRANT SELECT (id, code) ON orgs",
    "GRANT SELECT (id, org_id, name) ON definitions",
    "GRANT SELECT (login, org_id) ON product_logins",
)
# By table, the rows that row-level security lets it see and insert.
_POLICIES = {
    "starts": ("FOR SELECT TO {0} USING (true)", "FOR INSERT TO {0} WITH CHECK (true)"),
    **dict.fromkeys(("orgs", "definitions", "product_logins"), ("FOR SELECT TO {0} USING (true)",)),
}
_HAS_POLICY = text(
    "SELECT 1 FROM pg_policies WHERE schemaname = 'public' AND tablename = :table AND policyname = :name"
)
# SQLSTATEs: the login may not grant in the schema, or not act as the owner of the functions.
_DENIED = ("42501", "0LP01")
# They are there, and their owner is the role that can do nothing else.
_IS_INSTALLED = text("""
SELECT count(*) = 2 FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner
WHERE p.oid IN (to_regprocedure(:start), to_regprocedure(:many)) AND r.rolname = :owner
""")
_OWNED_BY_OTHERS = text("""
SELECT 1 FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner
WHERE p.oid = to_regprocedure(:function) AND r.rolname <> :owner
""")
_LOGINS = text("""
SELECT r.rolname FROM pg_roles r
WHERE r.rolname = ANY(:logins)
  AND pg_has_role(r.oid, (SELECT oid FROM pg_roles WHERE rolname = :product), 'MEMBER')
""")


def install(connection: Connection) -> bool:
    """Create the functions with their roles and rights; can be repeated.

    Returns False if this login may not: then the functions are not there, or as they were.
    """
    for role in (PRODUCT, OWNER):
        if not roles.make(connection, role):
            return False
        connection.execute(text(f"REVOKE ALL ON {', '.join(roles.ALL)} FROM {role}"))
    for right in _RIGHTS:
        connection.execute(text(f"{right} TO {OWNER}"))
    for table, policies in _POLICIES.items():
        for policy in policies:
            name = OWNER if "SELECT" in policy else f"{OWNER}_insert"
            if connection.execute(_HAS_POLICY, {"table": table, "name": name}).first() is None:
                connection.execute(text(f"CREATE POLICY {name} ON {table} {policy.format(OWNER)}"))
    nested = connection.begin_nested()
    try:
        for function in (START, START_MANY):
            # A restore that gives no owners has made them this login's.
            named = {"function": f"public.{function}", "owner": OWNER}
            if connection.execute(_OWNED_BY_OTHERS, named).first() is not None:
                connection.execute(text(f"DROP FUNCTION public.{function}"))
        connection.execute(text(f"GRANT USAGE, CREATE ON SCHEMA public TO {OWNER}"))
        connection.execute(text(f"SET LOCAL ROLE {OWNER}"))
        for statement in CREATE:
            # The driver takes a single % for a parameter.
            connection.exec_driver_sql(statement.replace("%", "%%"))
        for function in (START, START_MANY):
            connection.execute(text(f"REVOKE ALL ON FUNCTION public.{function} FROM PUBLIC"))
            connection.execute(text(f"GRANT EXECUTE ON FUNCTION public.{function} TO {PRODUCT}"))
        connection.execute(text("RESET ROLE"))
        connection.execute(text(f"REVOKE CREATE ON SCHEMA public FROM {OWNER}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA public TO {PRODUCT}"))
        nested.commit()
    except DBAPIError as error:
        nested.rollback()
        if getattr(error.orig, "sqlstate", None) not in _DENIED:
            raise
        return False
    return True


def is_installed(connection: Connection) -> bool:
    """Whether both functions are there, and belong to their role."""
    names = {"start": f"public.{START}", "many": f"public.{START_MANY}", "owner": OWNER}
    return bool(connection.execute(_IS_INSTALLED, names).scalar_one())


def members(connection: Connection, logins: Sequence[str]) -> set[str]:
    """Those of these logins that exist and may call the functions."""
    return set(connection.execute(_LOGINS, {"logins": list(logins), "product": PRODUCT}).scalars())
