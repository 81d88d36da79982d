"""Reading the tensors of a model directory one at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model directory by name; some of them replaced.

    A file is opened for one tensor at a time: pages of an open file stay in memory once they were read, up to the
    whole model.

    Args:
        directory: a Hugging Face directory.
        replaced: safetensors files of tensors that stand in for those of the same name.
    """

    def __init__(self, directory: Path, replaced: Mapping[str, Path] = MappingProxyType({})) -> None:
        self._replaced = replaced
        index = directory / INDEX
        weight_map = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._path_of: dict[str, Path] = {}
        for path in sorted({directory / name for name in weight_map.values()} or {directory / "model.safetensors"}):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._path_of[name] = path

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._path_of)

    def parameters(self, *, tied: bool) -> list[str]:
        """Of the tensors that a model is made of.

        Left out are a copy of the embeddings, which a model with ``tied`` ones may carry, and the table of rotary
        frequencies of old checkpoints, which transformers computes.
        """
        copies = {"lm_head.weight"} if tied else set()
        return [name for name in self.names() if name not in copies and not name.endswith("rotary_emb.inv_freq")]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, nothing read."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, or what stands in for it."""
        with safe_open(self._replaced.get(name, self._path_of[name]), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor
