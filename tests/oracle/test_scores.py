"""Scores against independent computations: plain autograd over the whole set, and finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

from gisp_tasks.errors import NumericsError, PermanentError
from gisp_tasks.pruning import forward, importance, objectives, taylor
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.ranking import Limits, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import slice_model

LENGTHS = [17, 9, 17, 2, 12, 5]
# Scores are kept in float32: two of them that are equal before rounding differ by one unit in the last place.
ONE_ULP = 1.2e-7


# ---- the reference: nothing of the package but the sequences goes in ----


def reference_loss(model: nn.Module, sequences: list[np.ndarray], prompts: list[int] | None = None) -> torch.Tensor:
    """Mean over sequences of the mean token cross-entropy, one sequence at a time, no padding."""
    total = torch.zeros((), dtype=torch.float64)
    for i, sequence in enumerate(sequences):
        ids = torch.from_numpy(sequence.astype(np.int64))[None]
        first = prompts[i] if prompts else 1
        log_probabilities = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
        losses = [-log_probabilities[t - 1, ids[0, t]] for t in range(first, len(sequence))]
        total = total + sum(losses) / len(losses)
    return total / len(sequences)


def reference_scores(model: nn.Module, config: dict, normaliser: str) -> tuple[np.ndarray, np.ndarray]:
    """Sum of |w * dL/dw| over every structure's own weights, by name and by loop, from the ``.grad`` fields."""
    layers, hidden, width = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    heads, groups, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    queries = heads // groups
    attention, mlp = np.zeros((layers, groups)), np.zeros((layers, width))
    for i in range(layers):
        layer = model.model.layers[i]

        def products(linear: nn.Linear) -> torch.Tensor:
            return (linear.weight.detach() * linear.weight.grad).abs()

        q, k, v, o = (products(getattr(layer.self_attn, f"{name}_proj")) for name in "qkvo")
        gate, up, down = (products(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        for group in range(groups):
            total = 0.0
            for head in range(group * queries, (group + 1) * queries):
                rows = slice(head * head_dim, (head + 1) * head_dim)
                total += float(q[rows].sum() + o[:, rows].sum())
            rows = slice(group * head_dim, (group + 1) * head_dim)
            attention[i, group] = total + float(k[rows].sum() + v[rows].sum())
        for channel in range(width):
            mlp[i, channel] = float(gate[channel].sum() + up[channel].sum() + down[:, channel].sum())
    if normaliser == "elements":
        return attention / (hidden * head_dim * (2 * queries + 2)), mlp / (3 * hidden)
    return attention / (4 * head_dim * hidden), mlp / (3 * width)


def mask_by_hand(model: nn.Module, config: dict, kept: list[tuple[list[int], list[int]]]) -> None:
    """Zero the o and down columns of what is not kept."""
    head_dim = config["head_dim"]
    group_columns = config["num_attention_heads"] // config["num_key_value_heads"] * head_dim
    with torch.no_grad():
        for layer, (groups, channels) in zip(model.model.layers, kept, strict=True):
            for group in set(range(config["num_key_value_heads"])) - set(groups):
                layer.self_attn.o_proj.weight[:, group * group_columns : (group + 1) * group_columns] = 0
            for channel in set(range(config["intermediate_size"])) - set(channels):
                layer.mlp.down_proj.weight[:, channel] = 0


def keep_sets_of(config: dict, kept: list[tuple[list[int], list[int]]]) -> KeepSets:
    attention = np.array([[g in groups for g in range(config["num_key_value_heads"])] for groups, _ in kept])
    mlp = np.array([[c in channels for c in range(config["intermediate_size"])] for _, channels in kept])
    return KeepSets(attention, mlp)


def settings_for(config: dict, normaliser: str = "elements", tokens: int = 51) -> ScoringSettings:
    return ScoringSettings(np.zeros(config["num_hidden_layers"], dtype=np.bool_), normaliser, tokens)


# ---- dense, sliced and masked ----


@pytest.mark.parametrize("normaliser", ["elements", "reference"])
def test_dense_scores_equal_plain_autograd(model, normaliser, random_sequences, float64_norms):
    sequences = random_sequences(model.config["vocab_size"], LENGTHS)
    reference = model.load(torch.float64)
    expected_loss = reference_loss(reference, sequences)
    expected_loss.backward()
    attention, mlp = reference_scores(reference, model.config, normaliser)

    geometry = geometry_of(model.config)
    found = importance.score(
        model.load(torch.float64),
        KeepSets.everything(geometry),
        geometry,
        objectives.perplexity(sequences),
        settings_for(model.config, normaliser),
    )
    assert found.objective == pytest.approx(expected_loss.item(), rel=1e-12)
    np.testing.assert_allclose(found.scores.attention, attention, rtol=ONE_ULP)
    np.testing.assert_allclose(found.scores.mlp, mlp, rtol=ONE_ULP)


def test_scores_of_a_sliced_model_equal_those_of_the_masked_dense_model(
    model, random_sequences, random_keep, float64_norms
):
    sequences = random_sequences(model.config["vocab_size"], LENGTHS)
    kept = random_keep(model.config)
    reference = model.load(torch.float64)
    mask_by_hand(reference, model.config, kept)
    expected_loss = reference_loss(reference, sequences)
    expected_loss.backward()
    attention, mlp = reference_scores(reference, model.config, "elements")

    geometry, keep = geometry_of(model.config), keep_sets_of(model.config, kept)
    sliced = model.load(torch.float64)
    slice_model(sliced, geometry, now=KeepSets.everything(geometry), wanted=keep)
    found = importance.score(
        sliced, keep, geometry, objectives.perplexity(sequences), settings_for(model.config, "elements")
    )
    assert found.objective == pytest.approx(expected_loss.item(), rel=1e-12)
    np.testing.assert_allclose(found.scores.attention[keep.attention], attention[keep.attention], rtol=ONE_ULP)
    np.testing.assert_allclose(found.scores.mlp[keep.mlp], mlp[keep.mlp], rtol=ONE_ULP)
    assert np.isnan(found.scores.attention[~keep.attention]).all()
    assert np.isnan(found.scores.mlp[~keep.mlp]).all()


def test_prompt_tokens_are_read_but_not_predicted(tiny, random_sequences, float64_norms):
    sequences, prompts = random_sequences(tiny.config["vocab_size"], LENGTHS), [4, 1, 16, 1, 7, 2]
    reference = tiny.load(torch.float64)
    reference_loss(reference, sequences, prompts).backward()
    attention, mlp = reference_scores(reference, tiny.config, "elements")
    geometry = geometry_of(tiny.config)
    found = importance.score(
        tiny.load(torch.float64),
        KeepSets.everything(geometry),
        geometry,
        objectives.perplexity(sequences, prompts),
        settings_for(tiny.config),
    )
    np.testing.assert_allclose(found.scores.attention, attention, rtol=ONE_ULP)
    np.testing.assert_allclose(found.scores.mlp, mlp, rtol=ONE_ULP)


def test_protected_layers_are_infinite_and_change_no_other_score(tiny, random_sequences, float64_norms):
    calibration = objectives.perplexity(random_sequences(tiny.config["vocab_size"], LENGTHS))
    geometry = geometry_of(tiny.config)
    everything = KeepSets.everything(geometry)
    settings = settings_for(tiny.config)
    free = importance.score(tiny.load(torch.float64), everything, geometry, calibration, settings).scores
    protected = np.array([True, False, True])
    found = importance.score(
        tiny.load(torch.float64), everything, geometry, calibration, ScoringSettings(protected, "elements", 51)
    ).scores
    assert np.isposinf(found.attention[protected]).all()
    assert np.isposinf(found.mlp[protected]).all()
    np.testing.assert_array_equal(found.attention[1], free.attention[1])
    np.testing.assert_array_equal(found.mlp[1], free.mlp[1])


# ---- finite differences: no autograd at all ----


def _central_difference(weight: torch.Tensor, where: tuple[int, int], loss, step: float = 1e-5) -> float:
    original = float(weight[where])
    weight[where] = original + step
    above = loss()
    weight[where] = original - step
    below = loss()
    weight[where] = original
    return (above - below) / (2 * step)


def test_a_channel_and_a_group_score_what_finite_differences_say(build_tiny, random_sequences, float64_norms):
    model = build_tiny(
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        intermediate_size=6,
        num_hidden_layers=2,
        vocab_size=23,
    )
    sequences = random_sequences(23, [7, 4])
    geometry = geometry_of(model.config)
    found = importance.score(
        model.load(torch.float64),
        KeepSets.everything(geometry),
        geometry,
        objectives.perplexity(sequences),
        settings_for(model.config),
    ).scores
    probe = model.load(torch.float64).requires_grad_(False)

    def loss() -> float:
        return float(reference_loss(probe, sequences))

    layer = probe.model.layers[0]
    channel, group = 4, 1
    total = 0.0
    for d in range(8):
        for weight, where in (
            (layer.mlp.gate_proj.weight, (channel, d)),
            (layer.mlp.up_proj.weight, (channel, d)),
            (layer.mlp.down_proj.weight, (d, channel)),
        ):
            total += abs(float(weight[where]) * _central_difference(weight, where, loss))
    assert found.mlp[0, channel] == pytest.approx(total / (3 * 8), rel=1e-6)

    total = 0.0
    for d in range(8):
        for row in range(4, 8):  # query heads 2 and 3 share kv head 1
            for weight, where in ((layer.self_attn.q_proj.weight, (row, d)), (layer.self_attn.o_proj.weight, (d, row))):
                total += abs(float(weight[where]) * _central_difference(weight, where, loss))
        for row in range(2, 4):
            for weight in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                total += abs(float(weight[row, d]) * _central_difference(weight, (row, d), loss))
    assert found.attention[0, group] == pytest.approx(total / (6 * 2 * 8), rel=1e-6)


def test_a_channel_with_one_weight_scores_that_weight_alone(tiny_models, random_sequences, float64_norms):
    model = tiny_models["gqa-untied-biases"]  # gate and up biases keep the channel alive without their weights
    sequences = random_sequences(model.config["vocab_size"], [8, 5])
    geometry = geometry_of(model.config)
    probe = model.load(torch.float64).requires_grad_(False)
    mlp = probe.model.layers[1].mlp
    mlp.gate_proj.weight[3], mlp.up_proj.weight[3] = 0, 0
    value = float(mlp.down_proj.weight[11, 3])
    mlp.down_proj.weight[:, 3] = 0
    mlp.down_proj.weight[11, 3] = value
    slope = _central_difference(mlp.down_proj.weight, (11, 3), lambda: float(reference_loss(probe, sequences)))
    found = importance.score(
        probe,
        KeepSets.everything(geometry),
        geometry,
        objectives.perplexity(sequences),
        settings_for(model.config),
    ).scores
    assert slope != 0
    assert found.mlp[1, 3] == pytest.approx(abs(value * slope) / (3 * 24), rel=1e-6)


# ---- how the set is cut into micro-batches must not matter ----


def _gradients(model: nn.Module, config: dict, sequences: list[np.ndarray], tokens: int) -> dict:
    geometry = geometry_of(config)
    weights = taylor.scored_weights(model, geometry, np.zeros(geometry.num_layers, dtype=np.bool_))
    calibration = objectives.perplexity(sequences)
    objective, gradients = taylor.accumulate(model, weights, calibration, tokens)
    return {"objective": torch.tensor(objective, dtype=torch.float64), **gradients}


def test_gradients_do_not_depend_on_micro_batch_order_or_padding(tiny, random_sequences, float64_norms):
    sequences = random_sequences(tiny.config["vocab_size"], LENGTHS)
    model = tiny.load(torch.float64)
    alone = _gradients(model, tiny.config, sequences, tokens=1)
    for others, tokens in (
        (sequences, 34),
        (sequences, 102),
        (sequences[::-1], 68),
        (sequences[3:] + sequences[:3], 102),
    ):
        together = _gradients(model, tiny.config, others, tokens)
        for key, value in alone.items():
            assert together[key].dtype == torch.float64
            scale = float(value.abs().max())
            torch.testing.assert_close(
                together[key], value, rtol=1e-9, atol=1e-12 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_removal_order_in_float32_does_not_depend_on_the_micro_batch(stories, testdata):
    text = _story_sequences(stories, testdata, 12)
    geometry = geometry_of(stories.config)
    limits = Limits(np.array([False] * 4 + [True]), 1, 32, 4)
    orders = []
    for others, tokens in ((text, 1), (text, 400), (text[::-1], 1200)):
        found = importance.score(
            stories.load(),
            KeepSets.everything(geometry),
            geometry,
            objectives.perplexity(others),
            ScoringSettings(limits.protected, "elements", tokens),
        )
        removals = next_removals(found.scores, RemovalOrder.empty().removals, geometry, limits, 0.4)
        orders.append(np.stack([removals.kinds, removals.layers, removals.indices], axis=1))
    assert len(orders[0]) > 200
    for order in orders[1:]:
        removed, expected = {tuple(row) for row in order}, {tuple(row) for row in orders[0]}
        assert len(removed ^ expected) <= 0.001 * 2 * len(expected)
        moved = (order != orders[0][: len(order)]).any(axis=1).mean() if len(order) == len(orders[0]) else 1.0
        assert moved <= 0.01, f"{moved:.2%} of the places differ"


def _story_sequences(stories, testdata, count: int) -> list[np.ndarray]:
    import pyarrow.parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories.path)
    texts = pyarrow.parquet.read_table(testdata / "data/tinystories/validation.parquet")["text"].to_pylist()[:count]
    return [np.array(tokenizer(text)["input_ids"][: 40 + 4 * i], dtype=np.int32) for i, text in enumerate(texts)]


# ---- the same bits every time, however the model was cut ----


def test_scores_are_bit_identical_between_runs_and_ways_of_slicing(model, random_sequences, random_keep):
    calibration = objectives.perplexity(random_sequences(model.config["vocab_size"], LENGTHS))
    geometry, settings = geometry_of(model.config), settings_for(model.config)
    everything, last = KeepSets.everything(geometry), keep_sets_of(model.config, random_keep(model.config))
    half = np.arange(geometry.intermediate_size) % 2 == 0
    middle = KeepSets(last.attention | (np.arange(geometry.num_kv_groups) % 2 == 0), last.mlp | half)

    at_once = model.load()
    slice_model(at_once, geometry, now=everything, wanted=last)
    stepwise = model.load()
    importance.score(stepwise, everything, geometry, calibration, settings)
    slice_model(stepwise, geometry, now=everything, wanted=middle)
    importance.score(stepwise, middle, geometry, calibration, settings)
    slice_model(stepwise, geometry, now=middle, wanted=last)
    results = [importance.score(m, last, geometry, calibration, settings) for m in (at_once, stepwise, at_once)]
    for other in results[1:]:
        assert other.objective == results[0].objective
        assert other.scores.attention.tobytes() == results[0].scores.attention.tobytes()
        assert other.scores.mlp.tobytes() == results[0].scores.mlp.tobytes()
    assert all(parameter.grad is None for parameter in stepwise.parameters())


def test_the_objective_without_gradients_is_the_same_number(tiny, random_sequences, float64_norms):
    sequences = random_sequences(tiny.config["vocab_size"], LENGTHS)
    model = tiny.load(torch.float64)
    expected = reference_loss(model, sequences).item()
    calibration = objectives.perplexity(sequences)
    assert importance.objective_value(model, calibration, max_tokens=68) == pytest.approx(expected, rel=1e-12)


# ---- trouble ----


@pytest.mark.parametrize(("fits", "expected_tokens"), [(20, 21), (36, 42), (85, 85)])
def test_out_of_memory_halves_the_micro_batch_and_changes_no_score(
    tiny_models, random_sequences, monkeypatch, float64_norms, fits, expected_tokens
):
    model = tiny_models["gqa-untied-biases"]
    calibration = objectives.perplexity(random_sequences(model.config["vocab_size"], 2 * LENGTHS))
    geometry = geometry_of(model.config)
    everything, loaded = KeepSets.everything(geometry), model.load(torch.float64)
    expected = importance.score(loaded, everything, geometry, calibration, settings_for(model.config, tokens=1))
    tried = []
    batch_loss = forward.batch_loss

    def limited(network: nn.Module, batch, scale: float) -> torch.Tensor:
        tried.append(batch.tokens.numel())
        # A pass that has begun well can fail too: what it has added up must not stay.
        if tried[-1] > fits and len(tried) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch_loss(network, batch, scale)

    monkeypatch.setattr(forward, "batch_loss", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = importance.score(loaded, everything, geometry, calibration, settings_for(model.config, tokens=85))
    assert found.micro_batch_tokens == expected_tokens
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    np.testing.assert_allclose(found.scores.attention, expected.scores.attention, rtol=ONE_ULP)
    np.testing.assert_allclose(found.scores.mlp, expected.scores.mlp, rtol=ONE_ULP)


def test_one_sequence_that_does_not_fit_is_permanent(tiny_models, random_sequences, monkeypatch):
    model = tiny_models["mqa-tied"]
    calibration = objectives.perplexity(random_sequences(model.config["vocab_size"], LENGTHS))
    geometry = geometry_of(model.config)

    def full(*_: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "batch_loss", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(PermanentError, match="sequence_length"):
        importance.score(model.load(), KeepSets.everything(geometry), geometry, calibration, settings_for(model.config))


def test_weights_that_are_no_numbers_are_refused(tiny_models, random_sequences):
    model = tiny_models["mqa-tied"]
    calibration = objectives.perplexity(random_sequences(model.config["vocab_size"], LENGTHS))
    geometry, loaded = geometry_of(model.config), model.load()
    with torch.no_grad():
        loaded.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="nan"):
        importance.score(loaded, KeepSets.everything(geometry), geometry, calibration, settings_for(model.config))
    with pytest.raises(NumericsError, match="nan"):
        importance.objective_value(loaded, calibration)
