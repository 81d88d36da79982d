"""The servers that a recipe names: asked before a run is begun."""

from gisp_tasks.recipe import Recipe
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.stores.registry import MlflowRegistry


def check_services(recipe: Recipe) -> None:
    """Prove that store and tracking server can be used as the run will use them.

    Raises:
        InputError: one refuses, or is none.
        RetryableError: one does not answer: a scheduler tries again, a person should be told at once.
    """
    open_store(recipe.publish.store, encryption=recipe.publish.encryption).check()
    if recipe.publish.mlflow is not None:
        registry = MlflowRegistry(recipe.publish.mlflow.tracking_uri)
        registry.check_source(recipe.publish.store)
        registry.check()
