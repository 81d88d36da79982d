"""What a level must meet before it gets its alias."""

from collections.abc import Mapping

from gisp_tasks.pruning.structures import Geometry
from gisp_tasks.recipe import Recipe
from gisp_tasks.tasks.measure import windows_of
from gisp_tasks.tasks.runtime import Json


def judge(recipe: Recipe, geometry: Geometry, metrics: Mapping[str, float], dense: Mapping[str, float]) -> Json:
    """Every check of the gate with its value and limit, and whether all of them passed.

    Args:
        recipe: sets the limits.
        geometry: of the dense model; its context bounds the window.
        metrics: of the level.
        dense: of the dense model.
    """
    checks = []
    limit = recipe.publish.gate.max_perplexity_ratio
    if limit is not None:
        metric = gate_metric(recipe, geometry)
        ratio = metrics[metric] / dense[metric]
        checks.append(
            {"name": "perplexity_ratio", "metric": metric, "value": ratio, "limit": limit, "passed": ratio <= limit}
        )
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def gate_metric(recipe: Recipe, geometry: Geometry) -> str:
    """The perplexity that the gate and the report's curve read: the first window of the text evaluation."""
    task = recipe.evaluation.perplexity_task
    assert task is not None, "the recipe refuses a perplexity gate without a text evaluation"
    window = windows_of(getattr(recipe.evaluation, task), geometry.max_positions)[0]
    return f"{task}_ppl_token_w{window}"
