"""Configurations to geometries: the counts are those of the real model class."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.families import FAMILIES, geometry_of, kept_positions
from gisp_tasks.pruning.structures import Geometry, KeepSets

CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "vocab_size": 31,
    "max_position_embeddings": 77,
    "tie_word_embeddings": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 6},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all at once": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 2},
}
WITHOUT = ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")


def real_model(config: dict[str, Any]) -> PreTrainedModel:
    """What transformers builds from a config.json, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_equal_a_real_model(family: str, variant: str):
    # A family that has no such option gets the key all the same: it must mean as little as it does to transformers.
    config = {**CONFIG, "model_type": family, **VARIANTS[variant]}
    model, geometry = real_model(config), geometry_of(config)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert geometry.decoder_parameters == layers
    assert geometry.other_parameters == sum(parameter.numel() for parameter in model.parameters()) - layers
    assert geometry.parameters_of(KeepSets.everything(geometry)) == layers
    assert geometry.sparsity_of(KeepSets.everything(geometry)) == 0
    assert geometry.max_positions == 77


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("absent", [(name,) for name in WITHOUT] + [WITHOUT], ids="+".join)
def test_absent_keys_take_the_defaults_of_transformers(family: str, absent: tuple[str, ...]):
    config = {**CONFIG, "model_type": family, "num_attention_heads": 32, "hidden_size": 96, "num_key_value_heads": 8}
    config = {key: value for key, value in config.items() if key not in absent}
    model, geometry = real_model(config), geometry_of(config)
    attention = model.model.layers[0].self_attn
    found = (geometry.num_query_heads * geometry.head_dim, geometry.num_kv_groups * geometry.head_dim)
    assert found == (attention.q_proj.out_features, attention.k_proj.out_features)
    assert (geometry.head_dim, geometry.max_positions) == (attention.head_dim, model.config.max_position_embeddings)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert geometry.decoder_parameters + geometry.other_parameters == total


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "head_dim"),
        ("llama", "num_key_value_heads"),
        ("mistral", "head_dim"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
    ],
)
def test_null_follows_from_the_other_sizes(family: str, name: str):
    config = {**CONFIG, "model_type": family, name: None}
    model, geometry = real_model(config), geometry_of(config)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert geometry.decoder_parameters == layers
    assert (geometry.head_dim, geometry.num_kv_groups) == ((4, 3) if name == "head_dim" else (10, 6))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_names_a_weight_of_the_real_model(family: str):
    layer = real_model({**CONFIG, "model_type": family}).model.layers[0]
    found = {projection.path for projection in FAMILIES[family].projections.values()}
    linear = {name.removesuffix(".weight") for name, weight in layer.named_parameters() if weight.ndim == 2}
    assert found == linear


def test_null_counts_as_absent_where_transformers_has_one_answer_for_both():
    config = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "head_dim")}
    config["max_position_embeddings"] = None
    geometry = geometry_of(config)
    assert (geometry.num_kv_groups, geometry.head_dim, geometry.max_positions) == (6, 4, 2048)
    del config["tie_word_embeddings"]
    assert geometry_of(config) == geometry


