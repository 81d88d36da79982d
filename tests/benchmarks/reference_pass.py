"""A scoring pass shaped as the reference implementation's (METHOD A2), to measure this package's against.

Eager attention, float32, a gradient for every parameter, gradients accumulated in ``.grad``, logits at all positions,
every candidate computed with its own prompt and padded right to the 99th percentile of candidate length, and separate
passes for wrong and correct answers with a copy of the gradients between them. The model stays at its dense size; what
was removed is masked. Two deviations, so that both sides compute the same scores: an answer's loss is its own token
mean (METHOD B4), and a candidate that is longer than the percentile is not cut but padded to its own length.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry

TEXT_BATCH = 2  # prune.batch_size of the published configurations
PADDED_PERCENTILE = 99


def batch_size_of(length: int) -> int:
    """Candidates of one padded length that are computed at once (METHOD A2)."""
    for above, size in ((512, 1), (256, 4), (128, 8), (64, 16), (31, 32)):
        if length > above:
            return size
    return 64


def reference_pass(model: nn.Module, geometry: Geometry, calibration: CalibrationSet) -> StructureScores:
    """Scores of every structure of a dense model in float32, a weight of the structure; removed ones included."""
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    negative: dict[str, torch.Tensor] = {}
    if (calibration.weights < 0).any():
        _accumulate(model, calibration, sign=-1)
        negative = {name: p.grad.to("cpu", copy=True) for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    _accumulate(model, calibration, sign=1)
    products = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and "_proj.weight" in name:
            weight = parameter.detach()
            difference = weight * gradient - weight * negative[name] if negative else weight * gradient
            products[name] = difference.abs()
    model.zero_grad(set_to_none=True)
    return _scores(products, geometry)


def _accumulate(model: nn.Module, calibration: CalibrationSet, *, sign: int) -> None:
    for tokens, weights in _batches(calibration, sign):
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        flat = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        (flat * weights[:, 1:].flatten()).sum().backward()


def _batches(calibration: CalibrationSet, sign: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded tokens and weights [B, T] of the sequences whose weights have that sign, in buckets of one length."""
    spans = calibration.spans
    lengths = spans[:, 1] - spans[:, 0]
    single = calibration.num_groups == calibration.num_sequences
    padded = np.maximum(lengths, 0 if single else int(np.percentile(lengths, PADDED_PERCENTILE)))
    mine = np.array([sign * calibration.weights[start:end].sum() > 0 for start, end in spans])
    for length in np.unique(padded[mine]):
        members = np.flatnonzero(mine & (padded == length))
        size = TEXT_BATCH if single else batch_size_of(int(length))
        for first in range(0, len(members), size):
            chosen = members[first : first + size]
            tokens = torch.zeros((len(chosen), length), dtype=torch.int64)
            weights = torch.zeros((len(chosen), length), dtype=torch.float32)
            for row, (start, end) in enumerate(spans[chosen]):
                tokens[row, : end - start] = torch.from_numpy(calibration.tokens[start:end].astype(np.int64))
                weights[row, : end - start] = torch.from_numpy(np.abs(calibration.weights[start:end]))
            yield tokens, weights


def _scores(products: dict[str, torch.Tensor], geometry: Geometry) -> StructureScores:
    groups = geometry.num_kv_groups
    attention, mlp = [], []
    for layer in range(geometry.num_layers):
        stem = f"model.layers.{layer}"
        rows = {name: products[f"{stem}.self_attn.{name}_proj.weight"].sum(dim=1) for name in "qkv"}
        rows["o"] = products[f"{stem}.self_attn.o_proj.weight"].sum(dim=0)
        attention.append(sum(part.view(groups, -1).sum(dim=1).double() for part in rows.values()))
        gate, up, down = (products[f"{stem}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        mlp.append((gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0)).double())
    return StructureScores(
        (torch.stack(attention) / geometry.attention_elements).float().numpy(),
        (torch.stack(mlp) / geometry.channel_elements).float().numpy(),
    )
