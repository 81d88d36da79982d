"""The steps once more, from the recorded model and tokens, held against the recorded removal order bit by bit."""

import logging
from dataclasses import dataclass, field
from typing import Any

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.subject import Json, Subject
from gisp_tasks.audit.trajectory import first_difference
from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.stores.environment import computed_on, environment
from gisp_tasks.tasks.child import run_in_child
from gisp_tasks.tasks.prune import extend
from gisp_tasks.tasks.runtime import Run, scratch
from gisp_tasks.tasks.score import Scorer

logger = logging.getLogger(__name__)

CHECK = "replay"
_NUMERIC_PACKAGES = ("torch", "transformers", "numpy", "safetensors")


@dataclass
class _Outcome:
    """JSON-ready, to come back from the process that computed."""

    findings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_replay(audit: Audit, subject: Subject) -> None:
    """Score and prune again in a process of its own, as a run's tasks do."""
    with audit.guard(CHECK, "steps"):
        outcome = run_in_child(
            "gisp_tasks.audit.replay:replay", prefix=subject.store.uri, manifest=dict(subject.manifest)
        )
        for where, message in outcome["findings"]:
            audit.find(CHECK, where, message)
        audit.notes += outcome["notes"]


def replay(prefix: str, manifest: Json) -> Json:
    """Repeat the steps until one removes something else, or to the end.

    Args:
        prefix: the run's.
        manifest: of the run.

    Returns:
        ``findings``: pairs of place and message; ``notes``.

    Raises:
        IntegrityError: model or tokens are not those of the manifest.
    """
    subject, outcome = Subject(open_store(prefix), manifest, ""), _Outcome()
    with scratch() as directory:
        again = Run(subject.run.recipe, subject.run.run_id, subject.run.model, open_store(directory.as_uri()))
        _copy_calibration(subject, again)
        _use_recorded_threads(manifest)
        scorer = Scorer(again)
        outcome.notes += _differences(manifest)
        order = RemovalOrder.empty()
        for step in manifest["steps"]:
            scores = scorer.score(step["number"], order)
            if scores.sha256 != step["scores_sha256"] and not any("scores" in note for note in outcome.notes):
                outcome.notes.append(
                    f"replay: from step {step['number']} on, scores differ in their bytes from the recorded ones"
                )
            ref, order = extend(again, step["number"], order, scores)
            if ref.sha256 != step["removal_order_sha256"]:
                where = f"step {step['number']}"
                outcome.findings.append((where, f"the removal order differs: {_explain(subject, step, order)}"))
                return vars(outcome)
        finished = again.store.stat(Keys.ORDER)
        if finished is None or finished.sha256 != manifest["removal_order"]["sha256"]:
            outcome.findings.append((Keys.ORDER, "every step is the same, and the finished order is another file"))
    if not outcome.findings:
        outcome.notes.append(f"replay: all {len(manifest['steps'])} steps gave the recorded removal order, bit by bit")
    return vars(outcome)


def _copy_calibration(subject: Subject, again: Run) -> None:
    """Tokens and their description, of the digests that the manifest gives."""
    with scratch() as directory:
        for key in (Keys.TOKENS, Keys.CALIBRATION):
            entry = subject.manifest["artifacts"][key]
            ref = ArtifactRef(uri=f"{subject.store.uri}/{key}", sha256=entry["sha256"], size=entry["size"])
            again.store.put(key, subject.store.fetch(ref, directory / ref.name))


def _use_recorded_threads(manifest: Json) -> None:
    """Sums over more or fewer threads differ in their last bits."""
    import torch

    recorded = {part["threads"] for part in manifest["computed_on"] if part["device"] == "cpu"}
    if len(recorded) == 1:
        torch.set_num_threads(recorded.pop())


def _differences(manifest: Json) -> list[str]:
    """Where this machine and its packages are not those of the record."""
    here, notes = computed_on(), []
    for part in manifest["computed_on"]:
        notes += [
            f"replay: steps {part['steps'][0]} to {part['steps'][-1]} were made with {name} {part[name]}, here it is "
            f"{value}"
            for name, value in here.items()
            if part[name] != value
        ]
    packages: dict[str, Any] = environment()["packages"]
    recorded = manifest["environment"]["packages"]
    notes += [
        f"replay: the run was recorded with {name} {recorded.get(name)}, here it is {packages[name]}"
        for name in _NUMERIC_PACKAGES
        if recorded.get(name) != packages[name]
    ]
    return notes


def _explain(subject: Subject, step: Json, found: RemovalOrder) -> str:
    """The first removal that is another one."""
    try:
        recorded, _ = subject.load_order(Keys.step(step["number"], "removal_order.safetensors"))
    except IntegrityError as error:
        return f"and the recorded one cannot be read: {error}"
    return first_difference(found, recorded) or "in its metadata only"
