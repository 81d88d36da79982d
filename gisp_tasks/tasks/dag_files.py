"""What all DAG files begin with: the recipes, and when a task is tried again."""

import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

from gisp_tasks.errors import InputError, PermanentError
from gisp_tasks.recipe import Recipe


def load_recipes(beside: Path) -> Iterator[tuple[Recipe, Path]]:
    """The recipes to make DAGs of, each with its file; one that is refused gives a warning and is left out.

    Args:
        beside: a file of the DAGs folder; recipes lie in ``recipes/`` beside it, unless ``GISP_RECIPES`` names files
            or directories (separated by ``:``).
    """
    places = os.environ.get("GISP_RECIPES") or str(beside.parent / "recipes")
    for place in map(Path, places.split(os.pathsep)):
        for path in sorted(place.glob("*.yaml")) if place.is_dir() else [place]:
            try:
                recipe = Recipe.load(path)
            except InputError as error:
                # One bad recipe must not take the DAGs of all others away.
                warnings.warn(f"no DAG was made: {error}", stacklevel=2)
                continue
            yield recipe, path


def attempts(recipe: Recipe) -> dict[str, Any]:
    """Arguments of every task: errors that may pass are tried again with growing delays, permanent ones never."""
    return {
        "retries": recipe.airflow.retries,
        "retry_delay": timedelta(seconds=30),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(minutes=10),
        "retry_policy": ExceptionRetryPolicy(rules=[RetryRule(exception=PermanentError, action=RetryAction.FAIL)]),
    }
