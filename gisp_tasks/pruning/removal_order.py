"""The nested trajectory: one total order of removals, from which any level can be cut without a GPU."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.ranking import keep_sets
from gisp_tasks.pruning.structures import Geometry, KeepSets, Kind, Removals, parameters_along

_STEP, _RANK = "step", "rank"


@dataclass(frozen=True)
class RemovalOrder:
    """What was removed, in order, and in which step.

    Args:
        removals: n structures, first removed first.
        steps: int64 [n], the step (from 1) of each removal; never falls.
    """

    removals: Removals
    steps: NDArray[np.int64]

    @classmethod
    def empty(cls) -> "RemovalOrder":
        """Nothing removed yet."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(Removals(nothing, nothing, nothing), nothing)

    @property
    def last_step(self) -> int:
        """The newest step, 0 before the first."""
        return int(self.steps[-1]) if len(self.steps) else 0

    def extend(self, removals: Removals, step: int) -> "RemovalOrder":
        """This order followed by what ``step`` removes."""
        return RemovalOrder(
            self.removals.then(removals),
            np.concatenate([self.steps, np.full(len(removals), step, dtype=np.int64)]),
        )

    def keep_sets(self, geometry: Geometry) -> KeepSets:
        """What is left now, widths not rounded: the model that the next step scores."""
        return keep_sets(geometry, self.removals)

    def level(self, sparsity: float, *, geometry: Geometry, width_multiple: int) -> KeepSets:
        """The keep-sets of a level: the shortest prefix of the order whose written model meets ``sparsity``.

        MLP widths are rounded up to ``width_multiple`` by giving back the channels that were removed last in
        their layer, so levels stay nested. A layer whose MLP was emptied stays empty: it is written with dead
        channels.

        Raises:
            InputError: the order does not reach that far.
        """
        parameters = parameters_along(geometry, self.removals, width_multiple)
        met = np.flatnonzero(parameters <= geometry.max_parameters(sparsity))
        if not len(met):
            reach = 1 - parameters[-1] / geometry.decoder_parameters
            raise InputError(
                f"a level of sparsity {sparsity:g} was asked, but this removal order ends at {reach:.4g} "
                f"(width_multiple {width_multiple}); ask for less, or prune further (under "
                f"importance.compat: reference, raise pruning.structure_ratio)"
            )
        return _written(geometry, self.removals.prefix(int(met[0])), width_multiple)

    def written(self, geometry: Geometry, width_multiple: int) -> KeepSets:
        """The keep-sets at the order's end, MLP widths rounded up as in `level`."""
        return _written(geometry, self.removals, width_multiple)

    def save(self, path: Path, geometry: Geometry, metadata: dict[str, str]) -> None:
        """Write ``removal_order.safetensors``: step and rank by structure, -1 = kept."""
        tensors: dict[str, NDArray[np.generic]] = {}
        shapes = {
            Kind.ATTENTION: (geometry.num_layers, geometry.num_attention_structures),
            Kind.MLP: (geometry.num_layers, geometry.intermediate_size),
        }
        for kind, shape in shapes.items():
            of_kind = np.flatnonzero(self.removals.kinds == kind)
            where = (self.removals.layers[of_kind], self.removals.indices[of_kind])
            step = np.full(shape, -1, dtype=np.int16)
            rank = np.full(shape, -1, dtype=np.int32)
            step[where], rank[where] = self.steps[of_kind], of_kind
            tensors[f"{kind.name.lower()}.{_STEP}"], tensors[f"{kind.name.lower()}.{_RANK}"] = step, rank
        # safetensors keeps metadata in a hash map of random order: one JSON entry keeps the bytes equal.
        save_file(tensors, path, metadata={"gisp": json.dumps(metadata, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> tuple["RemovalOrder", dict[str, str]]:
        """Read an order and its metadata.

        Raises:
            IntegrityError: not a file that `save` wrote, ranks that are no order, or steps that fall.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = json.loads(file.metadata()["gisp"])
                parts = [_removed(kind, file) for kind in Kind]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path.name} is no removal order: {error}") from error
        table = np.concatenate(parts, axis=1)
        table = table[:, np.argsort(table[0], kind="stable")]
        ranks, steps, kinds, layers, indices = table
        if not np.array_equal(ranks, np.arange(len(ranks))) or (np.diff(steps) < 0).any():
            raise IntegrityError(f"{path.name} is no removal order: its ranks or steps do not follow each other")
        return cls(Removals(kinds, layers, indices), steps), metadata


def _removed(kind: Kind, file: Any) -> NDArray[np.int64]:
    """int64 [5, n]: rank, step, kind, layer and index of the removed structures of one kind."""
    rank = file.get_tensor(f"{kind.name.lower()}.{_RANK}")
    step = file.get_tensor(f"{kind.name.lower()}.{_STEP}")
    if rank.shape != step.shape or not np.array_equal(rank >= 0, step >= 1):
        raise ValueError(f"the {kind.name} ranks and steps do not belong together")
    layers, indices = np.nonzero(rank >= 0)
    kinds = np.full(len(layers), kind, dtype=np.int64)
    return np.stack([rank[layers, indices], step[layers, indices], kinds, layers, indices]).astype(np.int64)


def _written(geometry: Geometry, removed: Removals, width_multiple: int) -> KeepSets:
    """What is left after ``removed``, with channels given back, last removed first, until widths are rounded up."""
    keep = keep_sets(geometry, removed)
    widths = keep.mlp.sum(axis=1)
    missing = np.where(widths > 0, geometry.rounded_width(widths, width_multiple) - widths, 0)
    for position in np.flatnonzero(removed.kinds == Kind.MLP)[::-1]:
        layer = removed.layers[position]
        if missing[layer]:
            keep.mlp[layer, removed.indices[position]] = True
            missing[layer] -= 1
    dead_width = int(geometry.rounded_width(np.zeros(1, dtype=np.int64), width_multiple)[0])
    return KeepSets(keep.attention, keep.mlp, dead_width)
