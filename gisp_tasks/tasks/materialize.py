"""A level's checkpoint: cut from the base model by the removal order, proven by reloading, published."""

import logging
from dataclasses import asdict

from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.runtime import Json, Run, make_torch_deterministic, scratch
from gisp_tasks.tasks.score import load_order

logger = logging.getLogger(__name__)
_PROOF_TOKENS = 64


def materialize(recipe: Json, run: Json, level: str, order: Json) -> Json:
    """Publish ``levels/<level>/reload.json`` and ``levels/<level>/model/``; return the directory's reference.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name.
        order: reference of the removal order after the step that completes the level, or a later one.
    """
    from gisp_tasks.export.huggingface import write_checkpoint
    from gisp_tasks.export.reload import prove_reload

    this = Run.open(recipe, run)
    if done := this.store.stat_directory(Keys.level(level, "model")):
        return done.to_dict()
    make_torch_deterministic()
    base = model_source.locate(this.model)
    geometry = this.geometry
    keep = load_order(this, ArtifactRef.from_dict(order)).level(
        this.plan.level(level).sparsity, geometry=geometry, width_multiple=this.limits.width_multiple
    )
    with scratch() as directory:
        out = directory / "model"
        parameters = write_checkpoint(base, out, geometry=geometry, keep=keep, dtype=this.recipe.model.dtype)
        expected = geometry.parameters_of(keep) + geometry.other_parameters
        assert parameters == expected, f"{parameters} parameters were written, {expected} planned"
        prompt = _calibration_prompt(this)
        proof = prove_reload(base, out, geometry=geometry, keep=keep, prompt=prompt)
        logger.info("Level %s: %d parameters, logits within %.1e", level, parameters, proof.max_logit_difference)
        this.publish_json(Keys.level(level, "reload.json"), asdict(proof))
        return this.store.put_directory(Keys.level(level, "model"), out).to_dict()


def _calibration_prompt(run: Run) -> list[int]:
    """The first tokens of the first calibration sequence."""
    ref = run.store.stat(Keys.TOKENS)
    assert ref is not None, "steps cannot have run without calibration tokens"
    with scratch() as directory:
        calibration = calibration_data.load(run.store.fetch(ref, directory / "tokens.safetensors"))
    start, end = calibration.spans[0]
    return [int(token) for token in calibration.tokens[start : min(end, start + _PROOF_TOKENS)]]
