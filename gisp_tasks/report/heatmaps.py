"""What a level keeps, layer by layer, as one picture: attention structures, channels in bins, width left.

Shape legend: L layers, U attention structures a layer, F MLP channels, B bins.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.report import drawing
from gisp_tasks.report.drawing import CARD, HEAT_RGB, SERIES

BINS = 96
_WIDTH = 4.4
_HEIGHT_OF_A_LAYER = 0.055


def binned(kept: NDArray[np.bool_], bins: int = BINS) -> NDArray[np.float64]:
    """float64 [L, B]: the share kept of each bin of neighbouring channels; B is ``bins``, or F where that is less.

    Args:
        kept: bool [L, F].
        bins: at most so many; they differ by one channel at most.
    """
    width = kept.shape[1]
    edges = np.linspace(0, width, min(bins, width) + 1).astype(np.int64)
    counts = np.add.reduceat(kept, edges[:-1], axis=1, dtype=np.int64)
    shares: NDArray[np.float64] = counts / np.diff(edges)
    return shares


def keep_map(name: str, keep: KeepSets, structure: str) -> str:
    """The picture of one level, layer 0 on top.

    Args:
        name: of the level.
        keep: what it keeps.
        structure: what an attention structure is called, in the plural.
    """
    layers = len(keep.attention)
    width_left = 100 * keep.mlp.mean(axis=1)
    size = (_WIDTH, max(2.6, 1.0 + _HEIGHT_OF_A_LAYER * layers))

    def paint(figure: Any) -> None:
        attention, channels, width = figure.subplots(1, 3, sharey=True, width_ratios=(1, 2.2, 1.1))
        _cells(attention, keep.attention.astype(np.float64), title=structure)
        _cells(channels, binned(keep.mlp), title="channels")
        _separate(attention, *keep.attention.shape)
        attention.set_ylabel("layer")
        width.barh(range(layers), width_left, height=0.8, color=SERIES[0])
        width.set(title="width left, %", xlim=(0, 100), xticks=(0, 50, 100))

    empty = int((~keep.attention.any(axis=1)).sum())
    label = (
        f"Level {name} keeps {keep.attention.sum()} of {keep.attention.size} {structure} and {keep.mlp.sum():,} of "
        f"{keep.mlp.size:,} channels. The narrowest layer is {width_left.argmin()} with {width_left.min():.0f} % of "
        f"its channels, the widest {width_left.argmax()} with {width_left.max():.0f} %; {empty} layers keep no "
        f"attention."
    )
    return drawing.draw(f"map-{name}", label=label, size=size, paint=paint)


def _cells(axes: Any, share: NDArray[np.float64], *, title: str) -> None:
    """Cells as deep as their share: an image with transparency, so that the page shows through what is gone."""
    picture = np.empty((*share.shape, 4), dtype=np.uint8)
    picture[..., :3] = HEAT_RGB
    picture[..., 3] = np.rint(255 * share)
    axes.imshow(picture, aspect="auto", interpolation="none")
    axes.set(title=title, xticks=[])
    axes.yaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _separate(axes: Any, rows: int, columns: int) -> None:
    """Thin lines between single structures."""
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color=CARD, linewidth=0.5)
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color=CARD, linewidth=0.5)
