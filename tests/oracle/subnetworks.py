"""Subnetworks by hand: which structures stay, the stock dense model with the rest set to zero, and the level cut so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import Geometry, KeepSets


def random_heads(config: dict[str, Any], seed: int = 3, *, granularity: str = "head") -> KeepSets:
    """A random subnetwork of a model; a layer may lose all its attention, or all its channels."""
    generator = np.random.default_rng(seed)
    keep = KeepSets.everything(geometry_of(config, granularity=granularity))
    keep.attention[:] = generator.random(keep.attention.shape) < 0.6
    keep.mlp[:] = generator.random(keep.mlp.shape) < 0.6
    return keep


def masked(model: Any, keep: KeepSets, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The stock dense model with the o and down columns of what went set to zero, by hand."""
    network, head_dim = model.load(dtype), model.config["head_dim"]
    width = head_dim * (model.config["num_attention_heads"] // keep.attention.shape[1])
    with torch.no_grad():
        for layer, heads, channels in zip(network.model.layers, keep.attention, keep.mlp, strict=True):
            for head in np.flatnonzero(~heads).tolist():
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
            layer.mlp.down_proj.weight[:, np.flatnonzero(~channels).tolist()] = 0
    return network


@dataclass(frozen=True)
class Level:
    """A float32 checkpoint, the model that it was cut from, what was kept, and the parameters written."""

    base: Any
    geometry: Geometry
    keep: KeepSets
    path: Path
    written: int

    def load(self) -> torch.nn.Module:
        return load_model(self.path, dtype="float32", trust_remote_code=True, device="cpu")

    def masked(self) -> torch.nn.Module:
        return masked(self.base, self.keep)


def write_level(model: Any, keep: KeepSets, directory: Path, *, granularity: str) -> Level:
    """Cut a model by what it keeps; where a layer keeps nothing, eight dead channels stand for its MLP."""
    geometry = geometry_of(model.config, granularity=granularity)
    keep = KeepSets(keep.attention, keep.mlp, dead_width=8)
    written = write_checkpoint(model.path, directory, geometry=geometry, keep=keep, dtype="float32")
    return Level(model, geometry, keep, directory, written)


def logits(network: torch.nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of every place of a batch."""
    with torch.inference_mode():
        return network(input_ids=ids, **options).logits


def greedy(
    network: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> list[list[int]]:
    """The twelve tokens that each sequence of a batch goes on with."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.inference_mode():
        out = network.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    return out[:, ids.shape[1] :].tolist()
