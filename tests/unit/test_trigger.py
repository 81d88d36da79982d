"""Who had a run made, from what Airflow hands to a task."""

import getpass
from datetime import UTC, datetime

import pytest
from airflow.sdk.api.datamodels._generated import DagRun

from gisp_tasks.stores.manifest_schema import Trigger
from gisp_tasks.tasks.trigger import page_of, trigger_of


def dag_run(run_type: str, user: str | None) -> DagRun:
    now = datetime.now(UTC)
    return DagRun.model_validate(
        {
            "dag_id": "gisp_demo",
            "run_id": f"{run_type}__1",
            "run_type": run_type,
            "triggering_user_name": user,
            "state": "running",
            "run_after": now,
            "start_date": now,
            "end_date": None,
            "logical_date": now,
            "data_interval_start": None,
            "data_interval_end": None,
            "consumed_asset_events": [],
            "partition_key": None,
        }
    )


@pytest.mark.parametrize(("run_type", "user"), [("scheduled", None), ("manual", "jane"), ("asset_triggered", None)])
def test_a_scheduler_names_its_run_and_user(run_type, user):
    trigger = trigger_of(dag_run(run_type, user))
    assert Trigger.model_validate(trigger)
    assert trigger == {
        "by": "airflow",
        "dag_id": "gisp_demo",
        "dag_run_id": f"{run_type}__1",
        "run_type": run_type,
        "user": user,
    }


def test_the_command_line_names_its_login(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "joe")
    trigger = trigger_of(dag_run("manual", "dag_test"))
    assert (trigger["by"], trigger["user"]) == ("command line", "joe")


def test_a_user_without_a_name(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert trigger_of(dag_run("manual", "dag_test"))["user"] is None


def test_a_scheduler_has_a_page_of_its_run_and_the_command_line_none():
    class Task:
        log_url = "https://airflow.example/dags/gisp_demo/runs/manual__1%2B00%3A00/tasks/report?try_number=1"

    address = "https://airflow.example/dags/gisp_demo/runs/manual__1%2B00%3A00"
    assert page_of(Task(), trigger_of(dag_run("manual", "jane"))) == address
    assert page_of(Task(), trigger_of(dag_run("manual", "dag_test"))) is None
