"""Last task: the manifest, the page, and the summary of a finished run."""

import json
import logging
from typing import Any

from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.report import render
from gisp_tasks.stores.manifest import deviations, environment, seal
from gisp_tasks.tasks.gate import gate_metric
from gisp_tasks.tasks.promotion import promotion_state
from gisp_tasks.tasks.runtime import Json, Run, scratch
from gisp_tasks.tasks.tracking import connect
from gisp_tasks.tasks.upload_to_s3 import merged_evaluation

logger = logging.getLogger(__name__)

_UNREGISTERED = dict.fromkeys(("model_name", "model_version", "alias", "promotion"))


def report(recipe: Json, run: Json) -> Json:
    """Publish ``report.html`` and then, last of all, ``manifest.json``; return the manifest's reference.

    Args:
        recipe: as data.
        run: reference of the plan.
    """
    this = Run.open(recipe, run)
    done = this.store.stat(Keys.MANIFEST)
    manifest_bytes = this.store.read(done) if done else seal(_content(this))
    manifest = json.loads(manifest_bytes)
    summary = _summary(this, manifest)
    metric = gate_metric(this.recipe, this.geometry) if this.recipe.evaluation.perplexity_task else None
    page = render(summary, manifest=manifest, curve_metric=metric)
    if this.store.stat(Keys.REPORT) is None:
        this.store.put_bytes(Keys.REPORT, page.encode())
    ref = this.store.put_bytes(Keys.MANIFEST, manifest_bytes)
    if connection := connect(this):
        registry, mlflow_run = connection
        registry.log_text(mlflow_run, page, artifact_file=Keys.REPORT)
        registry.log_text(mlflow_run, manifest_bytes.decode(), artifact_file=Keys.MANIFEST)
        dense = manifest["levels"][0]["evaluation"]["metrics"]
        registry.log_metrics(mlflow_run, {f"level.{name}": value for name, value in dense.items()}, step=0)
        registry.close_run(mlflow_run, "FINISHED")
    logger.info("Manifest %s, report at %s/%s", manifest["sha256"], this.store.uri, Keys.REPORT)
    return ref.to_dict()


def summarise(recipe: Json, manifest: Json) -> Json:
    """What `gisp run --json` prints, from the reference of a finished run's manifest."""
    ref = ArtifactRef.from_dict(manifest)
    prefix = ref.uri.removesuffix(Keys.MANIFEST)
    from gisp_tasks.stores.artifacts import open_store

    plan = open_store(prefix.rstrip("/")).stat(Keys.PLAN)
    assert plan is not None, "a run with a manifest has a plan"
    this = Run.open(recipe, plan.to_dict())
    return _summary(this, json.loads(this.store.read(ref)))


def _content(run: Run) -> Json:
    """Everything that the manifest names."""
    calibration = run.read_json(Keys.CALIBRATION)
    levels = [_dense_record(run)] + [run.read_json(Keys.level(level.name, "level.json")) for level in run.plan.levels]
    for level in levels:
        level["evaluation"]["protocol"] = merged_evaluation(run, level["name"])["protocol"]
    return {
        "run_id": run.run_id,
        "recipe": run.recipe.identity(),
        "plan": {"key": Keys.PLAN, "sha256": _digest(run, Keys.PLAN)},
        "model": run.model,
        "calibration": {**calibration, "tokens_sha256": _digest(run, Keys.TOKENS)},
        "compensation": _compensation_data(run),
        "steps": [_step_record(run, step) for step in range(1, len(run.plan.steps) + 1)],
        "removal_order": {"key": Keys.ORDER, "sha256": _digest(run, Keys.ORDER)},
        "levels": levels,
        "environment": environment(),
        "deviations": deviations(run.recipe),
    }


def _compensation_data(run: Run) -> Json | None:
    """What least squares read; None where it was not asked for."""
    if run.recipe.pruning.compensation == "none":
        return None
    key, tokens = run.compensation_keys
    return {**run.read_json(key), "tokens_sha256": _digest(run, tokens)}


def _dense_record(run: Run) -> Json:
    evaluation = merged_evaluation(run, DENSE)
    return {
        "name": DENSE,
        "param_sparsity": 0.0,
        "parameters": run.plan.dense_parameters,
        "bytes": sum(entry["size"] for name, entry in run.model["files"].items() if name.endswith(".safetensors")),
        "evaluation": {"metrics": evaluation["metrics"]},
    }


def _step_record(run: Run, number: int) -> Json:
    key = Keys.step(number, "scores.safetensors")
    ref = run.store.stat(key)
    assert ref is not None, "a finished run has the scores of every step"
    plan = run.plan.steps[number - 1]
    with scratch() as directory:
        _, facts = StructureScores.load(run.store.fetch(ref, directory / "scores.safetensors"))
        order_ref = run.store.stat(Keys.step(number, "removal_order.safetensors"))
        assert order_ref is not None, "a finished run has the order of every step"
        order, _ = RemovalOrder.load(run.store.fetch(order_ref, directory / "removal_order.safetensors"))
    return {
        "number": number,
        "target_sparsity": plan.target_sparsity,
        "structure_ratio": plan.structure_ratio,
        "completes": list(plan.completes),
        "objective": facts["objective"],
        "micro_batch_tokens": facts["micro_batch_tokens"],
        "removed": int((order.steps == number).sum()),
        "scores_sha256": ref.sha256,
        "removal_order_sha256": order_ref.sha256,
    }


def _summary(run: Run, manifest: Json) -> Json:
    versions = _registered(run)
    levels = []
    for level in manifest["levels"]:
        version = versions.get(level["name"], _UNREGISTERED)
        dense = level["name"] == DENSE
        gate = None if dense else "passed" if level["gate"]["passed"] else "failed"
        levels.append(
            {
                "name": level["name"],
                "param_sparsity": level["param_sparsity"],
                "parameters": level["parameters"],
                "bytes": level["bytes"],
                "metrics": level["evaluation"]["metrics"],
                "uri": run.model["source"] if dense else f"{run.store.uri}/levels/{level['name']}",
                **{name: version[name] for name in ("model_name", "model_version", "alias")},
                "gate": gate,
                "promotion": version["promotion"],
            }
        )
    seconds = [_seconds(run, step["number"]) for step in manifest["steps"]]
    return {
        "run_id": run.run_id,
        "store": run.store.uri,
        "manifest_sha256": manifest["sha256"],
        "levels": levels,
        "step_seconds": seconds,
    }


def _registered(run: Run) -> dict[str, dict[str, Any]]:
    """Level name -> registered model, version, alias and state of promotion of this run."""
    mlflow, connection = run.recipe.publish.mlflow, connect(run)
    if mlflow is None or connection is None:
        return {}
    aliases = connection[0].aliases(mlflow.model_name)
    return {
        version.tags["gisp.level"]: {
            "model_name": version.name,
            "model_version": version.version,
            "alias": version.alias,
            "promotion": promotion_state(version, aliases),
        }
        for version in connection[0].versions(mlflow.model_name)
        if version.tags.get("gisp.run_id") == run.run_id
    }


def _seconds(run: Run, step: int) -> float | None:
    ref = run.store.stat(Keys.step(step, "timing.json"))
    return json.loads(run.store.read(ref))["seconds"] if ref else None


def _digest(run: Run, key: str) -> str:
    ref = run.store.stat(key)
    assert ref is not None, f"a finished run has {key}"
    return ref.sha256
