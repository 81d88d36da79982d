"""Retention: which runs of a store nobody needs any more, and their removal.

A run goes only when it is older than the days asked for and nothing refers to it. What refers to a run is a version
in the model registry, whatever made it, and another run of the store that began with one of its levels. So the
registry is always asked; one that does not answer ends the command before anything is removed, and one that does not
have the model a run publishes to is not the one to release it.
"""

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.artifacts import Store, StoredObject, open_store
from gisp_tasks.stores.registry import Inventory, MlflowRegistry

logger = logging.getLogger(__name__)

_RUN_KEY = re.compile(r"^runs/([0-9a-f]{12})/.")
_RUN_IN_ADDRESS = re.compile(r"/runs/([0-9a-f]{12})(?![0-9a-f])")
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

    @property
    def num_bytes(self) -> int:
        """What they hold together."""
        return sum(run.num_bytes for run in self.going)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"runs": [asdict(run) for run in self.runs], "bytes_to_free": self.num_bytes}


def review(store_uri: str, *, tracking_uri: str, keep_days: float) -> Retention:
    """What retention says of every run of a store. Removes nothing.

    Args:
        store_uri: ``publish.store`` of the recipes.
        tracking_uri: the registry that may refer to its runs.
        keep_days: every run whose last artefact is younger stays.

    Raises:
        InputError: the registry refuses or is not there yet, or the store refuses.
        RegistryUnavailableError: the registry does not answer.
    """
    registry, store = MlflowRegistry.existing(tracking_uri), open_store(store_uri)
    objects = _by_run(store)
    origins = {run_id: _origin(store, run_id, items) for run_id, items in objects.items()}
    inventory = registry.inventory()
    reasons = [_registered(inventory), _bases(origins), _strangers(origins, inventory)]
    now_s = time.time()
    runs = []
    for run_id, items in objects.items():
        run = RunInStore(
            run_id=run_id,
            finished=f"runs/{run_id}/{Keys.MANIFEST}" in {item.key for item in items},
            age_days=(now_s - max(item.modified_s for item in items)) / _DAY_S,
            num_bytes=sum(item.size for item in items),
        )
        found = [reason[run_id] for reason in reasons if run_id in reason]
        if run.age_days < keep_days:
            found.append(f"younger than {keep_days:g} days")
        runs.append(replace(run, kept_because=found[0] if found else None))
    return Retention(tuple(sorted(runs, key=lambda run: -run.age_days)))


def remove(store_uri: str, retention: Retention, *, tracking_uri: str) -> Retention:
    """Remove what nothing keeps; returns what was removed.

    The registry is asked again before each run, since a level may have been registered meanwhile. A removal that is
    cut short leaves an unfinished run, and the next one ends it.

    Raises:
        RegistryUnavailableError: the registry went away; runs that were not yet removed stay.
    """
    registry, store = MlflowRegistry.existing(tracking_uri), open_store(store_uri)
    removed = []
    for run in retention.going:
        if found := _registered(registry.inventory()).get(run.run_id):
            logger.info("%s stays: %s since it was looked at", run.run_id, found)
            continue
        for key in sorted(store.keys(f"runs/{run.run_id}"), key=_removal_rank):
            store.delete(key)
        logger.info("%s: removed, %d bytes", run.run_id, run.num_bytes)
        removed.append(run)
    return Retention(tuple(removed))


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


@dataclass(frozen=True)
class _Origin:
    """What a run began with: its base model, and the registered model it publishes to."""

    source: str
    model_name: str | None


def _origin(store: Store, run_id: str, items: list[StoredObject]) -> _Origin | None:
    """From the run's first two artefacts; None where a killed task wrote only the first."""
    keys = [f"runs/{run_id}/{name}" for name in (Keys.MODEL, Keys.RECIPE)]
    if not set(keys) <= {item.key for item in items}:
        return None
    model, recipe = (store.read(ref) for ref in map(store.stat, keys) if ref is not None)
    mlflow = yaml.safe_load(recipe)["publish"]["mlflow"]
    return _Origin(json.loads(model)["source"], mlflow and mlflow["model_name"])


def _registered(inventory: Inventory) -> dict[str, str]:
    """Run id -> the versions that lie in it or came from it. The run id decides, whatever a bucket is called."""
    versions: dict[str, list[str]] = defaultdict(list)
    for name, place in inventory.places.items():
        for run_id in set(_RUN_IN_ADDRESS.findall(place)):
            versions[run_id].append(name)
    return {run_id: f"registered as {_shown(names)}" for run_id, names in versions.items()}


def _bases(origins: Mapping[str, _Origin | None]) -> dict[str, str]:
    """Run id -> a run of this store that began with one of its levels."""
    return {
        base: f"base model of run {run_id}"
        for run_id, origin in origins.items()
        if origin
        for base in _RUN_IN_ADDRESS.findall(origin.source)
    }


def _strangers(origins: Mapping[str, _Origin | None], inventory: Inventory) -> dict[str, str]:
    """Run id -> the model it is registered under, where this registry has none of that name: it is another one's."""
    return {
        run_id: f"published to {origin.model_name}, a model that this registry does not have"
        for run_id, origin in origins.items()
        if origin and origin.model_name and origin.model_name not in inventory.models
    }


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
