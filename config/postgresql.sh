#!/bin/sh
# Creates the roles and the database of docs/operating/postgresql.md in a new PostgreSQL; its image runs this once, as
# the superuser. The passwords are taken from the URLs in the secrets, so they may contain only letters and digits.
# With a secret `serve_database__url` it also creates the login of `serve`.
set -eu

password() {
    url=$(cat "${SECRETS:-/run/secrets}/$1")
    rest=${url#*://*:}
    echo "${rest%%@*}"
}

# Passed in variables, because other users can see arguments.
OWNER=$(password database__owner_url) WORKER=$(password database__url) \
    psql --no-psqlrc --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" postgres <<'SQL'
\getenv owner OWNER
\getenv worker WORKER
CREATE ROLE owner LOGIN PASSWORD :'owner';
CREATE ROLE worker LOGIN PASSWORD :'worker';
-- The owner may not create roles; `db upgrade` grants these their privileges.
CREATE ROLE orgworker_worker NOLOGIN;
CREATE ROLE orgworker_web NOLOGIN;
CREATE ROLE orgworker_operator NOLOGIN;
GRANT orgworker_worker, orgworker_web, orgworker_operator TO worker;
CREATE DATABASE orgworker OWNER owner;
SQL

[ -e "${SECRETS:-/run/secrets}/serve_database__url" ] || exit 0
SERVE=$(password serve_database__url) \
    psql --no-psqlrc --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" postgres <<'SQL'
\getenv serve SERVE
-- It has no privileges of its own; it assumes one of its two roles for each transaction.
CREATE ROLE serve LOGIN NOINHERIT PASSWORD :'serve';
GRANT orgworker_web, orgworker_operator TO serve;
SQL
