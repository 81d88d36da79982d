"""A referee for compatibility mode: METHOD Part A in plain torch, masks only. It shares no code with the package.

It loads nothing and saves nothing: a model of transformers goes in, what each iteration leaves comes out. It does what
the description of the reference says, in the order in which it says it, with the dense-shaped model all the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

Grads = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Iteration:
    """What one iteration leaves.

    Args:
        heads: bool [L, H], query heads that are left.
        channels: bool [L, F], channels that are left.
        rank: k, the number of structures below the threshold or at it, but for ties.
        gap: relative distance from the threshold to the next score above it: where it is no larger than rounding
            errors, float32 cannot decide.
    """

    heads: torch.Tensor
    channels: torch.Tensor
    rank: int
    gap: float


def perplexity_gradients(model: nn.Module, sequences: list[list[int]], batch_size: int) -> Grads:
    """A2: summed over batches of (mean loss of the batch) x (its size); divided by the number of sequences."""
    model.zero_grad(set_to_none=True)
    for first in range(0, len(sequences), batch_size):
        batch = torch.tensor(sequences[first : first + batch_size])
        (model(input_ids=batch, labels=batch).loss * len(batch)).backward()
    return _named_gradients(model, len(sequences))


def margin_gradients(model: nn.Module, items: list[dict]) -> Grads:
    """A2: negatives first, then positives; each candidate alone, so by its own token mean (the named exception)."""
    wrong = [(item["prompt_ids"], answer) for item in items for answer in item["wrong_ids"]]
    right = [(item["prompt_ids"], item["correct_ids"]) for item in items]
    negative, positive = (_labelled_gradients(model, candidates) for candidates in (wrong, right))
    # Subtracted after the multiplication by the weight in the reference; the same up to the last digit.
    return {name: positive[name] - negative[name] for name in positive}


def _labelled_gradients(model: nn.Module, candidates: list[tuple[list[int], list[int]]]) -> Grads:
    model.zero_grad(set_to_none=True)
    for prompt, answer in candidates:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.backward()
    return _named_gradients(model, len(candidates))


def _named_gradients(model: nn.Module, count: int) -> Grads:
    return {name: weight.grad.clone() / count for name, weight in model.named_parameters()}


def iterations(model: nn.Module, *, structure_ratio: float, num_iterations: int, gradients) -> Iterator[Iteration]:
    """Run the reference's loop on ``model``, which ends masked.

    Args:
        model: all of its parameters get gradients.
        structure_ratio: of the last iteration.
        num_iterations: as in the reference's settings.
        gradients: a function of the model.
    """
    model.requires_grad_(True)
    if num_iterations == 1:
        schedule = [torch.tensor(structure_ratio)]
    else:
        schedule = list(torch.linspace(0, structure_ratio, num_iterations))
    num_layers = len(model.model.layers)
    not_skipped = range(int(0.1 * num_layers), num_layers - 1)
    for ratio in schedule:
        grads = gradients(model)
        heads, channels = _scores(model, grads)
        for layer in range(num_layers):
            if layer not in not_skipped:
                heads[layer], channels[layer] = float("inf"), float("inf")
        scores = torch.cat([heads.flatten(), channels.flatten()])
        scores = scores + scores.min().abs()
        total = len(scores)
        rank = total - int(total * (1 - ratio)) + 1
        threshold = scores.kthvalue(rank).values
        pruned = scores <= threshold
        above = scores[scores > threshold]
        gap = float((above.min() - threshold) / above.min())
        pruned_heads = pruned[: heads.numel()].reshape(heads.shape)
        pruned_channels = pruned[heads.numel() :].reshape(channels.shape)
        _zero(model, pruned_heads, pruned_channels)
        yield Iteration(~pruned_heads, ~pruned_channels, rank, gap)


def _scores(model: nn.Module, grads: Grads) -> tuple[torch.Tensor, torch.Tensor]:
    """A2.4 to A2.6: float32 [L, H] and [L, F]."""
    config = model.config
    num_heads, width, hidden = config.num_attention_heads, config.intermediate_size, config.hidden_size
    head_dim = model.model.layers[0].self_attn.head_dim
    heads, channels = [], []
    for i, layer in enumerate(model.model.layers):
        importance = {
            name.split(".")[1]: (weight.detach() * grads[f"model.layers.{i}.{name}"]).abs()
            for name, weight in layer.named_parameters()
            if name.endswith("_proj.weight")
        }
        parts = ["q_proj", "k_proj", "v_proj"] if config.num_key_value_heads == num_heads else ["q_proj"]
        rows = [importance[part] for part in parts] + [importance["o_proj"].T]
        head = sum(part.reshape(num_heads, head_dim * hidden).sum(1) for part in rows)
        channel = importance["up_proj"].sum(1) + importance["gate_proj"].sum(1) + importance["down_proj"].sum(0)
        heads.append((head / (4 * head_dim * hidden)).float())
        channels.append((channel / (3 * width)).float())
    return torch.stack(heads), torch.stack(channels)


def _zero(model: nn.Module, pruned_heads: torch.Tensor, pruned_channels: torch.Tensor) -> None:
    """A3.6: rows of q (k, v under MHA), gate and up, columns of o and down."""
    config = model.config
    mha = config.num_key_value_heads == config.num_attention_heads
    with torch.no_grad():
        for layer, heads, channels in zip(model.model.layers, pruned_heads, pruned_channels, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            rows = heads.repeat_interleave(attention.head_dim)
            attention.q_proj.weight[rows] = 0
            if mha:
                attention.k_proj.weight[rows] = 0
                attention.v_proj.weight[rows] = 0
            attention.o_proj.weight[:, rows] = 0
            mlp.gate_proj.weight[channels] = 0
            mlp.up_proj.weight[channels] = 0
            mlp.down_proj.weight[:, channels] = 0
