"""To start from: a DAG that runs whenever a level of a recipe was registered.

Copy it into Airflow's DAGs folder, name your recipe and level in `LEVEL`, and put what you do with a new level (a
deployment, a larger evaluation, a message) in the place of the log line. `register_model` of every recipe emits an
event of the asset ``x-gisp://<recipe>/<level>``; its ``extra`` says what was registered.
"""

import logging
from typing import Any

from airflow.sdk import DAG, Asset, task
from airflow.sdk.exceptions import AirflowSkipException

LEVEL = Asset("x-gisp://smollm2-135m/sp40")

logger = logging.getLogger(__name__)


@task(inlets=[LEVEL])
def take_over(*, inlet_events: Any) -> dict[str, Any]:
    """Look at the newest level; one that missed its gate is left alone."""
    from gisp_tasks.stores.artifacts import open_store

    level: dict[str, Any] = inlet_events[LEVEL][-1].extra
    if level["gate"] != "passed":
        raise AirflowSkipException(f"{level['model_name']} version {level['model_version']} missed its gate")
    # Every file is there with the digest that was registered, before anything depends on it.
    found = open_store(level["uri"]).verify_directory("model")
    logger.info("%s version %s: %s, %s", level["model_name"], level["model_version"], found.uri, level["metrics"])
    return level


with DAG(dag_id="gisp_new_level", schedule=[LEVEL], catchup=False, max_active_runs=1, tags=["gisp"]):
    take_over()
