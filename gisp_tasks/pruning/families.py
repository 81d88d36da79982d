"""Where each supported architecture keeps its projections, and how its configuration gives its geometry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.structures import Geometry, KeepSets

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Projection:
    """One linear map of a decoder layer.

    Args:
        path: its module below the layer.
        structure: what its sliced side enumerates: ``query`` (head_dim rows a query head), ``key_value``
            (head_dim rows a kv group) or ``channel``.
        axis: the side of the weight [out, in] that is sliced; a bias follows the rows.
    """

    path: str
    structure: str
    axis: int


@dataclass(frozen=True)
class Family:
    """One architecture: its projections by role, all below ``model.layers.<i>.``."""

    model_type: str
    projections: Mapping[str, Projection]


_LLAMA_LAYOUT = {
    "q": Projection("self_attn.q_proj", "query", ROWS),
    "k": Projection("self_attn.k_proj", "key_value", ROWS),
    "v": Projection("self_attn.v_proj", "key_value", ROWS),
    "o": Projection("self_attn.o_proj", "query", COLUMNS),
    "gate": Projection("mlp.gate_proj", "channel", ROWS),
    "up": Projection("mlp.up_proj", "channel", ROWS),
    "down": Projection("mlp.down_proj", "channel", COLUMNS),
}

FAMILIES: Mapping[str, Family] = {"llama": Family("llama", _LLAMA_LAYOUT)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model's configuration.

    Raises:
        InputError: an architecture that is not supported.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise InputError(
            f"the model's architecture is {model_type!r} (config.json, model_type); supported are "
            f"{', '.join(FAMILIES)}. Choose a model of a supported architecture"
        )
    return FAMILIES[model_type]


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """The geometry that a ``config.json`` describes; an explicit ``head_dim`` counts, as transformers has it.

    Raises:
        InputError: unsupported architecture, a missing or impossible size, or query heads that kv heads do not divide.
    """
    family = family_of(config)
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    layers, vocab = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
    groups = _size(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise InputError(f"{heads} query heads cannot be shared by {groups} kv heads; check the model's config.json")
    untied_head = 0 if config.get("tie_word_embeddings", False) else vocab * hidden
    attention_bias = bool(config.get("attention_bias", False))
    return Geometry(
        family=family.model_type,
        num_layers=layers,
        hidden_size=hidden,
        num_query_heads=heads,
        num_kv_groups=groups,
        head_dim=_size(config, "head_dim", default=hidden // heads),
        intermediate_size=_size(config, "intermediate_size"),
        vocab_size=vocab,
        max_positions=_size(config, "max_position_embeddings", default=2048),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        norm_parameters=2 * hidden,
        other_parameters=vocab * hidden + untied_head + hidden,
    )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size that must be a positive whole number; null counts as absent."""
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int) or value < 1:
        raise InputError(
            f"config.json of the model has {name}={value!r}; a size is a whole number from 1. Give a complete "
            f"configuration"
        )
    return value


def kept_positions(geometry: Geometry, keep: KeepSets, layer: int, structure: str) -> NDArray[np.int64]:
    """Rows (or columns) of a projection that stay, rising.

    Args:
        geometry: of the dense model.
        keep: the subnetwork.
        layer: which layer.
        structure: as in `Projection`.
    """
    if structure == "channel":
        return np.flatnonzero(keep.mlp[layer])
    heads = geometry.queries_per_group if structure == "query" else 1
    return np.flatnonzero(np.repeat(keep.attention[layer], heads * geometry.head_dim))
