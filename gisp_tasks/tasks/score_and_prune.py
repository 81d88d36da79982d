"""Consecutive steps in one task that keeps the model loaded; the same calls, the same bytes."""

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.tasks.prune import extend
from gisp_tasks.tasks.runtime import Json, Run
from gisp_tasks.tasks.score import Scorer, load_order


def score_and_prune(recipe: Json, run: Json, steps: list[int], order: Json | None) -> Json:
    """Score and prune each of ``steps``, publishing scores and order after each one.

    A task that was interrupted goes on after the last step that it published.

    Args:
        recipe: as data.
        run: reference of the plan.
        steps: consecutive, from 1.
        order: reference of the order before the first of them; None at the start.

    Returns:
        Reference of the order after the last of them.
    """
    this = Run.open(recipe, run)
    ref = ArtifactRef.from_dict(order) if order else None
    steps_left = list(steps)
    while steps_left and (done := this.store.stat(Keys.step(steps_left[0], "removal_order.safetensors"))):
        ref = done
        steps_left.pop(0)
    scorer: Scorer | None = None
    longer = load_order(this, ref) if ref and steps_left else RemovalOrder.empty()
    for step in steps_left:
        scores = this.store.stat(Keys.step(step, "scores.safetensors"))
        if scores is None:
            scorer = scorer or Scorer(this)
            scores = scorer.score(step, longer)
        ref, longer = extend(this, step, longer, scores)
    assert ref is not None, "a task has at least one step"
    return ref.to_dict()
