"""A level as a Hugging Face directory: dense sliced tensors under the ordinary names, a configuration by layer.

Where single query heads were removed, rows of k and v may stand in a tensor several times, and places without a head
are zero (`pruning.layout`).

`per_layer_config` is transformers' own schema, but no stock model class builds layers of different sizes yet, so
the directory carries a short modelling file (`export/modeling`), the same for every family, named in `auto_map`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gisp_tasks.errors import InputError
from gisp_tasks.export.checkpoint import INDEX, Checkpoint
from gisp_tasks.export.safetensors_stream import TensorPlan, shards, write_safetensors
from gisp_tasks.pruning.families import ROWS, family_of
from gisp_tasks.pruning.layout import layer_layout
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.refs import canonical_json

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
_MODELING = "modeling_pruned"
_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}


def write_checkpoint(
    base: Path,
    out: Path,
    *,
    geometry: Geometry,
    keep: KeepSets,
    dtype: str,
    replaced: Mapping[str, Path] = MappingProxyType({}),
    auto_map: bool = True,
) -> int:
    """Write the subnetwork ``keep`` of the model in ``base`` to ``out``, tensor by tensor.

    Args:
        base: directory of the dense model.
        out: directory to fill.
        geometry: of the dense model.
        keep: what stays.
        dtype: of the tensors written, a torch name.
        replaced: safetensors files of tensors that stand in for those of the same name, in the dense model's shape.
        auto_map: put the modelling file into the directory and name it in its configuration, so that the level loads
            where this package is not installed.

    Returns:
        The number of parameters written.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    torch_dtype: torch.dtype = getattr(torch, dtype)
    tensors = list(_planned_tensors(Checkpoint(base, replaced), config, geometry, keep))
    files = shards(tensors, dtype=torch_dtype, max_bytes=SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(out / name, part, dtype=torch_dtype)
        weight_map.update({plan.name: name for plan in part})
    if len(files) > 1:
        total = sum(plan.num_bytes(torch_dtype) for plan in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_bytes(canonical_json(index))
    written = pruned_config(config, geometry, keep, dtype)
    if auto_map:
        module = f"{_MODELING}.py"
        (out / module).write_text((resources.files("gisp_tasks.export.modeling") / module).read_text())
    else:
        del written["auto_map"]
    (out / "config.json").write_bytes(canonical_json(written))
    for path in sorted(base.iterdir()):
        if path.name in (*TOKENIZER_FILES, "generation_config.json") or path.name.startswith("LICENSE"):
            shutil.copyfile(path, out / path.name)
    return sum(int(torch.Size(plan.shape).numel()) for plan in tensors)


def pruned_config(config: Mapping[str, Any], geometry: Geometry, keep: KeepSets, dtype: str) -> dict[str, Any]:
    """The configuration of a level: the base model's, with the sizes of each layer."""
    family = str(config["model_type"])
    title = "Pruned" + family.capitalize()
    layouts = [layer_layout(geometry, keep, layer) for layer in range(geometry.num_layers)]
    return {
        **config,
        "model_type": f"pruned_{family}",
        "architectures": [f"{title}ForCausalLM"],
        "auto_map": {auto: f"{_MODELING}.{title}{suffix}" for auto, suffix in _CLASSES.items()},
        "head_dim": geometry.head_dim,
        "dtype": dtype,
        "per_layer_config": {
            str(layer): {
                "num_attention_heads": len(layout.query_heads),
                "num_key_value_heads": len(layout.kv_heads),
                "intermediate_size": len(layout.channels),
            }
            for layer, layout in enumerate(layouts)
        },
    }


def _planned_tensors(
    source: Checkpoint, config: Mapping[str, Any], geometry: Geometry, keep: KeepSets
) -> Iterator[TensorPlan]:
    """Every tensor of the base model, sliced where a projection says so."""
    cuts = _cuts(config, geometry, keep)
    missing = [name for name in cuts if name not in source.names() and name.endswith("weight")]
    if missing:
        raise InputError(f"the model lacks the tensor {missing[0]}; its files do not match its config.json")
    for name in source.parameters(tied=bool(config.get("tie_word_embeddings"))):
        shape = source.shape(name)
        if name not in cuts:
            yield TensorPlan(name, shape, lambda name=name: source.tensor(name))  # type: ignore[misc]
            continue
        axis, index = cuts[name]
        sliced = (*shape[:axis], len(index), *shape[axis + 1 :])
        yield TensorPlan(
            name,
            sliced,
            lambda name=name, axis=axis, index=index: _gathered(source.tensor(name), axis, index),  # type: ignore[misc]
        )


def _gathered(tensor: torch.Tensor, axis: int, index: NDArray[np.int64]) -> torch.Tensor:
    """The places ``index`` of ``tensor`` along ``axis``; zeros where it is negative."""
    places = torch.from_numpy(index)
    gathered = tensor.index_select(axis, places.clamp(min=0))
    return gathered.index_fill_(axis, torch.nonzero(places < 0).flatten(), 0)


def _cuts(config: Mapping[str, Any], geometry: Geometry, keep: KeepSets) -> dict[str, tuple[int, NDArray[np.int64]]]:
    """Tensor name -> (axis, dense position in each place), for weights and for the biases that follow rows."""
    cuts = {}
    for layer in range(geometry.num_layers):
        layout = layer_layout(geometry, keep, layer)
        for projection in family_of(config).projections.values():
            index = layout.positions(projection.structure)
            stem = f"model.layers.{layer}.{projection.path}"
            cuts[f"{stem}.weight"] = (projection.axis, index)
            if projection.axis == ROWS:
                cuts[f"{stem}.bias"] = (0, index)
    return cuts
