"""First-order importance: gradients over the whole calibration set to one score a structure.

    score(s) = sum over the scored weights w of s of |w * dL/dw| / normaliser(s)

with L the objective over the WHOLE set and the absolute value taken once, after the sum (paper, Algorithm 1;
METHOD A2, B2). Deviations from the reference code: gradients accumulate in float32 whatever the weights' type,
are taken for scored weights only, and under grouped-query attention the structure is the whole kv group, with its
k and v rows.

Shape legend: L layers, K kv groups, F channels, B sequences of a micro-batch, T tokens, D hidden.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from gisp_tasks.errors import NumericsError, PermanentError
from gisp_tasks.pruning.families import FAMILIES, ROWS, Projection
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringSettings:
    """How a scoring pass is done.

    Args:
        protected: bool [L], layers that are not scored.
        normaliser: as in the recipe.
        micro_batch: sequences a forward pass; halved when the accelerator runs out of memory.
    """

    protected: NDArray[np.bool_]
    normaliser: str
    micro_batch: int


@dataclass(frozen=True)
class ScoringResult:
    """Scores, the objective's value, and the micro-batch that fitted."""

    scores: StructureScores
    objective: float
    micro_batch: int


def score(
    model: nn.Module, keep: KeepSets, geometry: Geometry, calibration: CalibrationSet, settings: ScoringSettings
) -> ScoringResult:
    """One scoring pass.

    Args:
        model: a causal language model in evaluation mode, already sliced to ``keep``.
        keep: what the model holds.
        geometry: of the dense model.
        calibration: S sequences with their token weights.
        settings: how to do it.

    Returns:
        Scores in the dense model's shape: NaN where removed, +inf in protected layers.

    Raises:
        NumericsError: the objective is not finite.
        PermanentError: one sequence alone does not fit into the accelerator's memory.
    """
    weights = _scored_weights(model, geometry, settings.protected)
    micro_batch = settings.micro_batch
    while True:
        try:
            objective, gradients = _accumulate(model, weights, calibration, micro_batch)
            break
        except torch.cuda.OutOfMemoryError:
            if micro_batch == 1:
                raise PermanentError(
                    "one calibration sequence does not fit into the accelerator's memory; lower "
                    "calibration.sequence_length or use a larger device"
                ) from None
        # Outside the handler: inside it the exception still holds the tensors of the failed pass.
        micro_batch //= 2
        torch.cuda.empty_cache()
        logger.warning("Out of memory: the micro-batch is halved to %d sequences", micro_batch)
    _finite(objective)
    scores = _structure_scores(weights, gradients, keep, geometry, settings)
    live = ~settings.protected[:, None]
    if not all(np.isfinite(s[live & k]).all() for s, k in ((scores.attention, keep.attention), (scores.mlp, keep.mlp))):
        raise NumericsError("a score is not finite although the objective is; check the weights and the dtype")
    return ScoringResult(scores, objective, micro_batch)


def objective_value(model: nn.Module, calibration: CalibrationSet, micro_batch: int = 1) -> float:
    """The objective alone, without gradients (float64 sum over micro-batches).

    Raises:
        NumericsError: it is not finite.
    """
    with torch.inference_mode():
        losses = [_batch_loss(model, batch).double() for batch in _batches(calibration, micro_batch, _device(model))]
    return _finite(float(sum(losses)))


def _finite(objective: float) -> float:
    if not np.isfinite(objective):
        raise NumericsError(f"the objective over the calibration set is {objective}; check the weights and the dtype")
    return objective


@dataclass(frozen=True)
class _Batch:
    """Right-padded sequences: ``tokens`` int64 [B, T], ``weights`` float64 [B, T] (0 on padding)."""

    tokens: torch.Tensor
    weights: torch.Tensor


ScoredWeights = dict[tuple[int, str], nn.Parameter]


def _scored_weights(model: nn.Module, geometry: Geometry, protected: NDArray[np.bool_]) -> ScoredWeights:
    """The weights that need a gradient, by (layer, role); every other parameter is frozen."""
    model.requires_grad_(False)
    found: ScoredWeights = {}
    for layer in np.flatnonzero(~protected):
        for role, projection in FAMILIES[geometry.family].projections.items():
            weight = model.get_parameter(f"model.layers.{layer}.{projection.path}.weight")
            weight.requires_grad_(True)
            found[int(layer), role] = weight
    return found


