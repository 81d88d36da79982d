"""What can be removed from a decoder, and how many parameters are left in the model as it would be written.

Shape legend: L layers, K key/value groups a layer, H query heads, U attention structures a layer, hd head dimension,
F MLP channels, D hidden.
A *kv group* is one key/value head with the H/K query heads that share it; a *channel* is one row of gate and up
with the matching column of down. An attention structure is a kv group (granularity ``kv_group``) or a query head
(granularity ``head``); where every query head has a key/value head of its own (H = K) the two are the same.

Attention is written with one number of query heads for each key/value head of a layer, because that is what
runtimes can hold. Where single query heads were removed, the layer is converted (EXPORT.md, rule 3): a group with n
query heads left becomes ceil(n/r) copies of its key/value head with r query heads each, r being the cheapest number
for the layer, and query heads that are missing to fill the last copy are dead: their weights are zero.
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
        granularity: what an attention structure is, ``kv_group`` or ``head``.
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
    granularity: str = "kv_group"

    @property
    def queries_per_group(self) -> int:
        """H/K."""
        return self.num_query_heads // self.num_kv_groups

    @property
    def separate_heads(self) -> bool:
        """Query heads are structures of their own although several share a key/value head, which is then none."""
        return self.granularity == "head" and self.queries_per_group > 1

    @property
    def num_attention_structures(self) -> int:
        """U."""
        return self.num_query_heads if self.separate_heads else self.num_kv_groups

    @property
    def queries_per_structure(self) -> int:
        """H/U."""
        return self.num_query_heads // self.num_attention_structures

    @property
    def attention_elements(self) -> int:
        """Scored weights of one attention structure: q rows and o columns, and the k and v rows that go with them."""
        rows = 2 * self.queries_per_structure + (0 if self.separate_heads else 2)
        return rows * self.head_dim * self.hidden_size

    @property
    def kv_group_parameters(self) -> int:
        """Parameters of one whole kv group: its weights and its biases."""
        return self._head_parameters(self.queries_per_group)

    def _head_parameters(self, queries: int) -> int:
        """Parameters of one key/value head with so many query heads."""
        bias = (queries + 2) * self.head_dim if self.qkv_bias else 0
        return (2 * queries + 2) * self.head_dim * self.hidden_size + bias

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

    def query_heads_left(self, attention: BoolArray) -> IntArray:
        """int64 [..., K]: how many query heads each group has left of the structures ``attention`` [..., U]."""
        heads = np.repeat(attention, self.queries_per_structure, axis=-1)
        left: IntArray = heads.reshape(*heads.shape[:-1], self.num_kv_groups, self.queries_per_group).sum(axis=-1)
        return left

    def written_heads(self, query_heads_left: IntArray) -> tuple[IntArray, IntArray]:
        """The cheapest conversion of layers (see the head of this module).

        Args:
            query_heads_left: int64 [..., K], of each group.

        Returns:
            int64 [...] each: key/value heads written, at least one, and query heads for each of them. Of two that
            cost the same, the one with fewer key/value heads.
        """
        options = np.arange(self.queries_per_group, 0, -1)
        copies = np.stack([np.maximum(1, (-(-query_heads_left // r)).sum(axis=-1)) for r in options])
        each = np.array([self._head_parameters(int(r)) for r in options])
        best = (copies.T * each).T.argmin(axis=0)
        return np.take_along_axis(copies, best[None], axis=0)[0], options[best]

    def attention_parameters(self, query_heads_left: IntArray) -> IntArray:
        """int64 [...]: parameters of layers' heads as they would be written; never rises when heads go."""
        copies, queries = self.written_heads(query_heads_left)
        per_copy = np.array([self._head_parameters(r) for r in range(self.queries_per_group + 1)])
        parameters: IntArray = copies * per_copy[queries]
        return parameters

    def parameters_of(self, keep: "KeepSets") -> int:
        """Parameters of the decoder layers of ``keep`` as they would be written."""
        return (
            self.num_layers * self.layer_overhead
            + int(self.attention_parameters(self.query_heads_left(keep.attention)).sum())
            + int(keep.widths.sum()) * self.channel_parameters
        )

    def sparsity_of(self, keep: "KeepSets") -> float:
        """Parameter sparsity: removed parameters over those of the dense decoder layers."""
        return 1.0 - self.parameters_of(keep) / self.decoder_parameters

    def max_parameters(self, sparsity: float) -> int:
        """The most decoder parameters with which a model still meets ``sparsity``."""
        # The tolerance keeps 3/5 * 0.5 from missing 0.3 by a rounding error of the fraction.
        return int(np.floor(self.decoder_parameters * (1.0 - sparsity + 1e-9)))

    def rounded_width(self, channels: IntArray, multiple: int) -> IntArray:
        """Channels after rounding up to ``multiple``, never above the dense width and never none."""
        width: IntArray = np.minimum(self.intermediate_size, -(-np.maximum(1, channels) // multiple) * multiple)
        return width


@dataclass(frozen=True)
class KeepSets:
    """What a subnetwork keeps.

    Args:
        attention: bool [L, U], attention structures kept.
        mlp: bool [L, F], channels kept.
        dead_width: channels, all of them dead (zero weights), of a written layer that keeps none.
    """

    attention: BoolArray
    mlp: BoolArray
    dead_width: int = 1

    @classmethod
    def everything(cls, geometry: Geometry) -> "KeepSets":
        """The dense model."""
        return cls(
            np.ones((geometry.num_layers, geometry.num_attention_structures), dtype=np.bool_),
            np.ones((geometry.num_layers, geometry.intermediate_size), dtype=np.bool_),
        )

    @property
    def widths(self) -> IntArray:
        """int64 [L]: channels of each written layer."""
        kept = self.mlp.sum(axis=1)
        widths: IntArray = np.where(kept > 0, kept, self.dead_width)
        return widths

    def contains(self, other: "KeepSets") -> bool:
        """True if ``other`` keeps nothing that this one does not."""
        return not bool((other.attention & ~self.attention).any() or (other.mlp & ~self.mlp).any())


@dataclass(frozen=True)
class LayerImportance:
    """Raw importance, before any normaliser, of the structures that a layer still has.

    Args:
        attention: float64 [U'], in the order of the kept attention structures.
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
        indices: int64 [n], attention structure or channel within the layer.
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
    freed = np.empty(len(removals), dtype=np.int64)
    attention, mlp = (np.flatnonzero(removals.kinds == kind) for kind in Kind)
    freed[attention] = _freed_by_heads(geometry, removals.layers[attention], removals.indices[attention])
    width_before = geometry.intermediate_size - _occurrence(removals.layers[mlp])
    narrowed = geometry.rounded_width(width_before, width_multiple) - geometry.rounded_width(
        width_before - 1, width_multiple
    )
    freed[mlp] = narrowed * geometry.channel_parameters
    return geometry.decoder_parameters - np.concatenate([np.zeros(1, np.int64), np.cumsum(freed)])


def _freed_by_heads(geometry: Geometry, layers: IntArray, indices: IntArray) -> IntArray:
    """int64 [n]: what each removal of an attention structure takes off its layer as it would be written."""
    freed = np.empty(len(layers), dtype=np.int64)
    groups = indices * geometry.queries_per_structure // geometry.queries_per_group
    for layer in np.unique(layers):
        here = np.flatnonzero(layers == layer)
        gone = np.zeros((len(here) + 1, geometry.num_kv_groups), dtype=np.int64)
        gone[np.arange(1, len(here) + 1), groups[here]] = geometry.queries_per_structure
        left = geometry.queries_per_group - gone.cumsum(axis=0)
        freed[here] = -np.diff(geometry.attention_parameters(left))
    return freed


def _occurrence(values: IntArray) -> IntArray:
    """int64 [n]: how often each value has stood before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, np.int64)
    run_lengths = np.diff(np.r_[starts, len(values)])
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - np.repeat(starts, run_lengths)
    return result
