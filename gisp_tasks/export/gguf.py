"""A level as one file for stock llama.cpp: GGUF of architecture ``deci``, whose layers may differ in size.

llama.cpp's architecture ``llama`` takes one size for all layers; ``deci`` has the same graph and reads head counts and
widths as arrays. It has no query/key norms, so Qwen3 cannot be written (EXPORT.md). Rows of q and k are permuted to
llama.cpp's order of rotary pairs, within each head.

The source is an exported Hugging Face directory, so what was proven there is what is written here, tensor by tensor. A
model that was not pruned is written the same way, to compare with.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.export.checkpoint import Checkpoint
from gisp_tasks.export.gguf_tokenizer import Vocabulary, read_vocabulary
from gisp_tasks.pruning.families import geometry_of

FAMILIES = ("llama", "mistral", "qwen2")
_ARCHITECTURE = gguf.MODEL_ARCH.DECI
_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
_Q8_BLOCK = 32
_MISTRAL_WINDOW = 4096
# Largest relative rounding of a value, and of a q8_0 block's largest value: half a step of 127, and a float16 scale.
_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "q8_0": 0.5 / 127 + 2.0**-10}
_SMALLEST_FLOAT16 = 2.0**-24


@dataclass(frozen=True)
class GgufProof:
    """What reading a file back found.

    Args:
        type: of the matrices.
        num_tensors: compared, each with the checkpoint's.
        kept_float16: matrices whose rows q8_0 cannot divide into blocks.
        max_difference: largest absolute difference of a weight.
    """

    type: str
    num_tensors: int
    kept_float16: int
    max_difference: float


def require_supported(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a model that llama.cpp would not compute as transformers does.

    Args:
        config: of the base model or of a level.
        directory: of either; its tokenizer is read.

    Raises:
        InputError: the architecture, its rotary scaling, sliding window or tokenizer cannot be written.
    """
    require_graph(config)
    read_vocabulary(directory, size=int(config["vocab_size"]))


def require_graph(config: Mapping[str, Any]) -> None:
    """`require_supported` by the configuration alone, whatever the tokenizer."""
    family = _family(config)
    if family not in FAMILIES:
        reason = "its query/key norms" if family == "qwen3" else "it"
        raise InputError(
            f"a GGUF file was asked for, and the model's architecture is {family}: llama.cpp has no architecture with "
            f"layers of different sizes and {reason}; allowed are {', '.join(FAMILIES)}. Set export.gguf: none"
        )
    kind = _rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"a GGUF file was asked for, and the model scales its rotary frequencies by {kind!r}; allowed are default, "
            f"linear and llama3. Set export.gguf: none"
        )
    window = _window(config, family)
    if window is not None and window < config.get("max_position_embeddings", window + 1):
        raise InputError(
            f"a GGUF file was asked for, and the model attends within a window of {window} tokens, which llama.cpp's "
            f"architecture deci does not; only full attention is written. Set export.gguf: none"
        )


def write_gguf(checkpoint: Path, out: Path, *, dtype: str, name: str) -> None:
    """Write a level as GGUF; memory is that of its largest tensor.

    Args:
        checkpoint: Hugging Face directory of a level, or of a model that was not pruned.
        out: the file.
        dtype: of matrices: float32, float16, bfloat16 or q8_0 (float16 where rows are no multiple of 32). Norms and
            biases are float32, as llama.cpp wants them.
        name: that llama.cpp shows.

    Raises:
        InputError: as in `require_supported`.
    """
    config = _read_config(checkpoint)
    require_graph(config)
    vocabulary = read_vocabulary(checkpoint, size=int(config["vocab_size"]))
    source = Checkpoint(checkpoint)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
    writer.add_name(name)
    _add_sizes(writer, config)
    _add_vocabulary(writer, vocabulary)
    extra = _rope_factors(config)
    if extra is not None:
        writer.add_tensor_info(_ROPE_FREQUENCIES, extra.shape, extra.dtype, extra.nbytes)
    plans = list(_planned(source, config, dtype))
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.num_bytes, raw_dtype=plan.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if extra is not None:
        writer.write_tensor_data(extra)
    for plan in plans:
        writer.write_tensor_data(quantize(plan.read(), plan.type))
    writer.close()


