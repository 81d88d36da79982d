"""The MLflow run of a pipeline run, for tasks that log to it."""

from collections.abc import Mapping

from gisp_tasks.stores.registry import MlflowRegistry
from gisp_tasks.tasks.runtime import Json, Run


def connect(run: Run) -> tuple[MlflowRegistry, str] | None:
    """The tracking server and the id of the run there; None when the recipe names no server."""
    mlflow = run.recipe.publish.mlflow
    if mlflow is None:
        return None
    registry = MlflowRegistry(mlflow.tracking_uri)
    return registry, registry.open_run(experiment=run.recipe.name, run_id=run.run_id, parameters={}, datasets=[])


def log_metrics(run: Run, metrics: Mapping[str, float], *, step: int) -> None:
    """Log metrics, if the recipe names a tracking server."""
    if connection := connect(run):
        registry, mlflow_run = connection
        registry.log_metrics(mlflow_run, metrics, step=step)


def close_failed(recipe: Json, run: Json) -> None:
    """Show the MLflow run as failed."""
    if connection := connect(Run.open(recipe, run)):
        registry, mlflow_run = connection
        registry.close_run(mlflow_run, "FAILED")
