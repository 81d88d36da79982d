"""Every object of a run, byte by byte, against the digests of the manifest; and nothing besides them."""

from collections.abc import Iterator

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.subject import Json, Subject
from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.stores.history import RunHistory
from gisp_tasks.tasks.sign import MANIFEST_SIGNATURE

CHECK = "objects"


def check_objects(audit: Audit, subject: Subject) -> None:
    """Read every object that the manifest names, and list what it does not name.

    The files of checkpoints are read with their level (`audit.levels`), by their listing.
    """
    with audit.guard(CHECK, Keys.MANIFEST):
        for key, entry in sorted(subject.manifest["artifacts"].items()):
            with audit.guard(CHECK, key):
                compare(audit, key, entry, found=subject.digest(key))
        for key, sha256 in _named_elsewhere(subject):
            recorded = subject.manifest["artifacts"].get(key, {}).get("sha256")
            if recorded is None:
                audit.find(CHECK, key, "belongs to every such run, and the manifest's artifacts do not name it")
            elif sha256 is not None and sha256 != recorded:
                audit.find(CHECK, key, f"the manifest names it twice, with sha256 {recorded} and {sha256}")
    with audit.guard(CHECK, Keys.HISTORY):
        _check_history(audit, subject)
    with audit.guard(CHECK, "listing"):
        _check_listing(audit, subject)


def compare(audit: Audit, key: str, recorded: Json, *, found: tuple[str, int]) -> None:
    """Count an object, with a finding if it has not the recorded digest and size."""
    sha256, size = found
    audit.objects += 1
    audit.size += size
    if (sha256, size) != (recorded["sha256"], recorded["size"]):
        audit.find(
            CHECK,
            key,
            f"{size} bytes with sha256 {sha256} are there, and the record says {recorded['size']} bytes with sha256 "
            f"{recorded['sha256']}",
        )


def _named_elsewhere(subject: Subject) -> Iterator[tuple[str, str | None]]:
    """Keys that a run has, each with its digest where another part of the manifest gives it."""
    manifest, run = subject.manifest, subject.run
    yield Keys.RECIPE, None
    yield Keys.MODEL, None
    yield Keys.PLAN, manifest["plan"]["sha256"]
    yield Keys.ORDER, manifest["removal_order"]["sha256"]
    yield Keys.CALIBRATION, None
    yield Keys.TOKENS, manifest["calibration"]["tokens_sha256"]
    if manifest["compensation"] is not None:
        description, tokens = run.compensation_keys
        yield description, None
        yield tokens, manifest["compensation"]["tokens_sha256"]
    for step in manifest["steps"]:
        yield Keys.step(step["number"], "scores.safetensors"), step["scores_sha256"]
        yield Keys.step(step["number"], "removal_order.safetensors"), step["removal_order_sha256"]
    for name in (DENSE, *run.recipe.level_names):
        for evaluation in run.recipe.evaluation.tasks:
            yield Keys.level(name, f"evaluation/{evaluation}.json"), None
    for level in subject.level_records:
        yield from _of_level(level)


def _of_level(level: Json) -> Iterator[tuple[str, str | None]]:
    name = level["name"]
    yield Keys.level(name, "level.json"), None
    yield Keys.level(name, "reload.json"), None
    yield Keys.level(name, "evaluation.json"), level["evaluation"]["sha256"]
    yield f"{level['model']['key']}.json", level["model"]["sha256"]
    for file, entry in level["package"].items():
        yield Keys.level(name, file), entry["sha256"]
    if level["compensation"] is not None:
        yield level["compensation"]["key"], level["compensation"]["sha256"]


def _check_history(audit: Audit, subject: Subject) -> None:
    """Findings where the decisions about the run's levels do not follow from each other, or from its manifest.

    That the last ones are missing shows only in the registry (`gisp history`).
    """
    for number, entry in enumerate(RunHistory(subject.store).read()):
        audit.objects += 1
        audit.size += len(entry.to_bytes())
        if number == 0 and entry.previous != subject.manifest_sha256:
            audit.find(CHECK, Keys.HISTORY, "its first entry was made for another manifest")


def _check_listing(audit: Audit, subject: Subject) -> None:
    """Findings for objects that nothing names; missing ones were found by reading them."""
    names = [level["name"] for level in subject.level_records]
    steps = [step["number"] for step in subject.manifest["steps"]]
    allowed = {Keys.MANIFEST, MANIFEST_SIGNATURE, Keys.REPORT, *subject.manifest["artifacts"]}
    allowed |= {Keys.step(number, "timing.json") for number in steps}
    allowed |= {Keys.level(name, "model.sig") for name in names}
    checkpoints = tuple(Keys.level(name, "model/") for name in names)
    for key in subject.store.keys(""):
        if key not in allowed and not key.startswith((*checkpoints, f"{Keys.HISTORY}/")):
            audit.find(CHECK, key, "lies there, and the manifest does not name it")
