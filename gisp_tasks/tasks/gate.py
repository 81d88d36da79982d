"""What a level must meet before it gets its alias."""

from collections.abc import Iterator, Mapping
from typing import Any

from gisp_tasks.pruning.structures import Geometry
from gisp_tasks.recipe import Recipe
from gisp_tasks.tasks.measure import windows_of
from gisp_tasks.tasks.runtime import Json

# Accuracies are counts over samples: a drop that equals its limit must not fail by a rounding.
_ROUNDING = 1e-9


def judge(recipe: Recipe, geometry: Geometry, *, record: Json, dense: Mapping[str, float]) -> Json:
    """Every check of the gate with its value and limit, and whether all of them passed.

    Args:
        recipe: sets the limits.
        geometry: of the dense model; its context bounds the window.
        record: of the level: ``evaluation`` with its metrics, ``reload`` and ``bytes``.
        dense: metrics of the dense model.
    """
    limits, metrics = recipe.publish.gate, record["evaluation"]["metrics"]
    checks = list(_reload_checks(record["reload"]))
    if limits.max_perplexity_ratio is not None:
        metric = gate_metric(recipe, geometry)
        ratio = metrics[metric] / dense[metric]
        checks.append(_at_most("perplexity_ratio", metric, ratio, limits.max_perplexity_ratio))
    if limits.max_accuracy_drop is not None:
        for metric in recipe.evaluation.accuracy_metrics:
            drop = dense[metric] - metrics[metric]
            checks.append(_at_most("accuracy_drop", metric, drop, limits.max_accuracy_drop, slack=_ROUNDING))
    if limits.max_bytes is not None:
        checks.append(_at_most("bytes", "bytes", record["bytes"], limits.max_bytes))
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def gate_metric(recipe: Recipe, geometry: Geometry) -> str:
    """The perplexity that the gate reads: the first window of the text evaluation."""
    task = recipe.evaluation.perplexity_task
    assert task is not None, "the recipe refuses a perplexity gate without a text evaluation"
    window = windows_of(getattr(recipe.evaluation, task), geometry.max_positions)[0]
    return f"{task}_ppl_token_w{window}"


def _reload_checks(proof: Json) -> Iterator[Json]:
    """The reloaded checkpoint is the masked base model."""
    yield _at_most("reload_logits", "max_logit_difference", proof["max_logit_difference"], proof["tolerance"])
    equal = proof["greedy_equal"]
    yield {"name": "reload_greedy", "metric": "greedy_equal", "value": equal, "limit": True, "passed": equal}


def _at_most(name: str, metric: str, value: Any, limit: Any, *, slack: float = 0.0) -> Json:
    return {"name": name, "metric": metric, "value": value, "limit": limit, "passed": value <= limit + slack}
