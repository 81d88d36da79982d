"""The history of a run: who made which of its levels champion, when, and why.

It lies beside the sealed manifest as ``history/0001.json``, ``history/0002.json``, …: entries are only ever added, by
conditional writes. Each one names the sha256 of the entry before it, the first one that of the manifest, so an entry
that is edited or taken out of the middle shows when the history is read. That the last ones are missing shows in the
registry, where the version's tags repeat each entry with its digest.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores.artifacts import Store

Action = Literal["requested", "promoted", "rejected", "timed_out", "rolled_back"]

_WRITERS_AT_ONCE = 50


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happened to a version.

    Args:
        action: what; `promoted` and `rolled_back` made the version champion.
        key: the same for every attempt at one decision, so that it is entered once.
        at: when, ISO 8601 in UTC.
        by: who.
        via: where they said so: ``airflow``, ``gisp`` (the command line) or ``recipe`` (its gate, without a person).
        reason: why, in their own words.
        approvers: who may approve; of a request.
    """

    action: Action
    key: str
    at: str
    by: str
    via: str
    reason: str = ""
    approvers: tuple[str, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether it made the version champion."""
        return self.action in ("promoted", "rolled_back")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The version that a decision is about.

    Args:
        model_name: the registered model.
        version: its number there.
        level: name of the level.
        alias: the champion's alias of that level.
        from_version: the champion when the decision was entered; None: there was none.
    """

    model_name: str
    version: int
    level: str
    alias: str
    from_version: int | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry: its number from 1, the sha256 of what came before, and what happened to which version."""

    number: int
    previous: str
    decision: Decision
    candidate: Candidate

    @property
    def facts(self) -> dict[str, Any]:
        """All of it in one mapping, JSON-ready."""
        decision = {**asdict(self.decision), "approvers": list(self.decision.approvers)}
        return {"number": self.number, "previous": self.previous, **decision, **asdict(self.candidate)}

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.facts)

    @property
    def sha256(self) -> str:
        """Digest of its bytes."""
        return sha256_bytes(self.to_bytes())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Entry":
        """The inverse of `facts`.

        Raises:
            ValueError: it is not what `facts` gives.
        """
        try:
            given = {**value, "approvers": tuple(value["approvers"])}
            decision = Decision(**{field.name: given.pop(field.name) for field in fields(Decision)})
            candidate = Candidate(**{field.name: given.pop(field.name) for field in fields(Candidate)})
            return cls(decision=decision, candidate=candidate, **given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no entry of a history: {error}") from error


class RunHistory:
    """The history of the run in a store.

    Args:
        store: opened at the run's own prefix.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self) -> list[Entry]:
        """All entries in order.

        Raises:
            IntegrityError: one of them was edited or removed, or was not written by this package.
        """
        found = {key for key in self._store.keys(Keys.HISTORY) if key.endswith(".json")}
        expected = [_key(number) for number in range(1, len(found) + 1)]
        if found != set(expected):
            missing = ", ".join(sorted(set(expected) - found))
            raise IntegrityError(f"{self._store.uri}: the history has {len(found)} entries, and lacks {missing}")
        if not expected:
            return []
        entries: list[Entry] = []
        previous = self._origin()
        for number, key in enumerate(expected, start=1):
            entry = self._entry(key)
            if (entry.number, entry.previous) != (number, previous):
                raise IntegrityError(
                    f"{self._store.uri}/{key} does not follow from what lies before it: that entry, or this one, was "
                    f"edited"
                )
            entries.append(entry)
            previous = entry.sha256
        return entries

    def append(self, decision: Decision, candidate: Candidate) -> Entry:
        """Add an entry, once for each `Decision.key`; the entry that is there keeps its facts.

        Raises:
            InputError: the run has no manifest yet.
            IntegrityError: as in `read`.
        """
        for _ in range(_WRITERS_AT_ONCE):
            entries = self.read()
            if found := next((entry for entry in entries if entry.decision.key == decision.key), None):
                return found
            previous = entries[-1].sha256 if entries else self._origin()
            entry = Entry(number=len(entries) + 1, previous=previous, decision=decision, candidate=candidate)
            try:
                self._store.put_bytes(_key(entry.number), entry.to_bytes())
            except IntegrityError:
                continue  # another decision took this number a moment ago
            return entry
        raise IntegrityError(f"{self._store.uri}/{Keys.HISTORY}: {_WRITERS_AT_ONCE} attempts found no free number")

    def _origin(self) -> str:
        """What the first entry follows from."""
        manifest = self._store.stat(Keys.MANIFEST)
        if manifest is None:
            raise InputError(
                f"{self._store.uri}: the run has no manifest yet. Only levels of a finished run can be promoted; let "
                f"the run end first"
            )
        return manifest.sha256

    def _entry(self, key: str) -> Entry:
        ref = self._store.stat(key)
        if ref is None:
            raise IntegrityError(f"{self._store.uri}/{key} is listed, and is not there")
        data = self._store.read(ref)
        try:
            entry = Entry.from_json(json.loads(data))
        except ValueError as error:
            raise IntegrityError(f"{ref.uri} is no entry of a history: {error}") from error
        if entry.to_bytes() != data:
            raise IntegrityError(f"{ref.uri} is not in the form in which entries are written: it was edited")
        return entry


def _key(number: int) -> str:
    return f"{Keys.HISTORY}/{number:04d}.json"
