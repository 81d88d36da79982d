"""What a recipe means for a model, before anything is loaded: steps, levels, sizes, memory, artefact names."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.ranking import Limits, limits_of, next_removals, smallest_model
from gisp_tasks.pruning.reference import check_ratio, structure_ratios, threshold_removals, without_minima
from gisp_tasks.pruning.schedule import level_steps, step_targets
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, Removals
from gisp_tasks.recipe import Recipe, level_name

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MICRO_BATCH_TOKENS = 2048
LOGIT_BYTES = 512 * 2**20
"""Logits that an accelerator holds at once; see `cross_entropy`."""
DENSE = "dense"


@dataclass(frozen=True)
class LevelPlan:
    """One level: how small its model must be, and after which step it can be cut.

    Args:
        sparsity: parameter sparsity of the decoder layers, at least.
        max_parameters: of the whole model (decoder layers at ``sparsity``, plus everything else).
        max_bytes: of the weights in the recipe's dtype.
        after_step: the step that completes it.
    """

    name: str
    sparsity: float
    max_parameters: int
    max_bytes: int
    after_step: int


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Args:
        number: from 1.
        target_sparsity: parameter sparsity to reach; None under ``compat: reference``.
        structure_ratio: fraction of the structures to reach, under ``compat: reference``; else None.
        completes: the levels that can be cut after it.
    """

    number: int
    target_sparsity: float | None
    structure_ratio: float | None
    completes: tuple[str, ...]

    def removals(self, scores: StructureScores, removed: Removals, geometry: Geometry, limits: Limits) -> Removals:
        """What the step removes, in order; the arguments and errors are those of `ranking.next_removals`."""
        if self.structure_ratio is not None:
            return threshold_removals(scores, removed, geometry, limits.protected, self.structure_ratio)
        assert self.target_sparsity is not None
        return next_removals(scores, removed, geometry, limits, self.target_sparsity)


@dataclass(frozen=True)
class Plan:
    """A pure function of a recipe and a geometry.

    Args:
        micro_batch_tokens: tokens a forward pass while scoring, padding counted; a longer sequence goes alone.
        scoring_bytes: estimate of the memory that one scoring pass takes: weights, float32 gradients, logits.
        compensation_bytes: estimate of the memory that least squares takes: weights, the hidden states between two
            layers, the Gram matrices of one layer and the solution of one projection. None: it is not asked for.
        scoring_flops: estimate of the operations of all scoring passes together; for items an upper bound, since
            the prompt that candidates share is computed once, and under ``compat: reference`` a fraction of the
            structures is taken for the same fraction of the parameters.
    """

    geometry: Geometry
    dense_parameters: int
    dense_bytes: int
    steps: tuple[StepPlan, ...]
    levels: tuple[LevelPlan, ...]
    micro_batch_tokens: int
    scoring_bytes: int
    compensation_bytes: int | None
    scoring_flops: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def level(self, name: str) -> LevelPlan:
        """The level of that name."""
        return next(level for level in self.levels if level.name == name)


def make_plan(recipe: Recipe, geometry: Geometry) -> Plan:
    """Plan a run.

    Raises:
        InputError: the levels or the structure ratio cannot be reached with what the recipe protects, or the
            sequences (or the prompt of the speed report) are longer than the model's context.
    """
    limits = limits_of(recipe.pruning.protect, recipe.pruning.width_multiple, geometry.num_layers)
    _check_reach(recipe, geometry, limits)
    for name, section in (
        ("calibration", recipe.calibration),
        ("pruning.compensation_data", recipe.pruning.compensation_data),
    ):
        if section is not None and section.sequence_length > geometry.max_positions:
            raise InputError(
                f"{name}.sequence_length={section.sequence_length} is more than the model's context of "
                f"{geometry.max_positions} tokens; lower it"
            )
    if recipe.evaluation.speed is not None:
        recipe.evaluation.speed.require_context(geometry.max_positions)
    size = DTYPE_BYTES[recipe.model.dtype]
    dense = geometry.decoder_parameters + geometry.other_parameters
    level_plans = []
    for sparsity, step in zip(recipe.pruning.levels, level_steps(recipe), strict=True):
        parameters = geometry.max_parameters(sparsity) + geometry.other_parameters
        level_plans.append(LevelPlan(level_name(sparsity), sparsity, parameters, parameters * size, step))
    fractions = _fractions(recipe)
    steps = tuple(_step(recipe, number, fraction, level_plans) for number, fraction in enumerate(fractions, 1))
    tokens = recipe.calibration.sequences * recipe.calibration.sequence_length
    # A parameter and token: 2 forward, 2 for the gradient of activations, 2 for that of weights.
    operations = 6.0 if recipe.importance.score == "taylor" else 4.0
    parameters_passed = dense * len(steps) - geometry.decoder_parameters * sum([0.0, *fractions[:-1]])
    return Plan(
        geometry=geometry,
        dense_parameters=dense,
        dense_bytes=dense * size,
        steps=steps,
        levels=tuple(level_plans),
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        scoring_bytes=_scoring_bytes(recipe, geometry, size),
        compensation_bytes=_compensation_bytes(recipe, geometry, size),
        scoring_flops=operations * tokens * parameters_passed,
    )


