"""The margin objective against two separate gradients, one of the correct answers and one of the wrong ones.

The reference computes every candidate alone, from its first token, without padding. Scoring computes what candidates
share once.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gisp_tasks.pruning import importance, objectives, taylor
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.objectives import Candidate, Item
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import slice_model

ONE_ULP = 1.2e-7


def mean_gradients(model: nn.Module, candidates: list[Candidate]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean over candidates of the mean NLL of their answers, one at a time, and its gradient by name."""
    model.zero_grad()
    total = 0.0
    for candidate in candidates:
        ids = torch.from_numpy(candidate.tokens.astype(np.int64))[None]
        log_probabilities = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
        targets = range(candidate.prompt_length, ids.shape[1])
        loss = -sum(log_probabilities[t - 1, ids[0, t]] for t in targets) / len(targets)
        loss.backward()
        total += loss.item()
    named = {name: parameter.grad / len(candidates) for name, parameter in model.named_parameters()}
    return total / len(candidates), named


def margin_gradients(model: nn.Module, items: list[Item]) -> tuple[float, dict[str, torch.Tensor]]:
    """The margin and its gradient by name."""
    loss_pos, pos = mean_gradients(model, [item.correct for item in items])
    loss_neg, neg = mean_gradients(model, [wrong for item in items for wrong in item.wrong])
    return loss_pos - loss_neg, {name: pos[name] - neg[name] for name in pos}


def reference_scores(
    model: nn.Module, gradients: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of |w * g| over every structure's own weights, a weight."""
    products = {name: (weight.detach() * gradients[name]).abs() for name, weight in model.named_parameters()}
    hidden, groups, head_dim = (config[k] for k in ("hidden_size", "num_key_value_heads", "head_dim"))
    queries = config["num_attention_heads"] // groups
    attention, mlp = [], []
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        q, k, v, o = (products[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkvo")
        sums = []
        for group in range(groups):
            wide = slice(group * queries * head_dim, (group + 1) * queries * head_dim)
            narrow = slice(group * head_dim, (group + 1) * head_dim)
            sums.append(sum(float(part.sum()) for part in (q[wide], o[:, wide], k[narrow], v[narrow])))
        attention.append(np.array(sums) / (hidden * head_dim * (2 * queries + 2)))
        gate, up, down = (products[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        mlp.append((gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0)).numpy() / (3 * hidden))
    return np.stack(attention), np.stack(mlp)


@pytest.mark.parametrize("max_tokens", [1, 45, 400])
def test_margin_scores_are_of_the_difference_of_two_gradients(tiny, max_tokens, many_items, float64_norms):
    items = many_items(tiny.config["vocab_size"])
    reference = tiny.load(torch.float64)
    objective, gradients = margin_gradients(reference, items)
    attention, mlp = reference_scores(reference, gradients, tiny.config)

    geometry = geometry_of(tiny.config)
    found = importance.score(
        tiny.load(torch.float64),
        KeepSets.everything(geometry),
        geometry,
        objectives.margin(items),
        ScoringSettings(np.zeros(geometry.num_layers, dtype=np.bool_), "elements", max_tokens),
    )
    assert found.objective == pytest.approx(objective, rel=1e-12)
    np.testing.assert_allclose(found.scores.attention, attention, rtol=ONE_ULP)
    np.testing.assert_allclose(found.scores.mlp, mlp, rtol=ONE_ULP)


@pytest.mark.parametrize("max_tokens", [1, 45, 400])
def test_gradients_of_shared_prefixes_are_those_of_candidates_alone(tiny, max_tokens, many_items, float64_norms):
    items = many_items(tiny.config["vocab_size"])
    _, expected = margin_gradients(tiny.load(torch.float64), items)
    model, geometry = tiny.load(torch.float64), geometry_of(tiny.config)
    weights = taylor.scored_weights(model, geometry, np.zeros(geometry.num_layers, dtype=np.bool_))
    _, found = taylor.accumulate(model, weights, objectives.margin(items), max_tokens)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key, weight in weights.items():
        gradient = expected[names[id(weight)]]
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-10 * float(gradient.abs().max()))


def test_margin_scores_of_a_sliced_model_are_those_of_the_masked_one(tiny, many_items, random_keep, float64_norms):
    items, config = many_items(tiny.config["vocab_size"]), tiny.config
    kept = random_keep(config)
    masked = tiny.load(torch.float64)
    columns = config["num_attention_heads"] // config["num_key_value_heads"] * config["head_dim"]
    keep = KeepSets(
        np.array([[g in groups for g in range(config["num_key_value_heads"])] for groups, _ in kept]),
        np.array([[c in channels for c in range(config["intermediate_size"])] for _, channels in kept]),
    )
    with torch.no_grad():
        for i, layer in enumerate(masked.model.layers):
            layer.self_attn.o_proj.weight *= torch.from_numpy(np.repeat(keep.attention[i], columns))
            layer.mlp.down_proj.weight *= torch.from_numpy(keep.mlp[i])
    objective, gradients = margin_gradients(masked, items)
    attention, mlp = reference_scores(masked, gradients, config)

    geometry, sliced = geometry_of(config), tiny.load(torch.float64)
    slice_model(sliced, geometry, now=KeepSets.everything(geometry), wanted=keep)
    free = np.zeros(geometry.num_layers, dtype=np.bool_)
    settings = ScoringSettings(free, "elements", 200)
    found = importance.score(sliced, keep, geometry, objectives.margin(items), settings)
    assert found.objective == pytest.approx(objective, rel=1e-12)
    np.testing.assert_allclose(found.scores.attention[keep.attention], attention[keep.attention], rtol=ONE_ULP)
    np.testing.assert_allclose(found.scores.mlp[keep.mlp], mlp[keep.mlp], rtol=ONE_ULP)


def test_the_sum_of_absolute_gradients_is_another_score(tiny, many_items, float64_norms):
    """The absolute value comes after the difference: taken before, the tests above could not tell."""
    items = many_items(tiny.config["vocab_size"])
    model = tiny.load(torch.float64)
    _, pos = mean_gradients(model, [item.correct for item in items])
    _, neg = mean_gradients(model, [wrong for item in items for wrong in item.wrong])
    name = "model.layers.1.mlp.down_proj.weight"
    together, apart = (pos[name] - neg[name]).abs().sum(), (pos[name].abs() + neg[name].abs()).sum()
    assert together < 0.95 * apart
