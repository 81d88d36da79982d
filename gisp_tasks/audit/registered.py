"""The versions, aliases and tags of a run in the registry, against its manifest."""

from collections.abc import Mapping

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.subject import Json, Subject
from gisp_tasks.errors import InputError
from gisp_tasks.stores.registry import (
    DIGEST_TAG,
    GATE_TAG,
    LEVEL_TAG,
    MANIFEST_TAG,
    RUN_TAG,
    MlflowRegistry,
    RegisteredVersion,
    alias_name,
    champion_alias,
    gate_verdict,
)
from gisp_tasks.tasks.champions import unexplained
from gisp_tasks.tasks.promotion import tagged_entries
from gisp_tasks.tasks.register_model import version_tags

CHECK = "registry"


def check_registry(audit: Audit, subject: Subject, tracking_uri: str | None) -> None:
    """Compare what the registry says of the run, where it can be asked; a note where it cannot."""
    with audit.guard(CHECK, "recipe"):
        mlflow = subject.manifest["recipe"]["publish"]["mlflow"]
        if mlflow is None:
            return
        if tracking_uri is None:
            audit.notes.append(
                "the registry was not checked: give --tracking-uri, or set MLFLOW_TRACKING_URI; a manifest names no "
                "address"
            )
            return
        try:
            registry = MlflowRegistry.existing(tracking_uri)
        except InputError as error:
            audit.notes.append(f"the registry was not checked: {error}")
            return
        _check_versions(audit, subject, registry, mlflow["model_name"])
        _check_run(audit, subject, registry)


def _check_versions(audit: Audit, subject: Subject, registry: MlflowRegistry, model_name: str) -> None:
    versions, aliases = registry.versions(model_name), registry.aliases(model_name)
    run_id = subject.manifest["run_id"]
    for level in subject.level_records:
        where = f"{model_name}, {level['name']}"
        own = [v for v in versions if v.tags.get(RUN_TAG) == run_id and v.tags.get(LEVEL_TAG) == level["name"]]
        source = f"{subject.store.uri}/levels/{level['name']}"
        found = next((version for version in own if version.source == source), None)
        if found is None:
            others = ", ".join(version.source for version in own) or "none of this run"
            audit.find(CHECK, where, f"no version points to {source}; found: {others}")
            continue
        with audit.guard(CHECK, where):
            _check_tags(audit, subject, level, found)
            holder = aliases.get(alias_name(level["name"]))
            _check_alias(audit, level, found, _numbered(versions, holder))
    _check_champions(audit, subject, model_name, versions, aliases)


def _check_tags(audit: Audit, subject: Subject, level: Json, version: RegisteredVersion) -> None:
    where = f"{version.name} version {version.version}"
    expected = {
        **version_tags(subject.run, level),
        RUN_TAG: subject.manifest["run_id"],
        LEVEL_TAG: level["name"],
        DIGEST_TAG: level["model"]["sha256"],
        GATE_TAG: gate_verdict(level["gate"]["passed"]),
    }
    for tag, recorded in expected.items():
        audit.expect(CHECK, where, f"the tag {tag}", found=version.tags.get(tag), recorded=recorded)


def _check_alias(audit: Audit, level: Json, own: RegisteredVersion, holder: RegisteredVersion | None) -> None:
    """The level's alias is on this version, if it passed its gate; a later run's version may have taken it."""
    alias = f"{own.name}@{alias_name(level['name'])}"
    passed = level["gate"]["passed"]
    if holder is None:
        if passed:
            audit.find(CHECK, alias, f"the level passed its gate, and nothing has its alias, not version {own.version}")
        return
    if holder.version == own.version:
        if not passed:
            audit.find(CHECK, alias, f"it points to version {own.version}, which failed its gate")
        return
    if _took_over(holder, own, level):
        audit.notes.append(
            f"{alias} points to version {holder.version} of the run {holder.tags.get(RUN_TAG)}, registered after this "
            f"run's version {own.version}"
        )
    elif passed or holder.tags.get(RUN_TAG) == own.tags.get(RUN_TAG):
        audit.find(
            CHECK,
            alias,
            f"it points to version {holder.version} ({_described(holder.tags)}), and not to version {own.version} of "
            f"this level",
        )


def _check_champions(
    audit: Audit, subject: Subject, model_name: str, versions: list[RegisteredVersion], aliases: Mapping[str, int]
) -> None:
    """The champion of each level, of whichever run, is what was decided last."""
    own = {champion_alias(level["name"]) for level in subject.level_records}
    decisions = [facts for version in versions for facts in tagged_entries(version).values() if facts["alias"] in own]
    held = {alias: number for alias, number in aliases.items() if alias in own}
    for alias, problem in unexplained(held, decisions).items():
        audit.find(CHECK, f"{model_name}@{alias}", problem)


def _took_over(holder: RegisteredVersion, own: RegisteredVersion, level: Json) -> bool:
    """Whether a later run put its own version of the same level in this one's place, as a run does."""
    tags = holder.tags
    return (
        holder.version > own.version
        and tags.get(RUN_TAG) != own.tags.get(RUN_TAG)
        and tags.get(LEVEL_TAG) == level["name"]
        and tags.get(GATE_TAG) == "passed"
    )


def _described(tags: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {tags.get(tag)}" for name, tag in (("run", RUN_TAG), ("level", LEVEL_TAG)))


def _numbered(versions: list[RegisteredVersion], number: int | None) -> RegisteredVersion | None:
    return next((version for version in versions if version.version == number), None)


def _check_run(audit: Audit, subject: Subject, registry: MlflowRegistry) -> None:
    """The MLflow run remembers the digest of the manifest's bytes, out of the store's reach."""
    run_id = subject.manifest["run_id"]
    tags = registry.run_tags(experiment=subject.manifest["recipe"]["name"], run_id=run_id)
    if tags is None:
        audit.find(CHECK, f"MLflow run of {run_id}", "there is none")
        return
    audit.expect(
        CHECK,
        f"MLflow run of {run_id}",
        "the manifest's digest there",
        found=tags.get(MANIFEST_TAG),
        recorded=subject.manifest_sha256,
    )
