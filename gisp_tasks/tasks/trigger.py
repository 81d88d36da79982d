"""Who had a run made, as Airflow knows it."""

import getpass
from typing import Any

_DAG_TEST = "dag_test"
"""The user that Airflow names for a DAG that runs in the process of `gisp run`."""


def trigger_of(dag_run: Any) -> dict[str, Any]:
    """The trigger in a manifest's form, from the ``dag_run`` of a task's context."""
    in_process = dag_run.triggering_user_name == _DAG_TEST
    return {
        "by": "command line" if in_process else "airflow",
        "dag_id": dag_run.dag_id,
        "dag_run_id": dag_run.run_id,
        "run_type": str(getattr(dag_run.run_type, "value", dag_run.run_type)),
        "user": _login() if in_process else dag_run.triggering_user_name,
    }


def _login() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return None
