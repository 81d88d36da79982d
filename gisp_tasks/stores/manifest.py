"""The audit record of a run: every input, version, digest and metric, in one document with a digest of its own.

It holds nothing that differs between two runs of the same bytes on the same kind of machine: no time, no host
name, no address. Timings lie beside the steps, addresses and registry versions in `summary.json`.
"""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from gisp_tasks import __version__
from gisp_tasks.errors import IntegrityError
from gisp_tasks.recipe import Recipe
from gisp_tasks.refs import canonical_json, sha256_bytes

FORMAT_VERSION = 1
_PACKAGES = (
    *("apache-airflow", "torch", "transformers", "tokenizers", "datasets", "lm-eval", "safetensors"),
    *("numpy", "boto3", "mlflow", "pydantic", "huggingface-hub"),
)


def deviations(recipe: Recipe) -> list[str]:
    """Where what a recipe asks for differs from the published reference code, one sentence each."""
    importance = recipe.importance
    found = [
        "Scores accumulate in float32 whatever the weights' type (the reference code: the weights' type).",
        "Gradients are taken for scored weights only (the reference code: for all parameters).",
        "The model is sliced between steps (the reference code: masked at its dense size).",
        "MLP widths of a level are rounded up, filled with the channels removed last (the reference code: no export).",
    ]
    if importance.granularity == "kv_group":
        found.append(
            "The attention structure is the kv group with its k and v rows (the reference code: the query head, with "
            "q and o only where heads share k and v)."
        )
    else:
        found.append(
            "Query heads that share a key/value head are written as copies of it, each with as many query heads, some "
            "dead: below 20-30 % of the heads this saves almost nothing (the reference code: masks only)."
        )
    if importance.score == "gate_fisher":
        found.append("The score is the empirical Fisher information of a gate (the reference code: first-order).")
    if importance.normaliser == "elements":
        found.append(
            "A score is divided by the structure's scored weights (the reference code: 4 x head_dim x hidden for a "
            "head, 3 x intermediate for a channel)."
        )
    if recipe.pruning.compensation == "least_squares":
        found.append(
            "o and down of every level are solved anew by least squares on the dense model's inputs, so levels share "
            "no weights there (the reference code: kept weights stay as they are)."
        )
    if importance.compat == "default":
        found += [
            "The schedule is linear in parameter sparsity (the reference code: linear in structures, first value 0).",
            "The count of removals is exact, ties go by kind, layer, index (the reference code: all ties go).",
            "Every layer keeps a minimum of kv groups and channels (the reference code: none).",
        ]
    if recipe.objective == "margin":
        found += [
            "Margin: each candidate counts by its own token mean (the reference code: mean over a batch).",
            "Margin: prompts are lm-eval's, WinoGrande's labels are read (the reference code: its own, option 2).",
        ]
    return found


def environment() -> dict[str, Any]:
    """Versions, hardware and the settings of torch that numbers depend on."""
    import torch

    return {
        "package": __version__,
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "torch": {
            "threads": torch.get_num_threads(),
            "deterministic_algorithms": True,
            "tf32": False,
            "seed": 0,
        },
    }


def seal(content: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: ``content`` with the format's version and the sha256 of everything else."""
    body = {"format_version": FORMAT_VERSION, **content}
    return canonical_json({**body, "sha256": sha256_bytes(canonical_json(body))})


def check_seal(manifest: Mapping[str, Any]) -> None:
    """Check a manifest's digest of itself.

    Raises:
        IntegrityError: it was changed.
    """
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    found = sha256_bytes(canonical_json(body))
    if found != manifest.get("sha256"):
        raise IntegrityError(
            f"the manifest says sha256 {manifest.get('sha256')}, its content has {found}: it was changed"
        )
