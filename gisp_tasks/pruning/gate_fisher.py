"""Gate-Fisher importance: how strongly the loss of each sequence, or item, answers to a gate on a structure's output.

    importance(s) = mean over groups i of (sum over tokens t of a_st * dL_i/da_st)^2

with a_s what structure s hands to the o or down projection, and L_i the loss of calibration group i, so weighted that
the objective is the mean of the L_i: the square of the derivative of L_i by a gate that multiplies a_s, the empirical
Fisher information of that gate (METHOD B5). Under the perplexity objective a group is a sequence and L_i its mean
token cross-entropy; under the margin objective it is an item, L_i its own part of the margin, and the gate acts on all
its candidates. A kv group sums over its query heads and their dimensions. Weights need no gradients, so a pass takes
about 4 instead of 6 operations a parameter and token, and no memory for gradients.

Deviation from the paper: the score itself; the paper's is `taylor`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.pruning.families import FAMILIES, READERS
from gisp_tasks.pruning.forward import backward_pass, device_of
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.structures import Geometry, KeepSets, LayerImportance
from gisp_tasks.pruning.surgery import live_structures


def gate_fisher(
    model: nn.Module, keep: KeepSets, geometry: Geometry, calibration: CalibrationSet, max_tokens: int, *,
    protected: NDArray[np.bool_],
) -> tuple[float, dict[int, LayerImportance]]:  # fmt: skip
    """The objective's value, and the importance of every structure by layer, protected layers left out."""
    model.requires_grad_(False)
    layers = [int(layer) for layer in np.flatnonzero(~protected)]
    device = device_of(model)
    live = {
        (layer, role): mask
        for layer in layers
        for role, mask in zip(READERS, live_structures(geometry, keep, layer), strict=True)
    }
    sums = {key: torch.zeros(len(mask), dtype=torch.float64, device=device) for key, mask in live.items()}
    with _gates(model, geometry, sums):
        objective, scale = backward_pass(model, calibration, max_tokens)
    # A row's loss is its share of a mean over G rows: (G x share)^2, averaged over G rows, leaves one factor G.
    factor = calibration.num_groups / scale**2
    return objective, {
        layer: LayerImportance(*(sums[layer, role].cpu().numpy()[live[layer, role]] * factor for role in READERS))
        for layer in layers
    }


@contextmanager
def _gates(model: nn.Module, geometry: Geometry, sums: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """Hooks that add each row's squared gate derivative to ``sums`` during a backward pass."""
    hooks = []
    for (layer, role), total in sums.items():
        path = FAMILIES[geometry.family].projections[role].path
        module = model.get_submodule(f"model.layers.{layer}.{path}")
        hooks.append(module.register_forward_pre_hook(_gate(total)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gate(total: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]:
    """A hook on a projection that watches the gradient of its input [B, T, units x width]."""

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        activation = inputs[0].detach()
        # No weight needs a gradient, so the first gate of the model starts the graph; what lies below it has none.
        watched = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_(True)

        def add(gradient: torch.Tensor) -> None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            derivative = (activation.to(wide) * gradient.to(wide)).sum(dim=1)
            by_unit = derivative.view(len(derivative), len(total), -1).sum(dim=2).double()
            total.add_(by_unit.square().sum(dim=0))

        watched.register_hook(add)  # type: ignore[no-untyped-call]
        return (watched,)

    return watch