def verify_gguf(checkpoint: Path, file: Path, *, dtype: str) -> GgufProof:
    """Read a file back and compare every tensor with the checkpoint's, rows of q and k put back in their order.

    Raises:
        NumericsError: a tensor is missing, or differs by more than its type rounds.
    """
    config = _read_config(checkpoint)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    source, largest, halved = Checkpoint(checkpoint), 0.0, 0
    plans = {plan.name: plan for plan in _planned(source, config, dtype)}
    if found.keys() - {_ROPE_FREQUENCIES} != plans.keys():
        raise NumericsError(f"{file.name} holds other tensors than the checkpoint it was written from")
    for name, plan in plans.items():
        values = dequantize(found[name].data, found[name].tensor_type).reshape(plan.shape)
        expected = source.tensor(plan.source).to(torch.float32).numpy()
        if plan.heads:
            values = values.reshape(plan.heads, -1, 2, *expected.shape[1:]).swapaxes(1, 2).reshape(expected.shape)
        difference = np.abs(values - expected)
        if plan.type is gguf.GGMLQuantizationType.Q8_0:
            size = np.abs(expected).reshape(-1, _Q8_BLOCK).max(axis=1).repeat(_Q8_BLOCK).reshape(expected.shape)
        else:
            size = np.abs(expected)
        allowed = _ROUNDING[_name_of(plan.type)] * size + (_SMALLEST_FLOAT16 if plan.type > 0 else 0)
        if not (difference <= allowed).all():
            raise NumericsError(f"{file.name}: {name} differs from the checkpoint by up to {difference.max():.3g}")
        largest = max(largest, float(difference.max(initial=0)))
        halved += dtype == "q8_0" and plan.type is gguf.GGMLQuantizationType.F16
    return GgufProof(dtype, len(plans), halved, largest)


@dataclass(frozen=True)
class _Plan:
    """A tensor to write: ``source`` is its name in the checkpoint, ``heads`` how many heads' rows are permuted."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    heads: int
    checkpoint: Checkpoint

    @property
    def num_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // int(block) * int(size)

    def read(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.checkpoint.tensor(self.source).to(torch.float32).numpy()
        return permuted(values, self.heads) if self.heads else values


def permuted(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of ``heads`` heads, from halves that rotate together to neighbours that do.

    Args:
        values: weight [heads * hd, D] or bias [heads * hd].
        heads: in it.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _read_config(checkpoint: Path) -> dict[str, Any]:
    """A level's config.json; of another model, with what a level's says of each layer."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    if "per_layer_config" in config:
        return config
    geometry = geometry_of(config)
    layer = {
        "num_attention_heads": geometry.num_query_heads,
        "num_key_value_heads": geometry.num_kv_groups,
        "intermediate_size": geometry.intermediate_size,
    }
    per_layer = {str(number): layer for number in range(geometry.num_layers)}
    return {**config, "head_dim": geometry.head_dim, "per_layer_config": per_layer}


def _planned(source: Checkpoint, config: Mapping[str, Any], dtype: str) -> Iterator[_Plan]:
    names = gguf.get_tensor_name_map(_ARCHITECTURE, int(config["num_hidden_layers"]))
    per_layer = config["per_layer_config"]
    for original in source.parameters(tied=bool(config.get("tie_word_embeddings"))):
        name = names.get_name(original, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"{original} has no name in GGUF"
        heads = 0
        for part, sizes in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".self_attn.{part}." in original:
                heads = per_layer[original.split(".")[2]][sizes]
        shape = source.shape(original)
        yield _Plan(name, original, shape, _type_of(shape, dtype), heads, source)


def _type_of(shape: tuple[int, ...], dtype: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % _Q8_BLOCK:
        return gguf.GGMLQuantizationType.F16
    return _TYPES[dtype]


def _name_of(kind: gguf.GGMLQuantizationType) -> str:
    return next(name for name, other in _TYPES.items() if other is kind)


def _family(config: Mapping[str, Any]) -> str:
    return str(config["model_type"]).removeprefix("pruned_")


def _window(config: Mapping[str, Any], family: str) -> int | None:
    """Tokens that attention reaches back, with transformers' defaults; None: all."""
    if family == "mistral":
        window: int | None = config.get("sliding_window", _MISTRAL_WINDOW)
        return window
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one name for each, whichever version of transformers wrote them."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return {**settings, "rope_type": kind, "rope_theta": settings.get("rope_theta", config.get("rope_theta", 10000.0))}


def _rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """What llama.cpp divides rotary frequencies by, under ``llama3`` scaling [hd / 2]; computed by transformers."""
    rope, width = _rope(config), int(config["head_dim"])
    if rope["rope_type"] != "llama3":
        return None
    base = {**config, "model_type": _family(config), "rope_parameters": rope}
    for key in ("per_layer_config", "auto_map", "rope_scaling"):
        base.pop(key, None)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**base), torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    factors: NDArray[np.float32] = (plain / scaled).to(torch.float32).numpy()
    return factors


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    layers = [config["per_layer_config"][str(layer)] for layer in range(int(config["num_hidden_layers"]))]
    rope, width = _rope(config), int(config["head_dim"])
    writer.add_block_count(len(layers))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count([layer["num_attention_heads"] for layer in layers])
    writer.add_head_count_kv([layer["num_key_value_heads"] for layer in layers])
    writer.add_feed_forward_length([layer["intermediate_size"] for layer in layers])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    adders = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id,
    }  # fmt: skip
    for special, number in vocabulary.special.items():
        adders[special](number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
