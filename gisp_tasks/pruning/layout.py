"""Where every row and column of a written layer comes from: the exact conversion of a subnetwork (EXPORT.md, rule 3).

Attention is written in copies of key/value heads, each with the same number of query heads; what that number is, and
why, stands in `pruning.structures`. A copy repeats the key/value head of the dense model, and what is missing to fill
the last copy of a group is a dead query head. A sub-layer that keeps nothing is written dead: no runtime takes a size
of zero. Dead is what has zero weights, in o and down above all, so that the layer computes the same function.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.pruning.structures import Geometry, KeepSets

DEAD = -1


@dataclass(frozen=True)
class LayerLayout:
    """A written layer; `DEAD` entries have no place in the dense model.

    Args:
        query_heads: int64 [n * r], the dense query head in each place; r consecutive ones share a key/value head.
        kv_heads: int64 [n], the dense key/value head in each place.
        channels: int64 [F'], the dense channel in each place.
        head_dim: rows of a head.
    """

    query_heads: NDArray[np.int64]
    kv_heads: NDArray[np.int64]
    channels: NDArray[np.int64]
    head_dim: int

    def positions(self, structure: str) -> NDArray[np.int64]:
        """The dense row (or column) in each place of a projection, `DEAD` for zeros.

        Args:
            structure: as in `families.Projection`.
        """
        if structure == "channel":
            return self.channels
        heads = self.query_heads if structure == "query" else self.kv_heads
        rows = heads[:, None] * self.head_dim + np.arange(self.head_dim)
        return np.where(heads[:, None] == DEAD, DEAD, rows).ravel()


def layer_layout(geometry: Geometry, keep: KeepSets, layer: int) -> LayerLayout:
    """How a layer of ``keep`` is written; its parameters are what `Geometry.parameters_of` counts."""
    _, queries_each = geometry.written_heads(geometry.query_heads_left(keep.attention[layer]))
    each = int(queries_each)
    alive = np.flatnonzero(np.repeat(keep.attention[layer], geometry.queries_per_structure))
    query_heads: list[int] = []
    kv_heads: list[int] = []
    for group in range(geometry.num_kv_groups):
        members = alive[alive // geometry.queries_per_group == group].tolist()
        copies = -(-len(members) // each)
        kv_heads += [group] * copies
        query_heads += members + [DEAD] * (copies * each - len(members))
    if not kv_heads:
        query_heads, kv_heads = [DEAD], [DEAD]
    channels = np.flatnonzero(keep.mlp[layer])
    if not len(channels):
        channels = np.full(keep.dead_width, DEAD)
    return LayerLayout(np.array(query_heads), np.array(kv_heads), channels, geometry.head_dim)
