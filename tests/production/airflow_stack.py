"""Airflow in production shape: its servers as processes of their own, and its REST API with a login."""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends import ADMIN
from daemons import Daemon, http_answers

from gisp_tasks.local_airflow import DAGS_FOLDER

SETTINGS = Path(__file__).parents[2] / "docker" / "airflow.env"
"""What the product recommends."""
OPERATOR = ("operator", "operator-of-this-test")
"""Who starts runs: role `User`, which may trigger and look, and no more."""
_FAB = "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager"


class AirflowStack:
    """API server, scheduler, DAG processor, triggerer, and a Celery worker for each of two queues.

    Args:
        directory: Airflow's home and the logs.
        ports: of the API server and of the log servers of triggerer and workers (at least six).
        database: address of an empty database.
        broker: address of Redis.
        environment: of every process, tasks included.
    """

    def __init__(
        self, directory: Path, *, ports: list[int], database: str, broker: str, environment: Mapping[str, str]
    ) -> None:
        port, *self._log_ports = ports
        self.url = f"http://127.0.0.1:{port}"
        self._directory = directory
        self._environment = {
            **environment,
            **recommended(),
            "AIRFLOW_HOME": str(directory / "home"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS_FOLDER),
            "AIRFLOW__CORE__AUTH_MANAGER": _FAB,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
            "AIRFLOW__CELERY__BROKER_URL": broker,
            "AIRFLOW__CELERY__RESULT_BACKEND": f"db+{database}",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(32),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(64),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(self._log_ports.pop()),
            # A recipe that changes between two runs of the test is seen at once.
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "5",
        }
        self.api = self._daemon("api-server", "api-server", answers_at=f"{self.url}/api/v2/monitor/health")
        self.scheduler = self._daemon("scheduler", "scheduler")
        self.dag_processor = self._daemon("dag-processor", "dag-processor")
        self.triggerer = self._daemon("triggerer", "triggerer")
        self._num_workers = 0
        self.workers: dict[str, Daemon] = {}

    def start(self) -> None:
        """Make the tables, the users and the pool; start everything, workers last."""
        (self._directory / "home").mkdir()
        self._airflow("db", "migrate")
        for (name, password), role in ((ADMIN, "Admin"), (OPERATOR, "User")):
            identity = ("--firstname", name, "--lastname", name, "--email", f"{name}@example.org")
            self._airflow("users", "create", "--username", name, "--password", password, "--role", role, *identity)
        for daemon in (self.api, self.scheduler, self.dag_processor, self.triggerer):
            daemon.start(wait=False)
        self.start_worker("default", concurrency=4)
        self.start_worker("gpu", concurrency=1)
        self.api.wait()
        Api(self.url, ADMIN).send("POST", "/pools", {"name": "gpu", "slots": 1})

    def start_worker(self, queue: str, *, concurrency: int) -> None:
        """Another worker of a queue, as on another machine; replaces the one that is gone."""
        self._num_workers += 1
        name = f"worker-{queue}-{self._num_workers}"
        arguments = ("celery", "worker", "--queues", queue, "--concurrency", str(concurrency))
        port = str(self._log_ports[self._num_workers % len(self._log_ports)])
        extra = {"AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": port}
        self.workers[queue] = self._daemon(name, *arguments, "--celery-hostname", f"{name}@%h", extra=extra)
        self.workers[queue].start(wait=False)

    def stop(self) -> None:
        for daemon in (*self.workers.values(), self.scheduler, self.dag_processor, self.triggerer, self.api):
            daemon.stop()

    def _daemon(
        self, name: str, *arguments: str, answers_at: str | None = None, extra: Mapping[str, str] | None = None
    ) -> Daemon:
        return Daemon(
            name,
            [sys.executable, "-m", "airflow", *arguments],
            directory=self._directory,
            environment={**self._environment, **(extra or {})},
            answers=(lambda: http_answers(answers_at)) if answers_at else None,
        )

    def _airflow(self, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *arguments],
            env={**os.environ, **self._environment},
            capture_output=True,
            text=True,
            cwd=self._directory,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def recommended() -> dict[str, str]:
    """The product's settings, as an env file holds them."""
    lines = [line for line in SETTINGS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


class Api:
    """Airflow's REST API.

    Args:
        url: of the API server.
        login: user and password; a token is fetched for them.
    """

    def __init__(self, url: str, login: tuple[str, str]) -> None:
        self._url = url
        self._token: str | None = None
        username, password = login
        self._token = self._call("POST", "/auth/token", {"username": username, "password": password})["access_token"]

    def get(self, path: str) -> Any:
        return self._call("GET", f"/api/v2{path}")

    def send(self, method: str, path: str, body: dict[str, Any]) -> Any:
        return self._call(method, f"/api/v2{path}", body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


class DagRun:
    """One run of a DAG, watched from outside.

    Args:
        api: of who started it.
        dag_id: the DAG.
        run_id: Airflow's.
    """

    def __init__(self, api: Api, dag_id: str, run_id: str) -> None:
        self._api = api
        self._path = f"/dags/{dag_id}/dagRuns/{run_id}"
        self.began = time.monotonic()

    @property
    def state(self) -> str:
        return str(self._api.get(self._path)["state"])

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Task id -> its instance, the latest attempt."""
        found = self._api.get(f"{self._path}/taskInstances?limit=200")["task_instances"]
        return {task["task_id"]: task for task in found}

    def wait_for(self, task_id: str, states: tuple[str, ...], *, timeout_s: float = 900) -> None:
        """Return when a task is in one of ``states``."""
        deadline = time.monotonic() + timeout_s
        while (state := self.tasks()[task_id]["state"]) not in states:
            assert self.state not in ("success", "failed"), f"the run ended before {task_id} was {states}"
            assert time.monotonic() < deadline, f"{task_id} is {state}, and not {states} after {timeout_s:.0f} s"
            time.sleep(0.5)

    def wait(self, *, timeout_s: float) -> float:
        """Return the seconds that it took, when it has succeeded."""
        while (state := self.state) not in ("success", "failed"):
            assert time.monotonic() - self.began < timeout_s, f"{state} after {timeout_s:.0f} s: {self._unfinished()}"
            time.sleep(1)
        assert state == "success", self._unfinished()
        return time.monotonic() - self.began

    def _unfinished(self) -> dict[str, str]:
        return {name: task["state"] for name, task in self.tasks().items() if task["state"] != "success"}
