"""Scores to removals: no model, no accelerator."""

import logging

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.tasks.runtime import Json, Run, scratch
from gisp_tasks.tasks.score import load_order
from gisp_tasks.tasks.tracking import log_metrics

logger = logging.getLogger(__name__)


def prune(recipe: Json, run: Json, step: int, order: Json | None, scores: Json) -> Json:
    """Publish ``steps/<step>/removal_order.safetensors``, and after the last step the finished order.

    Args:
        recipe: as data.
        run: reference of the plan.
        step: from 1.
        order: reference of the order after the step before; None for the first.
        scores: reference of this step's scores.
    """
    this = Run.open(recipe, run)
    before = load_order(this, ArtifactRef.from_dict(order)) if order else RemovalOrder.empty()
    return extend(this, step, before, ArtifactRef.from_dict(scores))[0].to_dict()


def extend(run: Run, step: int, order: RemovalOrder, scores: ArtifactRef) -> tuple[ArtifactRef, RemovalOrder]:
    """Remove what a step removes, log the step's metrics, and publish the longer order."""
    with scratch() as directory:
        structure_scores, facts = StructureScores.load(run.store.fetch(scores, directory / "scores.safetensors"))
        removals = run.plan.steps[step - 1].removals(structure_scores, order.removals, run.geometry, run.limits)
        longer = order.extend(removals, step)
        path = directory / "removal_order.safetensors"
        longer.save(path, run.geometry, run.order_metadata)
        sparsity = run.geometry.sparsity_of(longer.written(run.geometry, run.limits.width_multiple))
        logger.info("Step %d: %d structures removed, parameter sparsity %.4f", step, len(removals), sparsity)
        metrics = {"objective": facts["objective"], "removed_structures": len(removals), "param_sparsity": sparsity}
        # Before the order is published: a task that finds it there does nothing more.
        log_metrics(run, {f"step.{name}": value for name, value in metrics.items()}, step=step)
        if step == len(run.plan.steps):
            run.store.put(Keys.ORDER, path)
        ref = run.store.put(Keys.step(step, "removal_order.safetensors"), path)
    return ref, longer
