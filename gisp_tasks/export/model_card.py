"""The README.md of a level's checkpoint: what it is, how it was made, what was measured, how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from gisp_tasks.recipe import Recipe

Json = Mapping[str, Any]


def model_card(recipe: Recipe, level: Json, *, model: Json, calibration: Json, dense: Json, run: Json) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        recipe: of the run.
        level: its record, as in ``level.json``, with the ``protocol`` of its metrics.
        model: the record of the base model.
        calibration: description of the calibration set.
        dense: metrics of the dense model.
        run: ``run_id`` and ``dense_parameters``.
    """
    environment = Environment(
        loader=PackageLoader("gisp_tasks", "templates"),
        autoescape=False,  # noqa: S701 - Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if model["revision_kind"] == "hub commit":
        facts["base_model"] = model["source"]
    if model["licence"]:
        facts["license"] = model["licence"]
    facts["tags"] = ["pruning", "gisp"]
    base = Path(model["source"]).name if "base_model" not in facts else model["source"]
    return environment.get_template("model_card.md.jinja").render(
        front_matter=yaml.safe_dump(facts, sort_keys=False),
        title=f"{recipe.name} {level['name']}",
        base=base,
        revision=model["revision"],
        licence=model["licence"],
        importance=recipe.importance,
        steps=recipe.pruning.steps,
        compensation=recipe.pruning.compensation,
        objective=recipe.objective,
        calibration=calibration,
        level=level,
        dense_parameters=run["dense_parameters"],
        run_id=run["run_id"],
        metrics=[_row(name, value, level, dense) for name, value in level["evaluation"]["metrics"].items()],
        layers=list(zip(level["query_heads"], level["kv_groups"], level["channels"], strict=True)),
        auto_map=recipe.export.auto_map,
        gguf=None if level["gguf"] is None else Path(level["gguf"]["key"]).name,
    )


def _row(name: str, value: float, level: Json, dense: Json) -> dict[str, Any]:
    return {"name": name, "value": value, "dense": dense.get(name), "protocol": _words(level["protocol"][name])}


def _words(protocol: Json) -> str:
    """A protocol in a few words: data, how much of it, and what the number depends on."""
    words = []
    if source := protocol.get("source"):
        words.append(f"{source['dataset']} / {source['split']} ({source['origin']})")
    for key, unit in (("num_targets", "tokens"), ("num_samples", "samples"), ("shots", "shots"), ("window", "window")):
        if protocol.get(key) is not None:
            words.append(f"{protocol[key]:,} {unit}" if unit != "window" else f"windows of {protocol[key]:,}")
    if runtime := protocol.get("runtime"):
        words += [runtime, f"{protocol['prompt_tokens']} + {protocol['new_tokens']} tokens"]
    return ", ".join([*words, str(protocol["dtype"])])
