"""Scores to removals: global, exact, with protected layers, minima and a fixed order of ties."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import BoolArray, Geometry, KeepSets, Kind, Removals, parameters_along
from gisp_tasks.recipe import ProtectSection


@dataclass(frozen=True)
class Limits:
    """What ranking must respect.

    Args:
        protected: bool [L], layers of which nothing is removed.
        min_kv_groups: groups that every layer keeps, each with at least one query head.
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
    heads_left = np.zeros(geometry.num_kv_groups, dtype=np.int64)
    heads_left[: limits.min_kv_groups] = geometry.queries_per_structure
    freed = geometry.num_kv_groups * geometry.kv_group_parameters - int(geometry.attention_parameters(heads_left))
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
    require_numbers(scores, keep, limits.protected)
    per_group = geometry.num_attention_structures // geometry.num_kv_groups
    queue = lowest_first(
        scores,
        KeepSets(
            _removable(scores.attention, keep.attention, limits.protected, limits.min_kv_groups, per_group),
            _removable(scores.mlp, keep.mlp, limits.protected, limits.min_channels),
        ),
    )
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


def lowest_first(scores: StructureScores, chosen: KeepSets) -> Removals:
    """The structures in ``chosen``, lowest score first; ties go by (kind, layer, index)."""
    parts = []
    for kind, table, mask in _by_kind(scores, chosen):
        layers, indices = np.nonzero(mask)
        values = table[layers, indices].astype(np.float64)
        parts.append((values, np.full(len(layers), kind, dtype=np.int64), layers, indices))
    values, kinds, layers, indices = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((indices, layers, kinds, values))
    return Removals(kinds[order], layers[order], indices[order])


def require_numbers(scores: StructureScores, keep: KeepSets, protected: BoolArray) -> None:
    """Refuse scores that are no numbers, of what is alive in the layers that are not ``protected`` [L].

    Raises:
        NumericsError: there are some.
    """
    for kind, table, mask in _by_kind(scores, keep):
        bad = (np.isnan(table) & mask & ~protected[:, None]).sum(axis=1)
        for layer in np.flatnonzero(bad):
            raise NumericsError(f"layer {layer} has {bad[layer]} {kind.name} scores that are no number")


def _by_kind(scores: StructureScores, sets: KeepSets) -> Iterator[tuple[Kind, NDArray[np.float32], BoolArray]]:
    yield Kind.ATTENTION, scores.attention, sets.attention
    yield Kind.MLP, scores.mlp, sets.mlp


def _removable(
    scores: NDArray[np.float32], keep: BoolArray, protected: BoolArray, minimum: int, per_group: int = 1
) -> BoolArray:
    """Live structures of unprotected layers, less the best one of each of the ``minimum`` best groups of a layer.

    Args:
        scores: of one kind of structure, [L, n].
        keep: what is alive, [L, n].
        protected: layers, [L].
        minimum: groups that each layer keeps.
        per_group: consecutive structures that make a group.
    """
    removable = keep & ~protected[:, None]
    for layer in np.flatnonzero(~protected):
        alive = np.flatnonzero(keep[layer])
        best_first = alive[np.lexsort((alive, scores[layer, alive]))[::-1]]
        _, first_of_group = np.unique(best_first // per_group, return_index=True)
        removable[layer, best_first[np.sort(first_of_group)[:minimum]]] = False
    return removable


def _layers(asked: float, num_layers: int) -> int:
    """A fraction below 1 of the layers, rounded down, or a number of them."""
    return int(asked * num_layers + 1e-9) if asked < 1 else int(asked)
