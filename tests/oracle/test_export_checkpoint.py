"""A written level against the masked dense model, through everything that a user of the checkpoint does."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from subnetworks import greedy, logits, masked
from transformers import AutoModel

from gisp_tasks.export import huggingface
from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import mask_model, slice_model

Kept = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Level:
    """A checkpoint, what it keeps, and the model it was cut from."""

    base: Any
    kept: Kept
    path: Path
    written: int

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    @property
    def keep(self) -> KeepSets:
        """What is kept, as the product says it."""
        return _keep_sets(self.base.config, self.kept)

    @property
    def class_name(self) -> str:
        """What the checkpoint loads as."""
        titles = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        return f"Pruned{titles[self.base.config['model_type']]}ForCausalLM"

    def load(self) -> torch.nn.Module:
        return load_model(self.path, dtype="float32", trust_remote_code=True, device="cpu")


@pytest.fixture(scope="session")
def written() -> dict[Path, Level]:
    """Levels written so far: most tests read the same one."""
    return {}


@pytest.fixture
def level(model, written: dict[Path, Level], random_keep: Callable[..., Kept], tmp_path_factory) -> Level:
    """A random subnetwork of each model, written in float32."""
    if model.path not in written:
        out = tmp_path_factory.mktemp("level")
        kept = random_keep(model.config)
        written[model.path] = Level(model, kept, out, _write(model, kept, out))
    return written[model.path]


def _keep_sets(config: dict[str, Any], kept: Kept) -> KeepSets:
    attention = np.array([[g in groups for g in range(config["num_key_value_heads"])] for groups, _ in kept])
    mlp = np.array([[c in channels for c in range(config["intermediate_size"])] for _, channels in kept])
    return KeepSets(attention, mlp)


def _write(model, kept: Kept, out: Path, dtype: str = "float32") -> int:
    geometry = geometry_of(model.config)
    return write_checkpoint(model.path, out, geometry=geometry, keep=_keep_sets(model.config, kept), dtype=dtype)


def _expected_tensors(level: Level) -> dict[str, torch.Tensor]:
    """The base model's tensors, cut by name with plain indexing."""
    config = level.base.config
    head_dim, queries = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
    tensors = safetensors.torch.load_file(level.base.path / "model.safetensors")
    for i, (groups, channels) in enumerate(level.kept):
        kv_rows = [g * head_dim + r for g in groups for r in range(head_dim)]
        query_rows = [(g * queries + h) * head_dim + r for g in groups for h in range(queries) for r in range(head_dim)]
        stem = f"model.layers.{i}."
        for name in [name for name in tensors if name.startswith(stem)]:
            projection, tensor = name.removeprefix(stem).split(".")[1], tensors[name]
            if projection in ("k_proj", "v_proj"):
                tensors[name] = tensor[kv_rows]
            elif projection == "q_proj":
                tensors[name] = tensor[query_rows]
            elif projection in ("gate_proj", "up_proj"):
                tensors[name] = tensor[channels]
            elif projection in ("o_proj", "down_proj") and name.endswith("weight"):
                tensors[name] = tensor[:, query_rows if projection == "o_proj" else channels]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _headers(directory: Path) -> dict[str, dict[str, Any]]:
    """Every safetensors header below ``directory``, parsed by hand, and the sizes of the files checked."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        assert length % 8 == 0, "tensors begin at a multiple of 8 bytes"
        assert header.pop("__metadata__") == {"format": "pt"}
        assert len(data) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        assert not found.keys() & header.keys()
        found.update(header)
    return found


def _ids(level: Level, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, level.base.config["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


# ---- the same function, in memory ----


def test_the_decoder_loads_without_its_head(level: Level):
    decoder = AutoModel.from_pretrained(level.path, trust_remote_code=True, dtype="float32").eval()
    assert type(decoder).__name__ == level.class_name.replace("ForCausalLM", "Model")
    with torch.inference_mode():
        found, expected = (model(input_ids=_ids(level)).last_hidden_state for model in (decoder, level.load().model))
    assert torch.equal(found, expected)


def test_slicing_in_memory_gives_the_checkpoint(level: Level):
    geometry, keep = geometry_of(level.base.config), level.keep
    model = level.base.load()
    slice_model(model, geometry, now=KeepSets.everything(geometry), wanted=keep)
    checkpoint = level.load().state_dict()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, _ids(level)), logits(level.load(), _ids(level)))


def test_mask_model_zeroes_what_a_hand_would(level: Level):
    geometry, keep = geometry_of(level.base.config), level.keep
    model = level.base.load()
    mask_model(model, geometry, keep)
    expected = masked(level.base, level.keep).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---- what lies on disk ----


def test_sizes_on_disk_are_those_of_the_geometry(level: Level):
    geometry, keep = geometry_of(level.base.config), level.keep
    headers = _headers(level.path)
    parameters = sum(int(np.prod(entry["shape"])) for entry in headers.values())
    assert parameters == level.written == geometry.parameters_of(keep) + geometry.other_parameters
    assert parameters == sum(parameter.numel() for parameter in level.load().parameters())
    assert {entry["dtype"] for entry in headers.values()} == {"F32"}
    size = (level.path / "model.safetensors").stat().st_size
    assert 0 < size - 4 * parameters < 200 * len(headers)


def test_tensors_are_the_bytes_that_safetensors_itself_writes(level: Level, tmp_path: Path):
    expected = _expected_tensors(level)
    safetensors.torch.save_file(expected, tmp_path / "by_safetensors.safetensors", metadata={"format": "pt"})
    reference = safetensors.torch.load_file(tmp_path / "by_safetensors.safetensors")
    found = safetensors.torch.load_file(level.path / "model.safetensors")
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_cut(level: Level, tmp_path: Path, dtype: str):
    _write(level.base, level.kept, tmp_path, dtype)
    torch_dtype = getattr(torch, dtype)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    expected = _expected_tensors(level)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch_dtype
        assert torch.equal(found[name], tensor.to(torch_dtype)), name
    parameters = sum(tensor.numel() for tensor in found.values())
    assert max(entry["data_offsets"][1] for entry in _headers(tmp_path).values()) == 2 * parameters
    loaded = load_model(tmp_path, dtype=dtype, trust_remote_code=True, device="cpu")
    assert loaded.dtype == torch_dtype
    assert loaded.config.dtype == torch_dtype


def test_shards_carry_an_index_that_transformers_loads(level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 15_000)
    assert _write(level.base, level.kept, tmp_path) == level.written
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names == [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * level.written
    assert set(index["weight_map"]) == set(_headers(tmp_path))
    sharded = load_model(tmp_path, dtype="float32", trust_remote_code=True, device="cpu").state_dict()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in level.load().state_dict().items())


def test_a_sharded_base_model_gives_the_same_bytes(level: Level, tmp_path: Path):
    base = level.base.load()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    geometry, keep = geometry_of(level.base.config), level.keep
    write_checkpoint(tmp_path / "base", tmp_path / "out", geometry=geometry, keep=keep, dtype="float32")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (level.path / "model.safetensors").read_bytes()


def test_writing_twice_gives_the_same_bytes(level: Level, tmp_path: Path):
    _write(level.base, level.kept, tmp_path)
    files = sorted(path.name for path in level.path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    for name in files:
        assert (tmp_path / name).read_bytes() == (level.path / name).read_bytes(), name


# ---- without this package ----

_LOADER = """
import sys
sys.modules["gisp_tasks"] = None  # an installed copy must not help: importing it fails
import json, torch
from transformers import AutoModelForCausalLM
results = []
for path, ids in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="float32").eval()
    with torch.inference_mode():
        out = model.generate(torch.tensor(ids), do_sample=False, max_new_tokens=12, pad_token_id=0,
                             attention_mask=torch.ones(1, len(ids[0]), dtype=torch.int64))
    results.append([type(model).__name__, out[0, len(ids[0]):].tolist()])
print(json.dumps(results))
"""


def test_loads_in_a_process_that_has_no_gisp(tiny_models, written, random_keep, tmp_path_factory, tmp_path: Path):
    levels = []
    for model in tiny_models.values():
        out = tmp_path_factory.mktemp("alone")
        kept = random_keep(model.config, seed=8)
        levels.append(Level(model, kept, out, _write(model, kept, out)))
    asked = [(str(level.path), _ids(level, 7).tolist()) for level in levels]
    done = subprocess.run(
        [sys.executable, "-I", "-c", _LOADER, json.dumps(asked)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == [
        [level.class_name, greedy(masked(level.base, level.keep), _ids(level, 7))[0]] for level in levels
    ]
