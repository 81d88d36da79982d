"""The gate-Fisher score against finite differences: every structure's output scaled by hand, every sequence alone."""

import numpy as np
import pytest
import torch
from torch import nn

from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.objectives import Candidate, Item
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import slice_model

SMALL = {"num_hidden_layers": 2, "intermediate_size": 5, "vocab_size": 31, "hidden_size": 12, "head_dim": 4}
FAMILIES = {
    "llama": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": 6,
    },
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
ONE_ULP = 1.2e-7
STEP = 1e-4


@pytest.fixture(params=list(FAMILIES))
def small(request, build_tiny):
    return build_tiny(**SMALL, **FAMILIES[request.param])


# ---- the reference ----


def mean_nll(model: nn.Module, tokens: np.ndarray, first: int) -> float:
    """Mean negative log-likelihood of the tokens from ``first`` on."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
    return -float(np.mean([float(log_probabilities[t - 1, ids[0, t]]) for t in range(first, len(tokens))]))


def item_loss(model: nn.Module, item: Item, wrong_weight: float) -> float:
    """What one item adds to the margin: its correct answer, less its wrong ones."""

    def loss(candidate: Candidate) -> float:
        return mean_nll(model, candidate.tokens, candidate.prompt_length)

    return loss(item.correct) - wrong_weight * sum(loss(wrong) for wrong in item.wrong)


def gated(linear: nn.Linear, columns: slice, losses) -> np.ndarray:
    """Central difference of each of ``losses`` by a gate that multiplies some inputs of a projection."""
    original = linear.weight[:, columns].clone()
    found = []
    for gate in (1 + STEP, 1 - STEP):
        linear.weight[:, columns] = original * gate
        found.append(np.array(losses()))
    linear.weight[:, columns] = original
    return (found[0] - found[1]) / (2 * STEP)


def reference_scores(model: nn.Module, config: dict, losses) -> tuple[np.ndarray, np.ndarray]:
    """Mean over sequences (or items) of the squared derivative by each structure's gate, a scored weight."""
    hidden, groups, head_dim = config["hidden_size"], config["num_key_value_heads"], config["head_dim"]
    wide = config["num_attention_heads"] // groups * head_dim
    model.requires_grad_(False)
    attention, mlp = [], []
    for layer in model.model.layers:
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        attention.append([np.mean(gated(o, slice(g * wide, (g + 1) * wide), losses) ** 2) for g in range(groups)])
        width = config["intermediate_size"]
        mlp.append([np.mean(gated(down, slice(c, c + 1), losses) ** 2) for c in range(width)])
    return np.array(attention) / (hidden * (2 * wide + 2 * head_dim)), np.array(mlp) / (3 * hidden)


def settings(tokens: int = 60, protected: tuple[bool, ...] = (False, False)) -> ScoringSettings:
    return ScoringSettings(np.array(protected), "elements", tokens, score="gate_fisher")


def score(model: nn.Module, config: dict, calibration, settings: ScoringSettings):
    geometry = geometry_of(config)
    return importance.score(model, KeepSets.everything(geometry), geometry, calibration, settings)


def assert_scores(found, attention: np.ndarray, mlp: np.ndarray) -> None:
    for values, expected in ((found.attention, attention), (found.mlp, mlp)):
        assert (expected > 0).all()
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-8 * expected.max())


# ---- tests ----


def test_sequences(small, random_sequences, float64_norms):
    sequences = random_sequences(small.config["vocab_size"], [9, 4, 11])
    model = small.load(torch.float64)
    expected = reference_scores(model, small.config, lambda: [mean_nll(model, s, 1) for s in sequences])
    found = score(small.load(torch.float64), small.config, objectives.perplexity(sequences), settings())
    assert_scores(found.scores, *expected)


def test_items(small, many_items, float64_norms):
    items = many_items(small.config["vocab_size"])[1:6]
    model = small.load(torch.float64)
    # Of the mean over items, as of the mean over all wrong candidates.
    wrong_weight = len(items) / sum(len(item.wrong) for item in items)
    expected = reference_scores(model, small.config, lambda: [item_loss(model, item, wrong_weight) for item in items])
    found = score(small.load(torch.float64), small.config, objectives.margin(items), settings())
    assert_scores(found.scores, *expected)


def test_the_micro_batch_changes_nothing(tiny, many_items, random_sequences, float64_norms):
    vocab, protected = tiny.config["vocab_size"], (False, False, False)
    for calibration in (
        objectives.margin(many_items(vocab)),
        objectives.perplexity(random_sequences(vocab, [17, 9, 2, 12])),
    ):
        alone = score(tiny.load(torch.float64), tiny.config, calibration, settings(1, protected))
        for tokens in (20, 51, 1000):
            found = score(tiny.load(torch.float64), tiny.config, calibration, settings(tokens, protected))
            assert found.objective == pytest.approx(alone.objective, rel=1e-12)
            np.testing.assert_allclose(found.scores.attention, alone.scores.attention, rtol=ONE_ULP)
            np.testing.assert_allclose(found.scores.mlp, alone.scores.mlp, rtol=ONE_ULP)


def test_a_sliced_model_scores_as_its_gates_alone(tiny, random_keep, many_items, float64_norms):
    """A structure's gate is untouched by what its neighbours' columns were: sliced and masked agree."""
    items, config, geometry = many_items(tiny.config["vocab_size"]), tiny.config, geometry_of(tiny.config)
    kept = random_keep(config)
    keep = KeepSets(
        np.array([[g in groups for g in range(geometry.num_kv_groups)] for groups, _ in kept]),
        np.array([[c in channels for c in range(geometry.intermediate_size)] for _, channels in kept]),
    )
    masked, sliced = tiny.load(torch.float64), tiny.load(torch.float64)
    wide = geometry.queries_per_group * geometry.head_dim
    with torch.no_grad():
        for i, layer in enumerate(masked.model.layers):
            layer.self_attn.o_proj.weight *= torch.from_numpy(np.repeat(keep.attention[i], wide))
            layer.mlp.down_proj.weight *= torch.from_numpy(keep.mlp[i])
    slice_model(sliced, geometry, now=KeepSets.everything(geometry), wanted=keep)
    asked, calibration = settings(100, (False, False, False)), objectives.margin(items)
    expected = score(masked, config, calibration, asked).scores
    found = importance.score(sliced, keep, geometry, calibration, asked).scores
    np.testing.assert_allclose(found.attention[keep.attention], expected.attention[keep.attention], rtol=ONE_ULP)
    np.testing.assert_allclose(found.mlp[keep.mlp], expected.mlp[keep.mlp], rtol=ONE_ULP)
    assert np.isnan(found.attention[~keep.attention]).all()
    assert np.isnan(found.mlp[~keep.mlp]).all()


def test_protected_layers_are_infinite_and_change_no_other_score(tiny, random_sequences, float64_norms):
    calibration = objectives.perplexity(random_sequences(tiny.config["vocab_size"], [12, 7]))
    free = score(tiny.load(torch.float64), tiny.config, calibration, settings(60, (False,) * 3)).scores
    model = tiny.load(torch.float64)
    found = score(model, tiny.config, calibration, settings(60, (True, False, True))).scores
    for values, expected in ((found.attention, free.attention), (found.mlp, free.mlp)):
        assert np.isposinf(values[[0, 2]]).all()
        np.testing.assert_array_equal(values[1], expected[1])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
