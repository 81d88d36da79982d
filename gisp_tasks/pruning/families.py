"""Where each supported architecture keeps its projections, and how its configuration gives its geometry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.structures import Geometry, KeepSets

ROWS, COLUMNS = 0, 1
READERS = ("o", "down")
"""Roles of the projections that read what the attention structures and the channels of a layer compute."""


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


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its projections by role, all below ``model.layers.<i>.``, and what else its layers hold.

    Args:
        model_type: as in config.json.
        projections: by role.
        optional_biases: the keys of config.json that give projections biases: ``attention_bias`` (q, k, v and o)
            and ``mlp_bias`` (gate, up and down). A key that is not named here means nothing to the architecture.
        qkv_bias: q, k and v have biases, whatever the configuration says.
        query_key_norms: a norm of head_dim parameters each for queries and keys, shared by all heads.
        defaults: sizes that transformers assumes where config.json does not have the key.
    """

    model_type: str
    projections: Mapping[str, Projection]
    optional_biases: frozenset[str] = frozenset()
    qkv_bias: bool = False
    query_key_norms: bool = False
    defaults: Mapping[str, int]


# The layout of Llama, which the others have taken over name by name.
_LLAMA_LAYOUT: Mapping[str, Projection] = {
    "q": Projection("self_attn.q_proj", "query", ROWS),
    "k": Projection("self_attn.k_proj", "key_value", ROWS),
    "v": Projection("self_attn.v_proj", "key_value", ROWS),
    "o": Projection("self_attn.o_proj", "query", COLUMNS),
    "gate": Projection("mlp.gate_proj", "channel", ROWS),
    "up": Projection("mlp.up_proj", "channel", ROWS),
    "down": Projection("mlp.down_proj", "channel", COLUMNS),
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            projections=_LLAMA_LAYOUT,
            optional_biases=frozenset({"attention_bias", "mlp_bias"}),
            defaults={"max_position_embeddings": 2048},
        ),
        Family(
            model_type="mistral",
            projections=_LLAMA_LAYOUT,
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        ),
        Family(
            model_type="qwen2",
            projections=_LLAMA_LAYOUT,
            qkv_bias=True,
            defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        ),
        Family(
            model_type="qwen3",
            projections=_LLAMA_LAYOUT,
            optional_biases=frozenset({"attention_bias"}),
            query_key_norms=True,
            defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        ),
    )
}


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


def geometry_of(config: Mapping[str, Any], *, granularity: str = "kv_group") -> Geometry:
    """The geometry that a ``config.json`` describes, with the defaults of transformers where it has no key.

    Args:
        config: of the model.
        granularity: as in the recipe.

    Raises:
        InputError: unsupported architecture, a missing or impossible size, or query heads that kv heads do not divide.
    """
    family = family_of(config)
    sizes = {**family.defaults, **config}
    hidden, heads = _size(sizes, "hidden_size"), _size(sizes, "num_attention_heads")
    layers, vocab = _size(sizes, "num_hidden_layers"), _size(sizes, "vocab_size")
    groups = _size(sizes, "num_key_value_heads", if_null=heads)
    head_dim = _size(sizes, "head_dim", if_null=hidden // heads)
    if heads % groups:
        raise InputError(f"{heads} query heads cannot be shared by {groups} kv heads; check the model's config.json")
    untied_head = 0 if config.get("tie_word_embeddings", False) else vocab * hidden
    biases = {key for key in family.optional_biases if config.get(key, False)}
    return Geometry(
        family=family.model_type,
        num_layers=layers,
        hidden_size=hidden,
        num_query_heads=heads,
        num_kv_groups=groups,
        head_dim=head_dim,
        intermediate_size=_size(sizes, "intermediate_size"),
        vocab_size=vocab,
        max_positions=_size(sizes, "max_position_embeddings", if_null=family.defaults["max_position_embeddings"]),
        qkv_bias=family.qkv_bias or "attention_bias" in biases,
        output_bias="attention_bias" in biases,
        mlp_bias="mlp_bias" in biases,
        norm_parameters=2 * hidden + (2 * head_dim if family.query_key_norms else 0),
        other_parameters=vocab * hidden + untied_head + hidden,
        granularity=granularity,
    )


def _size(config: Mapping[str, Any], name: str, if_null: int | None = None) -> int:
    """A size that must be a positive whole number; ``if_null`` stands for null, and for a key without a default."""
    value = if_null if config.get(name) is None else config[name]
    if not isinstance(value, int) or value < 1:
        raise InputError(
            f"config.json of the model has {name}={value!r}; a size is a whole number from 1. Give a complete "
            f"configuration"
        )
    return value


def projections_of(geometry: Geometry) -> Mapping[str, Projection]:
    """The projections, by role, that hold weights of structures: k and v do not where query heads go one by one."""
    projections = FAMILIES[geometry.family].projections
    if geometry.separate_heads:
        return {role: projection for role, projection in projections.items() if projection.structure != "key_value"}
    return projections


def kept_positions(geometry: Geometry, keep: KeepSets, layer: int, structure: str) -> NDArray[np.int64]:
    """Rows (or columns) of a dense projection that a subnetwork uses, rising.

    Args:
        geometry: of the dense model.
        keep: the subnetwork.
        layer: which layer.
        structure: as in `Projection`; of ``key_value``, heads of which no query head is left are not used.
    """
    if structure == "channel":
        return np.flatnonzero(keep.mlp[layer])
    if structure == "query":
        return np.flatnonzero(np.repeat(keep.attention[layer], geometry.queries_per_structure * geometry.head_dim))
    return np.flatnonzero(np.repeat(geometry.query_heads_left(keep.attention[layer]) > 0, geometry.head_dim))
