"""The falsification test: methods against each other, on one model, its data, its levels and its evaluations.

Every method removes the same share of parameters from the same layers, by the same global ranking; only the scores
differ, or the number of steps. All are drawn and measured once a calibration seed.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gisp_tasks import __version__
from gisp_tasks.comparison import agreement, summarise
from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.errors import InputError
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.plan import Plan, make_plan
from gisp_tasks.pruning.ranking import limits_of, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.recipe import CalibrationSection, Recipe, level_name
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.compensate import Solutions, solve_projections
from gisp_tasks.tasks.measure import measure_model
from gisp_tasks.tasks.resolve_model import build_calibration
from gisp_tasks.tasks.runtime import Json, make_torch_deterministic, scratch

logger = logging.getLogger(__name__)

_GRADIENT_METHODS = {
    "gisp": ("taylor", None),
    "one-shot": ("taylor", 1),
    "gate-fisher": ("gate_fisher", None),
    "gate-fisher-one-shot": ("gate_fisher", 1),
}
"""Method -> score, and number of steps (None: the recipe's)."""
METHODS = (*_GRADIENT_METHODS, "wanda-sp", "flap", "magnitude", "random")


def compare(recipe: Recipe, *, methods: Sequence[str], seeds: Sequence[int], compensation: bool, out: Path) -> Json:
    """Compare methods; what was measured is kept below ``out``, so that an interrupted comparison goes on.

    Args:
        recipe: model, calibration, levels, steps, limits and evaluations; nothing is published.
        methods: of `METHODS`.
        seeds: of the calibration draw (and of `random`).
        compensation: measure every subnetwork once more with least squares on ``pruning.compensation_data``.
        out: directory for ``comparison.json`` and what leads to it.

    Raises:
        InputError: an unknown or repeated method or seed, no evaluation, or as in `resolve_model`.
    """
    _check(recipe, methods, seeds)
    make_torch_deterministic()
    bench = _Bench(recipe, out)
    cells: list[Json] = [bench.dense()]
    orders: dict[tuple[str, int], RemovalOrder] = {}
    for seed in seeds:
        runs = bench.seed(seed)
        for method in methods:
            orders[method, seed] = runs.order(method)
            cells += [runs.cell(method, level) for level in recipe.pruning.levels]
        if compensation:
            cells += runs.compensated_cells(methods)
    result = {
        "recipe": recipe.identity(),
        "model": {key: bench.model[key] for key in ("source", "revision")},
        "methods": list(methods),
        "seeds": list(seeds),
        "calibration": [bench.described[seed] for seed in seeds],
        "cells": cells,
        "summary": summarise(cells),
        "agreement": agreement(orders, bench.first_scores, bench.geometry, recipe.pruning),
    }
    (out / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _check(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int]) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise InputError(
            f"--methods {','.join(methods)}: {f'unknown: {unknown[0]}' if unknown else 'none, or one twice'}. Allowed "
            f"are {', '.join(METHODS)}, each once; correct the list"
        )
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(
            f"--seeds {','.join(map(str, seeds))}: none, one twice, or one below 0. Allowed are different "
            f"whole numbers from 0; correct the list"
        )
    if not set(recipe.evaluation.tasks) - {"speed"}:
        raise InputError("the recipe has no evaluation, so methods cannot be compared; add evaluation.wikitext2")


class _Bench:
    """The dense model, its data and the directory of results."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.model = model_source.resolve(recipe.model)
        self.geometry = geometry_of(self.model["config"], granularity=recipe.importance.granularity)
        self.plan = make_plan(recipe, self.geometry)
        pruning = recipe.pruning
        self.limits = limits_of(pruning.protect, pruning.width_multiple, self.geometry.num_layers)
        self.described: dict[int, Json] = {}
        self.first_scores: dict[tuple[str, int], StructureScores] = {}
        self._out = out

    @cached_property
    def base(self) -> Any:
        """The dense model on the device; never changed."""
        from gisp_tasks.export.reload import load_model

        section = self.recipe.model
        directory = model_source.locate(self.model)
        return load_model(directory, dtype=section.dtype, trust_remote_code=section.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        from gisp_tasks.export.reload import load_tokenizer

        return load_tokenizer(model_source.locate(self.model), trust_remote_code=self.recipe.model.trust_remote_code)

    def draw(self, section: CalibrationSection, seed: int) -> calibration_data.Calibration:
        """The sequences of a section, drawn by another seed."""
        section = section.model_copy(update={"seed": seed})
        return build_calibration(self.recipe, section, model_source.locate(self.model), self.model)

    def seed(self, seed: int) -> "_Seed":
        calibration = self.draw(self.recipe.calibration, seed)
        self.described[seed] = calibration.description
        return _Seed(self, seed, calibration.set)

    def dense(self) -> Json:
        """What the dense model measures."""
        cell = {"method": "dense", "seed": None, "level": None, "compensation": False, "param_sparsity": 0.0}
        return self.kept(self.path("dense.json"), lambda: {**cell, **self.measure(self.base)})

    def path(self, name: str, *, compensation: bool = False) -> Path:
        """A file of the directory of results; those of least squares have one of their own."""
        return (self._compensated if compensation else self._plain) / name

    @cached_property
    def _plain(self) -> Path:
        return self._directory("cells", leave_out=("compensation", "compensation_data"))

    @cached_property
    def _compensated(self) -> Path:
        return self._directory("compensated")

    def _directory(self, kind: str, leave_out: Sequence[str] = ()) -> Path:
        """A directory named by all that decides its results; keys of ``pruning`` that decide nothing are left out."""
        identity: Json = {
            "recipe": self.recipe.identity(),
            "model": self.model["files"],
            "package_version": __version__,
        }
        for key in leave_out:
            del identity["recipe"]["pruning"][key]
        directory = self._out / f"{kind}-{sha256_bytes(canonical_json(identity))[:12]}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def kept(self, path: Path, make: Callable[[], Json]) -> Json:
        """A result from the directory, made and kept there when it is new."""
        if not path.is_file():
            value = make()
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(value, indent=1))
            partial.replace(path)
        found: Json = json.loads(path.read_text())
        for metric, number in found["metrics"].items():
            logger.info("%s %s: %.6g", path.stem, metric, number)
        return found

    def measure(self, model: Any) -> Json:
        evaluation = self.recipe.evaluation
        # Subnetworks are compared by what they know: sizes are the same, and speed is the run's to measure.
        names = [name for name in evaluation.tasks if name != "speed"]
        results = [measure_model(model, self.tokenizer, name, getattr(evaluation, name)) for name in names]
        return {part: {k: v for result in results for k, v in result[part].items()} for part in ("metrics", "protocol")}


class _Seed:
    """All methods on one draw of the calibration set."""

    def __init__(self, bench: _Bench, seed: int, calibration: CalibrationSet) -> None:
        self._bench, self._seed, self._calibration = bench, seed, calibration
        self._orders: dict[str, RemovalOrder] = {}

    def order(self, method: str) -> RemovalOrder:
        """The removal order of a method up to the last level."""
        bench, path = self._bench, self._bench.path(f"{method}-seed{self._seed}.safetensors")
        scores_path = path.with_suffix(".scores.safetensors")
        if not path.is_file():
            logger.info("seed %d: %s", self._seed, method)
            order, scores = self._iterate(method) if method in _GRADIENT_METHODS else self._baseline(method)
            scores.save(scores_path, {"method": method})
            order.save(path, bench.geometry, {"method": method, "seed": str(self._seed)})
        bench.first_scores[method, self._seed] = StructureScores.load(scores_path)[0]
        self._orders[method] = RemovalOrder.load(path)[0]
        return self._orders[method]

    def cell(self, method: str, level: float) -> Json:
        """A level of a method, measured; FLAP's with its biases."""
        keep = self._keep(method, level)

        def make() -> Json:
            from gisp_tasks.pruning.baselines import output_biases

            bench = self._bench
            biases = output_biases(bench.base, bench.geometry, keep, self._moments) if method == "flap" else {}
            model = self._cut(keep, {})
            for name, bias in biases.items():
                _set_bias(model, name, bias)
            return self._cell(method, level, keep, model, compensation=False)

        return self._bench.kept(self._bench.path(f"{method}-seed{self._seed}-{level_name(level)}.json"), make)

    def compensated_cells(self, methods: Sequence[str]) -> list[Json]:
        """Every level of every method with least squares; the Gram matrices are gathered once for all."""
        bench, recipe = self._bench, self._bench.recipe
        wanted = [(method, level) for method in methods for level in recipe.pruning.levels]
        names = [f"{method}-seed{self._seed}-{level_name(level)}.json" for method, level in wanted]
        paths = [bench.path(name, compensation=True) for name in names]
        missing = [i for i, path in enumerate(paths) if not path.is_file()]
        with scratch() as directory:
            solutions: dict[int, Solutions] = {}
            if missing:
                data = bench.draw(recipe.compensation_section, self._seed).set
                keeps = [self._keep(*wanted[i]) for i in missing]
                solved = solve_projections(bench.base, bench.geometry, keeps, data, directory)
                solutions = dict(zip(missing, solved, strict=True))

            def make(i: int) -> Json:
                method, level = wanted[i]
                keep = self._keep(method, level)
                return self._cell(method, level, keep, self._cut(keep, solutions[i].weights), compensation=True)

            return [bench.kept(path, lambda i=i: make(i)) for i, path in enumerate(paths)]  # type: ignore[misc]

    def _iterate(self, method: str) -> tuple[RemovalOrder, StructureScores]:
        from gisp_tasks.pruning import importance
        from gisp_tasks.pruning.surgery import slice_model

        bench, recipe = self._bench, self._bench.recipe
        score, steps = _GRADIENT_METHODS[method]
        model, held = copy.deepcopy(bench.base), KeepSets.everything(bench.geometry)
        settings = importance.ScoringSettings(
            bench.limits.protected, recipe.importance.normaliser, bench.plan.micro_batch_tokens, score=score
        )
        order, first = RemovalOrder.empty(), None
        for step in bench.plan.steps if steps is None else _with_steps(recipe, steps, bench.geometry).steps:
            keep = order.keep_sets(bench.geometry)
            slice_model(model, bench.geometry, now=held, wanted=keep)
            held = keep
            scores = importance.score(model, keep, bench.geometry, self._calibration, settings).scores
            first = first or scores
            order = order.extend(step.removals(scores, order.removals, bench.geometry, bench.limits), step.number)
        assert first is not None, "a schedule has at least one step"
        return order, first

    def _baseline(self, method: str) -> tuple[RemovalOrder, StructureScores]:
        from gisp_tasks.pruning import baselines

        bench = self._bench
        geometry, protected = bench.geometry, bench.limits.protected
        if method == "random":
            scores = baselines.random(geometry, protected, seed=self._seed)
        elif method == "magnitude":
            scores = baselines.magnitude(bench.base, geometry, protected)
        else:
            of_inputs = baselines.wanda_sp if method == "wanda-sp" else baselines.flap
            scores = of_inputs(bench.base, geometry, protected, self._moments)
        order = RemovalOrder.empty()
        last = bench.recipe.pruning.levels[-1]
        return order.extend(next_removals(scores, order.removals, geometry, bench.limits, last), 1), scores

    @cached_property
    def _moments(self) -> Any:
        from gisp_tasks.pruning.baselines import input_moments

        bench = self._bench
        return input_moments(bench.base, bench.geometry, self._calibration, batch_tokens=bench.plan.micro_batch_tokens)

    def _keep(self, method: str, level: float) -> KeepSets:
        bench = self._bench
        return self._orders[method].level(level, geometry=bench.geometry, width_multiple=bench.limits.width_multiple)

    def _cut(self, keep: KeepSets, replaced: Mapping[str, Path]) -> Any:
        """A subnetwork in memory, after some weights were replaced."""
        from gisp_tasks.export.reload import replace_weights
        from gisp_tasks.pruning.surgery import slice_model

        bench = self._bench
        model = copy.deepcopy(bench.base)
        replace_weights(model, replaced)
        slice_model(model, bench.geometry, now=KeepSets.everything(bench.geometry), wanted=keep)
        return model

    def _cell(self, method: str, level: float, keep: KeepSets, model: Any, *, compensation: bool) -> Json:
        measured = self._bench.measure(model)
        return {
            "method": method,
            "seed": self._seed,
            "level": level,
            "compensation": compensation,
            "param_sparsity": self._bench.geometry.sparsity_of(keep),
            "kv_groups": int(np.count_nonzero(keep.attention)),
            "channels": int(np.count_nonzero(keep.mlp)),
            **measured,
        }


def _with_steps(recipe: Recipe, steps: int, geometry: Geometry) -> Plan:
    """The plan of the same recipe with another number of steps."""
    pruning = recipe.pruning.model_copy(update={"steps": steps})
    return make_plan(recipe.model_copy(update={"pruning": pruning}), geometry)


def _set_bias(model: Any, name: str, bias: Any) -> None:
    """Add to a projection's bias, or give it one."""
    import torch

    path, _, leaf = name.rpartition(".")
    linear = model.get_submodule(path)
    present = getattr(linear, leaf)
    value = bias.to(linear.weight.dtype).to(linear.weight.device)
    linear.bias = torch.nn.Parameter(value if present is None else present.detach() + value, requires_grad=False)
