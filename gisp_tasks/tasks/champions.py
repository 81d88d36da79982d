"""What a person does with champions from the command line: approve a version, roll one back, read how it came about."""

from collections.abc import Mapping, Sequence
from uuid import uuid4

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.stores.history import Action, Decision
from gisp_tasks.stores.registry import GATE_TAG, LEVEL_TAG, RUN_TAG, MlflowRegistry, RegisteredVersion, champion_alias
from gisp_tasks.tasks.promotion import (
    Promotable,
    checked_reason,
    decide,
    finish,
    is_level,
    now,
    promotion_state,
    tagged_entries,
)
from gisp_tasks.tasks.runtime import Json


def approve(registry: MlflowRegistry, model_name: str, version: int, *, by: str, reason: str) -> Json:
    """Make a version the champion of its level; nothing if it is.

    Raises:
        InputError: there is no such version, it missed its gate, or ``by`` is not among the approvers of its request.
    """
    promotable = Promotable(registry, _version(registry, model_name, version))
    reason = checked_reason(reason)
    requests = [entry for entry in promotable.entries() if entry.decision.action == "requested"]
    approvers = requests[-1].decision.approvers if requests else ()
    if approvers and by not in approvers:
        raise InputError(
            f"{by} was to approve version {version} of {model_name}, whose recipe names as approvers: "
            f"{', '.join(approvers)}. Only they may; let one of them do it, or say --by NAME if you are one"
        )
    finish(promotable)
    if promotable.champion() != version:
        decide(promotable, _by_hand("promoted", by, reason))
    return _outcome(promotable)


def roll_back(
    registry: MlflowRegistry, model_name: str, level: str, *, to: int | None = None, by: str, reason: str
) -> Json:
    """Make an earlier champion of a level its champion again.

    A rollback that was interrupted is completed first, and then is all that is done.

    Args:
        registry: where the model is registered.
        model_name: the registered model.
        level: name of the level.
        to: the version; by default the champion before the present one was promoted.
        by: who.
        reason: why.

    Raises:
        InputError: the level has no champion, or no such earlier one.
    """
    reason = checked_reason(reason)
    versions = {version.version: version for version in levels_of(registry, model_name)}
    champion = registry.aliases(model_name).get(champion_alias(level))
    if champion is None or champion not in versions:
        held = sorted({version.tags[LEVEL_TAG] for version in versions.values()})
        raise InputError(
            f"{level} of {model_name} was to be rolled back, and has no champion. A level that was promoted is needed; "
            f"the registered levels are {', '.join(held)}; see gisp history {model_name!r}"
        )
    present = Promotable(registry, versions[champion])
    interrupted = finish(present)
    if to == champion or any(entry.decision.action == "rolled_back" for entry in interrupted):
        return _outcome(present)
    target = Promotable(registry, _earlier(present, versions, to))
    finish(target)
    if target.champion() != target.version.version:
        decide(target, _by_hand("rolled_back", by, reason))
    return _outcome(target)


def history(registry: MlflowRegistry, model_name: str) -> Json:
    """Everything that was decided about a model, newest first, from the registry and the runs' histories.

    Returns:
        ``champions`` (alias -> version), ``versions`` (number, level, run and state of each), ``events``, and
        ``problems``: what the two do not agree on, and histories that were edited.
    """
    versions = levels_of(registry, model_name)
    aliases = registry.aliases(model_name)
    champions = {alias: number for alias, number in sorted(aliases.items()) if alias.startswith("champion-")}
    events, problems = [], []
    for version in versions:
        found, wrong = _events(Promotable(registry, version))
        events += found
        problems += wrong
    problems += unexplained(champions, events).values()
    return {
        "model_name": model_name,
        "champions": champions,
        "versions": [
            {
                "version": version.version,
                "level": version.tags[LEVEL_TAG],
                "run_id": version.tags[RUN_TAG],
                "gate": version.tags.get(GATE_TAG),
                "state": promotion_state(version, aliases),
            }
            for version in versions
        ],
        "events": sorted(events, key=lambda event: (event["at"], event["number"]), reverse=True),
        "problems": list(dict.fromkeys(problems)),
    }


