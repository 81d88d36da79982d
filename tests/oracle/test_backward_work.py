"""What a scoring pass leaves out: no gradient below the first scored layer, none for what is never scored."""

import numpy as np
import pytest
import torch

from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.structures import KeepSets

PROTECTED = np.array([True, True, False, False, True])
FIRST = 2


@pytest.fixture
def model(build_tiny):
    return build_tiny(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_hidden_layers=5,
        attention_bias=True,
    )


@pytest.fixture(params=["perplexity", "margin"])
def calibration(request, many_items, random_sequences):
    if request.param == "margin":
        return objectives.margin(many_items(61))
    return objectives.perplexity(random_sequences(61, [9, 12]))


def _score(loaded: torch.nn.Module, model, calibration, score: str) -> None:
    geometry = geometry_of(model.config)
    settings = ScoringSettings(PROTECTED, "elements", 64, score)
    importance.score(loaded, KeepSets.everything(geometry), geometry, calibration, settings)


@pytest.mark.parametrize("score", ["taylor", "gate_fisher"])
def test_autograd_begins_at_the_first_scored_layer(model, calibration, score):
    loaded = model.load()
    tracked: dict[str, set[bool]] = {}

    def watch(name: str):
        def look(module, inputs, output) -> None:
            made = output[0] if isinstance(output, tuple) else output
            if isinstance(made, torch.Tensor):
                tracked.setdefault(name, set()).add(made.requires_grad)

        return look

    for name, module in loaded.named_modules():
        module.register_forward_hook(watch(name))
    _score(loaded, model, calibration, score)
    below = {name for name in tracked if name.startswith(tuple(f"model.layers.{i}" for i in range(FIRST)))}
    assert len(below) > 10 * FIRST
    below |= {"model.embed_tokens", "model.rotary_emb", f"model.layers.{FIRST}.input_layernorm"} & set(tracked)
    assert "model.embed_tokens" in below
    assert all(tracked[name] == {False} for name in below)
    # The gate stands on the input of o: nothing below it is needed. Weights of q, k and v are scored by taylor.
    attention = {f"model.layers.{FIRST}.self_attn.{name}_proj" for name in "qkv"}
    assert all(tracked[name] == {score == "taylor"} for name in attention)
    assert all(tracked[f"model.layers.{i}"] == {True} for i in range(FIRST, 5))
    assert tracked["model.norm"] == {True}


@pytest.mark.parametrize("score", ["taylor", "gate_fisher"])
def test_only_scored_weights_get_gradients(model, calibration, score):
    loaded = model.load()
    during: list[set[str]] = []

    def look(*_: object) -> None:
        during.append({name for name, parameter in loaded.named_parameters() if parameter.requires_grad})

    loaded.model.norm.register_forward_hook(look)
    _score(loaded, model, calibration, score)
    projections = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    expected = {
        name
        for name, _ in loaded.named_parameters()
        if score == "taylor" and name.endswith(projections) and name.startswith(("model.layers.2.", "model.layers.3."))
    }
    assert during
    assert all(names == expected for names in during)
    assert all(parameter.grad is None for parameter in loaded.parameters())
