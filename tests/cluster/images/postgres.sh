#!/bin/sh
# Makes the database at the first start, as Docker's official image does with these variables, and runs the server.
#   POSTGRES_PASSWORD  of the superuser, must be set
#   POSTGRES_USER      the superuser, postgres by default
#   POSTGRES_DB        created at the first start; the user's name by default
#   PGDATA             folder of the data
set -eu
[ "${1:-}" = postgres ] || exec "$@"
user=${POSTGRES_USER:-postgres} database=${POSTGRES_DB:-${POSTGRES_USER:-postgres}}
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    : "${POSTGRES_PASSWORD:?must be set, got none: the password of the superuser}"
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA"
    password=$(mktemp)
    printf '%s\n' "$POSTGRES_PASSWORD" > "$password"
    initdb --username="$user" --pwfile="$password" --auth-local=trust --auth-host=scram-sha-256
    rm -f "$password"
    printf 'host all all all scram-sha-256\n' >> "$PGDATA/pg_hba.conf"
    # No TCP until the database is there, so that a probe does not pass too early.
    pg_ctl --wait --options="-c listen_addresses=''" start
    if [ "$database" != postgres ]; then
        createdb --username="$user" --maintenance-db=postgres "$database"
    fi
    pg_ctl --wait --mode=fast stop
fi
exec "$@" -c listen_addresses='*'