def unexplained(champions: Mapping[str, int], decisions: Sequence[Json]) -> dict[str, str]:
    """Champions that are not what was decided last: alias -> what is wrong.

    Args:
        champions: alias -> version, as the registry has them.
        decisions: facts of entries, each with when it was applied.
    """
    moves = [facts for facts in decisions if facts["action"] in ("promoted", "rolled_back") and facts["applied_at"]]
    decided = {facts["alias"]: facts["version"] for facts in sorted(moves, key=lambda facts: facts["applied_at"])}
    problems = {}
    for alias in sorted(champions.keys() | decided.keys()):
        found, expected = champions.get(alias), decided.get(alias)
        if found is None:
            problems[alias] = (
                f"{alias} is gone, and version {expected} was made champion last: it was removed by other means"
            )
        elif found != expected:
            problems[alias] = f"{alias} points to version {found}, and no entry says so: it was moved by other means"
    return problems


def levels_of(registry: MlflowRegistry, model_name: str) -> list[RegisteredVersion]:
    """The versions of a model that this package registered.

    Raises:
        InputError: there are none.
    """
    found = [version for version in registry.versions(model_name) if is_level(version)]
    if not found:
        raise InputError(
            f"model {model_name!r} was asked for, and the registry has no level of that name. A model that a recipe "
            f"registered is needed; correct the name (publish.mlflow.model_name) or the tracking server"
        )
    return found


def _version(registry: MlflowRegistry, model_name: str, number: int) -> RegisteredVersion:
    versions = levels_of(registry, model_name)
    found = next((version for version in versions if version.version == number), None)
    if found is None:
        numbers = ", ".join(str(version.version) for version in versions)
        raise InputError(f"version {number} of {model_name} was asked for, and there are {numbers}; give one of these")
    return found


def _by_hand(action: Action, by: str, reason: str) -> Decision:
    return Decision(action=action, key=f"gisp/{uuid4().hex}", at=now(), by=by, via="gisp", reason=reason)


def _outcome(promotable: Promotable) -> Json:
    """The last decision about a version that made it champion, and the champion now."""
    moves = [entry for entry in promotable.entries() if entry.decision.moves]
    return {
        "model_name": promotable.version.name,
        "level": promotable.level,
        "alias": promotable.alias,
        "champion": promotable.champion(),
        "version": promotable.version.version,
        "from_version": moves[-1].candidate.from_version if moves else None,
        "action": moves[-1].decision.action if moves else None,
    }


def _earlier(present: Promotable, versions: dict[int, RegisteredVersion], to: int | None) -> RegisteredVersion:
    """The version to go back to."""
    model_name, champion = present.version.name, present.version.version
    if to is None:
        promotions = [entry for entry in present.entries() if entry.decision.action == "promoted"]
        to = promotions[-1].candidate.from_version if promotions else None
    if to is None or to not in versions:
        raise InputError(
            f"{present.level} of {model_name} was to be rolled back, and no champion before version {champion} is "
            f"on record. An earlier champion is needed; name one with --to (see gisp history {model_name!r})"
        )
    target = Promotable(present.registry, versions[to])
    was_champion = any(entry.decision.moves for entry in target.entries())
    if target.level != present.level or not was_champion:
        raise InputError(
            f"version {to} of {model_name} was to be champion of {present.level} again, and it never was. Only an "
            f"earlier champion of that level can be rolled back to; to promote another version use gisp approve"
        )
    return versions[to]


def _events(promotable: Promotable) -> tuple[list[Json], list[str]]:
    """What store and tags say of one version, and where they differ."""
    version = promotable.version
    name, tagged = f"version {version.version} of {version.name}", tagged_entries(version)
    try:
        entries = {entry.number: entry for entry in promotable.entries()}
    except (IntegrityError, InputError) as error:
        return [_event(version, facts) for facts in tagged.values()], [str(error)]
    events, problems = [], []
    for number, facts in tagged.items():
        if number not in entries:
            events.append(_event(version, facts))
            problems.append(f"{name}: entry {number} is in the registry and was removed from {promotable.store.uri}")
        elif entries[number].sha256 != facts["sha256"]:
            problems.append(f"{name}: entry {number} in {promotable.store.uri} is not the one in the registry")
    for number, entry in entries.items():
        applied_at = tagged.get(number, {}).get("applied_at")
        events.append(_event(version, {**entry.facts, "sha256": entry.sha256, "applied_at": applied_at}))
        if number not in tagged:
            problems.append(f"{name}: entry {number} was not carried out; repeat the command or the task")
    return events, problems


def _event(version: RegisteredVersion, facts: Json) -> Json:
    shown = ("number", "at", "action", "level", "alias", "version", "from_version", "by", "via", "reason", "approvers")
    return {**{name: facts[name] for name in (*shown, "applied_at", "sha256")}, "run_id": version.tags[RUN_TAG]}
