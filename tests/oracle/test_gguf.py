"""A level as a GGUF file: sizes, tensors and vocabulary against the checkpoint, by naive loops."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import MODELS, SIZES, VOCABULARY, byte_level
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.export.gguf import require_supported, verify_gguf, write_gguf
from gisp_tasks.export.gguf_tokenizer import read_vocabulary
from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets


@pytest.fixture(scope="module", params=list(MODELS))
def level(request: pytest.FixtureRequest, build_tiny: Callable[..., Any], tmp_path_factory: Any) -> Path:
    """A level whose layers differ in groups and widths."""
    model = build_tiny(**{**SIZES, **MODELS[request.param]})
    byte_level(model.path)
    groups, widths = ([4, 1, 3], [96, 32, 64])
    attention = np.array([[g < count for g in range(4)] for count in groups])
    mlp = np.array([[c >= 96 - width for c in range(96)] for width in widths])
    out = tmp_path_factory.mktemp("level")
    write_checkpoint(
        model.path, out, geometry=geometry_of(model.config), keep=KeepSets(attention, mlp), dtype="float32"
    )
    return out


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp rotates them: place i of the first half, then place i of the second."""
    result, width = np.empty_like(values), len(values) // heads
    for head in range(heads):
        for i in range(width // 2):
            result[head * width + 2 * i] = values[head * width + i]
            result[head * width + 2 * i + 1] = values[head * width + width // 2 + i]
    return result


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _expected(level: Path) -> dict[str, np.ndarray]:
    found = {}
    per_layer = json.loads((level / "config.json").read_text())["per_layer_config"]
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in load_file(level / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if stem in outer:
            found[f"{outer[stem]}.{kind}"] = values
            continue
        number, part = stem.removeprefix("model.layers.").split(".", 1)
        sizes = per_layer[number]
        if part.endswith(("q_proj", "k_proj")):
            key = "num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"
            values = _interleaved(values, sizes[key])
        found[f"blk.{number}.{NAMES[part]}.{kind}"] = values
    return found


def test_float32_is_the_checkpoint(level: Path, tmp_path: Path) -> None:
    file = tmp_path / "level.gguf"
    write_gguf(level, file, dtype="float32", name="a level")
    reader = gguf.GGUFReader(file)
    expected = _expected(level)
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        assert np.array_equal(np.asarray(tensor.data).reshape(expected[tensor.name].shape), expected[tensor.name])
    read = {name: field.contents() for name, field in reader.fields.items()}
    assert read["general.architecture"] == "deci"
    assert read["deci.attention.head_count"] == [8, 2, 6]
    assert read["deci.attention.head_count_kv"] == [4, 1, 3]
    assert read["deci.feed_forward_length"] == [96, 32, 64]
    sizes = {"block_count": 3, "context_length": 64, "embedding_length": 64, "vocab_size": VOCABULARY}
    sizes |= {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
    assert {name: read[f"deci.{name}"] for name in sizes} == sizes
    proof = verify_gguf(level, file, dtype="float32")
    assert (proof.max_difference, proof.num_tensors) == (0.0, len(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_smaller_types_round(level: Path, tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "level.gguf"
    write_gguf(level, file, dtype=dtype, name="a level")
    verify_gguf(level, file, dtype=dtype)
    expected = _expected(level)
    for tensor in gguf.GGUFReader(file).tensors:
        wanted = expected[tensor.name]
        if wanted.ndim == 1:
            assert tensor.tensor_type is gguf.GGMLQuantizationType.F32
            continue
        if dtype == "q8_0" and wanted.shape[1] % 32 == 0:
            rows = np.asarray(tensor.data).reshape(len(wanted), -1, 34)
            scales = rows[:, :, :2].copy().view(np.float16).astype(np.float32)
            found = (scales * rows[:, :, 2:].view(np.int8)).reshape(wanted.shape)
            blocks = np.abs(wanted).reshape(len(wanted), -1, 32).max(axis=2)
            assert (np.abs(found - wanted).reshape(len(wanted), -1, 32).max(axis=2) <= 0.0051 * blocks).all()
        else:
            torch_type = torch.bfloat16 if dtype == "bfloat16" else torch.float16
            stored = torch.from_numpy(np.array(tensor.data)).view(torch_type).reshape(wanted.shape)
            assert torch.equal(stored, torch.from_numpy(wanted).to(torch_type))


def test_a_changed_file_is_no_proof(level: Path, tmp_path: Path) -> None:
    file = tmp_path / "level.gguf"
    write_gguf(level, file, dtype="float32", name="a level")
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(NumericsError, match="differs from the checkpoint"):
        verify_gguf(level, file, dtype="float32")


def test_vocabulary(level: Path) -> None:
    found = read_vocabulary(level, size=VOCABULARY)
    tokenizer = Tokenizer.from_file(str(level / "tokenizer.json"))
    count = tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(i) for i in range(count)] == found.tokens[:count]
    assert len(found.tokens) == len(found.types) == VOCABULARY
    assert set(found.types[count:]) == {gguf.TokenType.UNUSED}
    assert [found.types[i] for i in (0, 1, count - 1)] == [
        gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED,
    ]  # fmt: skip
    assert found.tokens[count - 1] == "[TOOL]"
    assert (found.model, found.pre) == ("gpt2", "smollm")
    assert found.special == {"bos": 0, "eos": 1}
    assert found.add_bos
    assert not found.add_eos
    assert found.chat_template == "{{ messages }}"
    assert all(left + right in found.tokens for left, right in (merge.split(" ") for merge in found.merges or []))


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pattern", "normalizer", "name"),
    [
        (LLAMA3, None, "llama-bpe"),
        (LLAMA3.replace("{1,3}", ""), normalizers.NFC(), "qwen2"),
        (r"\w+|\W+", None, None),
        (LLAMA3, normalizers.Lowercase(), None),
    ],
)
def test_splittings(tmp_path: Path, pattern: str, normalizer: Any, name: str | None) -> None:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level(tmp_path, splits=[split], normalizer=normalizer)
    if name:
        assert read_vocabulary(tmp_path, size=VOCABULARY).pre == name
        return
    with pytest.raises(InputError, match="splits text by"):
        read_vocabulary(tmp_path, size=VOCABULARY)


def test_sentencepiece_vocabulary(testdata: Path) -> None:
    found = read_vocabulary(testdata / "models" / "stories260K", size=512)
    assert found.model == "llama"
    assert found.types[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, 6]
    assert found.tokens[3] == "<0x00>"
    assert found.space_prefix
    assert found.add_bos
    data = json.loads((testdata / "models" / "stories260K" / "tokenizer.json").read_text())
    merges = data["model"]["merges"][:2]
    first, second = ("".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in merges)
    scores = dict(zip(found.tokens, found.scores or [], strict=True))
    assert scores[first] > scores[second] > scores["<0x00>"]


def _refused(directory: Path, **changes: Any) -> str:
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    with pytest.raises(InputError) as caught:
        require_supported(config, directory)
    return str(caught.value)


def test_what_llama_cpp_would_compute_otherwise_is_refused(level: Path, tmp_path: Path) -> None:
    assert "query/key norms" in _refused(level, model_type="qwen3")
    assert "'yarn'" in _refused(level, rope_parameters={"rope_type": "yarn", "factor": 2.0})
    assert "window of 32" in _refused(level, model_type="mistral", sliding_window=32)
    assert "window of 32" in _refused(level, model_type="qwen2", use_sliding_window=True, sliding_window=32)
    bare = tmp_path / "bare"
    shutil.copytree(level, bare)
    (bare / "tokenizer.json").unlink()
    assert "no tokenizer.json" in _refused(bare)


def test_llama3_frequencies(build_tiny: Callable[..., Any], tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = build_tiny(**SIZES, rope_parameters=rope)
    byte_level(model.path)
    geometry = geometry_of(model.config)
    out = tmp_path / "level"
    write_checkpoint(model.path, out, geometry=geometry, keep=KeepSets.everything(geometry), dtype="float32")
    write_gguf(out, tmp_path / "level.gguf", dtype="float32", name="scaled")
    (tensor,) = [t for t in gguf.GGUFReader(tmp_path / "level.gguf").tensors if t.name == "rope_freqs.weight"]
    used = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path)).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / np.asarray(tensor.data), used.numpy(), rtol=1e-6)
    assert np.asarray(tensor.data).max() > 1
