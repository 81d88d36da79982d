"""Calibration and steps without levels: what `gisp prune` does."""

import shutil
from pathlib import Path

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.recipe import Recipe
from gisp_tasks.tasks.child import run_in_child
from gisp_tasks.tasks.runtime import Json, Run


def prune_only(recipe: Recipe, out: Path) -> Json:
    """Run all steps with ``out`` as the store, then copy the order and the scores to its top.

    Args:
        recipe: its store is ``out``.
        out: a directory.

    Returns:
        Paths of the removal order and of each step's scores.
    """
    data = recipe.model_dump(mode="json")
    tasks = "gisp_tasks.tasks"
    run = run_in_child(f"{tasks}.resolve_model:resolve_model", recipe=data)
    run_in_child(f"{tasks}.prepare_calibration:prepare_calibration", recipe=data, run=run)
    steps = list(range(1, recipe.pruning.steps + 1))
    run_in_child(
        f"{tasks}.score_and_prune:score_and_prune",
        recipe=data,
        run=run,
        steps=steps,
        order=None,
    )
    this = Run.open(data, run)
    prefix = Path(this.store.uri.removeprefix("file://"))
    order = Path(shutil.copyfile(prefix / Keys.ORDER, out / Keys.ORDER))
    scores = []
    for step in steps:
        target = out / f"scores-{step:04d}.safetensors"
        scores.append(str(shutil.copyfile(prefix / Keys.step(step, "scores.safetensors"), target)))
    return {"run_id": this.run_id, "removal_order": str(order), "scores": scores}
