"""First-order importance: gradients of the scored weights over the whole calibration set.

    importance(s) = sum over the scored weights w of structure s of |w * dL/dw|

with L the objective over the WHOLE set and the absolute value taken once, after the sum (paper, Algorithm 1;
METHOD A2, B2). Deviations from the reference code: gradients accumulate in float32 whatever the weights' type,
are taken for scored weights only, and under grouped-query attention the structure of granularity ``kv_group`` is the
whole group, with its k and v rows. Of granularity ``head`` it is the reference's: q rows and o columns of one query
head, with its k and v rows where no other query head shares them.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.pruning.families import ROWS, Projection, projections_of
from gisp_tasks.pruning.forward import backward_pass
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.structures import Geometry, KeepSets, LayerImportance
from gisp_tasks.pruning.surgery import live_structures

ScoredWeights = dict[tuple[int, str], nn.Parameter]


def taylor(
    model: nn.Module, keep: KeepSets, geometry: Geometry, calibration: CalibrationSet, max_tokens: int, *,
    protected: NDArray[np.bool_],
) -> tuple[float, dict[int, LayerImportance]]:  # fmt: skip
    """The objective's value, and the importance of every structure by layer, protected layers left out."""
    weights = scored_weights(model, geometry, protected)
    objective, gradients = accumulate(model, weights, calibration, max_tokens)
    found = {}
    for layer in np.flatnonzero(~protected):
        live_attention, live_mlp = live_structures(geometry, keep, int(layer))
        attention, mlp = np.zeros(len(live_attention)), np.zeros(len(live_mlp))
        for role, projection in projections_of(geometry).items():
            key = (int(layer), role)
            sums = _sum_by_structure(weights[key], gradients[key], projection)
            if projection.structure == "channel":
                mlp += sums
            else:
                attention += sums.reshape(len(attention), -1).sum(axis=1)
        found[int(layer)] = LayerImportance(attention[live_attention], mlp[live_mlp])
    return objective, found


def scored_weights(model: nn.Module, geometry: Geometry, protected: NDArray[np.bool_]) -> ScoredWeights:
    """The weights that need a gradient, by (layer, role); every other parameter is frozen."""
    model.requires_grad_(False)
    found: ScoredWeights = {}
    for layer in np.flatnonzero(~protected):
        for role, projection in projections_of(geometry).items():
            weight = model.get_parameter(f"model.layers.{layer}.{projection.path}.weight")
            weight.requires_grad_(True)
            found[int(layer), role] = weight
    return found


def accumulate(
    model: nn.Module, weights: ScoredWeights, calibration: CalibrationSet, max_tokens: int
) -> tuple[float, dict[tuple[int, str], torch.Tensor]]:
    """The objective and its gradient by scored weight, in float32 (float64 for a float64 model)."""
    accumulators: dict[tuple[int, str], torch.Tensor] = {}
    hooks = [weight.register_post_accumulate_grad_hook(_adder(accumulators, key)) for key, weight in weights.items()]  # type: ignore[no-untyped-call]
    try:
        objective, scale = backward_pass(model, calibration, max_tokens)
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.grad = None
    for accumulator in accumulators.values():
        accumulator.div_(scale)
    return objective, accumulators


def _adder(accumulators: dict[tuple[int, str], torch.Tensor], key: tuple[int, str]) -> Callable[[torch.Tensor], None]:
    """A hook that moves a parameter's gradient into its accumulator as soon as it is complete."""

    def add(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if key in accumulators:
            accumulators[key].add_(gradient)
        else:
            accumulators[key] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))

    return add


def _sum_by_structure(weight: torch.Tensor, gradient: torch.Tensor, projection: Projection) -> NDArray[np.float64]:
    """float64 [n]: |w * g| summed over everything but the sliced side of the weight [out, in]; uses the gradient up."""
    products = gradient.mul_(weight.detach()).abs_()
    other_side = 1 if projection.axis == ROWS else 0
    return products.sum(dim=other_side, dtype=torch.float64).cpu().numpy()
