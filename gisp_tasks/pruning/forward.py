"""Calibration sequences through a model: micro-batches, and the objective of each.

Shape legend: B rows of a micro-batch, T tokens, D hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gisp_tasks.pruning.objectives import CalibrationSet


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: ``tokens`` int64 [B, T], ``weights`` float64 [B, T] (0 on padding)."""

    tokens: torch.Tensor
    weights: torch.Tensor


def batches(calibration: CalibrationSet, micro_batch: int, device: torch.device) -> Iterator[Batch]:
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
        yield Batch(torch.from_numpy(tokens).to(device), torch.from_numpy(weights).to(device))


def num_batches(calibration: CalibrationSet, micro_batch: int) -> int:
    """How many micro-batches `batches` makes."""
    return -(-calibration.num_sequences // micro_batch)


def batch_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted sum of token losses; logits are computed at target positions only.

    Attention is causal and padding stands at the right, so it cannot reach a target.
    """
    hidden_btd = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
    is_target = batch.weights[:, 1:] != 0
    logits = model.lm_head(hidden_btd[:, :-1][is_target])  # type: ignore[operator]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(logits, batch.tokens[:, 1:][is_target], reduction="none")
    return (losses * batch.weights[:, 1:][is_target].to(losses.dtype)).sum()


def loss_scale(calibration: CalibrationSet) -> float:
    """What a loss is multiplied by before its backward pass.

    About the number of targets, so that gradients in half precision do not underflow; a power of two, so that it is
    exact.
    """
    return float(2.0 ** round(np.log2(max(calibration.num_targets, 1))))


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies."""
    return next(model.parameters()).device
