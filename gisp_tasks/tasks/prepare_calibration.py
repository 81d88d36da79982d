"""Calibration text to tokens with weights, published once for all steps."""

from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import canonical_json
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.resolve_model import build_calibration
from gisp_tasks.tasks.runtime import Json, Run, scratch


def prepare_calibration(recipe: Json, run: Json) -> Json:
    """Publish ``calibration/tokens.safetensors`` and its description; return the tokens' reference."""
    this = Run.open(recipe, run)
    if done := this.store.stat(Keys.TOKENS):
        return done.to_dict()
    calibration = build_calibration(this.recipe, model_source.locate(this.model), this.model)
    with scratch() as directory:
        path = directory / "tokens.safetensors"
        calibration_data.save(calibration, path)
        this.store.put_bytes(Keys.CALIBRATION, canonical_json(calibration.description))
        return this.store.put(Keys.TOKENS, path).to_dict()
