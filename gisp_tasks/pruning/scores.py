"""The outcome of a scoring pass, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class StructureScores:
    """Scores by structure: float32 ``attention`` [L, K] and ``mlp`` [L, F].

    NaN where already removed, +inf where protected.
    """

    attention: NDArray[np.float32]
    mlp: NDArray[np.float32]

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write ``scores.safetensors`` with JSON-ready metadata; equal values give equal bytes."""
        # safetensors keeps metadata in a hash map of random order: one JSON entry keeps the bytes equal.
        text = json.dumps(metadata, sort_keys=True)
        save_file({"attention": self.attention, "mlp": self.mlp}, path, metadata={"gisp": text})

    @classmethod
    def load(cls, path: Path) -> tuple["StructureScores", dict[str, Any]]:
        """Scores and metadata of a file."""
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads(file.metadata()["gisp"])
            tensors: Any = file
            return cls(tensors.get_tensor("attention"), tensors.get_tensor("mlp")), metadata
