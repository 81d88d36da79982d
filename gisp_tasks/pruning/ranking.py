"""Scores to removals: global, exact, with protected layers, minima and a fixed order of ties."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets, Kind, Removals, parameters_along
from gisp_tasks.recipe import ProtectSection


@dataclass(frozen=True)
class Limits:
    """What ranking must respect.

    Args:
        protected: bool [L], layers of which nothing is removed.
        min_kv_groups: groups that every layer keeps.
        min_channels: channels that every layer keeps (all of them where a layer has fewer).
        width_multiple: rounding of MLP widths in the written model.
    """

    protected: NDArray[np.bool_]
    min_kv_groups: int
    min_channels: int
    width_multiple: int


def limits_of(protect: ProtectSection, width_multiple: int, num_layers: int) -> Limits:
    """The limits that a recipe sets for a model of ``num_layers`` layers.

    Raises:
        InputError: every layer would be protected.
    """
    first = _layers(protect.first_layers, num_layers)
    last = _layers(protect.last_layers, num_layers)
    if first + last >= num_layers:
        raise InputError(
            f"pruning.protect keeps the first {first} and the last {last} of {num_layers} layers, so nothing can be "
            f"removed; lower first_layers or last_layers so that at least one layer is left"
        )
    protected = np.zeros(num_layers, dtype=np.bool_)
    protected[:first] = True
    protected[num_layers - last :] = True
    return Limits(protected, protect.min_kv_groups, protect.min_channels, width_multiple)


def smallest_model(geometry: Geometry, limits: Limits) -> int:
    """Decoder parameters when everything that may go is gone, widths rounded."""
    width = min(limits.min_channels, geometry.intermediate_size)
    width = int(geometry.rounded_width(np.array([width]), limits.width_multiple)[0])
    groups = min(limits.min_kv_groups, geometry.num_kv_groups)
    freed = (geometry.num_kv_groups - groups) * geometry.kv_group_parameters
    freed += (geometry.intermediate_size - width) * geometry.channel_parameters
    return geometry.decoder_parameters - int((~limits.protected).sum()) * freed


def next_removals(
    scores: StructureScores, removed: Removals, geometry: Geometry, limits: Limits, sparsity: float
) -> Removals:
    """The structures to remove now: the lowest scores of all layers together, until ``sparsity`` is met.

    Args:
        scores: of this step; entries of removed structures and protected layers are not read.
        removed: everything removed so far, in order.
        geometry: of the dense model.
        limits: protected layers, minima, rounding.
        sparsity: to be met by the model as it would be written. The count is exact: one removal fewer would
            miss it. Ties are broken by (kind, layer, index).

    Raises:
        NumericsError: a live structure has a score that is not a number.
        InputError: the limits leave too little to remove.
    """
    keep = keep_sets(geometry, removed)
    candidates = _candidates(scores.attention, keep.attention, Kind.ATTENTION, limits)
    candidates = np.concatenate([candidates, _candidates(scores.mlp, keep.mlp, Kind.MLP, limits)], axis=0)
    order = np.lexsort((candidates["index"], candidates["layer"], candidates["kind"], candidates["score"]))
    ranked = candidates[order]
    queue = Removals(*(ranked[name].astype(np.int64) for name in ("kind", "layer", "index")))
    parameters = parameters_along(geometry, removed.then(queue), limits.width_multiple)[len(removed) :]
    met = np.flatnonzero(parameters <= geometry.max_parameters(sparsity))
    if not len(met):
        reach = 1 - parameters[-1] / geometry.decoder_parameters
        raise InputError(
            f"sparsity {sparsity:.4g} was asked, but with pruning.protect only {reach:.4g} can be removed; lower the "
            f"last level, or protect fewer layers, groups or channels"
        )
    return queue.prefix(int(met[0]))


def keep_sets(geometry: Geometry, removed: Removals) -> KeepSets:
    """What is left after ``removed``, widths not rounded."""
    keep = KeepSets.everything(geometry)
    for kind, mask in ((Kind.ATTENTION, keep.attention), (Kind.MLP, keep.mlp)):
        of_kind = removed.kinds == kind
        mask[removed.layers[of_kind], removed.indices[of_kind]] = False
    return keep


_CANDIDATE = np.dtype([("score", np.float64), ("kind", np.int64), ("layer", np.int64), ("index", np.int64)])


def _candidates(scores: NDArray[np.float32], keep: NDArray[np.bool_], kind: Kind, limits: Limits) -> NDArray[np.void]:
    """Live structures of unprotected layers, less the best of each layer that its minimum keeps."""
    minimum = limits.min_kv_groups if kind is Kind.ATTENTION else limits.min_channels
    found = []
    for layer in np.flatnonzero(~limits.protected):
        alive = np.flatnonzero(keep[layer])
        values = scores[layer, alive]
        if np.isnan(values).any():
            raise NumericsError(
                f"layer {layer} has {int(np.isnan(values).sum())} {kind.name} scores that are no number"
            )
        ascending = np.lexsort((alive, values))
        removable = ascending[: max(0, len(alive) - minimum)]
        part = np.empty(len(removable), dtype=_CANDIDATE)
        part["score"], part["kind"] = values[removable], kind
        part["layer"], part["index"] = layer, alive[removable]
        found.append(part)
    return np.concatenate(found)


def _layers(asked: float, num_layers: int) -> int:
    """A fraction below 1 of the layers, rounded down, or a number of them."""
    return int(asked * num_layers + 1e-9) if asked < 1 else int(asked)
