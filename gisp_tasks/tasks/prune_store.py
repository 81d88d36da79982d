"""Retention: which runs of a store nobody needs any more, and their removal.

A run goes only when it is older than the days asked for and nothing refers to it. What refers to a run is a version
in the model registry, whatever made it, and another run of the store that began with one of its levels. So the
registry is always asked, and one that does not answer ends the command before anything is removed.
"""

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gisp_tasks.errors import InputError, RegistryUnavailableError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.artifacts import Store, StoredObject, open_store
from gisp_tasks.stores.registry import MlflowRegistry

logger = logging.getLogger(__name__)

_RUN_KEY = re.compile(r"^runs/([0-9a-f]{12})/.")
_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class RunInStore:
    """One run, and what retention says of it.

    Args:
        run_id: 12 hex digits.
        finished: its manifest is there.
        age_days: since its last artefact was written.
        num_bytes: of all its artefacts.
        kept_because: why it stays; None: it goes.
    """

    run_id: str
    finished: bool
    age_days: float
    num_bytes: int
    kept_because: str | None = None


@dataclass(frozen=True)
class Retention:
    """What a store holds, and what goes.

    Args:
        runs: all of them, the oldest first.
    """

    runs: tuple[RunInStore, ...]

    @property
    def going(self) -> tuple[RunInStore, ...]:
        """Those that nothing keeps."""
        return tuple(run for run in self.runs if run.kept_because is None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "runs": [asdict(run) for run in self.runs],
            "freed_bytes": sum(run.num_bytes for run in self.going),
        }


def review(store_uri: str, *, tracking_uri: str, keep_days: float) -> Retention:
    """What retention says of every run of a store. Removes nothing.

    Args:
        store_uri: ``publish.store`` of the recipes.
        tracking_uri: the registry that may refer to its runs.
        keep_days: every run whose last artefact is younger stays.

    Raises:
        InputError: the registry does not answer, or the store does not exist or refuses.
    """
    registry = MlflowRegistry(tracking_uri)
    registry.check()
    store = open_store(store_uri)
    objects = _by_run(store)
    referring = _registered(store, registry) | _bases(store, objects)
    now_s = time.time()
    runs = []
    for run_id, items in objects.items():
        run = RunInStore(
            run_id=run_id,
            finished=f"runs/{run_id}/{Keys.MANIFEST}" in {item.key for item in items},
            age_days=(now_s - max(item.modified_s for item in items)) / _DAY_S,
            num_bytes=sum(item.size for item in items),
        )
        young = f"younger than {keep_days:g} days" if run.age_days < keep_days else None
        runs.append(replace(run, kept_because=referring.get(run_id) or young))
    return Retention(tuple(sorted(runs, key=lambda run: -run.age_days)))


def remove(store_uri: str, retention: Retention, *, tracking_uri: str) -> None:
    """Remove what nothing keeps.

    The registry is asked again before each run, since a level may have been registered meanwhile. A removal that is
    cut short leaves an unfinished run, and the next one ends it.

    Raises:
        RegistryUnavailableError: the registry went away; runs that were not yet removed stay.
    """
    store, registry = open_store(store_uri), MlflowRegistry(tracking_uri)
    for run in retention.going:
        if found := _registered(store, registry).get(run.run_id):
            logger.info("%s stays: %s since it was looked at", run.run_id, found)
            continue
        for key in sorted((item.key for item in store.objects(f"runs/{run.run_id}")), key=_removal_rank):
            store.delete(key)
        logger.info("%s: removed, %d bytes", run.run_id, run.num_bytes)


def _removal_rank(key: str) -> tuple[int, str]:
    """The manifest first, then every record, then the data: no record ever vouches for what is gone."""
    name = key.split("/", 2)[2]
    return (0 if name == Keys.MANIFEST else 1 if name.endswith(".json") else 2), key


def _by_run(store: Store) -> Mapping[str, list[StoredObject]]:
    """Run id -> its objects. What lies elsewhere below the store is none of retention's business."""
    found: dict[str, list[StoredObject]] = defaultdict(list)
    for item in store.objects("runs"):
        if match := _RUN_KEY.match(item.key):
            found[match.group(1)].append(item)
    return found


def _registered(store: Store, registry: MlflowRegistry) -> dict[str, str]:
    """Run id -> the versions whose source lies in it."""
    versions: dict[str, list[str]] = defaultdict(list)
    for source, name in registry.sources():
        # The same bucket may be named by another prefix or scheme (s3a://): the run id alone decides.
        for run_id in re.findall(r"/runs/([0-9a-f]{12})(?:/|$)", source):
            versions[run_id].append(name)
    return {run_id: f"registered as {_shown(names)}" for run_id, names in versions.items()}


def _bases(store: Store, objects: Mapping[str, list[StoredObject]]) -> dict[str, str]:
    """Run id -> a run of this store that began with one of its levels."""
    return {
        base: f"base model of run {run_id}"
        for run_id, source in _model_sources(store, objects)
        for base in re.findall(r"/runs/([0-9a-f]{12})/", source)
        if base != run_id
    }


def _model_sources(store: Store, objects: Mapping[str, list[StoredObject]]) -> Iterator[tuple[str, str]]:
    for run_id, items in objects.items():
        key = f"runs/{run_id}/{Keys.MODEL}"
        ref = store.stat(key) if key in {item.key for item in items} else None
        if ref is not None:
            yield run_id, json.loads(store.read(ref))["source"]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tracking_uri_of(given: str | None) -> str:
    """The registry to ask: an option or ``MLFLOW_TRACKING_URI``.

    Raises:
        InputError: neither is there. Without a registry nobody knows what is in use.
    """
    if given:
        return given
    raise InputError(
        "prune-store was asked for, and no registry was named; a run may go only when its registry says that no level "
        "of it is a version. Give --tracking-uri, or set MLFLOW_TRACKING_URI"
    )
