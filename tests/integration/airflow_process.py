"""Airflow on SQLite in a process of its own, which a test tells what to do.

Airflow reads its settings when it is first imported, and takes seconds for that: so the process is kept, and commands
and answers are lines of JSON. All tasks run in it (`inline`); what tasks log goes to stderr.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

Json = dict[str, Any]
EXAMPLES = Path(__file__).parents[2] / "examples"
_BUNDLES = [
    {"name": name, "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle", "kwargs": kwargs}
    for name, kwargs in (("dags-folder", {}), ("examples", {"path": str(EXAMPLES)}))
]
WITH_EXAMPLES = {"AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(_BUNDLES)}
"""Setting with which Airflow has the examples' DAGs beside those of its folder."""


class Airflow:
    """The test's side.

    Args:
        process: the other side.
        recipes: the directory of its recipes.
    """

    def __init__(self, process: subprocess.Popen[str], recipes: Path) -> None:
        self._process = process
        self.recipes = recipes

    def tick(self, dag_id: str, *, logical_date: str | None = None, conf: Json | None = None) -> Json:
        """Run a DAG to its end: ``state``, and ``tasks`` with the state and the number of attempts of each."""
        answer: Json = self._ask("tick", dag_id, logical_date, conf)
        return answer

    def runs(self, dag_id: str) -> list[Json]:
        """The runs of a DAG in the order in which they were made."""
        answer: list[Json] = self._ask("runs", dag_id)
        return answer

    def end(self, dag_id: str, run_id: str, state: str) -> None:
        """Have a run ended in a state."""
        self._ask("end", dag_id, run_id, state)

    def events(self, uri: str) -> list[Json]:
        """What the events of an asset tell."""
        answer: list[Json] = self._ask("events", uri)
        return answer

    def _ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "Airflow's process ended"
        return json.loads(line)


@contextmanager
def airflow_process(home: Path, environment: Mapping[str, str]) -> Iterator[Airflow]:
    """A running one; what it logs is in ``home/log``."""
    recipes = home / "recipes"
    recipes.mkdir(parents=True)
    settings = {
        "GISP_AIRFLOW_HOME": str(home),
        **WITH_EXAMPLES,
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Airflow(process, recipes)
        finally:
            process.kill()


# The side of Airflow.


def tick(dag_id: str, logical_date: str | None, conf: Json | None) -> Json:
    from airflow.dag_processing.dagbag import DagBag

    from gisp_tasks.local_airflow import DAGS_FOLDER

    folder = EXAMPLES if dag_id == "gisp_new_level" else DAGS_FOLDER
    dag = DagBag(dag_folder=str(folder)).dags[dag_id]
    for task in dag.tasks:
        task.retry_delay = timedelta(seconds=1)
    when = {"logical_date": datetime.fromisoformat(logical_date)} if logical_date else {}
    run = dag.test(run_conf=conf, **when)
    tasks = {ti.task_id: [str(ti.state), ti.try_number] for ti in run.get_task_instances()}
    return {"state": str(run.state), "tasks": tasks}


def runs(dag_id: str) -> list[Json]:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        found = session.scalars(select(DagRun).where(DagRun.dag_id == dag_id).order_by(DagRun.id)).all()
        return [{"run_id": r.run_id, "state": str(r.state), "run_type": str(r.run_type), "conf": r.conf} for r in found]


def end(dag_id: str, run_id: str, state: str) -> None:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        run = session.scalars(select(DagRun).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)).one()
        run.set_state(state)


def events(uri: str) -> list[Json]:
    from airflow.models.asset import AssetEvent, AssetModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        assets = select(AssetModel.id).where(AssetModel.uri == uri)
        found = session.scalars(select(AssetEvent).where(AssetEvent.asset_id.in_(assets)).order_by(AssetEvent.id))
        return [event.extra for event in found]


def main() -> None:
    """Read commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import inline

    from gisp_tasks import local_airflow
    from gisp_tasks.recipe import Recipe
    from gisp_tasks.tasks import child

    child.run_in_child = inline.call
    shipped = Recipe.load(local_airflow.DAGS_FOLDER / "recipes" / "demo-embedded.yaml")
    with local_airflow.prepare(shipped) as only_recipe:
        only_recipe.unlink()
        os.environ["GISP_RECIPES"] = str(only_recipe.parent)
        commands = {"tick": tick, "runs": runs, "end": end, "events": events}
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answers.write(json.dumps(commands[name](*arguments)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
