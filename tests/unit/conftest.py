"""A finished run as the page gets it, at any size, without a model: its manifest is of the form that a run writes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.recipe import Recipe, level_name
from gisp_tasks.report import StepObservation, Trajectory, summarise_scores
from gisp_tasks.stores.manifest import deviations, seal

PERPLEXITY = "wikitext2_ppl_token_w128"
DIGEST = "ab" * 32
LEVELS = (0.2, 0.4)
TRIGGER = {
    "by": "airflow",
    "dag_id": "gisp_r",
    "dag_run_id": "manual__1",
    "run_type": "manual",
    "user": "jane",
}


@dataclass
class FinishedRun:
    """The arguments of `gisp_tasks.report.render`, less the addresses."""

    summary: dict[str, Any]
    manifest: dict[str, Any]
    trajectory: Trajectory


@pytest.fixture(scope="session")
def finished_run() -> Callable[..., FinishedRun]:
    """Makes one; sizes are those of the dense model, ``metrics`` are by level, the dense model first."""
    return _finished_run


def _finished_run(
    *,
    layers: int = 6,
    groups: int = 3,
    channels: int = 200,
    steps: int = 3,
    metrics: tuple[dict[str, float], ...] = ({PERPLEXITY: 20.0}, {PERPLEXITY: 31.0}, {PERPLEXITY: 90.0}),
    registered: bool = True,
) -> FinishedRun:
    recipe = Recipe.parse(
        {
            "name": "r",
            "model": {"source": "org/model"},
            "calibration": {"dataset": "c4", "sequences": 4, "sequence_length": 16},
            "pruning": {"levels": list(LEVELS), "steps": steps},
            "evaluation": {"wikitext2": {"windows": [128]}},
            "publish": {
                "store": "s3://models/gisp",
                "mlflow": {"tracking_uri": "http://mlflow.example", "model_name": "m"},
            },
        }
    )
    geometry = Geometry(
        family="llama", num_layers=layers, hidden_size=64, num_query_heads=2 * groups, num_kv_groups=groups, head_dim=8,
        intermediate_size=channels, vocab_size=99, max_positions=256, qkv_bias=False, output_bias=False, mlp_bias=False,
        norm_parameters=128, other_parameters=6400,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    draws = rng.random((layers, groups)), rng.random((layers, channels))
    keep = {level_name(level): KeepSets(draws[0] > level, draws[1] > level) for level in LEVELS}
    trajectory = Trajectory(
        geometry=geometry,
        keep=keep,
        steps=tuple(_observation(number, draws, rng) for number in range(1, steps + 1)),
    )
    names = ["dense", *keep]
    levels = [
        {
            "name": name,
            "param_sparsity": sparsity,
            "parameters": int(1_000_000 * (1 - sparsity)),
            "bytes": int(2_000_000 * (1 - sparsity)),
            "metrics": measured,
            "uri": "org/model" if name == "dense" else f"s3://b/runs/0123456789ab/levels/{name}",
            "model_name": "m" if registered and name != "dense" else None,
            "model_version": number if registered and name != "dense" else None,
            "alias": name if registered and name == "sp20" else None,
            "gate": {"dense": None, "sp20": "passed", "sp40": "failed"}[name],
        }
        for number, (name, sparsity, measured) in enumerate(zip(names, (0.0, *LEVELS), metrics, strict=True))
    ]
    manifest = json.loads(seal(_content(recipe, levels, keep, steps), TRIGGER))
    summary = {
        "run_id": "0123456789ab",
        "store": "s3://b/runs/0123456789ab",
        "manifest_sha256": manifest["sha256"],
        "levels": levels,
        "step_seconds": [step.seconds for step in trajectory.steps],
    }
    return FinishedRun(summary, manifest, trajectory)


def _observation(number: int, draws: Any, rng: np.random.Generator) -> StepObservation:
    summaries = []
    for draw in draws:
        scores = rng.lognormal(-12, 2, draw.shape).astype(np.float32)
        scores[draw < 0.1 * (number - 1)] = np.nan
        summaries.append(summarise_scores(scores, (draw >= 0.1 * (number - 1)) & (draw < 0.1 * number)))
    return StepObservation(
        number=number, attention=summaries[0], mlp=summaries[1], seconds=60.5 + number, peak_bytes=number * 10**9
    )


# fmt: off
# One key a line would hide how small these records are.
def _source(dataset: str, split: str) -> dict[str, Any]:
    return {"dataset": dataset, "split": split, "origin": "mirror", "revision": None, "digest": DIGEST, "rows": 7}


def _content(recipe: Recipe, levels: list[dict[str, Any]], keep: dict[str, KeepSets], steps: int) -> dict[str, Any]:
    """A manifest less its digests."""
    environment = {
        "package": "0", "package_sha256": DIGEST, "python": "3.11.2", "platform": "p", "machine": "x86_64",
        "packages": {"torch": "2", "transformers": "5"}, "cpu": "c", "accelerator": None, "cuda": None,
    }
    computed_on = {
        "steps": list(range(1, steps + 1)), "cpu": "c", "device": "cpu", "package_sha256": DIGEST, "torch": "2",
        "cuda": None, "cudnn": None, "threads": 1, "deterministic_algorithms": True, "tf32": False, "seed": 0,
        "matmul_precision": "highest", "cublas_workspace": None,
    }
    calibration = {
        "dataset": "c4", "source": _source("c4", "train"), "tokenizer": None, "sampling": "whole", "seed": 0,
        "sequences": 4, "sequence_length": 16, "num_tokens": 64, "num_targets": 60, "tokens_sha256": DIGEST,
        "contamination": {"criterion": "c", "n": 13, "tolerated_share": 0.01, "evaluations": {}, "accepted": False},
    }
    return {
        "run_id": "0123456789ab",
        "recipe": recipe.identity(),
        "plan": {"key": "plan.json", "sha256": DIGEST},
        "model": {
            "source": "org/model", "revision": "c0ffee", "revision_kind": "commit", "trust_remote_code": False,
            "licence": "mit", "config": {}, "files": {},
        },
        "tokenizer": {"files": {}},
        "datasets": {
            "calibration": _source("c4", "train"),
            "compensation": None,
            "evaluation": {"wikitext2": _source("wikitext2", "test")},
        },
        "calibration": calibration,
        "compensation": None,
        "steps": [
            {
                "number": number, "target_sparsity": 0.4 * number / steps, "structure_ratio": None, "removed": 9,
                "completes": ["sp40"] if number == steps else [], "objective": 3.5, "micro_batch_tokens": 64,
                "scores_sha256": DIGEST, "removal_order_sha256": DIGEST,
            }
            for number in range(1, steps + 1)
        ],
        "computed_on": [computed_on],
        "removal_order": {"key": "removal_order.safetensors", "sha256": DIGEST},
        "levels": [_dense(levels[0]), *(_level(level, keep[level["name"]], levels[0]) for level in levels[1:])],
        "artifacts": {},
        "environment": environment,
        "deviations": deviations(recipe),
    }


def _evaluation(level: dict[str, Any]) -> dict[str, Any]:
    def protocol(metric: str) -> dict[str, Any]:
        counted = {"num_targets": 254} if "_ppl_" in metric else {"num_samples": 438, "shots": 0}
        return {"source": _source("d", "validation"), **counted}

    return {"metrics": level["metrics"], "protocol": {metric: protocol(metric) for metric in level["metrics"]}}


def _dense(level: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: level[key] for key in ("name", "param_sparsity", "parameters", "bytes")},
        "evaluation": _evaluation(level),
    }


def _level(level: dict[str, Any], keep: KeepSets, dense: dict[str, Any]) -> dict[str, Any]:
    ratio, passed = level["metrics"][PERPLEXITY] / dense["metrics"][PERPLEXITY], level["gate"] == "passed"
    check = {"name": "perplexity_ratio", "metric": PERPLEXITY, "value": ratio, "limit": 4.0, "passed": passed}
    groups = [int(number) for number in keep.attention.sum(axis=1)]
    return {
        **_dense(level),
        "target_sparsity": level["param_sparsity"], "weight_bytes": level["bytes"], "keep_set_sha256": DIGEST,
        "query_heads": [2 * number for number in groups],
        "kv_groups": groups,
        "channels": [int(number) for number in keep.mlp.sum(axis=1)],
        "compensation": None,
        "model": {"key": f"levels/{level['name']}/model", "sha256": DIGEST, "size": 1},
        "gguf": None,
        "package": {},
        "evaluation": {**_evaluation(level), "sha256": DIGEST},
        "reload": {
            "max_logit_difference": 1.5e-05, "greedy_equal": True, "greedy_tokens": 16, "num_tokens": 64,
            "tolerance": 2e-04, "versions": {"torch": "2"},
        },
        "gate": {"passed": passed, "checks": [check]},
    }
# fmt: on
