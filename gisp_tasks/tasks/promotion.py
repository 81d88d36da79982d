"""A decision about a version takes effect: it is entered, the champion's alias moves, and the version says so.

Three calls, in this order: the entry in the run's history (`stores.history`), the alias, a tag of the version that
repeats the entry and marks it as carried out. Killed between any two, the next attempt finds the entry by its key, sees
that the tag is missing, and does the rest. An alias that someone else moved meanwhile is left where it is, and the tag
says that the decision was overtaken.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.artifacts import Store, open_store
from gisp_tasks.stores.history import Candidate, Decision, Entry, RunHistory
from gisp_tasks.stores.registry import (
    DIGEST_TAG,
    GATE_TAG,
    LEVEL_TAG,
    RUN_TAG,
    MlflowRegistry,
    RegisteredVersion,
    champion_alias,
)

logger = logging.getLogger(__name__)

MAX_REASON_CHARACTERS = 500
_ENTRY_TAG = "gisp.history."


@dataclass(frozen=True)
class Promotable:
    """A registered level and the run that made it."""

    registry: MlflowRegistry
    version: RegisteredVersion

    @property
    def level(self) -> str:
        """Name of the level."""
        return self.version.tags[LEVEL_TAG]

    @property
    def alias(self) -> str:
        """The champion's alias of its level."""
        return champion_alias(self.level)

    @property
    def gate_passed(self) -> bool:
        """Whether it met its recipe's gate."""
        return self.version.tags.get(GATE_TAG) == "passed"

    @property
    def store(self) -> Store:
        """The run's part of the store."""
        return open_store(self.version.source.rpartition(f"/{Keys.level(self.level, '').rstrip('/')}")[0])

    @property
    def history(self) -> RunHistory:
        """Of the run, so of its other levels too."""
        return RunHistory(self.store)

    def champion(self) -> int | None:
        """Number of the level's champion now."""
        return self.registry.aliases(self.version.name).get(self.alias)

    def entries(self) -> list[Entry]:
        """What the run's history says of this version."""
        mine = (self.version.name, self.version.version)
        return [e for e in self.history.read() if (e.candidate.model_name, e.candidate.version) == mine]


def is_level(version: RegisteredVersion) -> bool:
    """Whether a version was registered by this package."""
    return {RUN_TAG, LEVEL_TAG, DIGEST_TAG} <= version.tags.keys()


def decide(promotable: Promotable, decision: Decision) -> Entry:
    """Enter a decision and carry it out; again with the same key: what is left of it.

    Raises:
        InputError: the run is not finished, or the version missed its gate and would become champion.
        IntegrityError: its checkpoint is not what was registered, or the history was edited.
    """
    if decision.moves:
        _check_fit(promotable)
    version = promotable.version
    candidate = Candidate(
        model_name=version.name,
        version=version.version,
        level=promotable.level,
        alias=promotable.alias,
        from_version=promotable.champion(),
    )
    entry = promotable.history.append(decision, candidate)
    _carry_out(promotable, entry)
    return entry


def finish(promotable: Promotable) -> list[Entry]:
    """Carry out what was entered for a version and then interrupted; the entries that this was done for."""
    done = tagged_entries(promotable.version)
    left = [entry for entry in promotable.entries() if entry.number not in done]
    for entry in left:
        _carry_out(promotable, entry)
    return left


def tagged_entries(version: RegisteredVersion) -> dict[int, dict[str, Any]]:
    """Number -> entry with its ``sha256`` and ``applied_at`` (null: overtaken), from a version's tags."""
    tags = {key: value for key, value in version.tags.items() if key.startswith(_ENTRY_TAG)}
    return {int(key.removeprefix(_ENTRY_TAG)): json.loads(tags[key]) for key in sorted(tags)}


def promotion_state(version: RegisteredVersion, aliases: Mapping[str, int]) -> str | None:
    """`champion`, `awaiting approval`, `rejected`, `timed out`, `former champion`; None: nothing was ever decided."""
    if aliases.get(champion_alias(version.tags.get(LEVEL_TAG, ""))) == version.version:
        return "champion"
    entries = list(tagged_entries(version).values())
    states = {"requested": "awaiting approval", "rejected": "rejected", "timed_out": "timed out"}
    return states.get(entries[-1]["action"], "former champion") if entries else None


def checked_reason(reason: str) -> str:
    """A reason as it is entered.

    Raises:
        InputError: too long for a tag, or empty.
    """
    text = " ".join(reason.split())
    if not 0 < len(text) <= MAX_REASON_CHARACTERS:
        raise InputError(
            f"a reason of {len(text)} characters was given; 1 to {MAX_REASON_CHARACTERS} are kept in the history. "
            f"Say in a sentence why"
        )
    return text


def now() -> str:
    """The time as histories hold it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _check_fit(promotable: Promotable) -> None:
    version = promotable.version
    if not promotable.gate_passed:
        raise InputError(
            f"version {version.version} of {version.name} was to become champion of {promotable.level}, and its tag "
            f"says gate={version.tags.get(GATE_TAG)}. Only versions that passed their gate can be promoted; choose "
            f"another, or run the recipe with a gate that this level meets"
        )
    found = promotable.store.verify_directory(Keys.level(promotable.level, "model"))
    if found.sha256 != version.tags[DIGEST_TAG]:
        raise IntegrityError(
            f"{found.uri} has the digest {found.sha256}, and version {version.version} of {version.name} was "
            f"registered with {version.tags[DIGEST_TAG]}: it is not the same checkpoint"
        )


def _carry_out(promotable: Promotable, entry: Entry) -> None:
    """Move the alias where the entry says so, and mark the entry as carried out; nothing if it is marked."""
    version, registry = promotable.version, promotable.registry
    if entry.number in tagged_entries(version):
        return
    candidate = entry.candidate
    applied = True
    if entry.decision.moves:
        champion = promotable.champion()
        applied = champion in (candidate.from_version, candidate.version)
        if not applied:
            logger.warning("%s moved to version %s meanwhile, and is left there", candidate.alias, champion)
        elif champion != candidate.version:
            registry.set_alias(version.name, candidate.alias, candidate.version)
            logger.info("%s: %s -> %d", candidate.alias, candidate.from_version, candidate.version)
    facts = {**entry.facts, "sha256": entry.sha256, "applied_at": now() if applied else None}
    registry.tag(version.name, version.version, f"{_ENTRY_TAG}{entry.number:04d}", json.dumps(facts, sort_keys=True))
