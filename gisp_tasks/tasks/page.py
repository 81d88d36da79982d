"""What the run's page shows besides summary and manifest: read back from the store, one step at a time."""

import numpy as np

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Kind
from gisp_tasks.report import StepObservation, Trajectory, summarise_scores
from gisp_tasks.tasks.runtime import Run, scratch
from gisp_tasks.tasks.score import load_order


def trajectory_of(run: Run) -> Trajectory:
    """Scores, removals and timings of a run whose steps are done."""
    ref = run.store.stat(Keys.ORDER)
    assert ref is not None, "a run whose levels are published has its removal order"
    order = load_order(run, ref)
    return Trajectory(
        geometry=run.geometry,
        keep={level.name: run.keep_sets(level.name, order) for level in run.plan.levels},
        steps=tuple(_observation(run, step.number, order) for step in run.plan.steps),
    )


def _observation(run: Run, step: int, order: RemovalOrder) -> StepObservation:
    ref = run.store.stat(Keys.step(step, "scores.safetensors"))
    assert ref is not None, "a finished step has its scores"
    with scratch() as directory:
        scores, _ = StructureScores.load(run.store.fetch(ref, directory / ref.name))
    of_step = order.steps == step
    gone = {}
    for kind, values in ((Kind.ATTENTION, scores.attention), (Kind.MLP, scores.mlp)):
        chosen = of_step & (order.removals.kinds == kind)
        gone[kind] = np.zeros(values.shape, dtype=np.bool_)
        gone[kind][order.removals.layers[chosen], order.removals.indices[chosen]] = True
    timing = run.timing(step)
    return StepObservation(
        number=step,
        attention=summarise_scores(scores.attention, gone[Kind.ATTENTION]),
        mlp=summarise_scores(scores.mlp, gone[Kind.MLP]),
        seconds=timing.get("seconds"),
        peak_bytes=timing.get("peak_bytes"),
    )
