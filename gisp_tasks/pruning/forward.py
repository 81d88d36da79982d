"""The objective of a calibration set on a model, micro-batch by micro-batch, and its backward pass.

Shape legend: B rows of a micro-batch, T tokens, D hidden, P places that predict, N targets.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.pruning.cross_entropy import weighted_cross_entropy
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.rows import Row, micro_batches, rows_of

logger = logging.getLogger(__name__)

_PADDING = -1


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    Args:
        tokens: int64 [B, T].
        positions: int64 [B, T], as in `Row`; 0 on padding.
        segments: int64 [B, T], as in `Row`; -1 on padding. None: every row is one sequence.
        places: int64 [P], places of the flattened rows that predict a target, rising, each once.
        predictors: int64 [N], which of ``places`` predicts each target; never falls. A place may predict the first
            token of several segments.
        targets: int64 [N], token ids.
        weights: float64 [N].
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor | None
    places: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def batches(calibration: CalibrationSet, max_tokens: int, device: torch.device) -> Iterator[Batch]:
    """The whole set in micro-batches of at most ``max_tokens`` tokens, padding counted (at least one row each)."""
    cut = micro_batches(rows_of(calibration), max_tokens)
    for number, rows in enumerate(cut, 1):
        yield _batch(rows, device)
        if number % max(1, len(cut) // 5) == 0:
            logger.info("micro-batch %d of %d done", number, len(cut))


def _batch(rows: list[Row], device: torch.device) -> Batch:
    length = max(len(row.tokens) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        array = np.full((len(rows), length), filler, dtype=np.int64)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            array[i, : len(values)] = values
        return torch.from_numpy(array).to(device)

    def joined(parts: list[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    places, predictors = np.unique(
        np.concatenate([row.predictors + i * length for i, row in enumerate(rows)]), return_inverse=True
    )
    # Each place's targets together, as the loss reads them.
    order = np.argsort(predictors, kind="stable")
    shared = any(row.segments.max() > 1 for row in rows)
    return Batch(
        tokens=padded("tokens", 0),
        positions=padded("positions", 0),
        segments=padded("segments", _PADDING) if shared else None,
        places=joined([places]),
        predictors=joined([predictors])[order],
        targets=joined([row.targets for row in rows])[order],
        weights=joined([row.weights for row in rows])[order],
    )


def batch_loss(model: nn.Module, batch: Batch, scale: float = 1.0) -> torch.Tensor:
    """``scale`` times the weighted sum of token losses; logits are computed once for each place that predicts.

    Rows of one sequence need no mask: attention is causal and padding stands at the right, so it cannot reach a target.
    """
    layout = {} if batch.segments is None else _layout(model, batch.positions, batch.segments)
    hidden_btd = model.model(input_ids=batch.tokens, use_cache=False, **layout).last_hidden_state  # type: ignore[operator]
    return weighted_cross_entropy(
        hidden_btd.flatten(0, 1)[batch.places],
        model.lm_head,  # type: ignore[arg-type]
        predictors=batch.predictors,
        targets=batch.targets,
        weights=batch.weights * scale,
    )


def _layout(model: nn.Module, positions: torch.Tensor, segments: torch.Tensor) -> dict[str, Any]:
    """Position ids and attention masks of rows that hold several sequences, as transformers takes them.

    A configuration with ``layer_types`` takes one mask a type of layer; else one holds for all layers, with the window
    of sliding attention where the configuration has one (Mistral).
    """
    config: Any = model.config
    if getattr(config, "layer_types", None) is None:
        mask: Any = _mask(model, positions, segments, window=getattr(config, "sliding_window", None))
    else:
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        types = set(config.layer_types)
        mask = {kind: _mask(model, positions, segments, window=windows[kind]) for kind in types}
    return {"position_ids": positions, "attention_mask": mask}


def _mask(model: nn.Module, positions: torch.Tensor, segments: torch.Tensor, *, window: int | None) -> torch.Tensor:
    """Additive mask [B, 1, T, T]: a token sees the prefix and its own segment, up to itself and within the window.

    Padding sees itself and the first token of the prefix: a row of the mask with nothing in it would come out of
    softmax as no number.
    """
    query_segments, key_segments = segments[:, :, None], segments[:, None, :]
    back = positions[:, :, None] - positions[:, None, :]
    visible = ((key_segments == query_segments) | (key_segments == 0)) & (back >= 0)
    if window is not None:
        visible &= back < window
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf)[:, None]


def backward_pass(model: nn.Module, calibration: CalibrationSet, max_tokens: int) -> tuple[float, float]:
    """Loss and backward pass of every micro-batch.

    Gradients arrive where the caller has put its hooks.

    Args:
        model: a causal language model in evaluation mode.
        calibration: S sequences with their token weights.
        max_tokens: that a micro-batch may hold, padding counted.

    Returns:
        The objective's value (float64 sum over micro-batches), and the scale that every gradient carries.
    """
    scale = _loss_scale(calibration)
    total = torch.zeros((), dtype=torch.float64, device=device_of(model))
    for batch in batches(calibration, max_tokens, device_of(model)):
        loss = batch_loss(model, batch, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach().double()
    return float(total) / scale, scale


def _loss_scale(calibration: CalibrationSet) -> float:
    """What a loss is multiplied by before its backward pass.

    About the number of targets, so that gradients in half precision do not underflow; a power of two, so that it is
    exact.
    """
    return float(2.0 ** round(np.log2(max(calibration.num_targets, 1))))


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies."""
    return next(model.parameters()).device
