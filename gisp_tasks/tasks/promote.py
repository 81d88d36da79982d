"""The end of a run that promotes: a level asks to become champion, and the answer takes effect."""

import json
from collections.abc import Sequence
from uuid import uuid4

from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.report import gate_value
from gisp_tasks.stores.history import Action, Decision
from gisp_tasks.stores.registry import LEVEL_TAG, MlflowRegistry
from gisp_tasks.tasks.promotion import MAX_REASON_CHARACTERS, Promotable, decide, finish, now
from gisp_tasks.tasks.runtime import Json, Run
from gisp_tasks.tasks.upload_to_s3 import merged_evaluation

NOBODY = "nobody"


def request(recipe: Json, run: Json, level: Json) -> Json | None:
    """Enter that a level asks to become champion, unless its last request is still open.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: reference of ``level.json``.

    Returns:
        ``subject`` and ``body`` (Markdown) of the question. None when the level missed its gate or is champion: there
        is nothing to ask.
    """
    this = Run.open(recipe, run)
    promotable, record = _registered(this, level)
    finish(promotable)
    champion = promotable.champion()
    if not promotable.gate_passed or champion == promotable.version.version:
        return None
    approvers = this.recipe.publish.promotion.approvers
    last = [entry.decision for entry in promotable.entries()][-1:]
    if not last or (last[0].action, last[0].approvers) != ("requested", approvers):
        key = f"request/{uuid4().hex}"
        by = this.recipe.name
        decide(promotable, Decision(action="requested", key=key, at=now(), by=by, via="recipe", approvers=approvers))
    version = promotable.version
    return {
        "subject": f"Version {version.version} of {version.name}: champion of {promotable.level}?",
        "body": _question(this, promotable, record, champion),
    }


def promote(recipe: Json, run: Json, level: Json, answer: Json | None) -> bool:
    """Carry out the answer, or the verdict of the gate where the recipe asks nobody; whether it is champion then.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: reference of ``level.json``.
        answer: ``key``, ``at``, ``approved``, ``by`` (ids by which the person is known; none: nobody answered in
            time) and ``reason``; None under ``promotion.by: gate``.
    """
    this = Run.open(recipe, run)
    promotable, _ = _registered(this, level)
    finish(promotable)
    if answer is not None:
        decision = _decision(answer, this.recipe.publish.promotion.approvers)
    elif promotable.gate_passed:
        # Once for each version: a run that is repeated does not undo a rollback.
        version = promotable.version
        key = f"gate/{version.name}/{version.version}"
        decision = Decision(action="promoted", key=key, at=now(), by=this.recipe.name, via="recipe")
    else:
        return False
    already = promotable.champion() == promotable.version.version
    if not already or decision.action == "rejected":
        decide(promotable, decision)
    return promotable.champion() == promotable.version.version


def _decision(answer: Json, approvers: Sequence[str]) -> Decision:
    """What an answer comes to: only a named approver's yes is one."""
    known_as = answer["by"]
    reason = " ".join((answer["reason"] or "").split())[:MAX_REASON_CHARACTERS]
    approver = next((name for name in known_as if name in approvers), None)
    if not known_as:
        return Decision(action="timed_out", key=answer["key"], at=answer["at"], by=NOBODY, via="airflow")
    if answer["approved"] and approver is None:
        reason = f"approved by {known_as[0]}, who is not among the approvers {', '.join(approvers)}"
    action: Action = "promoted" if answer["approved"] and approver else "rejected"
    return Decision(
        action=action, key=answer["key"], at=answer["at"], by=approver or known_as[0], via="airflow", reason=reason
    )


def _registered(run: Run, level: Json) -> tuple[Promotable, Json]:
    """The level's version and its record."""
    record = json.loads(run.store.read(ArtifactRef.from_dict(level)))
    mlflow = run.recipe.publish.mlflow
    assert mlflow is not None, "the recipe refuses a promotion without publish.mlflow"
    registry = MlflowRegistry(mlflow.tracking_uri)
    source = f"{run.store.uri}/{Keys.level(record['name'], '').rstrip('/')}"
    version = next(
        version
        for version in registry.versions(mlflow.model_name)
        if version.source == source and version.tags.get(LEVEL_TAG) == record["name"]
    )
    return Promotable(registry, version), record


def _question(run: Run, promotable: Promotable, record: Json, champion: int | None) -> str:
    """What a person should see before they say yes."""
    dense = merged_evaluation(run.recipe, DENSE, read=run.read_json)["metrics"]
    metrics = record["evaluation"]["metrics"]
    version, serving = promotable.version.version, f"version {champion}" if champion is not None else "no version"
    checks = ["| gate | limit | value |", "|---|---|---|"]
    for check in record["gate"]["checks"]:
        limit, value = gate_value(check["limit"]), gate_value(check["value"])
        checks.append(f"| {check['name']} ({check['metric']}) | {limit} | {value} |")
    rows = ["| metric | dense | level |", "|---|---|---|"]
    rows += [f"| {name} | {dense[name]:.4g} | {value:.4g} |" for name, value in metrics.items() if name in dense]
    answers = f"**Approve** moves it to version {version}. **Reject**, or no answer in time, leaves it."
    share = f"{100 * record['param_sparsity']:.1f} % of the decoder layers' parameters are removed"
    parts = (
        f"`{promotable.alias}` points to {serving}. {answers}",
        f"{share}; {record['parameters']:,} are left, in {record['bytes']:,} bytes.",
        "\n".join(checks),
        "\n".join(rows),
        f"Report: `{run.store.uri}/{Keys.REPORT}`",
    )
    return "\n\n".join(parts)
