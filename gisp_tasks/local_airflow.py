"""A recipe's DAG in this process: the same file, graph and tasks that a scheduler runs, without one.

Airflow reads its settings when it is first imported, so `prepare` comes before anything of Airflow.
"""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisp_tasks.cache import cache_directory
from gisp_tasks.errors import GispError, PermanentError
from gisp_tasks.recipe import Recipe

if TYPE_CHECKING:
    from airflow.sdk import DAG

logger = logging.getLogger(__name__)

DAGS_FOLDER = Path(__file__).parent.parent / "dags"
CACHE = cache_directory()
Event = Callable[[str, str], None]
"""Called with a task's id and ``running``, ``success``, ``skipped`` or ``failed``."""


@contextmanager
def prepare(recipe: Recipe) -> Iterator[Path]:
    """Point Airflow at a database of its own and at one recipe; yields the recipe's file.

    The database lives as long as the process, or in ``GISP_AIRFLOW_HOME`` where that is set, so that an Airflow
    started on the same home shows the run.
    """
    kept = os.environ.get("GISP_AIRFLOW_HOME")
    home = Path(kept).absolute() if kept else Path(tempfile.mkdtemp(prefix="gisp-airflow-"))
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / "recipes").mkdir(exist_ok=True)
        recipe_file = home / "recipes" / f"{recipe.name}.yaml"
        recipe_file.write_bytes(recipe.to_json())
        os.environ.update(airflow_environment(home, recipes=recipe_file))
        if not (home / "airflow.db").exists():
            _copy_migrated_database(home / "airflow.db")
        yield recipe_file
    finally:
        if not kept:
            shutil.rmtree(home, ignore_errors=True)


def airflow_environment(home: Path, *, recipes: Path) -> dict[str, str]:
    """Settings of an Airflow on SQLite in ``home`` that shows the DAGs of ``recipes``."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS_FOLDER),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
        "GISP_RECIPES": str(recipes),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def run_dag(dag: "DAG", *, conf: dict[str, Any], on_event: Event) -> dict[str, Any]:
    """Run a DAG to its end and return the reference of the manifest.

    Raises:
        GispError: the error of the task that failed.
    """
    from airflow.sdk.listener import get_listener_manager
    from airflow.utils.state import DagRunState

    listener = _make_listener(on_event)
    get_listener_manager().add_listener(listener)  # type: ignore[no-untyped-call]
    dag_run = dag.test(run_conf=conf)
    if dag_run.state != DagRunState.SUCCESS:
        raise listener.error or PermanentError("the run failed; the log says why")
    manifest: dict[str, Any] = dag_run.get_task_instance("report").xcom_pull(task_ids="report")
    return manifest


def load_dag(recipe: Recipe) -> "DAG":
    """The DAG object that the DAG file makes of the recipe in ``GISP_RECIPES``."""
    path = DAGS_FOLDER / "gisp_recompression.py"
    spec = importlib.util.spec_from_file_location("gisp_recompression", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gisp_recompression"] = module
    spec.loader.exec_module(module)
    dag: DAG = vars(module)[f"gisp_{recipe.name}"]
    return dag


def _make_listener(on_event: Event) -> Any:
    """Airflow's listener hooks, turned into events; remembers the last error."""
    from airflow.listeners import hookimpl

    class Listener:
        error: GispError | None = None

        @hookimpl
        def on_task_instance_running(self, task_instance: Any) -> None:
            on_event(task_instance.task_id, "running")

        @hookimpl
        def on_task_instance_success(self, task_instance: Any) -> None:
            on_event(task_instance.task_id, "success")

        @hookimpl
        def on_task_instance_skipped(self, task_instance: Any) -> None:
            on_event(task_instance.task_id, "skipped")

        @hookimpl
        def on_task_instance_failed(self, task_instance: Any, error: Any) -> None:
            on_event(task_instance.task_id, "failed")
            if isinstance(error, GispError):
                self.error = error

    return Listener()


def _copy_migrated_database(target: Path) -> None:
    """An empty database of this Airflow version: migrated once, then copied."""
    template = CACHE / f"airflow-{version('apache-airflow')}.db"
    if not template.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            home = Path(directory)
            environment = {**os.environ, **airflow_environment(home, recipes=home)}
            subprocess.run(
                [sys.executable, "-m", "airflow", "db", "migrate"],
                env=environment,
                check=True,
                capture_output=True,
            )
            (home / "airflow.db").replace(template)
    shutil.copyfile(template, target)