def _accumulate(
    model: nn.Module, weights: ScoredWeights, calibration: CalibrationSet, micro_batch: int
) -> tuple[float, dict[tuple[int, str], torch.Tensor]]:
    """The objective and its gradient by scored weight, in float32 (float64 for a float64 model)."""
    accumulators = {
        key: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for key, weight in weights.items()
    }
    hooks = [weight.register_post_accumulate_grad_hook(_adder(accumulators[key])) for key, weight in weights.items()]  # type: ignore[no-untyped-call]
    # A power of two: exact, and it keeps the gradients of half-precision weights from underflowing.
    scale = 2.0 ** round(np.log2(max(calibration.num_targets, 1)))
    try:
        total = torch.zeros((), dtype=torch.float64, device=_device(model))
        num_batches = -(-calibration.num_sequences // micro_batch)
        for number, batch in enumerate(_batches(calibration, micro_batch, _device(model)), 1):
            loss = _batch_loss(model, batch)
            (loss * scale).backward()
            total += loss.detach().double()
            if number % max(1, num_batches // 5) == 0:
                logger.info("scored %d of %d micro-batches", number, num_batches)
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.grad = None
    for accumulator in accumulators.values():
        accumulator.div_(scale)
    return float(total), accumulators


def _adder(accumulator: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that moves a parameter's gradient into ``accumulator`` as soon as it is complete."""

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        accumulator.add_(parameter.grad)
        parameter.grad = None

    return add


def _batches(calibration: CalibrationSet, micro_batch: int, device: torch.device) -> Iterator[_Batch]:
    """Micro-batches of sequences of like length, longest first, so that a lack of memory shows at once."""
    lengths = calibration.spans[:, 1] - calibration.spans[:, 0]
    order = np.argsort(-lengths, kind="stable")
    for first in range(0, len(order), micro_batch):
        members = order[first : first + micro_batch]
        tokens = np.zeros((len(members), lengths[members].max()), dtype=np.int64)
        weights = np.zeros(tokens.shape, dtype=np.float64)
        for row, member in enumerate(members):
            start, end = calibration.spans[member]
            tokens[row, : end - start] = calibration.tokens[start:end]
            weights[row, : end - start] = calibration.weights[start:end]
        yield _Batch(torch.from_numpy(tokens).to(device), torch.from_numpy(weights).to(device))


def _batch_loss(model: nn.Module, batch: _Batch) -> torch.Tensor:
    """Weighted sum of token losses; logits are computed at target positions only.

    Attention is causal and padding stands at the right, so it cannot reach a target.
    """
    hidden_btd = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
    is_target = batch.weights[:, 1:] != 0
    logits = model.lm_head(hidden_btd[:, :-1][is_target])  # type: ignore[operator]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(logits, batch.tokens[:, 1:][is_target], reduction="none")
    return (losses * batch.weights[:, 1:][is_target].to(losses.dtype)).sum()


def _structure_scores(
    weights: ScoredWeights,
    gradients: dict[tuple[int, str], torch.Tensor],
    keep: KeepSets,
    geometry: Geometry,
    settings: ScoringSettings,
) -> StructureScores:
    """Sum |w * g| over each structure and divide by its normaliser."""
    attention = np.full(keep.attention.shape, np.nan, dtype=np.float32)
    mlp = np.full(keep.mlp.shape, np.nan, dtype=np.float32)
    attention_normaliser, mlp_normaliser = normalisers(geometry, settings.normaliser)
    family = FAMILIES[geometry.family]
    for layer in range(geometry.num_layers):
        if settings.protected[layer]:
            attention[layer], mlp[layer] = np.inf, np.inf
            continue
        groups, channels = int(keep.attention[layer].sum()), int(keep.mlp[layer].sum())
        group_sums, channel_sums = np.zeros(groups), np.zeros(channels)
        for role, projection in family.projections.items():
            key = (layer, role)
            sums = _sum_by_structure(weights[key], gradients[key], projection)
            if projection.structure == "channel":
                channel_sums += sums
            else:
                group_sums += sums.reshape(groups, -1).sum(axis=1)
        attention[layer, keep.attention[layer]] = group_sums / attention_normaliser
        mlp[layer, keep.mlp[layer]] = channel_sums / mlp_normaliser
    return StructureScores(attention, mlp)


def _sum_by_structure(weight: torch.Tensor, gradient: torch.Tensor, projection: Projection) -> NDArray[np.float64]:
    """float64 [n]: |w * g| summed over everything but the sliced side of the weight [out, in]."""
    products = (weight.detach() * gradient).abs()
    other_side = 1 if projection.axis == ROWS else 0
    return products.sum(dim=other_side, dtype=torch.float64).cpu().numpy()


def normalisers(geometry: Geometry, normaliser: str) -> tuple[int, int]:
    """What the sums of a kv group and of a channel are divided by (METHOD B5)."""
    if normaliser == "elements":
        return geometry.kv_group_elements, geometry.channel_elements
    return 4 * geometry.head_dim * geometry.hidden_size, 3 * geometry.intermediate_size


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
