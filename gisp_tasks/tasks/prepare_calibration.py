"""Calibration text to tokens with weights, published once for all steps."""

from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.recipe import CalibrationSection
from gisp_tasks.refs import ArtifactRef, canonical_json
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.resolve_model import build_calibration
from gisp_tasks.tasks.runtime import Json, Run, scratch


def prepare_calibration(recipe: Json, run: Json) -> Json:
    """Publish ``calibration/tokens.safetensors`` and its description; return the tokens' reference.

    What least squares reads lies beside it, where the recipe names data for that.
    """
    this = Run.open(recipe, run)
    wanted = [(this.recipe.calibration, Keys.TOKENS, Keys.CALIBRATION)]
    if this.recipe.pruning.compensation_data:
        wanted.append((this.recipe.pruning.compensation_data, Keys.COMPENSATION_TOKENS, Keys.COMPENSATION))
    refs = [_publish(this, *part) for part in wanted]
    return refs[0].to_dict()


def _publish(run: Run, section: CalibrationSection, tokens_key: str, description_key: str) -> ArtifactRef:
    if done := run.store.stat(tokens_key):
        return done
    calibration = build_calibration(run.recipe, section, model_source.locate(run.model), run.model)
    with scratch() as directory:
        path = directory / "tokens.safetensors"
        calibration_data.save(calibration, path)
        run.store.put_bytes(description_key, canonical_json(calibration.description))
        return run.store.put(tokens_key, path)
