"""The removal order: each step's follows from its scores and the order before, and the last is the run's."""

import numpy as np

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.subject import Json, Subject
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Kind, Removals
from gisp_tasks.tasks.runtime import scratch

CHECK = "order"


def check_trajectory(audit: Audit, subject: Subject) -> None:
    """Rank and remove again from the published scores, without model or accelerator, and compare step by step."""
    order = RemovalOrder.empty()
    for step in subject.manifest["steps"]:
        key = Keys.step(step["number"], "removal_order.safetensors")
        with audit.guard(CHECK, key):
            published, metadata = subject.load_order(key)
            audit.expect(CHECK, key, "metadata", found=metadata, recorded=subject.run.order_metadata)
            removed = int((published.steps == step["number"]).sum())
            audit.expect(CHECK, key, "the number of removals", found=removed, recorded=step["removed"])
            again = _extended(audit, subject, step, order)
            if difference := first_difference(published, again):
                audit.find(CHECK, key, f"it does not follow from the step's scores: {difference}")
            order = published
    with audit.guard(CHECK, Keys.ORDER):
        finished, metadata = subject.load_order(Keys.ORDER)
        audit.expect(CHECK, Keys.ORDER, "metadata", found=metadata, recorded=subject.run.order_metadata)
        if difference := first_difference(finished, order):
            audit.find(CHECK, Keys.ORDER, f"it is not the order after the last step: {difference}")


def _extended(audit: Audit, subject: Subject, step: Json, before: RemovalOrder) -> RemovalOrder:
    """``before`` and what the step's scores remove."""
    run, number = subject.run, step["number"]
    key = Keys.step(number, "scores.safetensors")
    with scratch() as directory:
        scores, facts = StructureScores.load(subject.store.copy_out(key, directory / "scores.safetensors"))
    recorded = {
        "step": number,
        "objective": step["objective"],
        "micro_batch_tokens": step["micro_batch_tokens"],
        "run_id": run.run_id,
    }
    for name, value in recorded.items():
        audit.expect(CHECK, key, name, found=facts[name], recorded=value)
    return before.extend(run.plan.steps[number - 1].removals(scores, before.removals, run.geometry, run.limits), number)


def first_difference(found: RemovalOrder, expected: RemovalOrder) -> str | None:
    """Where two orders part, in words; None if they are the same."""
    tables = [np.stack([o.steps, o.removals.kinds, o.removals.layers, o.removals.indices]) for o in (found, expected)]
    length = min(table.shape[1] for table in tables)
    different = np.flatnonzero((tables[0][:, :length] != tables[1][:, :length]).any(axis=0))
    if len(different):
        place = int(different[0])
        here, there = (_named(order.removals, place) for order in (found, expected))
        steps = " and ".join(str(int(order.steps[place])) for order in (found, expected))
        return f"removal {place} is {here}, expected is {there} (steps {steps}); {len(different)} of {length} differ"
    if tables[0].shape != tables[1].shape:
        return f"it has {tables[0].shape[1]} removals, expected are {tables[1].shape[1]}"
    return None


def _named(removals: Removals, place: int) -> str:
    kind = Kind(int(removals.kinds[place])).name.lower()
    return f"{kind} {int(removals.indices[place])} of layer {int(removals.layers[place])}"
