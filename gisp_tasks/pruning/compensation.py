"""Least-squares compensation: what the removed inputs of o and down did, the kept ones take over as well as they can.

For a projection W [D, n] with Gram matrix G = X X^T [n, n] of its inputs in the DENSE model, kept inputs S and removed
inputs P, the weights of the kept inputs change by

    dW = W_P G_PS (G_SS + ridge * mean(diag G_SS) * I)^-1

which minimises |W_P X_P - dW X_S|^2 + ridge |dW|^2 (METHOD B5; not part of the paper, whose levels keep the base
model's weights). The ridge is the one of `RIDGES` with the least error on sequences that were held back; the final
solve uses all of them. No training and no randomness: equal inputs give equal weights.

The dense model runs layer by layer over all sequences, so at any time the Gram matrices of one layer are held, and
the hidden states between two layers.

Shape legend: D hidden, n inputs of a projection (query heads x head_dim, or channels), B sequences, T tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.families import FAMILIES, READERS, kept_positions
from gisp_tasks.pruning.layer_stream import LayerStream, Observer
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.structures import Geometry, KeepSets

logger = logging.getLogger(__name__)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the ridge, relative to the mean diagonal of G_SS."""
HELD_BACK_EVERY = 8
"""Every so manieth sequence is held back for the choice of the ridge."""


@dataclass(frozen=True)
class Gram:
    """Gram matrices of a projection's inputs, float64 [n, n]: of the sequences to fit, and of those held back."""

    fit: torch.Tensor
    held_back: torch.Tensor


@dataclass(frozen=True)
class Compensated:
    """One projection, solved anew for one subnetwork.

    Args:
        name: of the weight in the model.
        weight: [D, n] in the dense model's shape and dtype; the columns of removed inputs are zero.
        ridge: chosen of `RIDGES`; None where the kept weights stay as they were.
        error: on the sequences held back, |what was removed - what took over|^2 over |what was removed|^2; 1 where
            nothing took over.
    """

    name: str
    weight: torch.Tensor
    ridge: float | None
    error: float


def compensate(
    model: nn.Module, geometry: Geometry, keeps: Sequence[KeepSets], calibration: CalibrationSet, *, batch_tokens: int
) -> Iterator[tuple[int, Compensated]]:
    """Solve o and down of every layer anew, for one or more subnetworks of one dense model.

    Args:
        model: the dense causal language model, in evaluation mode.
        geometry: of it.
        keeps: the subnetworks.
        calibration: sequences whose every token counts alike; at least two.
        batch_tokens: padded tokens that go through a layer at once (at least one sequence).

    Yields:
        Index of the subnetwork and one solved projection, layer by layer; projections that lost nothing are left out.

    Raises:
        InputError: fewer than two sequences.
    """
    check_sequences(calibration)
    for layer, role, gram in layer_grams(model, geometry, calibration, batch_tokens=batch_tokens, keeps=keeps):
        projection = FAMILIES[geometry.family].projections[role]
        name = f"model.layers.{layer}.{projection.path}.weight"
        weight = model.get_parameter(name).detach()
        for index, keep in enumerate(keeps):
            kept = torch.from_numpy(kept_positions(geometry, keep, layer, projection.structure)).to(weight.device)
            if len(kept) < weight.shape[1]:
                yield index, solve(name, weight, gram, kept)


def check_sequences(calibration: CalibrationSet) -> None:
    """Refuse what least squares cannot be fitted on.

    Raises:
        InputError: fewer than two sequences.
    """
    if calibration.num_sequences < 2:
        raise InputError(
            f"least squares (pruning.compensation) was asked, with {calibration.num_sequences} sequence to fit it on; "
            f"at least two are needed, since the ridge is chosen on some held back. Raise the number of sequences"
        )


