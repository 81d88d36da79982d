"""Importance to scores: one scoring pass over the calibration set, normalised, in the dense model's shape."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.errors import NumericsError, PermanentError
from gisp_tasks.pruning.forward import batch_loss, batches, device_of
from gisp_tasks.pruning.gate_fisher import gate_fisher
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.rows import micro_batches, rows_of
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets, LayerImportance
from gisp_tasks.pruning.taylor import taylor

logger = logging.getLogger(__name__)

_SCORES = {"taylor": taylor, "gate_fisher": gate_fisher}


@dataclass(frozen=True)
class ScoringSettings:
    """How a scoring pass is done.

    Args:
        protected: bool [L], layers that are not scored.
        normaliser: as in the recipe.
        micro_batch_tokens: tokens a forward pass, padding counted (at least one row); halved when the accelerator
            runs out of memory.
        score: as in the recipe.
    """

    protected: NDArray[np.bool_]
    normaliser: str
    micro_batch_tokens: int
    score: str = "taylor"


@dataclass(frozen=True)
class ScoringResult:
    """Scores, the objective's value, and the micro-batch that fitted, in tokens."""

    scores: StructureScores
    objective: float
    micro_batch_tokens: int


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
        PermanentError: one sequence, or item, alone does not fit into the accelerator's memory.
    """
    importance_of, max_tokens = _SCORES[settings.score], settings.micro_batch_tokens
    while True:
        try:
            objective, found = importance_of(
                model, keep, geometry, calibration, max_tokens, protected=settings.protected
            )
            break
        except torch.cuda.OutOfMemoryError:
            if all(len(rows) == 1 for rows in micro_batches(rows_of(calibration), max_tokens)):
                raise PermanentError(
                    "one calibration sequence (or item with its answers) does not fit into the accelerator's memory; "
                    "lower calibration.sequence_length or use a larger device"
                ) from None
        # Outside the handler: inside it the exception still holds the tensors of the failed pass.
        max_tokens //= 2
        torch.cuda.empty_cache()
        logger.warning("Out of memory: the micro-batch is halved to %d tokens", max_tokens)
    _finite(objective)
    scores = normalised(found, keep, geometry, settings.normaliser)
    live = ~settings.protected[:, None]
    if not all(np.isfinite(s[live & k]).all() for s, k in ((scores.attention, keep.attention), (scores.mlp, keep.mlp))):
        raise NumericsError("a score is not finite although the objective is; check the weights and the dtype")
    return ScoringResult(scores, objective, max_tokens)


def objective_value(model: nn.Module, calibration: CalibrationSet, max_tokens: int = 1) -> float:
    """The objective alone, without gradients (float64 sum over micro-batches).

    Raises:
        NumericsError: it is not finite.
    """
    with torch.inference_mode():
        losses = [batch_loss(model, batch).double() for batch in batches(calibration, max_tokens, device_of(model))]
    return _finite(float(sum(losses)))


def normalised(
    importance: dict[int, LayerImportance], keep: KeepSets, geometry: Geometry, normaliser: str
) -> StructureScores:
    """Importance divided by each kind's normaliser, in the dense shape; layers without importance are protected."""
    attention = np.full(keep.attention.shape, np.nan, dtype=np.float32)
    mlp = np.full(keep.mlp.shape, np.nan, dtype=np.float32)
    attention_normaliser, mlp_normaliser = normalisers(geometry, normaliser)
    for layer in range(geometry.num_layers):
        if layer not in importance:
            attention[layer], mlp[layer] = np.inf, np.inf
            continue
        attention[layer, keep.attention[layer]] = importance[layer].attention / attention_normaliser
        mlp[layer, keep.mlp[layer]] = importance[layer].mlp / mlp_normaliser
    return StructureScores(attention, mlp)


def normalisers(geometry: Geometry, normaliser: str) -> tuple[int, int]:
    """What the importance of an attention structure and of a channel is divided by (METHOD B5)."""
    if normaliser == "elements":
        return geometry.attention_elements, geometry.channel_elements
    return 4 * geometry.head_dim * geometry.hidden_size, 3 * geometry.intermediate_size


def _finite(objective: float) -> float:
    if not np.isfinite(objective):
        raise NumericsError(f"the objective over the calibration set is {objective}; check the weights and the dtype")
    return objective
