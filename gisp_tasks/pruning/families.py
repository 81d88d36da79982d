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
        InputError: unsupported architecture, a missing size, or query heads that kv heads do not divide.
    """
    family = family_of(config)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers, vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
        intermediate = int(config["intermediate_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"config.json of the model lacks a usable size: {error}; give a complete configuration"
        ) from None
    groups = int(config.get("num_key_value_heads") or heads)
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
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_positions=int(config.get("max_position_embeddings", 2048)),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        norm_parameters=2 * hidden,
        other_parameters=vocab * hidden + untied_head + hidden,
    )


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
