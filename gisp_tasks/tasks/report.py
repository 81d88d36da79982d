"""Last task: the manifest, the page, and the summary of a finished run."""

import json
import logging
from typing import Any

from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.report import Places, render
from gisp_tasks.stores.manifest import seal
from gisp_tasks.stores.registry import MANIFEST_TAG, MlflowRegistry, gate_verdict
from gisp_tasks.tasks.page import trajectory_of
from gisp_tasks.tasks.promotion import promotion_state
from gisp_tasks.tasks.record import manifest_content
from gisp_tasks.tasks.runtime import Json, Run
from gisp_tasks.tasks.sign import sign_manifest
from gisp_tasks.tasks.tracking import connect

logger = logging.getLogger(__name__)

_UNREGISTERED = dict.fromkeys(("model_name", "model_version", "alias", "promotion"))


def report(recipe: Json, run: Json, trigger: Json, airflow_page: str | None = None) -> Json:
    """Publish ``report.html`` and then, last of all, ``manifest.json``; return the manifest's reference.

    Args:
        recipe: as data.
        run: reference of the plan.
        trigger: who had the run made, as `manifest_schema.Trigger`.
        airflow_page: address of the DAG run, where a scheduler runs it.
    """
    this = Run.open(recipe, run)
    done = this.store.stat(Keys.MANIFEST)
    manifest_bytes = this.store.read(done) if done else seal(manifest_content(this), trigger)
    manifest = json.loads(manifest_bytes)
    summary = _summary(this, manifest)
    connection = connect(this)
    places = Places(airflow_run=airflow_page, **_in_mlflow(this, connection))
    page = render(summary, manifest=manifest, trajectory=trajectory_of(this), places=places)
    if this.store.stat(Keys.REPORT) is None:
        this.store.put_bytes(Keys.REPORT, page.encode())
    ref = this.store.put_bytes(Keys.MANIFEST, manifest_bytes)
    sign_manifest(this, ref)
    if connection:
        registry, mlflow_run = connection
        registry.log_text(mlflow_run, page, artifact_file=Keys.REPORT)
        registry.log_text(mlflow_run, manifest_bytes.decode(), artifact_file=Keys.MANIFEST)
        dense = manifest["levels"][0]["evaluation"]["metrics"]
        registry.log_metrics(mlflow_run, {f"level.{name}": value for name, value in dense.items()}, step=0)
        registry.tag_run(mlflow_run, {MANIFEST_TAG: ref.sha256})
        registry.close_run(mlflow_run, "FINISHED")
    logger.info("Manifest %s, report at %s/%s", manifest["sha256"], this.store.uri, Keys.REPORT)
    return ref.to_dict()


def _in_mlflow(run: Run, connection: tuple[MlflowRegistry, str] | None) -> dict[str, str]:
    """Where MLflow shows the run, as `Places` takes it; empty when the recipe names no server."""
    mlflow = run.recipe.publish.mlflow
    if connection is None or mlflow is None:
        return {}
    registry, mlflow_run = connection
    experiment = registry.experiment_of(mlflow_run)
    return {"tracking_uri": mlflow.tracking_uri, "experiment_id": experiment, "mlflow_run": mlflow_run}


def summarise(recipe: Json, manifest: Json) -> Json:
    """What `gisp run --json` prints, from the reference of a finished run's manifest."""
    ref = ArtifactRef.from_dict(manifest)
    prefix = ref.uri.removesuffix(Keys.MANIFEST)
    from gisp_tasks.stores.artifacts import open_store

    plan = open_store(prefix.rstrip("/")).stat(Keys.PLAN)
    assert plan is not None, "a run with a manifest has a plan"
    this = Run.open(recipe, plan.to_dict())
    return _summary(this, json.loads(this.store.read(ref)))


def _summary(run: Run, manifest: Json) -> Json:
    versions = _registered(run)
    levels = []
    for level in manifest["levels"]:
        version = versions.get(level["name"], _UNREGISTERED)
        dense = level["name"] == DENSE
        gate = None if dense else gate_verdict(level["gate"]["passed"])
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
    return {
        "run_id": run.run_id,
        "store": run.store.uri,
        "manifest_sha256": manifest["sha256"],
        "levels": levels,
        "step_seconds": [run.timing(step["number"]).get("seconds") for step in manifest["steps"]],
    }


def _registered(run: Run) -> dict[str, dict[str, Any]]:
    """Level name -> registered model, version, alias and state of promotion of this run."""
    mlflow = run.recipe.publish.mlflow
    if mlflow is None:
        return {}
    registry = MlflowRegistry(mlflow.tracking_uri)
    aliases = registry.aliases(mlflow.model_name)
    return {
        version.tags["gisp.level"]: {
            "model_name": version.name,
            "model_version": version.version,
            "alias": version.alias,
            "promotion": promotion_state(version, aliases),
        }
        for version in registry.versions(mlflow.model_name)
        if version.tags.get("gisp.run_id") == run.run_id
    }
