"""The methods that `gisp compare` holds GISP against, each against a naive loop over its formula."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gisp_tasks.pruning import baselines, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.ranking import limits_of, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.recipe import ProtectSection

_PATHS = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}


@pytest.fixture
def setting(model: Any, random_sequences: Callable[..., list[np.ndarray]]) -> tuple[Any, Geometry, Any, dict[Any, Any]]:
    """A model, its geometry, moments as the package takes them, and all inputs [N, n] by plain forward passes."""
    geometry, loaded = geometry_of(model.config), model.load()
    sequences = random_sequences(geometry.vocab_size, [7, 12, 12, 3, 9])
    moments = baselines.input_moments(loaded, geometry, objectives.perplexity(sequences), batch_tokens=24)
    inputs: dict[Any, Any] = {key: [] for key in moments}
    hooks = [
        loaded.get_submodule(f"model.layers.{layer}.{_PATHS[role]}").register_forward_pre_hook(
            lambda _, arguments, key=(layer, role): inputs[key].append(arguments[0][0].double().numpy())
        )
        for layer, role in moments
    ]
    with torch.inference_mode():
        for sequence in sequences:
            loaded(input_ids=torch.from_numpy(sequence.astype(np.int64))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return loaded, geometry, moments, {key: np.vstack(parts) for key, parts in inputs.items()}


def _columns(model: Any, layer: int, role: str) -> np.ndarray:
    return model.get_parameter(f"model.layers.{layer}.{_PATHS[role]}.weight").detach().double().numpy()


def _unprotected(geometry: Geometry) -> np.ndarray:
    protected = np.zeros(geometry.num_layers, dtype=np.bool_)
    protected[0] = True
    return protected


def test_moments_are_those_of_all_tokens(setting: Any) -> None:
    _, _, moments, inputs = setting
    for key, values in inputs.items():
        np.testing.assert_allclose(moments[key].mean, values.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moments[key].variance, values.var(axis=0, ddof=1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(moments[key].norm, np.linalg.norm(values, axis=0), rtol=1e-4, atol=1e-6)


def test_wanda_ranks_structures_by_weight_times_input_norm_within_a_layer(setting: Any) -> None:
    model, geometry, moments, inputs = setting
    scores = baselines.wanda_sp(model, geometry, _unprotected(geometry), moments)
    assert np.isposinf(scores.attention[0]).all()
    assert np.isposinf(scores.mlp[0]).all()
    for layer in range(1, geometry.num_layers):
        for role, found in (("o", scores.attention[layer]), ("down", scores.mlp[layer])):
            weight, size = _columns(model, layer, role), _columns(model, layer, role).shape[1] // len(found)
            expected = []
            for structure in range(len(found)):
                columns = range(structure * size, (structure + 1) * size)
                terms = [np.abs(weight[:, j]).sum() * np.linalg.norm(inputs[layer, role][:, j]) for j in columns]
                expected.append(np.mean(terms))
            assert np.array_equal(np.argsort(found), np.argsort(expected))
            assert sorted(found) == pytest.approx([(i + 0.5) / len(found) for i in range(len(found))])


def test_wanda_takes_the_same_share_of_every_layer(setting: Any) -> None:
    model, geometry, moments, _ = setting
    limits = limits_of(ProtectSection(first_layers=1, last_layers=0, min_channels=1), 1, geometry.num_layers)
    scores = baselines.wanda_sp(model, geometry, limits.protected, moments)
    removals = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, 0.25)
    keep = RemovalOrder.empty().extend(removals, 1).keep_sets(geometry)
    assert np.ptp(keep.mlp[1:].sum(axis=1)) <= 1
    assert np.ptp(keep.attention[1:].sum(axis=1)) <= 1
    assert keep.mlp[0].all()
    assert not keep.mlp[1:].all()


def test_flap_is_the_standardised_fluctuation(setting: Any) -> None:
    model, geometry, moments, inputs = setting
    scores = baselines.flap(model, geometry, _unprotected(geometry), moments)
    for layer in range(1, geometry.num_layers):
        for role, found in (("o", scores.attention[layer]), ("down", scores.mlp[layer])):
            weight = _columns(model, layer, role)
            terms = [inputs[layer, role][:, j].var(ddof=1) * (weight[:, j] ** 2).sum() for j in range(weight.shape[1])]
            raw = np.array(terms).reshape(len(found), -1).mean(axis=1)
            spread = raw.std() if len(raw) > 1 else 0.0
            expected = (raw - raw.mean()) / spread if spread else raw - raw.mean()
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_flap_biases_are_what_the_removed_inputs_added_on_average(setting: Any) -> None:
    model, geometry, moments, inputs = setting
    keep = KeepSets.everything(geometry)
    keep.attention[-1, 0] = False
    keep.mlp[1, ::2] = False
    biases = baselines.output_biases(model, geometry, keep, moments)
    group = geometry.queries_per_group * geometry.head_dim
    last = geometry.num_layers - 1
    expected = {
        (last, "o"): inputs[last, "o"][:, :group] @ _columns(model, last, "o")[:, :group].T,
        (1, "down"): inputs[1, "down"][:, ::2] @ _columns(model, 1, "down")[:, ::2].T,
    }
    for (layer, role), outputs in expected.items():
        found = biases[f"model.layers.{layer}.{_PATHS[role]}.bias"].numpy()
        np.testing.assert_allclose(found, outputs.mean(axis=0), rtol=1e-3, atol=1e-5)
    assert not biases[f"model.layers.0.{_PATHS['down']}.bias"].any()


def test_magnitude_is_the_mean_size_of_a_structures_weights(model: Any) -> None:
    geometry, loaded = geometry_of(model.config), model.load()
    scores = baselines.magnitude(loaded, geometry, np.zeros(geometry.num_layers, dtype=np.bool_))
    layer, group, channel = 1, geometry.num_kv_groups - 1, 3
    module = loaded.get_submodule(f"model.layers.{layer}")
    width = geometry.queries_per_group * geometry.head_dim
    queries = slice(group * width, (group + 1) * width)
    keys = slice(group * geometry.head_dim, (group + 1) * geometry.head_dim)
    attention, mlp = module.self_attn, module.mlp
    parts = [attention.q_proj.weight[queries], attention.k_proj.weight[keys], attention.v_proj.weight[keys]]
    parts.append(attention.o_proj.weight[:, queries])
    expected = torch.cat([part.flatten() for part in parts]).abs().mean()
    assert scores.attention[layer, group] == pytest.approx(float(expected.detach()), rel=1e-5)
    row = torch.stack([mlp.gate_proj.weight[channel], mlp.up_proj.weight[channel], mlp.down_proj.weight[:, channel]])
    assert scores.mlp[layer, channel] == pytest.approx(float(row.abs().mean().detach()), rel=1e-5)


def test_random_scores_follow_their_seed(model: Any) -> None:
    geometry = geometry_of(model.config)
    protected = _unprotected(geometry)
    one, same, other = (baselines.random(geometry, protected, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.mlp, same.mlp)
    assert not np.array_equal(one.mlp, other.mlp)
    assert np.isposinf(one.mlp[protected]).all()
    assert (one.mlp[~protected] < 1).all()
