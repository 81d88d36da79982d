"""Keep-sets to sliced weights, in a model in memory.

What a model in memory holds is the subnetwork, with two exceptions in which something dead stays, its o or down
columns zero: where query heads go one by one but share key/value heads, attention keeps its dense shape (the layers
of a model in memory are all built with one number of query heads for each key/value head); and a sub-layer that
keeps nothing holds one structure, because modules cannot have no width at all.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.pruning.families import FAMILIES, READERS, ROWS, Projection, kept_positions, projections_of
from gisp_tasks.pruning.structures import BoolArray, Geometry, KeepSets


def slice_model(model: nn.Module, geometry: Geometry, *, now: KeepSets, wanted: KeepSets) -> None:
    """Cut a model's projections in place, so that it computes what the masked dense model would.

    Stock attention and MLP modules find their head count and width in the shapes of their weights, and what is
    sliced leaves every key/value head its number of query heads, so nothing else has to change.

    Args:
        model: a causal language model of transformers, holding ``now``.
        geometry: of the dense model.
        now: what the model holds; the dense model if nothing was cut.
        wanted: what it shall hold; part of ``now``.
    """
    assert now.contains(wanted), "a sliced model cannot be given structures back"
    for layer in range(geometry.num_layers):
        module = model.get_submodule(f"model.layers.{layer}")
        for projection in projections_of(geometry).values():
            linear = module.get_submodule(projection.path)
            assert isinstance(linear, nn.Linear)
            if projection.structure == "channel" or not geometry.separate_heads:
                _slice_linear(linear, _held_positions(geometry, now, wanted, layer, projection), projection)
        for projection, live in zip(_outputs(geometry), live_structures(geometry, wanted, layer), strict=True):
            _zero_columns(module.get_submodule(projection.path), ~live)


def mask_model(model: nn.Module, geometry: Geometry, keep: KeepSets) -> None:
    """Zero the o and down columns of what ``keep`` leaves out: the same function at the dense size."""
    for layer in range(geometry.num_layers):
        module = model.get_submodule(f"model.layers.{layer}")
        for projection, kept in zip(_outputs(geometry), (keep.attention[layer], keep.mlp[layer]), strict=True):
            _zero_columns(module.get_submodule(projection.path), ~kept)


def live_structures(geometry: Geometry, keep: KeepSets, layer: int) -> tuple[BoolArray, BoolArray]:
    """Which attention structures and channels are alive, of those that a model sliced to ``keep`` holds in a layer."""
    kept_attention, kept_mlp = keep.attention[layer], keep.mlp[layer]
    attention = kept_attention if geometry.separate_heads else _all_or_one_dead(kept_attention)
    return attention, _all_or_one_dead(kept_mlp)


def _all_or_one_dead(kept: BoolArray) -> BoolArray:
    return kept[kept] if kept.any() else np.zeros(1, dtype=np.bool_)


def _outputs(geometry: Geometry) -> tuple[Projection, Projection]:
    """The projections that read what the attention structures and the channels of a layer compute."""
    attention, mlp = (FAMILIES[geometry.family].projections[role] for role in READERS)
    return attention, mlp


def _held_positions(
    geometry: Geometry, now: KeepSets, wanted: KeepSets, layer: int, projection: Projection
) -> NDArray[np.int64]:
    """Which of the rows (or columns) that a projection has now stay."""
    held, kept = (kept_positions(geometry, keep, layer, projection.structure) for keep in (now, wanted))
    if len(kept):
        return np.searchsorted(held, kept)
    # Any one structure will do: it is dead.
    everything = kept_positions(geometry, KeepSets.everything(geometry), layer, projection.structure)
    structures = geometry.intermediate_size if projection.structure == "channel" else geometry.num_attention_structures
    return np.arange(len(everything) // structures)


def _slice_linear(linear: nn.Linear, positions: NDArray[np.int64], projection: Projection) -> None:
    if len(positions) == linear.weight.shape[projection.axis]:
        return
    index = torch.from_numpy(positions).to(linear.weight.device)
    with torch.no_grad():
        linear.weight = _frozen(linear.weight.index_select(projection.axis, index))
        if projection.axis == ROWS and linear.bias is not None:
            linear.bias = _frozen(linear.bias.index_select(0, index))
    linear.out_features, linear.in_features = linear.weight.shape


def _zero_columns(linear: nn.Module, dead: BoolArray) -> None:
    """Zero the columns of the structures that are ``dead``, one entry a structure."""
    assert isinstance(linear, nn.Linear)
    if not dead.any():
        return
    columns = np.repeat(dead, linear.weight.shape[1] // len(dead))
    with torch.no_grad():
        linear.weight[:, torch.from_numpy(columns).to(linear.weight.device)] = 0


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
