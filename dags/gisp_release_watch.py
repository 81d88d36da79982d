"""One DAG for each recipe with `airflow.watch`: a new upstream revision starts the recipe's DAG, pinned to it.

The started run's id names recipe and revision, so a revision is started once: the next tick, a backfill or a second
scheduler finds the run there, in whatever state, and skips. A look-up that fails is tried again and starts nothing.
Several new revisions wait in the recipe's DAG, which runs one at a time.
"""

from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, task

from gisp_tasks.recipe import Recipe
from gisp_tasks.tasks.dag_files import attempts, load_recipes

Json = dict[str, Any]


@task
def look_up(recipe: Json) -> Json:
    """Ask upstream for the newest revision."""
    from gisp_tasks.tasks.watch import look_up as newest

    return newest(recipe)


def watch_dag(recipe: Recipe) -> DAG:
    """The DAG that watches the model of a recipe."""
    with DAG(
        # Not gisp_…, which is how the DAGs of recipes begin: no recipe's name can take this one.
        dag_id=f"watch_gisp_{recipe.name}",
        description=f"New revisions of {recipe.model.source} start gisp_{recipe.name}",
        schedule=recipe.airflow.watch,
        catchup=False,
        max_active_runs=1,
        tags=["gisp"],
        default_args=attempts(recipe),
    ) as dag:
        found = look_up(recipe.model_dump(mode="json"))
        TriggerDagRunOperator(
            task_id="start",
            trigger_dag_id=f"gisp_{recipe.name}",
            trigger_run_id=found["dag_run_id"],
            conf={"revision": found["revision"]},
            logical_date=None,
            skip_when_already_exists=True,
        )
    return dag


for _recipe, _ in load_recipes(Path(__file__)):
    if _recipe.airflow.watch is not None:
        globals()[f"watch_gisp_{_recipe.name}"] = watch_dag(_recipe)
