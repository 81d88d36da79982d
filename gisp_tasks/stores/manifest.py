"""The audit record of a run: every input, version, digest and metric, in one document with digests of its own.

Its form is `stores.manifest_schema`. Up to ``sha256`` it holds nothing that differs between two runs of the same bytes
on the same kind of machine: no time, no host name, no address. Who triggered the run follows, under a second digest of
the whole. Timings lie beside the steps, addresses and registry versions in `summary.json`.
"""

import re
from collections.abc import Mapping
from typing import Any

from gisp_tasks.errors import IntegrityError
from gisp_tasks.recipe import Recipe
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores.manifest_schema import FORMAT_VERSION, Manifest

_NOT_NAMED = re.compile(r"manifest\.(json|sig)|report\.html|steps/\d+/timing\.json|levels/[^/]+/model\.sig")


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


def is_named(key: str) -> bool:
    """Whether a manifest names an object of its run by digest under ``artifacts``.

    Not itself, the page that shows it, timings and signatures, which differ between equal runs. The files of a
    checkpoint are named by its listing instead.
    """
    return _NOT_NAMED.fullmatch(key) is None


def seal(content: Mapping[str, Any], trigger: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: ``content`` with its digest, ``trigger``, and the digest of both.

    Raises:
        pydantic.ValidationError: it is not of the form that `manifest_schema` says.
    """
    document: dict[str, Any] = {"format_version": FORMAT_VERSION, **content}
    document["sha256"] = sha256_bytes(canonical_json(document))
    document["trigger"] = dict(trigger)
    document["document_sha256"] = sha256_bytes(canonical_json(document))
    Manifest.model_validate(document)
    return canonical_json(document)


def check_seal(manifest: Mapping[str, Any]) -> None:
    """Check a manifest's two digests of itself.

    Raises:
        IntegrityError: it was changed.
    """
    for name, left_out in (("document_sha256", set()), ("sha256", {"sha256", "trigger"})):
        body = {key: value for key, value in manifest.items() if key not in {"document_sha256", *left_out}}
        found = sha256_bytes(canonical_json(body))
        if found != manifest.get(name):
            raise IntegrityError(
                f"the manifest says {name} {manifest.get(name)}, its content has {found}: it was changed"
            )
