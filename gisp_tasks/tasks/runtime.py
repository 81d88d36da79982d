"""What every task begins with: the recipe, the run's plan and its part of the store."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.plan import Keys, Plan, make_plan
from gisp_tasks.pruning.ranking import Limits, limits_of
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.recipe import Recipe
from gisp_tasks.refs import ArtifactRef, canonical_json
from gisp_tasks.stores.artifacts import Store, open_store

logger = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: its recipe, its identity and its prefix of the store.

    Args:
        recipe: what was asked, with the revision of the model that was pinned.
        run_id: 12 hex digits, the digest of everything that decides the run's bytes.
        model: the record of the base model (`stores.model_source`).
        store: opened at ``<store>/runs/<run_id>``.
    """

    recipe: Recipe
    run_id: str
    model: Json
    store: Store

    @classmethod
    def open(cls, recipe: Json, run: Json) -> "Run":
        """From a recipe and the reference of a published plan.

        Raises:
            IntegrityError: the plan is not what the reference says.
        """
        parsed = Recipe.parse(recipe)
        ref = ArtifactRef.from_dict(run)
        store = open_store(ref.uri.removesuffix("/" + Keys.PLAN), encryption=parsed.publish.encryption)
        document = json.loads(store.read(ref))
        pinned = parsed.with_revision(document["identity"]["recipe"]["model"]["revision"])
        return cls(pinned, document["run_id"], document["model"], store)

    @cached_property
    def geometry(self) -> Geometry:
        """Of the dense model."""
        return geometry_of(self.model["config"], granularity=self.recipe.importance.granularity)

    @cached_property
    def plan(self) -> Plan:
        """The plan, made again from recipe and geometry: a pure function of both."""
        return make_plan(self.recipe, self.geometry)

    @cached_property
    def limits(self) -> Limits:
        """What ranking must respect."""
        pruning = self.recipe.pruning
        return limits_of(pruning.protect, pruning.width_multiple, self.geometry.num_layers)

    @property
    def order_metadata(self) -> dict[str, str]:
        """What a removal order says of itself."""
        return {
            "geometry": json.dumps(self.plan.to_dict()["geometry"], sort_keys=True),
            "granularity": self.recipe.importance.granularity,
            "base_source": self.model["source"],
            "base_revision": self.model["revision"],
            "run_id": self.run_id,
        }

    def keep_sets(self, level: str, order: RemovalOrder) -> KeepSets:
        """What a level keeps, as ``order`` and the recipe's widths give it."""
        return order.level(
            self.plan.level(level).sparsity, geometry=self.geometry, width_multiple=self.limits.width_multiple
        )

    def calibration(self) -> CalibrationSet:
        """The published calibration set.

        Raises:
            IntegrityError: it is not there, or not what was published.
        """
        return self._sequences(Keys.CALIBRATION, Keys.TOKENS)

    def compensation_set(self) -> CalibrationSet:
        """The published sequences for least squares; those of calibration, where the recipe names no others.

        Raises:
            IntegrityError: as in `calibration`.
        """
        return self._sequences(*self.compensation_keys)

    @property
    def compensation_keys(self) -> tuple[str, str]:
        """Description and tokens of what least squares reads."""
        if self.recipe.pruning.compensation_data is None:
            return Keys.CALIBRATION, Keys.TOKENS
        return Keys.COMPENSATION, Keys.COMPENSATION_TOKENS

    def _sequences(self, *keys: str) -> CalibrationSet:
        """From the description's key and the tokens' key."""
        with scratch() as directory:
            for key in keys:
                ref = self.store.stat(key)
                if ref is None:
                    raise self._missing(key)
                path = self.store.fetch(ref, directory / ref.name)
            return calibration_data.load(path).set

    def read_json(self, key: str) -> Json:
        """A published JSON document.

        Raises:
            IntegrityError: it is not there.
        """
        ref = self.store.stat(key)
        if ref is None:
            raise self._missing(key)
        document: Json = json.loads(self.store.read(ref))
        return document

    def timing(self, step: int) -> Json:
        """What a step took, as it was recorded; empty where it was not."""
        ref = self.store.stat(Keys.step(step, "timing.json"))
        return json.loads(self.store.read(ref)) if ref else {}

    def _missing(self, key: str) -> IntegrityError:
        return IntegrityError(f"{self.store.uri}/{key} is not there; an earlier task of this run published it")

    def publish_json(self, key: str, value: Mapping[str, Any]) -> ArtifactRef:
        """Publish a JSON document in canonical form."""
        return self.store.put_bytes(key, canonical_json(value))

    def publish_observation(self, key: str, value: Mapping[str, Any]) -> ArtifactRef:
        """Publish what differs between two runs of the same bytes, such as timings: the first one stays."""
        try:
            return self.store.stat(key) or self.publish_json(key, value)
        except IntegrityError:
            logger.info("%s was published by another attempt meanwhile", key)
            found = self.store.stat(key)
            if found is None:
                raise
            return found


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory of this task alone, removed at its end."""
    with tempfile.TemporaryDirectory(prefix="gisp-") as directory:
        yield Path(directory)


def make_torch_deterministic() -> None:
    """Same inputs, same bytes: seeds and kernels fixed. Called once in each process that computes."""
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
