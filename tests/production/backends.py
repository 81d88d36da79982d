"""PostgreSQL, Redis and MLflow as a team runs them, on ports and in directories of their own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from daemons import Daemon, http_answers

ADMIN = ("admin", "admin-of-this-test")
"""Administrator of MLflow, and of Airflow."""
PIPELINE = ("gisp-pipeline", "pipeline-of-this-test")
"""Whom MLflow knows the pipeline as; no administrator."""


class Postgres:
    """A PostgreSQL cluster of the system's own programs.

    Args:
        port: on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self._programs = versions[-1]
        self._port = port
        # Not below pytest's directories: the user postgres may not enter them.
        self._directory = Path(tempfile.mkdtemp(prefix="gisp-postgres-"))
        # The server refuses to run as root.
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as_user:
            shutil.chown(self._directory, "postgres", "postgres")

    def start(self) -> None:
        data, log = self._directory / "data", self._directory / "postgres.log"
        self._run("initdb", "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync")
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._directory}"
        options += " -c fsync=off -c max_connections=300"
        self._run("pg_ctl", "-D", str(data), "-l", str(log), "-o", options, "-w", "start")

    def stop(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-D", str(self._directory / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._directory, ignore_errors=True)

    def create(self, database: str, *, template: str = "template1") -> None:
        """A new database; one of the same name is dropped."""
        for statement in (
            f"DROP DATABASE IF EXISTS {database} WITH (FORCE)",
            f"CREATE DATABASE {database} TEMPLATE {template}",
        ):
            self._run("psql", "-h", "127.0.0.1", "-p", str(self._port), "-U", "postgres", "-q", "-c", statement)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self._port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self._as_user, str(self._programs / program), *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # and no pipe: the server would hold its end open
            cwd="/",
        )


def redis(port: int, directory: Path, environment: Mapping[str, str]) -> Daemon:
    """A Redis that keeps what it was given."""
    program = shutil.which("redis-server")
    assert program is not None, "checked by `make test-production`"
    data = directory / "redis"
    data.mkdir()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(data), "--appendonly", "yes"]

    def answers() -> bool:
        from redis import Redis, RedisError

        try:
            return bool(Redis(port=port, socket_timeout=2).ping())
        except RedisError:
            return False

    return Daemon("redis", command, directory=directory, environment=environment, answers=answers)


class Mlflow:
    """An MLflow server with logins on a PostgreSQL database, of which each run of a test gets a fresh copy.

    Args:
        postgres: is running.
        port: of the server.
        directory: for configuration, artefacts and the log.
        environment: of its process.
    """

    _TEMPLATE, _DATABASE = "mlflow_template", "mlflow"

    def __init__(self, postgres: Postgres, port: int, directory: Path, environment: Mapping[str, str]) -> None:
        self._postgres = postgres
        self._port = port
        self._directory = directory
        self._environment = environment
        self.url = f"http://127.0.0.1:{port}"
        self.daemon = self._daemon(self._DATABASE)

    def prepare(self) -> None:
        """Let MLflow make its tables once, and the pipeline's user."""
        from mlflow.server import get_app_client

        self._postgres.create(self._TEMPLATE)
        daemon = self._daemon(self._TEMPLATE)
        daemon.start()
        names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        saved = {name: os.environ.get(name) for name in names}
        os.environ.update(zip(names, ADMIN, strict=True))
        try:
            get_app_client("basic-auth", tracking_uri=self.url).create_user(*PIPELINE)
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            daemon.stop()

    def renew(self) -> None:
        """Start on an empty database."""
        self.daemon.stop()
        self._postgres.create(self._DATABASE, template=self._TEMPLATE)
        self.daemon.start()

    def _daemon(self, database: str) -> Daemon:
        users = self._directory / f"{database}-users.ini"
        users.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {self._postgres.url(database)}\n"
            f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
            f"authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)),
            *("--workers", "1", "--app-name", "basic-auth", "--backend-store-uri", self._postgres.url(database)),
            *("--artifacts-destination", (self._directory / "mlartifacts").as_uri()),
        ]
        environment = {
            **self._environment,
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs-the-forms-of-this-test",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        return Daemon(
            database,
            command,
            directory=self._directory,
            environment=environment,
            answers=lambda: http_answers(f"{self.url}/health"),
        )
