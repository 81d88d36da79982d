"""Compatibility mode: the published reference code's own schedule and selection, in its float32 arithmetic.

METHOD A3 and A4. The schedule counts structures, not parameters, and begins at 0; a step removes every structure
whose score is not above a threshold, so ties at the threshold all go, and so does whatever is alive and scores
exactly 0; no layer keeps a minimum. Layers that are skipped score +inf, but count.

Deviation: none is meant. The reference gets "removed" from weights that it has set to zero; here it is remembered.
Within a step the order is by (score, kind, layer, index); the reference has none.
"""

import dataclasses

import numpy as np

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.ranking import Limits, keep_sets, lowest_first, require_numbers
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import BoolArray, Geometry, KeepSets, Removals


def structure_ratios(steps: int, last: float) -> list[float]:
    """The fraction of all structures that each step takes the model to; float32 values, the first is 0 (METHOD A4).

    Computed by torch, as the reference does: its values in the middle differ from numpy's by a unit in the last
    place now and then, and that can decide how many structures a step takes.
    """
    import torch

    if steps == 1:
        return [float(np.float32(last))]
    return [float(ratio) for ratio in torch.linspace(0, last, steps, dtype=torch.float32)]


def threshold_rank(num_structures: int, ratio: float) -> int:
    """k: the threshold is the k-th smallest score (METHOD A3.4: float32, truncated, plus one)."""
    kept = np.float32(num_structures) * (np.float32(1) - np.float32(ratio))
    return num_structures - int(kept) + 1


def threshold_removals(
    scores: StructureScores, removed: Removals, geometry: Geometry, protected: BoolArray, ratio: float
) -> Removals:
    """The structures that a step removes: all that are alive and not above the threshold.

    Args:
        scores: of this step.
        removed: everything removed so far.
        geometry: of the dense model.
        protected: bool [L], layers that score +inf.
        ratio: of structures, as `structure_ratios` gives it.

    Raises:
        NumericsError: a live structure has a score that is not a number.
    """
    keep = keep_sets(geometry, removed)
    require_numbers(scores, keep, protected)
    tables = [
        np.where(protected[:, None], np.float32(np.inf), np.where(mask, table, np.float32(0)))
        for table, mask in ((scores.attention, keep.attention), (scores.mlp, keep.mlp))
    ]
    values = np.concatenate([table.ravel() for table in tables])
    # Lifts a step's scores as long as nothing scores 0; rounding may make equal what was not.
    values += np.abs(values.min())
    rank = threshold_rank(len(values), ratio)
    threshold = np.partition(values, rank - 1)[rank - 1]
    assert np.isfinite(threshold), "the plan refuses ratios that reach protected layers"
    chosen = np.split(values <= threshold, [tables[0].size])
    attention, mlp = (part.reshape(table.shape) for part, table in zip(chosen, tables, strict=True))
    return lowest_first(scores, KeepSets(attention & keep.attention, mlp & keep.mlp))


def check_ratio(geometry: Geometry, limits: Limits, ratio: float) -> None:
    """Refuse a ratio whose threshold would fall among structures that are never removed.

    Raises:
        InputError: it does.
    """
    a_layer = geometry.num_attention_structures + geometry.intermediate_size
    everything, removable = geometry.num_layers * a_layer, int((~limits.protected).sum()) * a_layer
    rank = threshold_rank(everything, ratio)
    if rank > removable:
        raise InputError(
            f"pruning.structure_ratio={ratio:g} was asked, which takes {rank} of the model's {everything} heads and "
            f"channels, but importance.compat: reference never touches {int(limits.protected.sum())} of "
            f"{geometry.num_layers} layers, which leaves {removable}; lower pruning.structure_ratio"
        )


def without_minima(limits: Limits) -> Limits:
    """The reference keeps no minimum in a layer."""
    return dataclasses.replace(limits, min_kv_groups=0, min_channels=0)
