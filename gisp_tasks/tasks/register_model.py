"""A level that lies complete in the store becomes a version of the recipe's registered model."""

import json
import logging

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores.registry import LevelVersion, gate_verdict
from gisp_tasks.tasks.runtime import Json, Run
from gisp_tasks.tasks.tracking import connect

logger = logging.getLogger(__name__)


def register_model(recipe: Json, run: Json, level: Json) -> Json:
    """Register one level, once; return what its asset event tells.

    The objects are verified first: the registry would take an address where nothing lies.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: reference of ``level.json``.
    """
    this = Run.open(recipe, run)
    record = json.loads(this.store.read(ArtifactRef.from_dict(level)))
    this.store.verify_directory(record["model"]["key"])
    connection = connect(this)
    mlflow = this.recipe.publish.mlflow
    assert connection is not None, "only recipes with publish.mlflow have this task"
    assert mlflow is not None, "only recipes with publish.mlflow have this task"
    registry, mlflow_run = connection
    version = registry.register_level(
        LevelVersion(
            model_name=mlflow.model_name,
            level=record["name"],
            source=f"{this.store.uri}/{Keys.level(record['name'], '').rstrip('/')}",
            digest=record["model"]["sha256"],
            run_id=this.run_id,
            mlflow_run=mlflow_run,
            gate_passed=record["gate"]["passed"],
            tags=version_tags(this, record),
        )
    )
    return {
        "recipe": this.recipe.name,
        "level": record["name"],
        "run_id": this.run_id,
        "base_source": this.model["source"],
        "base_revision": this.model["revision"],
        "uri": version.source,
        "model_name": version.name,
        "model_version": version.version,
        "alias": version.alias,
        "digest": record["model"]["sha256"],
        "metrics": record["evaluation"]["metrics"],
        "gate": gate_verdict(record["gate"]["passed"]),
    }


def version_tags(run: Run, record: Json) -> dict[str, str]:
    """What a reader of the registry sees without opening anything.

    Args:
        run: that made the level.
        record: its ``level.json``.
    """
    facts = {
        "recipe": run.recipe.name,
        "base_source": run.model["source"],
        "base_revision": run.model["revision"],
        "param_sparsity": f"{record['param_sparsity']:.6f}",
        "parameters": str(record["parameters"]),
        "bytes": str(record["bytes"]),
        "keep_set_sha256": record["keep_set_sha256"],
    }
    metrics = {f"metric.{name}": f"{value:.6g}" for name, value in record["evaluation"]["metrics"].items()}
    return {f"gisp.{key}": value for key, value in facts.items()} | metrics
