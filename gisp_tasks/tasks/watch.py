"""The release watch: which revision a recipe's model has upstream now, and the one run that it deserves."""

import logging

from gisp_tasks.recipe import Recipe
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.runtime import Json

logger = logging.getLogger(__name__)


def look_up(recipe: Json) -> Json:
    """The newest revision and the id of the Airflow run for it.

    The id is made of the recipe and the revision alone, so Airflow itself sees to it that a revision is started once,
    however often and by whatever it is found. Of the recipe counts what decides a run's bytes (`Recipe.identity`): the
    same revision is started again when the levels change, not when the schedule does.

    Args:
        recipe: as data.

    Raises:
        InputError: as in `model_source.newest_revision`.
        RetryableError: as there.
    """
    parsed = Recipe.parse(recipe)
    revision = model_source.newest_revision(parsed.model)
    digest = sha256_bytes(canonical_json(parsed.identity()))[:12]
    logger.info("%s is at revision %s", parsed.model.source, revision)
    return {"revision": revision, "dag_run_id": f"watch__{digest}__{revision}"}
