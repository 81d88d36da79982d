"""Sliding attention against single sequences under a mask that is written out token by token."""

import numpy as np
import pytest
import torch
from torch import nn

from gisp_tasks.pruning import objectives, taylor
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import objective_value

WINDOWED = {"mistral-gqa-untied-sliding": 8, "qwen2-gqa-untied-sliding": 8}


@pytest.fixture(params=list(WINDOWED))
def windowed(request, tiny_models):
    return tiny_models[request.param], WINDOWED[request.param]


def band(length: int, window: int | None) -> torch.Tensor:
    """Additive mask [1, 1, T, T]: token t sees itself and at most window - 1 tokens before it."""
    mask = torch.full((1, 1, length, length), -torch.inf, dtype=torch.float64)
    for t in range(length):
        for seen in range(0 if window is None else max(0, t - window + 1), t + 1):
            mask[0, 0, t, seen] = 0
    return mask


def mean_nll(model: nn.Module, tokens: np.ndarray, first: int, window: int) -> torch.Tensor:
    """Mean NLL of the tokens from ``first`` on, of one sequence."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    mask = band(len(tokens), window)
    types = getattr(model.config, "layer_types", None)
    if types:
        mask = {"sliding_attention": mask, "full_attention": band(len(tokens), None)}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return -torch.stack([log_probabilities[t - 1, ids[0, t]] for t in range(first, len(tokens))]).mean()


def assert_gradients(model, reference: nn.Module, loss: torch.Tensor, calibration) -> None:
    loss.backward()
    loaded, geometry = model.load(torch.float64), geometry_of(model.config)
    weights = taylor.scored_weights(loaded, geometry, np.zeros(geometry.num_layers, dtype=np.bool_))
    objective, gradients = taylor.accumulate(loaded, weights, calibration, 200)
    assert objective == pytest.approx(loss.item(), rel=1e-12)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    names = {id(parameter): name for name, parameter in loaded.named_parameters()}
    for key, weight in weights.items():
        wanted = expected[names[id(weight)]]
        torch.testing.assert_close(gradients[key], wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def test_sequences_longer_than_the_window(windowed, random_sequences, float64_norms):
    model, window = windowed
    sequences = random_sequences(model.config["vocab_size"], [30, 17, 8, 9, 5])
    reference = model.load(torch.float64)
    loss = torch.stack([mean_nll(reference, s, 1, window) for s in sequences]).mean()
    assert_gradients(model, reference, loss, objectives.perplexity(sequences))


def test_items_longer_than_the_window(windowed, many_items, float64_norms):
    model, window = windowed
    items = many_items(model.config["vocab_size"])
    assert max(len(c.tokens) for item in items for c in item.candidates) > window
    reference = model.load(torch.float64)

    def mean(candidates) -> torch.Tensor:
        return torch.stack([mean_nll(reference, c.tokens, c.prompt_length, window) for c in candidates]).mean()

    loss = mean([item.correct for item in items]) - mean([wrong for item in items for wrong in item.wrong])
    assert_gradients(model, reference, loss, objectives.margin(items))


def test_the_window_is_felt(windowed, many_items, float64_norms):
    """Without it the objective is another one: the tests above can tell."""
    model, _ = windowed
    calibration = objectives.margin(many_items(model.config["vocab_size"]))
    narrow, wide = model.load(torch.float64), model.load(torch.float64)
    wide.config.sliding_window = 1000
    assert abs(objective_value(narrow, calibration) - objective_value(wide, calibration)) > 1e-3
