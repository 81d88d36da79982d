"""A level's package: the MLflow model around its checkpoint, its evaluation, its record; every object verified."""

import logging

import numpy as np

from gisp_tasks.pruning.layout import layer_layout
from gisp_tasks.pruning.plan import DENSE, DTYPE_BYTES, Keys
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.refs import ArtifactRef, canonical_json, sha256_bytes
from gisp_tasks.tasks.gate import judge
from gisp_tasks.tasks.runtime import Json, Run, scratch
from gisp_tasks.tasks.score import load_order
from gisp_tasks.tasks.sign import sign_level
from gisp_tasks.tasks.tracking import log_metrics

logger = logging.getLogger(__name__)


def upload_to_s3(recipe: Json, run: Json, level: str, model: Json, order: Json) -> Json:
    """Complete ``levels/<level>/`` and publish its record ``level.json`` last.

    The checkpoint is read back from the store, so what is packaged is what users will download.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name.
        model: reference of the level's checkpoint.
        order: reference of the removal order that completes the level.
    """
    from gisp_tasks.export.mlmodel import write_mlmodel
    from gisp_tasks.export.model_card import model_card

    this, model_ref = Run.open(recipe, run), ArtifactRef.from_dict(model)
    if done := this.store.stat(Keys.level(level, "level.json")):
        sign_level(this, this.read_json(Keys.level(level, "level.json")))  # the recipe may ask for it since
        return done.to_dict()
    evaluation, dense = merged_evaluation(this, level), merged_evaluation(this, DENSE)
    plan = this.plan.level(level)
    with scratch() as directory:
        this.store.fetch_directory(model_ref, directory / "model")
        write_mlmodel(directory, digest=model_ref.sha256, metadata={"level": level, "run_id": this.run_id})
        package = {}
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            if not name.startswith("model/"):
                ref = this.store.put(Keys.level(level, name), path)
                package[name] = {"sha256": ref.sha256, "size": ref.size}
    geometry = this.geometry
    keep = load_order(this, ArtifactRef.from_dict(order)).level(
        plan.sparsity, geometry=geometry, width_multiple=this.limits.width_multiple
    )
    layouts = [layer_layout(geometry, keep, layer) for layer in range(geometry.num_layers)]
    evaluation_ref = this.publish_json(Keys.level(level, "evaluation.json"), evaluation)
    this.store.verify_directory(Keys.level(level, "model"))
    parameters = geometry.parameters_of(keep) + geometry.other_parameters
    record: Json = {
        "name": level,
        "target_sparsity": plan.sparsity,
        "param_sparsity": geometry.sparsity_of(keep),
        "parameters": parameters,
        "weight_bytes": parameters * DTYPE_BYTES[this.recipe.model.dtype],
        "bytes": model_ref.size,
        "query_heads": [len(layout.query_heads) for layout in layouts],
        "kv_groups": [len(layout.kv_heads) for layout in layouts],
        "channels": [len(layout.channels) for layout in layouts],
        "keep_set_sha256": keep_set_digest(keep),
        "compensation": _compensation(this, level),
        "model": {"key": Keys.level(level, "model"), "sha256": model_ref.sha256, "size": model_ref.size},
        "gguf": this.read_json(Keys.level(level, "gguf.json")) if this.recipe.export.gguf != "none" else None,
        "package": package,
        "evaluation": {"sha256": evaluation_ref.sha256, "metrics": evaluation["metrics"]},
        "reload": this.read_json(Keys.level(level, "reload.json")),
    }
    record["gate"] = judge(this.recipe, geometry, record=record, dense=dense["metrics"])
    card = model_card(
        this.recipe,
        {**record, "protocol": evaluation["protocol"]},
        model=this.model,
        calibration=this.read_json(Keys.CALIBRATION),
        dense=dense["metrics"],
        run={"run_id": this.run_id, "dense_parameters": this.plan.dense_parameters},
    )
    # In the directory that users download, beside what its listing names: the checkpoint was complete before it was
    # measured.
    card_ref = this.store.put_bytes(Keys.level(level, "model/README.md"), card.encode())
    package["model/README.md"] = {"sha256": card_ref.sha256, "size": card_ref.size}
    sign_level(this, record)
    metrics = {f"level.{name}": value for name, value in evaluation["metrics"].items()}
    # Before the record is published: a task that finds it there does nothing more.
    log_metrics(this, metrics, step=round(plan.sparsity * 100))
    return this.store.put_bytes(Keys.level(level, "level.json"), canonical_json(record)).to_dict()


def _compensation(run: Run, level: str) -> Json | None:
    """How least squares went; None where levels keep the base model's weights."""
    if run.recipe.pruning.compensation == "none":
        return None
    key = Keys.level(level, "compensation.json")
    ref = run.store.stat(key)
    assert ref is not None, "the task before this one published it"
    record = {name: value for name, value in run.read_json(key).items() if name != "by_projection"}
    return {**record, "key": key, "sha256": ref.sha256}


def merged_evaluation(run: Run, level: str) -> Json:
    """All metrics and protocols of a level, from the files of its evaluation tasks."""
    merged: Json = {"metrics": {}, "protocol": {}}
    for task in run.recipe.evaluation.tasks:
        part = run.read_json(Keys.level(level, f"evaluation/{task}.json"))
        for section, values in merged.items():
            values.update(part[section])
    return merged


def keep_set_digest(keep: KeepSets) -> str:
    """sha256 of the packed bits of both keep-sets, attention first."""
    return sha256_bytes(np.packbits(keep.attention).tobytes() + np.packbits(keep.mlp).tobytes())
