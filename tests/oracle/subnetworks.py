"""Subnetworks by hand: which structures stay at random, and the stock dense model with the rest set to zero."""

from typing import Any

import numpy as np
import torch

from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets


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