def _fractions(recipe: Recipe) -> list[float]:
    """What each step takes the model to: of its parameters, or under ``compat: reference`` of its structures."""
    pruning = recipe.pruning
    if pruning.structure_ratio is not None:
        return structure_ratios(pruning.steps, pruning.structure_ratio)
    return step_targets(pruning.steps, pruning.levels[-1])


def _step(recipe: Recipe, number: int, fraction: float, levels: Sequence[LevelPlan]) -> StepPlan:
    completes = tuple(level.name for level in levels if level.after_step == number)
    if recipe.pruning.structure_ratio is not None:
        return StepPlan(number, None, fraction, completes)
    return StepPlan(number, fraction, None, completes)


def _check_reach(recipe: Recipe, geometry: Geometry, limits: Limits) -> None:
    kept = f"{int(limits.protected.sum())} of {geometry.num_layers} layers"
    if recipe.pruning.structure_ratio is not None:
        check_ratio(geometry, limits, recipe.pruning.structure_ratio)
        limits = without_minima(limits)
        found, advice = f"importance.compat: reference skips {kept}", "lower the level"
    else:
        found = (
            f"pruning.protect keeps {kept}, {limits.min_kv_groups} kv groups and {limits.min_channels} channels a layer"
        )
        advice = "lower the level or protect less"
    smallest, last = smallest_model(geometry, limits), recipe.pruning.levels[-1]
    if smallest > geometry.max_parameters(last):
        reach = np.floor((1 - smallest / geometry.decoder_parameters) * 1000) / 1000
        raise InputError(
            f"pruning.levels[{len(recipe.pruning.levels) - 1}]={last:g} was asked, but {found}, which leaves at most "
            f"{reach:g}; {advice}"
        )


def _scoring_bytes(recipe: Recipe, geometry: Geometry, size: int) -> int:
    tokens = max(MICRO_BATCH_TOKENS, recipe.calibration.sequence_length)
    weights = (geometry.decoder_parameters + geometry.other_parameters) * size
    gradients = geometry.decoder_parameters * 4 if recipe.importance.score == "taylor" else 0
    logits = min(LOGIT_BYTES, 4 * tokens * geometry.vocab_size)
    widths = 6 * geometry.hidden_size + 4 * geometry.intermediate_size
    activations = size * tokens * geometry.num_layers * widths
    return weights + gradients + logits + activations


def _compensation_bytes(recipe: Recipe, geometry: Geometry, size: int) -> int | None:
    if recipe.pruning.compensation == "none":
        return None
    data = recipe.compensation_section
    weights = (geometry.decoder_parameters + geometry.other_parameters) * size
    hidden = 2 * data.sequences * data.sequence_length * geometry.hidden_size * size
    inputs = (geometry.num_query_heads * geometry.head_dim, geometry.intermediate_size)
    grams = sum(2 * 8 * width**2 for width in inputs)
    solution = 4 * 8 * max(inputs) ** 2
    return weights + hidden + grams + solution


class Keys:
    """Names of a run's artefacts below its prefix."""

    RECIPE = "recipe.yaml"
    PLAN = "plan.json"
    MODEL = "model.json"
    TOKENS = "calibration/tokens.safetensors"
    CALIBRATION = "calibration/tokens.json"
    COMPENSATION_TOKENS = "calibration/compensation.safetensors"
    COMPENSATION = "calibration/compensation.json"
    ORDER = "removal_order.safetensors"
    MANIFEST = "manifest.json"
    REPORT = "report.html"
    SUMMARY = "summary.json"
    HISTORY = "history"

    @staticmethod
    def step(number: int, name: str) -> str:
        """`steps/0007/scores.safetensors` and its like."""
        return f"steps/{number:04d}/{name}"

    @staticmethod
    def level(level: str, name: str) -> str:
        """`levels/sp20/evaluation.json` and its like."""
        return f"levels/{level}/{name}"
