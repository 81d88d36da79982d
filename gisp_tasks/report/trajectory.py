"""What the page shows of the way from the dense model to the last level, small enough to be kept in memory.

Shape legend: L layers, U attention structures a layer, F MLP channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.pruning.structures import Geometry, KeepSets

PROBABILITIES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the quantiles that are shown."""


@dataclass(frozen=True)
class ScoreSummary:
    """The scores of one kind of structure before a step.

    Args:
        quantiles: at `PROBABILITIES`, of the structures that could be removed.
        num_scored: how many those are.
        highest_removed: the highest score that the step removed; None where it removed none of this kind.
    """

    quantiles: tuple[float, ...]
    num_scored: int
    highest_removed: float | None


@dataclass(frozen=True, kw_only=True)
class StepObservation:
    """What one step found and took; None where it was not recorded, or no structure of that kind could be removed.

    Args:
        number: from 1.
        attention: scores of the attention structures.
        mlp: scores of the channels.
        seconds: of the scoring pass.
        peak_bytes: most memory held: of the accelerator if there is one, else of the process.
    """

    number: int
    attention: ScoreSummary | None
    mlp: ScoreSummary | None
    seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The whole way.

    Args:
        geometry: of the dense model.
        keep: what each level keeps, by its name.
        steps: in order.
    """

    geometry: Geometry
    keep: Mapping[str, KeepSets]
    steps: tuple[StepObservation, ...]


def summarise_scores(scores: NDArray[np.float32], removed: NDArray[np.bool_]) -> ScoreSummary | None:
    """Quantiles of one kind's scores; None where nothing could be removed.

    Args:
        scores: [L, U] or [L, F]; NaN where already removed, +inf where protected.
        removed: of the same shape, what this step removed.
    """
    scored = scores[np.isfinite(scores)]
    if not scored.size:
        return None
    gone = scores[removed]
    return ScoreSummary(
        quantiles=tuple(float(value) for value in np.quantile(scored.astype(np.float64), PROBABILITIES)),
        num_scored=int(scored.size),
        highest_removed=float(gone.max()) if gone.size else None,
    )
