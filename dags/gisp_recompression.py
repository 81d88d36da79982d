"""One DAG per recipe file: model -> calibration -> K steps -> levels -> S3 -> MLflow -> report (-> promotion).

K, the levels and what hangs on which step are known from the recipe alone, so the whole graph is drawn at parse
time. Nothing heavy is imported here: tasks import what they need when they run, and whatever loads a model runs
in a process of its own (`gisp_tasks.tasks.child`). Only references travel between tasks.

Every level that is registered is an event of the asset ``x-gisp://<recipe>/<level>``, on which other DAGs can be
scheduled. `gisp_release_watch.py` starts these DAGs when there is something new.
"""

from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Asset, Param, TaskGroup, task
from airflow.sdk.exceptions import AirflowSkipException

from gisp_tasks.approval import WAIT, LevelApproval
from gisp_tasks.pruning.schedule import fused_steps, level_steps
from gisp_tasks.recipe import Recipe
from gisp_tasks.tasks.child import run_in_child
from gisp_tasks.tasks.dag_files import attempts, load_recipes
from gisp_tasks.tasks.trigger import page_of, trigger_of

Json = dict[str, Any]

DENSE = "dense"


@task
def resolve_model(recipe: Json, params: Json) -> Json:
    """Check all input, pin the model, publish the plan."""
    return run_in_child(
        "gisp_tasks.tasks.resolve_model:resolve_model",
        recipe=recipe,
        revision=params["revision"],
        resume=params["resume"],
    )


@task
def prepare_calibration(recipe: Json, run: Json) -> Json:
    """Calibration text to tokens."""
    return run_in_child("gisp_tasks.tasks.prepare_calibration:prepare_calibration", recipe=recipe, run=run)


@task
def score(recipe: Json, run: Json, step: int, order: Json | None) -> Json:
    """One scoring pass over the whole calibration set."""
    return run_in_child("gisp_tasks.tasks.score:score", recipe=recipe, run=run, step=step, order=order)


@task
def prune(recipe: Json, run: Json, step: int, order: Json | None, scores: Json) -> Json:
    """Scores to a longer removal order."""
    from gisp_tasks.tasks.prune import prune as prune_step

    return prune_step(recipe, run, step, order, scores)


@task
def score_and_prune(recipe: Json, run: Json, steps: list[int], order: Json | None) -> Json:
    """Several steps with the model kept loaded."""
    return run_in_child(
        "gisp_tasks.tasks.score_and_prune:score_and_prune",
        recipe=recipe,
        run=run,
        steps=steps,
        order=order,
    )


@task
def materialize(recipe: Json, run: Json, level: str, order: Json) -> Json:
    """Cut a level's checkpoint from the base model and prove it."""
    return run_in_child("gisp_tasks.tasks.materialize:materialize", recipe=recipe, run=run, level=level, order=order)


@task
def export_gguf(recipe: Json, run: Json, level: str, model: Json) -> Json:
    """Write a level's file for llama.cpp and read it back."""
    return run_in_child("gisp_tasks.tasks.export_gguf:export_gguf", recipe=recipe, run=run, level=level, model=model)


@task
def evaluate(recipe: Json, run: Json, level: str, evaluation: str, model: Json | None) -> Json:
    """Measure a checkpoint as it lies in the store."""
    return run_in_child(
        "gisp_tasks.tasks.evaluate:evaluate",
        recipe=recipe,
        run=run,
        level=level,
        evaluation=evaluation,
        model=model,
    )


@task
def upload_to_s3(recipe: Json, run: Json, level: str, model: Json, order: Json) -> Json:
    """Complete and verify a level's package in the store."""
    return run_in_child(
        "gisp_tasks.tasks.upload_to_s3:upload_to_s3", recipe=recipe, run=run, level=level, model=model, order=order
    )


@task
def register_model(recipe: Json, run: Json, level: Json, outlet_events: Any = None) -> Json:
    """Make a level a version of the registered model, and an event of its asset; Airflow fills in ``outlet_events``."""
    from gisp_tasks.tasks.register_model import register_model as register

    registered = register(recipe, run, level)
    outlet_events[level_asset(registered["recipe"], registered["level"])].extra = registered
    return level


def level_asset(recipe: str, level: str) -> Asset:
    """The asset of a recipe's level: the same one for all its runs, stores and registries."""
    return Asset(f"x-gisp://{recipe}/{level}")


@task
def report(recipe: Json, run: Json, dag_run: Any = None, ti: Any = None) -> Json:
    """Manifest and page of the finished run; Airflow fills in ``dag_run`` and ``ti``."""
    trigger = trigger_of(dag_run)
    return run_in_child(
        "gisp_tasks.tasks.report:report", recipe=recipe, run=run, trigger=trigger, airflow_page=page_of(ti, trigger)
    )


@task
def promote(recipe: Json, run: Json, level: Json, answer: Json | None) -> None:
    """Make a level champion, if the gate, or the person who was asked, says so; shown as skipped if not."""
    from gisp_tasks.tasks.promote import promote as promote_level

    if not promote_level(recipe, run, level, answer):
        raise AirflowSkipException("not promoted; `gisp history` says why")


