"""What can be removed from a decoder, and how many parameters each piece costs.

Shape legend: L layers, K key/value groups a layer, H query heads, hd head dimension, F MLP channels, D hidden.
A *kv group* is one key/value head with the H/K query heads that share it; a *channel* is one row of gate and up
with the matching column of down.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


class Kind(IntEnum):
    """The kinds of structure, in the order that breaks ties."""

    ATTENTION = 0
    MLP = 1


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a model that pruning needs; read from its configuration (`families.geometry_of`).

    Args:
        family: the architecture's ``model_type``.
        qkv_bias: q, k and v projections have biases.
        output_bias: the o projection has one (never removed: it belongs to the residual stream).
        mlp_bias: gate, up and down have biases (that of down is never removed).
        norm_parameters: parameters of a layer's norms, which are never removed.
        other_parameters: everything outside the decoder layers: embeddings, final norm, an untied head.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_query_heads: int
    num_kv_groups: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    norm_parameters: int
    other_parameters: int

    @property
    def queries_per_group(self) -> int:
        """H/K."""
        return self.num_query_heads // self.num_kv_groups

    @property
    def kv_group_elements(self) -> int:
        """Scored weights of one kv group: q, k and v rows and o columns."""
        return (2 * self.queries_per_group + 2) * self.head_dim * self.hidden_size

    @property
    def kv_group_parameters(self) -> int:
        """Parameters that leave with one kv group: its weights and its biases."""
        bias = (self.queries_per_group + 2) * self.head_dim if self.qkv_bias else 0
        return self.kv_group_elements + bias

    @property
    def channel_elements(self) -> int:
        """Scored weights of one channel: gate and up row, down column."""
        return 3 * self.hidden_size

    @property
    def channel_parameters(self) -> int:
        """Parameters that leave with one channel."""
        return self.channel_elements + (2 if self.mlp_bias else 0)

    @property
    def layer_overhead(self) -> int:
        """Parameters of a layer that no removal touches: norms, and the biases of o and down."""
        return self.norm_parameters + self.hidden_size * (int(self.output_bias) + int(self.mlp_bias))

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all decoder layers of the dense model: the denominator of sparsity."""
        layer = self.layer_overhead + self.num_kv_groups * self.kv_group_parameters
        return self.num_layers * (layer + self.intermediate_size * self.channel_parameters)

    def parameters_of(self, keep: "KeepSets") -> int:
        """Parameters of the decoder layers that ``keep`` leaves."""
        return (
            self.num_layers * self.layer_overhead
            + int(keep.attention.sum()) * self.kv_group_parameters
            + int(keep.mlp.sum()) * self.channel_parameters
        )

    def sparsity_of(self, keep: "KeepSets") -> float:
        """Parameter sparsity: removed parameters over those of the dense decoder layers."""
        return 1.0 - self.parameters_of(keep) / self.decoder_parameters

    def max_parameters(self, sparsity: float) -> int:
        """The most decoder parameters with which a model still meets ``sparsity``."""
        # The tolerance keeps 3/5 * 0.5 from missing 0.3 by a rounding error of the fraction.
        return int(np.floor(self.decoder_parameters * (1.0 - sparsity + 1e-9)))

    def rounded_width(self, channels: IntArray, multiple: int) -> IntArray:
        """Channels after rounding up to ``multiple``, never above the dense width."""
        return np.minimum(self.intermediate_size, -(-channels // multiple) * multiple)


@dataclass(frozen=True)
class KeepSets:
    """What a subnetwork keeps.

    Args:
        attention: bool [L, K], kv groups kept.
        mlp: bool [L, F], channels kept.
    """

    attention: BoolArray
    mlp: BoolArray

    @classmethod
    def everything(cls, geometry: Geometry) -> "KeepSets":
        """The dense model."""
        return cls(
            np.ones((geometry.num_layers, geometry.num_kv_groups), dtype=np.bool_),
            np.ones((geometry.num_layers, geometry.intermediate_size), dtype=np.bool_),
        )

    def contains(self, other: "KeepSets") -> bool:
        """True if ``other`` keeps nothing that this one does not."""
        return not bool((other.attention & ~self.attention).any() or (other.mlp & ~self.mlp).any())


@dataclass(frozen=True)
class LayerImportance:
    """Raw importance, before any normaliser, of the structures that a layer still has.

    Args:
        attention: float64 [K'], in the order of the kept kv groups.
        mlp: float64 [F'], in the order of the kept channels.
    """

    attention: NDArray[np.float64]
    mlp: NDArray[np.float64]


@dataclass(frozen=True)
class Removals:
    """A sequence of structures in the order in which they go.

    Args:
        kinds: int64 [n], values of `Kind`.
        layers: int64 [n].
        indices: int64 [n], kv group or channel within the layer.
    """

    kinds: IntArray
    layers: IntArray
    indices: IntArray

    def __len__(self) -> int:
        return len(self.kinds)

    def prefix(self, length: int) -> "Removals":
        """The first ``length`` removals."""
        return Removals(self.kinds[:length], self.layers[:length], self.indices[:length])

    def then(self, later: "Removals") -> "Removals":
        """These removals followed by ``later``."""
        return Removals(
            np.concatenate([self.kinds, later.kinds]),
            np.concatenate([self.layers, later.layers]),
            np.concatenate([self.indices, later.indices]),
        )


def parameters_along(geometry: Geometry, removals: Removals, width_multiple: int) -> IntArray:
    """Decoder parameters of the model as it would be written after each removal, widths rounded up.

    Args:
        geometry: of the dense model.
        removals: n structures, none twice, beginning at the dense model.
        width_multiple: MLP widths are rounded up to a multiple of this.

    Returns:
        int64 [n + 1]; entry i counts after the first i removals; never rises.
    """
    freed = np.full(len(removals), geometry.kv_group_parameters, dtype=np.int64)
    mlp = removals.kinds == Kind.MLP
    width_before = geometry.intermediate_size - _occurrence(removals.layers[mlp])
    narrowed = geometry.rounded_width(width_before, width_multiple) - geometry.rounded_width(
        width_before - 1, width_multiple
    )
    freed[mlp] = narrowed * geometry.channel_parameters
    return geometry.decoder_parameters - np.concatenate([np.zeros(1, np.int64), np.cumsum(freed)])


def _occurrence(values: IntArray) -> IntArray:
    """int64 [n]: how often each value has stood before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, np.int64)
    run_lengths = np.diff(np.r_[starts, len(values)])
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - np.repeat(starts, run_lengths)
    return result
