"""Files of a checkpoint: the safetensors writer, the configuration, what is copied and what is refused."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.export.huggingface import pruned_config, write_checkpoint
from gisp_tasks.export.reload import load_model, load_tokenizer, prove_reload
from gisp_tasks.export.safetensors_stream import TensorPlan, shards, write_safetensors
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import Geometry, KeepSets


def planned(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [TensorPlan(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose kv heads are shared by two query heads each."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_hidden_layers=2,
        intermediate_size=12,
        vocab_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def geometry(base: Path) -> Geometry:
    return geometry_of(config_of(base))


@pytest.fixture(scope="module")
def keep(geometry: Geometry) -> KeepSets:
    keep = KeepSets.everything(geometry)
    keep.attention[0, 1] = False
    keep.mlp[0, 8:] = False
    keep.mlp[1, ::3] = False
    return keep


@pytest.fixture
def level(base: Path, geometry: Geometry, keep: KeepSets, tmp_path: Path) -> Path:
    write_checkpoint(base, tmp_path / "level", geometry=geometry, keep=keep, dtype="float32")
    return tmp_path / "level"


# ---- the writer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_reads_what_is_written(tmp_path: Path, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "matrix": torch.randn(5, 7, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "vector": torch.randn(3, generator=generator),
        "scalar": torch.tensor(1.25),
    }
    write_safetensors(tmp_path / "file", planned(tensors), dtype=dtype)
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor.to(dtype)), name
            assert file.get_tensor(name).dtype == dtype


def test_written_tensors_are_let_go(tmp_path: Path):
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert sum(earlier() is not None for earlier in made) <= 1, "tensors are held after they were written"
        tensor = torch.ones(2)
        made.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / "file", [TensorPlan(name, (2,), make) for name in "dcab"], dtype=torch.float32)
    assert len(made) == 4


def test_a_tensor_of_another_shape_than_planned_stops_the_write(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"w: planned \(2, 3\), made \(3, 2\)"):
        write_safetensors(tmp_path / "file", [TensorPlan("w", (2, 3), lambda: torch.zeros(3, 2))], dtype=torch.float32)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([2, 2, 2], 24, [["0", "1", "2"]]),
        ([2, 2, 2], 23, [["0", "1"], ["2"]]),
        ([1, 9, 1, 1], 8, [["0"], ["1"], ["2", "3"]]),
        ([5, 5], 1, [["0"], ["1"]]),
    ],
)
def test_shards_are_consecutive_and_as_full_as_allowed(sizes, limit, expected):
    plans = [TensorPlan(str(i), (size,), lambda: torch.zeros(0)) for i, size in enumerate(sizes)]
    found = shards(plans, dtype=torch.float32, max_bytes=limit)
    assert [[plan.name for plan in file] for file in found] == expected


# ---- the configuration ----


def test_the_configuration_gives_each_layer_its_sizes(base: Path, geometry: Geometry, keep: KeepSets):
    config = pruned_config(config_of(base), geometry, keep, "bfloat16")
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8},
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8},
    }
    assert config["model_type"] == "pruned_llama"
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_pruned.PrunedLlamaConfig",
        "AutoModel": "modeling_pruned.PrunedLlamaModel",
        "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
    }
    assert (config["head_dim"], config["dtype"]) == (6, "bfloat16")
    untouched = set(config_of(base)) - {"model_type", "architectures", "dtype"}
    assert all(config[key] == config_of(base)[key] for key in untouched)


def test_an_old_configuration_without_head_dim_gets_one(base: Path, geometry: Geometry, keep: KeepSets):
    old = {key: value for key, value in config_of(base).items() if key not in ("head_dim", "dtype")}
    assert pruned_config({**old, "torch_dtype": "float16"}, geometry, keep, "bfloat16")["head_dim"] == 6


# ---- the directory ----


def test_tokenizer_and_generation_settings_travel_along(base: Path, level: Path, geometry: Geometry, keep: KeepSets):
    assert sorted(path.name for path in level.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_pruned.py",
    ]
    source = level.parent / "source"
    source.mkdir()
    for path in base.iterdir():
        (source / path.name).symlink_to(path)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(f"contents of {name}")
    write_checkpoint(source, level.parent / "again", geometry=geometry, keep=keep, dtype="float32")
    assert (level.parent / "again/tokenizer.json").read_text() == "contents of tokenizer.json"
    assert (level.parent / "again/chat_template.jinja").is_file()
    assert not (level.parent / "again/README.md").exists()


def test_what_is_no_parameter_is_left_out(base: Path, level: Path, geometry: Geometry, keep: KeepSets):
    """Checkpoints of old carry rotary tables, and tied ones a copy of the embeddings."""
    source = level.parent / "source"
    source.mkdir()
    (source / "config.json").write_text((base / "config.json").read_text())
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    written = write_checkpoint(source, level.parent / "again", geometry=geometry, keep=keep, dtype="float32")
    assert written == geometry.parameters_of(keep) + geometry.other_parameters
    assert (level.parent / "again/model.safetensors").read_bytes() == (level / "model.safetensors").read_bytes()


def test_a_checkpoint_without_a_tensor_is_refused(base: Path, geometry: Geometry, keep: KeepSets, tmp_path: Path):
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        write_checkpoint(tmp_path, tmp_path / "out", geometry=geometry, keep=keep, dtype="float32")


# ---- loading, and the proof ----


def test_a_directory_that_is_no_model_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="cannot load this model"):
        load_model(tmp_path, dtype="float32")
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_loaded_model_is_frozen_and_evaluating(base: Path):
    model = load_model(base, dtype="bfloat16", device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_holds_for_what_was_written(
    base: Path, geometry: Geometry, keep: KeepSets, tmp_path: Path, dtype: str
):
    write_checkpoint(base, tmp_path, geometry=geometry, keep=keep, dtype=dtype)
    proof = prove_reload(base, tmp_path, geometry=geometry, keep=keep, prompt=list(range(20)), greedy_tokens=8)
    assert 0 <= proof.max_logit_difference < 2e-5
    assert proof.greedy_equal
    assert (proof.num_tokens, proof.greedy_tokens) == (20, 8)


def test_the_proof_fails_for_one_wrong_weight(base: Path, level: Path, geometry: Geometry, keep: KeepSets):
    path = level / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 2] += 0.05
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="not the masked base model"):
        prove_reload(base, level, geometry=geometry, keep=keep, prompt=list(range(20)), greedy_tokens=2)


def test_the_proof_fails_for_other_structures_of_the_same_number(
    base: Path, level: Path, geometry: Geometry, keep: KeepSets
):
    other = KeepSets(np.flip(keep.attention, axis=1).copy(), keep.mlp)
    with pytest.raises(NumericsError, match="not the masked base model"):
        prove_reload(base, level, geometry=geometry, keep=other, prompt=list(range(20)), greedy_tokens=2)


def test_the_proof_fails_for_weights_that_are_no_numbers(base: Path, level: Path, geometry: Geometry, keep: KeepSets):
    path = level / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="differ by nan"):
        prove_reload(base, level, geometry=geometry, keep=keep, prompt=list(range(20)), greedy_tokens=2)
