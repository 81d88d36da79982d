"""A recipe under Airflow's own scheduler (`airflow standalone`), with a real S3 server and a real MLflow server."""

import contextlib
import json
import os
import time
import urllib.error
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow_api import Api

from gisp_tasks.demo.services import Service, start_airflow, start_mlflow, start_s3
from gisp_tasks.demo.smollm2 import fetch

pytestmark = pytest.mark.slow

EVALUATION = {
    "stories260k": {
        "wikitext2": {"windows": [128], "limit_tokens": 2049},
        "gsm8k": {"shots": 0, "limit": 2, "max_new_tokens": 16, "batch_size": 2, "limit_solutions": 4},
        "commonsense_qa": {"limit": 2},
    },
    "smollm2-135m": {
        "wikitext2": {"windows": [128, 2048], "limit_tokens": 8193},
        "gsm8k": {"shots": 5, "limit": 8, "max_new_tokens": 128, "batch_size": 8, "limit_solutions": 64},
    },
}
CALIBRATION = {
    "stories260k": {"dataset": "wikitext2", "split": "validation", "sequences": 16, "sequence_length": 64},
    "smollm2-135m": {"dataset": "wikitext2", "split": "validation", "sequences": 64, "sequence_length": 128},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where everything lies; kept after the test when GISP_KEEP names a directory."""
    return Path(os.environ["GISP_KEEP"]) if "GISP_KEEP" in os.environ else tmp_path


@pytest.fixture
def s3(place: Path):
    with start_s3(place / "s3", access_key="standalone", secret_key="standalone-secret") as service:
        import boto3

        session = boto3.session.Session(
            aws_access_key_id="standalone", aws_secret_access_key="standalone-secret", region_name="us-east-1"
        )
        client = session.client("s3", endpoint_url=service.url)
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="gisp")
        yield service


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["stories260k", "smollm2-135m"])
def test_the_scheduler_runs_a_recipe_from_model_to_registry(name, place, s3, testdata, monkeypatch):
    model = testdata / "models" / "stories260K" if name == "stories260k" else fetch(place)
    with start_mlflow(place / "mlflow", environment=s3.environment) as mlflow:
        recipes = place / "recipes"
        recipes.mkdir(exist_ok=True)
        recipe = {
            "name": name,
            "model": {"source": str(model), "dtype": "float32"},
            "calibration": CALIBRATION[name],
            "pruning": {"levels": [0.2, 0.3, 0.4, 0.5], "steps": 5},
            "evaluation": EVALUATION[name],
            "publish": {
                "store": "s3://gisp/models",
                "mlflow": {"tracking_uri": mlflow.url, "model_name": f"{name}-gisp"},
                "gate": {"max_perplexity_ratio": 8.0},
            },
            # One model at a time: several at once would fight over this machine's cores.
            "airflow": {"pool": "accelerator"},
        }
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        environment = {**s3.environment, "GISP_DATA_ROOT": str(testdata / "data"), "HF_HUB_OFFLINE": "1"}
        with start_airflow(place / "airflow", recipes=recipes, environment=environment) as airflow:
            run = run_to_the_end(airflow, f"gisp_{name}")
            assert run["state"] == "success"
            if "GISP_PAUSE" in os.environ:  # to take screenshots of the pages
                print(f"Airflow {airflow.url}, MLflow {mlflow.url}", flush=True)
                time.sleep(float(os.environ["GISP_PAUSE"]))
        for key, value in s3.environment.items():
            monkeypatch.setenv(key, value)
        check_registry(mlflow, f"{name}-gisp")


def run_to_the_end(airflow: Service, dag_id: str) -> dict[str, Any]:
    """Unpause, trigger, wait."""
    api = Api(airflow.url)
    run_id = begin(api, dag_id)
    while True:
        run = api.get(f"/dags/{dag_id}/dagRuns/{run_id}")
        if run["state"] in ("success", "failed"):
            return run
        time.sleep(3)


def begin(api: Api, dag_id: str) -> str:
    """Unpause and trigger."""
    deadline = time.monotonic() + 120
    while dag_id not in {dag["dag_id"] for dag in api.get("/dags?limit=100")["dags"]}:
        assert time.monotonic() < deadline, "the scheduler never saw the DAG"
        time.sleep(2)
    if "accelerator" not in {pool["name"] for pool in api.get("/pools")["pools"]}:
        api.send("POST", "/pools", {"name": "accelerator", "slots": 1})
    api.send("PATCH", f"/dags/{dag_id}", {"is_paused": False})
    run_id: str = api.send("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None})["dag_run_id"]
    return run_id


def check_registry(mlflow: Service, model_name: str) -> None:
    """Four versions with their tags; those that passed the gate can be loaded by their alias."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow.url, registry_uri=mlflow.url)
    versions = client.search_model_versions(f"name = '{model_name}'")
    assert sorted(version.tags["gisp.level"] for version in versions) == ["sp20", "sp30", "sp40", "sp50"]
    for version in versions:
        assert version.source.startswith("s3://gisp/models/runs/")
        assert version.tags["gate"] in ("passed", "failed")
        assert any(key.startswith("metric.gsm8k_solution_ppl_token") for key in version.tags)
    aliases = client.get_registered_model(model_name).aliases
    assert set(aliases) == {v.tags["gisp.level"] for v in versions if v.tags["gate"] == "passed"}


@pytest.mark.timeout(1800)
def test_people_decide_about_champions(place: Path, testdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four levels: approved, rejected, left until the time is over, and one that missed its gate and is not asked."""
    from gisp_tasks.stores.registry import MlflowRegistry
    from gisp_tasks.tasks import champions

    monkeypatch.chdir(place)
    recipes = place / "recipes"
    recipes.mkdir(exist_ok=True)
    tracking_uri = f"sqlite:///{place}/mlflow.db"
    recipe = {
        "name": "decided",
        "model": {"source": str(testdata / "models" / "stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 16, "sequence_length": 64},
        "pruning": {"levels": [0.2, 0.3, 0.4, 0.5], "steps": 2},
        "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 1025}},
        "publish": {
            "store": f"file://{place}/store",
            "mlflow": {"tracking_uri": tracking_uri, "model_name": "decided-gisp"},
            "gate": {"max_perplexity_ratio": None, "max_bytes": 800_000},
            "promotion": {"by": "approval", "approvers": ["ana", "ben"], "timeout_hours": 0.05},
        },
        "airflow": {"pool": "accelerator"},
    }
    (recipes / "decided.yaml").write_text(yaml.safe_dump(recipe))
    passwords = place / "passwords.json"
    passwords.write_text(json.dumps({name: name for name in ("ana", "ben", "eve")}))
    environment = {
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "ana:admin,ben:admin,eve:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "HF_HUB_OFFLINE": "1",
    }
    with start_airflow(place / "airflow", recipes=recipes, environment=environment) as airflow:
        ana, ben, eve = (Api(airflow.url, (name, name)) for name in ("ana", "ben", "eve"))
        run_id = begin(ana, "gisp_decided")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            answer(eve, run_id, "sp30", "Approve", "I would like it")
        answer(ana, run_id, "sp30", "Approve", "good on ours")
        answer(ben, run_id, "sp40", "Reject", "too slow")
        states = states_at_the_end(ana, run_id)
    assert states.pop("run") == "success"
    assert {name: state for name, state in states.items() if name.startswith("promotion.")} == {
        "promotion.approve_sp20": "skipped",
        "promotion.promote_sp20": "skipped",
        "promotion.approve_sp30": "success",
        "promotion.promote_sp30": "success",
        "promotion.approve_sp40": "success",
        "promotion.promote_sp40": "skipped",
        "promotion.approve_sp50": "success",
        "promotion.promote_sp50": "skipped",
    }
    registry = MlflowRegistry(tracking_uri)
    found = champions.history(registry, "decided-gisp")
    assert found["problems"] == []
    versions = {version["level"]: version["version"] for version in found["versions"]}
    assert found["champions"] == {"champion-sp30": versions["sp30"]}
    # What was not approved is registered all the same.
    assert {alias for alias in registry.aliases("decided-gisp") if "-" not in alias} == {"sp30", "sp40", "sp50"}
    decided = {event["level"]: event for event in found["events"] if event["action"] != "requested"}
    assert {level: (event["action"], event["by"], event["reason"]) for level, event in decided.items()} == {
        "sp30": ("promoted", "ana", "good on ours"),
        "sp40": ("rejected", "ben", "too slow"),
        "sp50": ("timed_out", "nobody", ""),
    }
    requests = {event["level"]: event["at"] for event in found["events"] if event["action"] == "requested"}
    assert requests.keys() == decided.keys()
    waited = datetime.fromisoformat(decided["sp50"]["at"]) - datetime.fromisoformat(requests["sp50"])
    assert waited >= timedelta(hours=0.05)


def answer(api: Api, run_id: str, level: str, option: str, reason: str) -> None:
    """As a person on Airflow's page does, once they are asked."""
    path = f"/dags/gisp_decided/dagRuns/{run_id}/taskInstances/promotion.approve_{level}"
    deadline = time.monotonic() + 600
    while api.get(path)["state"] != "awaiting_input":
        assert time.monotonic() < deadline, api.get(path)
        time.sleep(2)
    # Nobody reads that fast, and an answer within the scheduler's same loop makes Airflow 3.3 take the task for lost
    # and ask anew.
    time.sleep(5)
    asked = api.get(f"{path}/-1/hitlDetails")
    assert asked["subject"].endswith(f"champion of {level}?")
    assert "| bytes (bytes) | 800,000 |" in asked["body"]
    api.send("PATCH", f"{path}/-1/hitlDetails", {"chosen_options": [option], "params_input": {"reason": reason}})


def states_at_the_end(api: Api, run_id: str) -> dict[str, str]:
    """State by task of the finished run, and of the run."""
    deadline = time.monotonic() + 600
    while (state := api.get(f"/dags/gisp_decided/dagRuns/{run_id}")["state"]) not in ("success", "failed"):
        assert time.monotonic() < deadline
        time.sleep(3)
    tasks = api.get(f"/dags/gisp_decided/dagRuns/{run_id}/taskInstances?limit=100")["task_instances"]
    return {"run": state, **{task["task_id"]: task["state"] for task in tasks}}
