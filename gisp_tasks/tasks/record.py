"""What a finished run's manifest says, collected from what its tasks published."""

import json
import logging

from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.refs import ArtifactRef, canonical_json
from gisp_tasks.stores.environment import environment
from gisp_tasks.stores.manifest import deviations, is_named
from gisp_tasks.tasks.runtime import Json, Run, scratch
from gisp_tasks.tasks.score import load_order
from gisp_tasks.tasks.upload_to_s3 import merged_evaluation

logger = logging.getLogger(__name__)


def manifest_content(run: Run) -> Json:
    """Everything that the manifest names, in the form of `stores.manifest_schema.Manifest`, less its digests."""
    from gisp_tasks.export.huggingface import TOKENIZER_FILES

    levels = [_dense_record(run)] + [run.read_json(Keys.level(level.name, "level.json")) for level in run.plan.levels]
    for level in levels:
        level["evaluation"]["protocol"] = merged_evaluation(run, level["name"])["protocol"]
    files = run.model["files"]
    order = load_order(run, _ref(run, Keys.ORDER))
    return {
        "run_id": run.run_id,
        "recipe": run.recipe.identity(),
        "plan": _key_record(run, Keys.PLAN),
        "model": run.model,
        "tokenizer": {"files": {name: files[name] for name in TOKENIZER_FILES if name in files}},
        "datasets": run.read_json(Keys.PLAN)["identity"]["datasets"],
        "calibration": _sequences(run, Keys.CALIBRATION, Keys.TOKENS),
        "compensation": _compensation_data(run),
        "steps": [_step_record(run, step, order) for step in range(1, len(run.plan.steps) + 1)],
        "computed_on": _computed_on(run),
        "removal_order": _key_record(run, Keys.ORDER),
        "levels": levels,
        "artifacts": _artifacts(run),
        "environment": environment(),
        "deviations": deviations(run.recipe),
    }


def _sequences(run: Run, description: str, tokens: str) -> Json:
    return {**run.read_json(description), "tokens_sha256": _ref(run, tokens).sha256}


def _compensation_data(run: Run) -> Json | None:
    """What least squares read; None where it was not asked for."""
    if run.recipe.pruning.compensation == "none":
        return None
    return _sequences(run, *run.compensation_keys)


def _dense_record(run: Run) -> Json:
    evaluation = merged_evaluation(run, DENSE)
    return {
        "name": DENSE,
        "param_sparsity": 0.0,
        "parameters": run.plan.dense_parameters,
        "bytes": sum(entry["size"] for name, entry in run.model["files"].items() if name.endswith(".safetensors")),
        "evaluation": {"metrics": evaluation["metrics"]},
    }


def _step_record(run: Run, number: int, order: RemovalOrder) -> Json:
    ref = _ref(run, Keys.step(number, "scores.safetensors"))
    plan = run.plan.steps[number - 1]
    with scratch() as directory:
        _, facts = StructureScores.load(run.store.fetch(ref, directory / "scores.safetensors"))
    return {
        "number": number,
        "target_sparsity": plan.target_sparsity,
        "structure_ratio": plan.structure_ratio,
        "completes": list(plan.completes),
        "objective": facts["objective"],
        "micro_batch_tokens": facts["micro_batch_tokens"],
        "removed": int((order.steps == number).sum()),
        "scores_sha256": ref.sha256,
        "removal_order_sha256": _ref(run, Keys.step(number, "removal_order.safetensors")).sha256,
    }


def _computed_on(run: Run) -> list[Json]:
    """Hardware and settings of the scoring passes, with the steps that each held for.

    A step that was scored twice, because the first attempt died before its scores were published, names the first.
    """
    steps_by: dict[bytes, list[int]] = {}
    for step in range(1, len(run.plan.steps) + 1):
        facts = run.read_json(Keys.step(step, "timing.json"))["computed_on"]
        steps_by.setdefault(canonical_json(facts), []).append(step)
    return [{"steps": steps, **json.loads(facts)} for facts, steps in steps_by.items()]


def _artifacts(run: Run) -> Json:
    """Digest and size of every object of the run that `is_named`, less those that a checkpoint's listing names."""
    models = [Keys.level(level.name, "model") for level in run.plan.levels]
    listed = {f"{model}/{name}" for model in models for name in run.read_json(f"{model}.json")}
    found: Json = {}
    for key in filter(is_named, run.store.keys()):
        if key in listed:
            continue
        try:
            ref = _ref(run, key)
        except IntegrityError as error:
            logger.warning("The manifest does not name %s: %s", key, error)
            continue
        found[key] = {"sha256": ref.sha256, "size": ref.size}
    return found


def _key_record(run: Run, key: str) -> Json:
    return {"key": key, "sha256": _ref(run, key).sha256}


def _ref(run: Run, key: str) -> ArtifactRef:
    ref = run.store.stat(key)
    assert ref is not None, f"a finished run has {key}"
    return ref
