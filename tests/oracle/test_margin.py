"""The margin objective against two separate gradients, one of the correct answers and one of the wrong ones."""

import numpy as np
import pytest
import torch
from torch import nn

from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.objectives import Candidate, Item
from gisp_tasks.pruning.structures import KeepSets

# (prompt, correct answer, wrong answers) in tokens; two to five candidates, answers of unlike length.
SIZES = [(5, 3, [2]), (2, 1, [4, 1, 6]), (9, 2, [2, 2]), (1, 7, [1, 3, 2, 5])]
ONE_ULP = 1.2e-7


def random_items(vocab: int, seed: int = 0) -> list[Item]:
    generator = np.random.default_rng(seed)
    items = []
    for prompt, correct, wrong in SIZES:
        shared = generator.integers(0, vocab, prompt)
        made = [Candidate(np.concatenate([shared, generator.integers(0, vocab, n)]), prompt) for n in (correct, *wrong)]
        items.append(Item(made[0], tuple(made[1:])))
    return items


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


@pytest.mark.parametrize("max_tokens", [1, 45, 400])
def test_margin_scores_are_of_the_difference_of_two_gradients(tiny, max_tokens, float64_norms):
    items = random_items(tiny.config["vocab_size"])
    reference = tiny.load(torch.float64)
    loss_pos, pos = mean_gradients(reference, [item.correct for item in items])
    loss_neg, neg = mean_gradients(reference, [wrong for item in items for wrong in item.wrong])
    products = {
        name: (weight.detach() * (pos[name] - neg[name])).abs() for name, weight in reference.named_parameters()
    }

    geometry = geometry_of(tiny.config)
    found = importance.score(
        tiny.load(torch.float64),
        KeepSets.everything(geometry),
        geometry,
        objectives.margin(items),
        ScoringSettings(np.zeros(geometry.num_layers, dtype=np.bool_), "elements", max_tokens),
    )
    assert found.objective == pytest.approx(loss_pos - loss_neg, rel=1e-12)
    hidden, groups, head_dim = (tiny.config[k] for k in ("hidden_size", "num_key_value_heads", "head_dim"))
    queries = tiny.config["num_attention_heads"] // groups
    for i in range(geometry.num_layers):
        prefix = f"model.layers.{i}"
        q, k, v, o = (products[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkvo")
        for group in range(groups):
            wide = slice(group * queries * head_dim, (group + 1) * queries * head_dim)
            narrow = slice(group * head_dim, (group + 1) * head_dim)
            total = sum(float(part.sum()) for part in (q[wide], o[:, wide], k[narrow], v[narrow]))
            elements = hidden * head_dim * (2 * queries + 2)
            assert found.scores.attention[i, group] == pytest.approx(total / elements, rel=ONE_ULP)
        gate, up, down = (products[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        channels = (gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0)) / (3 * hidden)
        np.testing.assert_allclose(found.scores.mlp[i], channels.numpy(), rtol=ONE_ULP)


def test_the_sum_of_absolute_gradients_is_another_score(tiny, float64_norms):
    """The absolute value comes after the difference: taken before, the test above could not tell."""
    items = random_items(tiny.config["vocab_size"])
    model = tiny.load(torch.float64)
    _, pos = mean_gradients(model, [item.correct for item in items])
    _, neg = mean_gradients(model, [wrong for item in items for wrong in item.wrong])
    name = "model.layers.1.mlp.down_proj.weight"
    together, apart = (pos[name] - neg[name]).abs().sum(), (pos[name].abs() + neg[name].abs()).sum()
    assert together < 0.95 * apart