def recompression_dag(recipe: Recipe, source: Path) -> DAG:
    """The DAG of a recipe."""
    data = recipe.model_dump(mode="json")
    accelerator = _accelerator(recipe)
    with DAG(
        dag_id=f"gisp_{recipe.name}",
        description=f"{recipe.model.source} to {', '.join(recipe.level_names)}",
        doc_md=f"Recipe `{source.name}`:\n```yaml\n{source.read_text()}\n```",
        schedule=recipe.airflow.schedule,
        catchup=False,
        max_active_runs=1,
        tags=["gisp"],
        params={
            "revision": Param(None, type=["null", "string"], description="Pins the model instead of the recipe"),
            "resume": Param(False, type="boolean", description="Go on with an unfinished run; never begin one"),
            **_approval_params(recipe),
        },
        default_args={
            **attempts(recipe),
            "on_failure_callback": close_mlflow_run,
        },
    ) as dag:
        run = resolve_model.override(**accelerator)(data)
        calibration = prepare_calibration(data, run)
        with TaskGroup(DENSE):
            dense = _evaluations(recipe, data, run, DENSE, None)
        orders = _steps(recipe, data, run, calibration)
        ends = [
            _level(recipe, data, run, name, orders[step], dense)
            for name, step in zip(recipe.level_names, level_steps(recipe), strict=True)
        ]
        finish = report(data, run)
        [*ends, *dense, orders[recipe.pruning.steps]] >> finish
        if recipe.publish.promotion.by != "none":
            with TaskGroup("promotion"):
                for name, registered in zip(recipe.level_names, ends, strict=True):
                    _promotion(recipe, data, run, name, registered, finish)
    return dag


def _steps(recipe: Recipe, data: Json, run: Any, calibration: Any) -> dict[int, Any]:
    """The steps in a row; step -> the removal order after it."""
    accelerator = _accelerator(recipe)
    orders: dict[int, Any] = {}
    order = None
    for steps in fused_steps(recipe.pruning.steps, recipe.airflow.steps_per_task):
        first, last = steps[0], steps[-1]
        if recipe.airflow.steps_per_task == 1:
            with TaskGroup(f"step_{first:03d}"):
                begun = scores = score.override(**accelerator)(data, run, first, order)
                order = prune(data, run, first, order, scores)
        else:
            with TaskGroup(f"step_{first:03d}_to_{last:03d}"):
                begun = order = score_and_prune.override(**accelerator)(data, run, list(steps), order)
        if not orders:
            calibration >> begun
        orders.update(dict.fromkeys(steps, order))
    return orders


def _level(recipe: Recipe, data: Json, run: Any, name: str, order: Any, dense: list[Any]) -> Any:
    """A level from its checkpoint to its registered version; returns its last task."""
    with TaskGroup(name.replace(".", "_")):
        # Least squares runs the base model.
        place = {} if recipe.pruning.compensation == "none" else _accelerator(recipe)
        model = materialize.override(**place)(data, run, name, order)
        evaluations = _evaluations(recipe, data, run, name, model)
        uploaded = upload_to_s3(data, run, name, model, order)
        [*evaluations, *dense] >> uploaded
        if recipe.export.gguf != "none":
            export_gguf(data, run, name, model) >> uploaded
        if recipe.publish.mlflow is None:
            return uploaded
        return register_model.override(outlets=[level_asset(recipe.name, name)])(data, run, uploaded)


def _promotion(recipe: Recipe, data: Json, run: Any, name: str, registered: Any, finish: Any) -> None:
    """A registered level to its champion's alias, after the run is complete with its report."""
    task_name = name.replace(".", "_")
    # The run itself is done: a promotion that fails does not make it a failed one in MLflow.
    quiet = {"on_failure_callback": None}
    asked = None
    if recipe.publish.promotion.by == "approval":
        place = {"recipe": data, "run": run, "level": registered}
        asked = LevelApproval(task_id=f"approve_{task_name}", **place, promotion=recipe.publish.promotion, **quiet)
    answer = asked.output if asked else None
    promoted = promote.override(task_id=f"promote_{task_name}", **quiet)(data, run, registered, answer)
    finish >> (asked or promoted)


def _approval_params(recipe: Recipe) -> dict[str, Param]:
    if recipe.publish.promotion.by != "approval":
        return {}
    text = "Wait until an approver answers; otherwise the request is left for `gisp approve`"
    return {WAIT: Param(True, type="boolean", description=text)}


def _evaluations(recipe: Recipe, data: Json, run: Any, level: str, model: Any) -> list[Any]:
    accelerator = _accelerator(recipe)
    return [
        evaluate.override(task_id=f"evaluate_{name}", **accelerator)(data, run, level, name, model)
        for name in recipe.evaluation.tasks
    ]


def _accelerator(recipe: Recipe) -> dict[str, str]:
    """Where tasks that load a model run."""
    return {"pool": recipe.airflow.pool, "queue": recipe.airflow.queue or "default"}


def close_mlflow_run(context: Any) -> None:
    """A task failed for good: its MLflow run is shown as failed, until the next attempt opens it again."""
    from gisp_tasks.tasks.tracking import close_failed

    task_instance = context["ti"]
    run = task_instance.xcom_pull(task_ids="resolve_model")
    if run:
        close_failed(task_instance.task.op_args[0], run)


for _recipe, _path in load_recipes(Path(__file__)):
    globals()[f"gisp_{_recipe.name}"] = recompression_dag(_recipe, _path)
