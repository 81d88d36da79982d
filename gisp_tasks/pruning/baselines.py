"""Other ways to score structures, to hold the method against (`gisp compare`). One pass at most, no gradients.

Each returns scores in the dense shape, ready for the same global ranking as the method's own:

- `random`: seeded, uniform.
- `magnitude`: mean |w| of the structure's weights.
- `wanda_sp`: mean of |w_ij| * |x_j| over the columns of o and down that belong to the structure, ranked within its
  layer and kind only, so that every layer loses the same share (Wanda, arXiv 2306.11695, in the structured form that
  FLAP's authors compare with).
- `flap`: fluctuation of the input, var(x_j) * |w_j|^2, averaged over the structure's columns and standardised within
  layer and kind (FLAP, arXiv 2312.11983, "WIFV" with its adaptive structure). What a removed input did on average is
  given to a bias (`output_biases`).

Deviation: under grouped-query attention the structure is the kv group here as everywhere in this package.

Shape legend: L layers, K kv groups, F channels, D hidden, n inputs of a projection.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gisp_tasks.pruning.families import FAMILIES, READERS, ROWS, kept_positions, projections_of
from gisp_tasks.pruning.importance import normalised
from gisp_tasks.pruning.layer_stream import LayerStream, Observer
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets, LayerImportance


class Moments:
    """Sum and sum of squares of a module's inputs over tokens, float64 [n]."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = torch.zeros(())
        self.square = torch.zeros(())

    def add(self, inputs: torch.Tensor, _: torch.Tensor) -> None:
        """An `Observer`."""
        wide = inputs.double()
        self.count += len(wide)
        self.sum = self.sum + wide.sum(dim=0)
        self.square = self.square + wide.square().sum(dim=0)

    @property
    def mean(self) -> torch.Tensor:
        """float64 [n]."""
        return self.sum / self.count

    @property
    def norm(self) -> torch.Tensor:
        """Root of the sum of squares, float64 [n]."""
        return self.square.sqrt()

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased, float64 [n]."""
        return (self.square - self.sum * self.mean).clamp(min=0) / max(1, self.count - 1)


InputMoments = dict[tuple[int, str], Moments]


def input_moments(
    model: nn.Module, geometry: Geometry, calibration: CalibrationSet, *, batch_tokens: int
) -> InputMoments:
    """Moments of the inputs of o and down of every layer of the dense model, by (layer, role)."""
    stream = LayerStream(model, calibration, batch_tokens=batch_tokens)
    found: InputMoments = {}
    for layer in range(geometry.num_layers):
        observers: dict[str, Observer] = {}
        for role in READERS:
            moments = found[layer, role] = Moments()
            observers[FAMILIES[geometry.family].projections[role].path] = moments.add
        stream.advance(layer, observers)
    return found


def random(geometry: Geometry, protected: NDArray[np.bool_], *, seed: int) -> StructureScores:
    """Scores drawn uniformly."""
    generator = np.random.default_rng(seed)
    everything = KeepSets.everything(geometry)
    attention = generator.random(everything.attention.shape, dtype=np.float32)
    mlp = generator.random(everything.mlp.shape, dtype=np.float32)
    attention[protected], mlp[protected] = np.inf, np.inf
    return StructureScores(attention, mlp)


def magnitude(model: nn.Module, geometry: Geometry, protected: NDArray[np.bool_]) -> StructureScores:
    """Mean |w| over the structure's weights."""
    everything, found = KeepSets.everything(geometry), {}
    for layer in map(int, np.flatnonzero(~protected)):
        attention = np.zeros(everything.attention.shape[1])
        mlp = np.zeros(everything.mlp.shape[1])
        for role, projection in projections_of(geometry).items():
            sums = _weight(model, geometry, layer, role).abs().sum(dim=1 if projection.axis == ROWS else 0)
            if projection.structure == "channel":
                mlp += sums.cpu().numpy()
            else:
                attention += sums.view(len(attention), -1).sum(dim=1).cpu().numpy()
        found[layer] = LayerImportance(attention, mlp)
    return normalised(found, everything, geometry, "elements")


def wanda_sp(
    model: nn.Module, geometry: Geometry, protected: NDArray[np.bool_], moments: InputMoments
) -> StructureScores:
    """Mean of |w_ij| * |x_j| over the structure's columns, turned into its rank within layer and kind."""

    def column_scores(weight: torch.Tensor, inputs: Moments) -> torch.Tensor:
        return weight.abs().sum(dim=0) * inputs.norm

    scores = _by_columns(model, geometry, protected, moments, column_scores)
    for kind in (scores.attention, scores.mlp):
        ranks = kind.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        kind[~protected] = ((ranks + 0.5) / kind.shape[1])[~protected]
    return scores


def flap(model: nn.Module, geometry: Geometry, protected: NDArray[np.bool_], moments: InputMoments) -> StructureScores:
    """Fluctuation var(x_j) * |w_j|^2 of the structure's columns, standardised within layer and kind."""

    def column_scores(weight: torch.Tensor, inputs: Moments) -> torch.Tensor:
        return weight.square().sum(dim=0) * inputs.variance

    scores = _by_columns(model, geometry, protected, moments, column_scores)
    for kind in (scores.attention, scores.mlp):
        live = kind[~protected]
        spread = live.std(axis=1, keepdims=True)
        kind[~protected] = (live - live.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return scores


def output_biases(
    model: nn.Module, geometry: Geometry, keep: KeepSets, moments: InputMoments
) -> dict[str, torch.Tensor]:
    """FLAP's bias: what the removed inputs of o and down added on average, [D] by the bias's name."""
    found = {}
    for layer, role in moments:
        projection = FAMILIES[geometry.family].projections[role]
        kept = kept_positions(geometry, keep, layer, projection.structure)
        weight, mean = _weight(model, geometry, layer, role), moments[layer, role].mean
        removed = np.setdiff1d(np.arange(weight.shape[1]), kept)
        found[f"model.layers.{layer}.{projection.path}.bias"] = weight[:, removed] @ mean[removed]
    return found


def _by_columns(
    model: nn.Module,
    geometry: Geometry,
    protected: NDArray[np.bool_],
    moments: InputMoments,
    column_scores: Callable[[torch.Tensor, Moments], torch.Tensor],
) -> StructureScores:
    """Mean over a structure's columns of o or down of a score a column."""
    everything = KeepSets.everything(geometry)
    scores = StructureScores(
        np.full(everything.attention.shape, np.inf, dtype=np.float32),
        np.full(everything.mlp.shape, np.inf, dtype=np.float32),
    )
    for layer in map(int, np.flatnonzero(~protected)):
        for role, kind in zip(READERS, (scores.attention, scores.mlp), strict=True):
            columns = column_scores(_weight(model, geometry, layer, role), moments[layer, role])
            kind[layer] = columns.view(kind.shape[1], -1).mean(dim=1).cpu().numpy()
    return scores


def _weight(model: nn.Module, geometry: Geometry, layer: int, role: str) -> torch.Tensor:
    """float64, detached."""
    path = FAMILIES[geometry.family].projections[role].path
    return model.get_parameter(f"model.layers.{layer}.{path}.weight").detach().double()