def solve(name: str, weight: torch.Tensor, gram: Gram, kept: torch.Tensor) -> Compensated:
    """The weights of the kept inputs, for one projection.

    Args:
        name: of the weight.
        weight: [D, n], dense.
        gram: of the projection's inputs in the dense model.
        kept: int64, positions of the kept inputs, rising.
    """
    wide = weight.to(torch.float64)
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_removed[kept] = False
    removed = torch.nonzero(is_removed)[:, 0]
    lost = wide[:, removed]
    candidates: list[tuple[float, int, float | None]] = [(1.0, -1, None)]
    for number, ridge in enumerate(RIDGES if len(kept) else ()):
        change = _change(lost, gram.fit, kept, removed, ridge)
        if change is not None:
            candidates.append((_error(lost, change, gram.held_back, kept, removed), number, ridge))
    error, _, chosen = min(candidates, key=lambda candidate: candidate[:2])
    result = torch.zeros_like(wide)
    result[:, kept] = wide[:, kept]
    if chosen is not None:
        change = _change(lost, gram.fit + gram.held_back, kept, removed, chosen)
        if change is None:
            chosen, error = None, 1.0
        else:
            result[:, kept] += change
    if chosen is None and len(kept):
        logger.warning(
            "%s: its kept inputs cannot stand in for the removed ones (the Gram matrix of %d kept inputs is singular "
            "at every ridge up to %g, or the fit does not hold on the sequences held back); the weights stay as they "
            "were. More compensation sequences may help",
            name,
            len(kept),
            RIDGES[-1],
        )
    return Compensated(name, result.to(weight.dtype), chosen, error)


def _change(
    lost: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor, ridge: float
) -> torch.Tensor | None:
    """The change dW [D, |S|] in float64; None where G_SS + ridge is not positive definite."""
    kept_gram = gram[kept][:, kept]
    kept_gram.diagonal().add_(ridge * kept_gram.diagonal().mean())
    factor, fault = torch.linalg.cholesky_ex(kept_gram)
    if int(fault) or not bool(torch.isfinite(factor).all()):
        return None
    return torch.cholesky_solve((lost @ gram[removed][:, kept]).T, factor).T


def _error(
    lost: torch.Tensor, change: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor
) -> float:
    """|lost X_P - change X_S|^2 / |lost X_P|^2 by the Gram matrix of X; 1 where nothing was lost."""
    before = (lost @ gram[removed][:, removed] * lost).sum()
    cross = (lost @ gram[removed][:, kept] * change).sum()
    after = (change @ gram[kept][:, kept] * change).sum()
    return float((before - 2 * cross + after) / before) if float(before) > 0 else 1.0


def layer_grams(
    model: nn.Module, geometry: Geometry, calibration: CalibrationSet, *, batch_tokens: int, keeps: Sequence[KeepSets]
) -> Iterator[tuple[int, str, Gram]]:
    """Gram matrices of the inputs of o and down, layer by layer, where a subnetwork of ``keeps`` lost something.

    Yields:
        Layer, role and Gram matrices; those of one layer are freed before the next one's are made.
    """
    stream = LayerStream(model, calibration, batch_tokens=batch_tokens)
    roles = FAMILIES[geometry.family].projections
    for layer in range(geometry.num_layers):
        lost = {
            "o": not all(keep.attention[layer].all() for keep in keeps),
            "down": not all(keep.mlp[layer].all() for keep in keeps),
        }
        grams, observers = {}, {}
        for role in READERS:
            if lost[role]:
                weight = model.get_parameter(f"model.layers.{layer}.{roles[role].path}.weight")
                grams[role] = _empty_gram(weight)
                observers[roles[role].path] = _adder(grams[role])
        stream.advance(layer, observers)
        for role in list(grams):
            yield layer, role, grams.pop(role)


def _empty_gram(weight: torch.Tensor) -> Gram:
    square = (weight.shape[1], weight.shape[1])
    return Gram(*(torch.zeros(square, dtype=torch.float64, device=weight.device) for _ in range(2)))


def _adder(gram: Gram) -> Observer:
    """Adds X X^T of inputs [N, n]; each batch's product in float32, their sum in float64."""

    def add(inputs: torch.Tensor, sequences: torch.Tensor) -> None:
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        held_back = sequences % HELD_BACK_EVERY == 1
        for total, chosen in ((gram.fit, ~held_back), (gram.held_back, held_back)):
            columns = wide[chosen]
            total.add_(columns.T @ columns)

    return add