def test_an_unsupported_architecture_lists_the_supported_ones():
    with pytest.raises(InputError, match=r"'gpt2'.*supported are llama, mistral, qwen2, qwen3\."):
        geometry_of({**CONFIG, "model_type": "gpt2"})
    with pytest.raises(InputError, match="None"):
        geometry_of({})


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"]
)
@pytest.mark.parametrize("value", [None, 0, -3, "many", 2.5])
def test_a_size_that_is_none_is_named(name: str, value: object):
    with pytest.raises(InputError, match=name):
        geometry_of({**CONFIG, name: value})
    with pytest.raises(InputError, match=name):
        geometry_of({key: other for key, other in CONFIG.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [("head_dim", "x"), ("head_dim", -4), ("num_key_value_heads", -2), ("max_position_embeddings", 0)],
)
def test_an_optional_size_must_be_one_too(name: str, value: object):
    with pytest.raises(InputError, match=name):
        geometry_of({**CONFIG, name: value})


@pytest.mark.parametrize("groups", [4, 5, 12])
def test_kv_heads_must_divide_the_query_heads(groups: int):
    with pytest.raises(InputError, match=f"6 query heads cannot be shared by {groups} kv heads"):
        geometry_of({**CONFIG, "num_key_value_heads": groups})


def test_costs_of_families():
    plain = geometry_of(CONFIG)
    biased = {"attention_bias": True, "mlp_bias": True}
    assert dataclasses.replace(geometry_of({**CONFIG, **biased, "model_type": "mistral"}), family="llama") == plain
    qwen2 = geometry_of({**CONFIG, "model_type": "qwen2"})
    assert qwen2.kv_group_parameters == plain.kv_group_parameters + (2 + 1 + 1) * 10
    assert qwen2.layer_overhead == plain.layer_overhead, "o has no bias"
    qwen3 = geometry_of({**CONFIG, "model_type": "qwen3"})
    assert qwen3.layer_overhead == plain.layer_overhead + 2 * 10, "norms of queries and keys stay"
    assert qwen3.kv_group_parameters == plain.kv_group_parameters


def test_costs_of_structures():
    plain = geometry_of(CONFIG)
    assert plain.attention_elements == plain.kv_group_parameters == (2 + 2) * 10 * 24 + 2 * 10 * 24
    assert plain.channel_elements == plain.channel_parameters == 3 * 24
    biased = geometry_of({**CONFIG, "attention_bias": True, "mlp_bias": True})
    assert biased.attention_elements == plain.attention_elements, "biases are not scored"
    assert biased.kv_group_parameters == plain.kv_group_parameters + (2 + 1 + 1) * 10
    assert biased.channel_parameters == plain.channel_parameters + 2
    assert biased.layer_overhead == 2 * 24 + 24 + 24


def test_kept_positions_of_each_side():
    geometry = geometry_of({**CONFIG, "head_dim": 2})
    keep = KeepSets.everything(geometry)
    keep.attention[1] = [True, False, True]
    keep.mlp[1, 3:] = False
    assert kept_positions(geometry, keep, 1, "key_value").tolist() == [0, 1, 4, 5]
    assert kept_positions(geometry, keep, 1, "query").tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept_positions(geometry, keep, 1, "channel").tolist() == [0, 1, 2]
    assert len(kept_positions(geometry, keep, 0, "query")) == 12


def test_contains_is_about_both_kinds():
    geometry = geometry_of(CONFIG)
    everything = KeepSets.everything(geometry)
    for kind in ("attention", "mlp"):
        less = KeepSets.everything(geometry)
        getattr(less, kind)[0, 0] = False
        assert everything.contains(less)
        assert not less.contains(everything)
        assert less.contains(less)


def test_max_parameters_forgives_a_rounding_error_of_the_fraction_only():
    geometry: Geometry = dataclasses.replace(geometry_of(CONFIG), num_layers=1000)
    dense = geometry.decoder_parameters
    for fraction in (0.1 + 0.2, 0.5 * 0.6, 0.3 - 1e-12, 0.3 + 1e-12):
        assert geometry.max_parameters(fraction) == geometry.max_parameters(0.3)
    assert abs(geometry.max_parameters(0.3) - 0.7 * dense) <= 1
    assert geometry.max_parameters(0) == dense


@pytest.mark.parametrize(
    ("multiple", "channels", "expected"),
    [(1, [0, 1, 7, 20], [1, 1, 7, 20]), (8, [1, 8, 9, 17, 20], [8, 8, 16, 20, 20]), (32, [0, 1, 20], [20, 20, 20])],
)
def test_widths_round_up_never_above_the_dense_one_and_never_to_none(multiple, channels, expected):
    assert geometry_of(CONFIG).rounded_width(np.array(channels), multiple).tolist() == expected
