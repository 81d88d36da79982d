"""The manifest against itself and against the documents that it was made from."""

import json

from pydantic import ValidationError

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.subject import Subject
from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores.environment import package_digest
from gisp_tasks.stores.manifest import check_seal, deviations
from gisp_tasks.stores.manifest_schema import Manifest

CHECK = "record"
_MAX_SCHEMA_FINDINGS = 20


def check_manifest(audit: Audit, subject: Subject) -> None:
    """Its form, its digests of itself, and its bytes."""
    try:
        check_seal(subject.manifest)
    except (IntegrityError, ValueError) as error:
        audit.find("manifest", Keys.MANIFEST, str(error))
    try:
        Manifest.model_validate(subject.manifest)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False)[:_MAX_SCHEMA_FINDINGS]:
            where = ".".join(map(str, fault["loc"]))
            audit.find("manifest", Keys.MANIFEST, f"not of the form that its schema says: {where}: {fault['msg']}")
    if sha256_bytes(canonical_json(subject.manifest)) != subject.manifest_sha256:
        audit.find("manifest", Keys.MANIFEST, "its bytes are not the canonical form in which it was published")


def check_record(audit: Audit, subject: Subject) -> None:
    """Recipe, model, plan, data sets and run id agree with each other wherever they stand."""
    manifest = subject.manifest
    with audit.guard(CHECK, Keys.RECIPE):
        audit.expect(
            CHECK, Keys.RECIPE, "the recipe", found=subject.read_yaml(Keys.RECIPE), recorded=manifest["recipe"]
        )
    with audit.guard(CHECK, Keys.MODEL):
        audit.expect(CHECK, Keys.MODEL, "the model", found=subject.read_json(Keys.MODEL), recorded=manifest["model"])
        files = manifest["model"]["files"]
        for name, entry in manifest["tokenizer"]["files"].items():
            audit.expect(CHECK, Keys.MODEL, f"the tokenizer's {name}", found=files.get(name), recorded=entry)
    with audit.guard(CHECK, Keys.CALIBRATION):
        recorded = {key: value for key, value in manifest["calibration"].items() if key != "tokens_sha256"}
        audit.expect(
            CHECK, Keys.CALIBRATION, "calibration", found=subject.read_json(Keys.CALIBRATION), recorded=recorded
        )
        source = recorded["source"]
        audit.expect(CHECK, Keys.CALIBRATION, "source", found=source, recorded=manifest["datasets"]["calibration"])
    with audit.guard(CHECK, Keys.PLAN):
        _check_plan(audit, subject)
    with audit.guard(CHECK, Keys.MANIFEST):
        _check_deviations(audit, subject)


def _check_plan(audit: Audit, subject: Subject) -> None:
    """Its run id is what its own inputs come to, and all of it is what the manifest says."""
    manifest, run = subject.manifest, subject.run
    document = subject.read_json(Keys.PLAN)
    identity = document["identity"]
    expected = {
        "run id": (sha256_bytes(canonical_json(identity))[:12], manifest["run_id"]),
        "the plan's run id": (document["run_id"], manifest["run_id"]),
        "the prefix": (subject.store.uri.rpartition("/")[2], manifest["run_id"]),
        "the recipe": (identity["recipe"], manifest["recipe"]),
        "the model": (document["model"], manifest["model"]),
        "the model's identity": (
            identity["model"],
            {"revision": manifest["model"]["revision"], "files": manifest["model"]["files"]},
        ),
        "the data sets": (identity["datasets"], manifest["datasets"]),
        "the package's version": (identity["package_version"], manifest["environment"]["package"]),
    }
    for what, (found, recorded) in expected.items():
        audit.expect(CHECK, Keys.PLAN, what, found=found, recorded=recorded)
    made_again = json.loads(canonical_json(run.plan.to_dict()))
    audit.expect(CHECK, Keys.PLAN, "the plan that recipe and model give", found=made_again, recorded=document["plan"])
    for step, planned in zip(manifest["steps"], run.plan.steps, strict=True):
        where = f"step {planned.number}"
        for name in ("number", "target_sparsity", "structure_ratio"):
            audit.expect(CHECK, where, name, found=getattr(planned, name), recorded=step[name])
        audit.expect(CHECK, where, "completes", found=list(planned.completes), recorded=step["completes"])


def _check_deviations(audit: Audit, subject: Subject) -> None:
    """Only where this is the code that wrote them: another version may say it in other words."""
    if subject.manifest["environment"]["package_sha256"] != package_digest():
        audit.notes.append(
            f"this package is not the one that made the run (its version {subject.manifest['environment']['package']}, "
            f"other code): the list of deviations was not compared"
        )
        return
    found = deviations(subject.run.recipe)
    audit.expect(CHECK, Keys.MANIFEST, "deviations", found=found, recorded=subject.manifest["deviations"])
