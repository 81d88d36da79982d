"""What a fixed model and fixed scores gave when this was written: a change of any of it is a change of every run.

The model's weights come from integers, so they are the same on every machine; scores are taken in float64 and
differ by 1.7e-4 at least, so their order does not hang on rounding. If a
change is meant, the new values belong into the changelog.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model
from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.ranking import Limits, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.schedule import step_targets
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import slice_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LIMITS = Limits(np.array([True, False, False, False]), 1, 4, 4)


def _numbers(count: int, seed: int) -> np.ndarray:
    """Small dyadic fractions from a multiplicative congruential generator: exact in every dtype used here."""
    values, state = np.empty(count), seed * 2 + 1
    for i in range(count):
        state = state * 48271 % 2147483647
        values[i] = (state >> 12) % 255 - 127
    return values / 256


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.embed_tokens": (48, 16), "model.norm": (16,)}
    for layer in range(4):
        stem = f"model.layers.{layer}."
        shapes |= {stem + "input_layernorm": (16,), stem + "post_attention_layernorm": (16,)}
        shapes |= {stem + "self_attn.q_proj": (24, 16), stem + "self_attn.o_proj": (16, 24)}
        shapes |= {stem + "self_attn.k_proj": (12, 16), stem + "self_attn.v_proj": (12, 16)}
        shapes |= {stem + "mlp.gate_proj": (24, 16), stem + "mlp.up_proj": (24, 16), stem + "mlp.down_proj": (16, 24)}
    tensors = {
        f"{name}.weight": (len(shape) == 1) + _numbers(int(np.prod(shape)), seed).reshape(shape)
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    }
    save_file(
        {name: tensor.astype(np.float32) for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


@pytest.fixture(scope="module")
def order(base: Path) -> RemovalOrder:
    """Three steps of score, rank and slice to 45 % of the decoder layers."""
    geometry = geometry_of(CONFIG)
    tokens = ((_numbers(6 * 20, 99) * 256 + 127).astype(np.int32) % 48).reshape(6, 20)
    calibration = objectives.perplexity(list(tokens))
    model = load_model(base, dtype="float64", device="cpu")
    order, held = RemovalOrder.empty(), KeepSets.everything(geometry)
    for step, target in enumerate(step_targets(3, 0.45), 1):
        keep = order.keep_sets(geometry)
        slice_model(model, geometry, now=held, wanted=keep)
        held = keep
        result = importance.score(model, keep, geometry, calibration, ScoringSettings(LIMITS.protected, "elements", 80))
        order = order.extend(next_removals(result.scores, order.removals, geometry, LIMITS, target), step)
    return order


def test_the_trajectory(order: RemovalOrder):
    removals = order.removals
    rows = [f"{k}{a}.{i}" for k, a, i in zip(removals.kinds, removals.layers, removals.indices, strict=True)]
    assert " ".join(rows[:12]) == "13.0 13.7 13.19 13.18 13.20 13.15 12.14 13.12 13.9 13.2 12.20 11.14"
    assert np.bincount(order.steps).tolist() == [0, 36, 4, 23]
    digest = hashlib.sha256(np.stack([removals.kinds, removals.layers, removals.indices, order.steps]).tobytes())
    assert digest.hexdigest()[:16] == "9358c57e43bb25bf"


@pytest.mark.parametrize(
    ("sparsity", "groups", "widths"),
    [
        (0.2, [2, 2, 2, 1], [24, 20, 8, 8]),
        (0.35, [2, 2, 1, 1], [24, 16, 4, 4]),
        (0.45, [2, 1, 1, 1], [24, 4, 4, 4]),
    ],
)
def test_the_shapes_of_levels(order: RemovalOrder, sparsity: float, groups: list[int], widths: list[int]):
    keep = order.level(sparsity, geometry=geometry_of(CONFIG), width_multiple=4)
    assert keep.attention.sum(axis=1).tolist() == groups
    assert keep.mlp.sum(axis=1).tolist() == widths


def test_ranking_of_scores_full_of_ties():
    geometry = geometry_of(CONFIG)
    scores = StructureScores(
        (np.abs(_numbers(8, 5)) * 8).astype(np.int64).reshape(4, 2).astype(np.float32),
        (np.abs(_numbers(96, 6)) * 8).astype(np.int64).reshape(4, 24).astype(np.float32),
    )
    removals = next_removals(scores, RemovalOrder.empty().removals, geometry, LIMITS, 0.4)
    digest = hashlib.sha256(np.stack([removals.kinds, removals.layers, removals.indices]).tobytes())
    assert (len(removals), digest.hexdigest()[:16]) == (50, "5738e4eaa5efecd2")


@pytest.mark.parametrize(("dtype", "digest"), [("float32", "f3d2f21e7810dddb"), ("bfloat16", "e1d52a4cef9a2573")])
def test_the_bytes_of_a_checkpoint(base: Path, tmp_path: Path, dtype: str, digest: str):
    geometry = geometry_of(CONFIG)
    keep = KeepSets.everything(geometry)
    keep.attention[1, 0], keep.attention[3, 1] = False, False
    keep.mlp[1, 4:12], keep.mlp[2, ::2] = False, False
    write_checkpoint(base, tmp_path, geometry=geometry, keep=keep, dtype=dtype)
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()[:16] == digest


def test_the_configuration_of_a_checkpoint(base: Path, tmp_path: Path):
    geometry = geometry_of(CONFIG)
    write_checkpoint(base, tmp_path, geometry=geometry, keep=KeepSets.everything(geometry), dtype="bfloat16")
    assert hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()[:16] == "9f89fb099c67926c"


def test_the_tables_of_a_removal_order(order: RemovalOrder, tmp_path: Path):
    order.save(tmp_path / "removal_order.safetensors", geometry_of(CONFIG), {"run_id": "0123456789ab"})
    found = {name: (t.dtype.name, t.shape) for name, t in load_file(tmp_path / "removal_order.safetensors").items()}
    assert found == {
        "attention.rank": ("int32", (4, 2)),
        "attention.step": ("int16", (4, 2)),
        "mlp.rank": ("int32", (4, 24)),
        "mlp.step": ("int16", (4, 24)),
    }


def test_the_reference_of_this_file_is_a_live_model(base: Path):
    """Weights that gave no gradient, or a flat loss, would make the values above worthless."""
    model = load_model(base, dtype="float32", device="cpu")
    logits = model(input_ids=torch.arange(10)[None]).logits
    assert 0.1 < float(logits.std()) < 10
