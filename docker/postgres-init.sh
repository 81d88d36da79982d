#!/bin/sh
# Runs once, on an empty volume: a role and a database each for Airflow and MLflow, which do not see each other's.
set -eu
for name in airflow mlflow; do
    psql --no-psqlrc --set ON_ERROR_STOP=1 --username postgres --set role="$name" \
        --set password="$(cat "${GISP_SECRETS_DIR:-/run/secrets}/${name}_db_password")" <<'SQL'
CREATE ROLE :"role" LOGIN PASSWORD :'password';
CREATE DATABASE :"role" OWNER :"role";
REVOKE CONNECT ON DATABASE :"role" FROM PUBLIC;
SQL
done
