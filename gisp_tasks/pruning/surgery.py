"""Keep-sets to sliced weights, in a model in memory."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.pruning.families import FAMILIES, ROWS, Projection, kept_positions
from gisp_tasks.pruning.structures import Geometry, KeepSets


def slice_model(model: nn.Module, geometry: Geometry, *, now: KeepSets, wanted: KeepSets) -> None:
    """Cut a model's projections in place, so that it computes what the masked dense model would.

    Stock attention and MLP modules find their head count and width in the shapes of their weights, and the
    query heads of a kv group leave together, so nothing else has to change.

    Args:
        model: a causal language model of transformers, holding ``now``.
        geometry: of the dense model.
        now: what the model holds; the dense model if nothing was cut.
        wanted: what it shall hold; part of ``now``.
    """
    assert now.contains(wanted), "a sliced model cannot be given structures back"
    for layer in range(geometry.num_layers):
        module = model.get_submodule(f"model.layers.{layer}")
        for projection in FAMILIES[geometry.family].projections.values():
            held = kept_positions(geometry, now, layer, projection.structure)
            kept = kept_positions(geometry, wanted, layer, projection.structure)
            if len(kept) < len(held):
                _slice_linear(module.get_submodule(projection.path), np.searchsorted(held, kept), projection)


def mask_model(model: nn.Module, geometry: Geometry, keep: KeepSets) -> None:
    """Zero the o and down columns of what ``keep`` leaves out: the same function at the dense size."""
    with torch.no_grad():
        for layer in range(geometry.num_layers):
            for projection in FAMILIES[geometry.family].projections.values():
                if projection.axis == ROWS:
                    continue
                weight = model.get_parameter(f"model.layers.{layer}.{projection.path}.weight")
                dead = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
                dead[torch.from_numpy(kept_positions(geometry, keep, layer, projection.structure))] = False
                weight[:, dead] = 0


def _slice_linear(linear: nn.Module, positions: NDArray[np.int64], projection: Projection) -> None:
    assert isinstance(linear, nn.Linear)
    index = torch.from_numpy(positions).to(linear.weight.device)
    with torch.no_grad():
        linear.weight = _frozen(linear.weight.index_select(projection.axis, index))
        if projection.axis == ROWS and linear.bias is not None:
            linear.bias = _frozen(linear.bias.index_select(0, index))
    linear.out_features, linear.in_features = linear.weight.shape


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
