"""How much is gone after each step, known before anything runs: linear in parameter sparsity.

Under ``compat: reference`` the schedule is that of `pruning.reference`, and levels are cut after the last step.
"""

from collections.abc import Sequence

from gisp_tasks.recipe import Recipe

_EPSILON = 1e-9


def step_targets(steps: int, last_level: float) -> list[float]:
    """Parameter sparsity to reach by the end of each of K steps.

    Step k of K takes the model to k/K of the last level (METHOD B2; the reference's schedule counts structures
    and wastes its first step at 0).
    """
    return [last_level * (k / steps) for k in range(1, steps + 1)]


def completing_steps(levels: Sequence[float], steps: int) -> list[int]:
    """The step (from 1) after which each level can be cut."""
    targets = step_targets(steps, levels[-1])
    return [next(k for k, target in enumerate(targets, 1) if target >= level - _EPSILON) for level in levels]


def level_steps(recipe: Recipe) -> list[int]:
    """The step (from 1) after which each level of a recipe can be cut."""
    pruning = recipe.pruning
    if pruning.structure_ratio is not None:
        return [pruning.steps] * len(pruning.levels)
    return completing_steps(pruning.levels, pruning.steps)


def fused_steps(steps: int, steps_per_task: int) -> list[range]:
    """The steps of each task: consecutive ranges of at most ``steps_per_task``."""
    return [range(first, min(first + steps_per_task, steps + 1)) for first in range(1, steps + 1, steps_per_task)]
