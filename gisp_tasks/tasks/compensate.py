"""Least squares for subnetworks of a model: their o and down solved anew, the weights left on disk."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.plan import MICRO_BATCH_TOKENS
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.tasks.runtime import Json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solutions:
    """New weights and how they were found.

    Args:
        weights: safetensors file by the name of the weight that it holds.
        projections: by name, the ridge (None: left as it was) and the error on the sequences held back.
    """

    weights: dict[str, Path]
    projections: dict[str, Json]

    def record(self) -> Json:
        """What a level says of it."""
        solved = [entry for entry in self.projections.values() if entry["ridge"] is not None]
        ridges = Counter(str(entry["ridge"]) for entry in solved)
        errors = [entry["error"] for entry in self.projections.values()]
        return {
            "method": "least_squares",
            "projections": len(self.projections),
            "solved": len(solved),
            "ridges": dict(sorted(ridges.items())),
            "mean_error": sum(errors) / len(errors) if errors else None,
        }


def solve_projections(
    model: Any, geometry: Geometry, keeps: Sequence[KeepSets], data: CalibrationSet, out: Path
) -> list[Solutions]:
    """Solve o and down of every layer that lost something, for each subnetwork; the data is gone through once.

    Args:
        model: the dense model.
        geometry: of it.
        keeps: the subnetworks.
        data: sequences to fit on.
        out: directory for the weights, one file each, so that memory holds one layer's at a time.
    """
    from safetensors.torch import save_file

    from gisp_tasks.pruning.compensation import compensate

    out.mkdir(parents=True, exist_ok=True)
    solutions = [Solutions({}, {}) for _ in keeps]
    for index, solution in compensate(model, geometry, keeps, data, batch_tokens=MICRO_BATCH_TOKENS):
        path = out / f"{index}-{solution.name}.safetensors"
        save_file({solution.name: solution.weight.cpu().contiguous()}, path)
        solutions[index].weights[solution.name] = path
        solutions[index].projections[solution.name] = {"ridge": solution.ridge, "error": solution.error}
        logger.info("%s: ridge %s, error %.3f", solution.name, solution.ridge, solution.error)
    return solutions
