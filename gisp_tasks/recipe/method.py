"""How importance is measured, and how much is removed."""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from gisp_tasks.recipe.section import Section
from gisp_tasks.recipe.sources import CalibrationSection

# The published runs' (METHOD A4): of all structures, not of the parameters.
REFERENCE_STRUCTURE_RATIO = 0.7
REFERENCE_PROTECT = {"first_layers": 0.1, "last_layers": 1}

Level = Annotated[float, Field(ge=0.001, le=0.99)]


def level_name(sparsity: float) -> str:
    """`sp20` for 0.2, `sp37.5` for 0.375."""
    return f"sp{round(sparsity * 100, 1):g}"


class ImportanceSection(Section):
    """How a structure's importance is measured: by the task's own loss, globally."""

    score: Literal["taylor", "gate_fisher"] = "taylor"
    """`taylor`: sum over the structure's weights of |weight x gradient| of the whole set's loss (the paper's).
    `gate_fisher`: mean over sequences of the squared derivative of the sequence's loss by a gate on the structure's
    output; needs no weight gradients."""
    normaliser: Literal["elements", "reference"] = "elements"
    """`elements`: the structure's own number of scored weights (the paper's Algorithm 1); `reference`: 4 x head_dim
    x hidden for attention, 3 x intermediate for a channel (the published code)."""
    granularity: Literal["kv_group", "head"] = "kv_group"
    """The attention structure. `kv_group`: a key/value head with the query heads that share it. `head`: one query head
    (the paper's); key/value heads that several share are then no structures, and a level is written by an exact
    conversion that saves little before 20-30 % of the heads are gone."""
    compat: Literal["default", "reference"] = "default"
    """`default`: this project's method; every deviation from the reference code is named in the manifest. `reference`:
    scores, schedule and selection of the published code, in float32, to be checked against it; sets `score: taylor`,
    `normaliser: reference` and `granularity: head`."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_reference(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("compat") != "reference":
            return value
        if value.get("score", "taylor") != "taylor":
            raise ValueError(
                f"score={value['score']} was asked with compat=reference, and the reference code has the first-order "
                f"score only; use score: taylor, or compat: default"
            )
        return {**value, "score": "taylor", "normaliser": "reference", "granularity": "head"}


class ProtectSection(Section):
    """What is never removed.

    The published runs protect the first tenth of the layers and the last one. In this package's measurements (README)
    that costs quality, so no layer is protected unless a recipe says so.
    """

    first_layers: float = Field(default=0, ge=0.0)
    """Layers at the start: a fraction of them when below 1 (rounded down), else a number of layers."""
    last_layers: float = Field(default=0, ge=0.0)
    """Layers at the end: a fraction of them when below 1 (rounded down), else a number of layers."""
    min_kv_groups: int = Field(default=1, ge=1)
    """Key/value groups that every layer keeps."""
    min_channels: int = Field(default=32, ge=1)
    """MLP channels that every layer keeps."""

    @field_validator("first_layers", "last_layers")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value} is neither a fraction below 1 nor a whole number of layers")
        return value


class PruningSection(Section):
    """How much is removed, in how many steps, into which shapes."""

    levels: tuple[Level, ...] = Field(default=(0.2, 0.3, 0.4, 0.5), min_length=1, max_length=32)
    """Parameter sparsity of the decoder layers, one level each, rising."""
    steps: int = Field(default=30, ge=1, le=2000)
    """K: scoring passes; the schedule is linear in parameter sparsity up to the last level, or under
    `importance.compat: reference` linear in structures, from 0 to `structure_ratio`."""
    structure_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Fraction of all heads and channels, protected layers included, that the last step takes the model to. Read only
    under `importance.compat: reference`, where it is 0.7 unless set; levels are then cut from the finished order."""
    protect: ProtectSection = ProtectSection()
    width_multiple: int = Field(default=32, ge=1, le=4096)
    """MLP widths are rounded up to a multiple of this (32: fast kernels; 256: llama.cpp K-quants)."""
    compensation: Literal["none", "least_squares"] = "none"
    """What is done to the kept weights after the cut. `none`: nothing, levels share the base model's weights.
    `least_squares`: the o and down projections of every layer are solved anew in closed form, so that the kept inputs
    stand in for the removed ones; each level then has o and down matrices of its own."""
    compensation_data: CalibrationSection | None = None
    """Text for `least_squares`, more of it than scoring needs; null: the calibration sequences."""

    @model_validator(mode="after")
    def _data_has_a_use(self) -> Self:
        if self.compensation_data is not None and self.compensation == "none":
            raise ValueError(
                "compensation_data was given, and compensation is none, which reads no data; set compensation: "
                "least_squares, or remove compensation_data"
            )
        return self

    @field_validator("levels")
    @classmethod
    def _levels_rise(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        for i, (low, high) in enumerate(itertools.pairwise(levels)):
            if high <= low:
                raise ValueError(
                    f"levels[{i + 1}]={high:g} does not rise above levels[{i}]={low:g}; "
                    f"levels are nested, so write them in rising order without repetition"
                )
        names = [level_name(level) for level in levels]
        if len(set(names)) != len(names):
            raise ValueError(f"two levels share a name ({', '.join(names)}); keep them 0.1 % apart")
        return levels
