"""One evaluation of one checkpoint, as it lies in the store: fetched, verified, loaded, measured."""

import logging

from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.recipe import SpeedEvaluation
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.measure import measure
from gisp_tasks.tasks.measure_speed import measure_speed
from gisp_tasks.tasks.runtime import Json, Run, make_torch_deterministic, scratch

logger = logging.getLogger(__name__)


def evaluate(recipe: Json, run: Json, level: str, evaluation: str, model: Json | None) -> Json:
    """Publish ``levels/<level>/evaluation/<evaluation>.json``: metrics, each with its protocol.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name, or ``dense``.
        evaluation: a key of the recipe's ``evaluation``.
        model: reference of the level's checkpoint; None for the dense model.
    """
    this = Run.open(recipe, run)
    key = Keys.level(level, f"evaluation/{evaluation}.json")
    if done := this.store.stat(key):
        return done.to_dict()
    make_torch_deterministic()
    with scratch() as directory:
        if model is None:
            assert level == DENSE, "only the dense model is not in the store"
            checkpoint = model_source.locate(this.model)
        else:
            checkpoint = this.store.fetch_directory(ArtifactRef.from_dict(model), directory / "model")
        remote_code = this.recipe.model.trust_remote_code
        section = getattr(this.recipe.evaluation, evaluation)
        dtype = this.recipe.model.dtype
        if isinstance(section, SpeedEvaluation):
            dense = None if model is None else model_source.locate(this.model)
            gguf = None if this.recipe.export.gguf == "none" else this.recipe.export.gguf
            result = measure_speed(
                checkpoint, section, dense=dense, dtype=dtype, gguf=gguf, trust_remote_code=remote_code
            )
        else:
            result = measure(checkpoint, evaluation, section, dtype=dtype, trust_remote_code=remote_code)
    for name, value in result["metrics"].items():
        logger.info("%s %s: %.6g", level, name, value)
    # Seconds differ between attempts; everything else must not.
    publish = this.publish_observation if isinstance(section, SpeedEvaluation) else this.publish_json
    return publish(key, result).to_dict()
