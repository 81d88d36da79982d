"""Data of a run in, page out: what is shown where. How it looks is in ``templates/report``."""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from gisp_tasks.pruning.plan import DENSE
from gisp_tasks.report import charts, heatmaps
from gisp_tasks.report.metrics import byte_size, duration, gate_value, is_accuracy, is_perplexity, metric_names
from gisp_tasks.report.places import Places, commands
from gisp_tasks.report.trajectory import PROBABILITIES, ScoreSummary, Trajectory

Facts = Mapping[str, Any]


def render(summary: Facts, *, manifest: Facts, trajectory: Trajectory, places: Places) -> str:
    """The page of a finished run: one file that asks no server for anything. The same arguments give the same bytes.

    Args:
        summary: as `gisp run --json` prints it; the dense model is the first level.
        manifest: of the run.
        trajectory: scores, removals and timings.
        places: where else the run can be seen.
    """
    environment = _environment()
    script = environment.get_template("page.js").render()
    headline, by_task = metric_names(summary["levels"])
    return environment.get_template("page.html.jinja").render(
        summary=summary,
        manifest=manifest,
        trajectory=trajectory,
        places=places,
        metrics=headline,
        task_metrics=by_task,
        judged=[level for level in manifest["levels"] if level["name"] != DENSE],
        tiles=list(_tiles(summary, manifest, trajectory)),
        quality=list(_quality(summary["levels"], manifest, headline)),
        maps=list(_maps(trajectory)),
        structure=_structure(trajectory),
        scores=list(_scores(trajectory)),
        probabilities=PROBABILITIES,
        costs=list(_costs(trajectory)),
        commands=commands(summary, manifest["model"]["source"]),
        recipe=yaml.safe_dump(dict(manifest["recipe"]), sort_keys=True),
        script=Markup(script),  # noqa: S704 - a file of this package
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gisp_tasks", "templates/report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., str]] = {
        "gate_value": gate_value,
        "byte_size": byte_size,
        "duration": duration,
        "breakable": _breakable,
        "percent": lambda share, digits=1: f"{100 * share:.{digits}f} %",
        "digits": lambda value, digits=4: f"{value:.{digits}g}",
        "whole": lambda number: f"{number:,}",
    }
    environment.filters.update(filters)
    environment.tests["perplexity"] = is_perplexity
    return environment


def _breakable(name: str) -> Markup:
    """A long name that may be broken after an underscore."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _tiles(summary: Facts, manifest: Facts, trajectory: Trajectory) -> Iterator[tuple[str, str, str]]:
    """What a reader wants to know first: title, value, more of it."""
    dense, *levels = summary["levels"]
    passed = [level for level in levels if level["gate"] == "passed"]
    yield "Gate", f"{len(passed)} of {len(levels)}", "levels passed"
    if passed:
        smallest = min(passed, key=lambda level: int(level["parameters"]))
        share = smallest["parameters"] / dense["parameters"]
        yield (
            "Smallest that passed",
            smallest["name"],
            f"{smallest['parameters'] / 1e6:,.1f} M parameters, {share:.0%} of the dense model",
        )
    seconds = [step.seconds for step in trajectory.steps]
    peaks = [step.peak_bytes for step in trajectory.steps if step.peak_bytes is not None]
    taken = f"{duration(sum(filter(None, seconds)))} of scoring" if None not in seconds else "some were not timed"
    peak = f", at most {byte_size(max(peaks))} of memory" if peaks else ""
    yield "Steps", str(len(trajectory.steps)), taken + peak
    calibration = manifest["calibration"]
    source = calibration["source"]
    yield (
        "Calibration",
        f"{calibration['num_tokens']:,} tokens",
        f"{source['dataset']}, {source['split']}, {calibration['sequences']:,} sequences",
    )


def _quality(levels: charts.Levels, manifest: Facts, metrics: list[str]) -> Iterator[tuple[str, str]]:
    """Title and chart of what was measured over sparsity, the gate's first; what is 0 everywhere has none."""
    limits = {metric: _limit(levels, manifest, metric) for metric in filter(is_perplexity, metrics)}
    for metric in sorted(limits, key=lambda metric: limits[metric] is None):
        yield metric, charts.perplexity_chart(levels, metric, limits[metric])
    told = [metric for metric in metrics if any(level["metrics"].get(metric) for level in levels)]
    if accuracies := list(filter(is_accuracy, told)):
        yield "accuracy", charts.lines_chart(levels, accuracies, "accuracy")
    if ratios := [metric for metric in metrics if metric.endswith("_over_dense")]:
        yield "speed, times the dense model's", charts.lines_chart(levels, ratios, "speed over dense")


def _limit(levels: charts.Levels, manifest: Facts, metric: str) -> float | None:
    """The highest perplexity that passes the gate, where it reads this one."""
    checks = [check for level in manifest["levels"] for check in level.get("gate", {}).get("checks", [])]
    limits = [check["limit"] for check in checks if (check["name"], check["metric"]) == ("perplexity_ratio", metric)]
    return float(limits[0] * levels[0]["metrics"][metric]) if limits else None


def _maps(trajectory: Trajectory) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Level, picture, and counts of what it keeps."""
    for name, keep in trajectory.keep.items():
        counts = {
            "attention": int(keep.attention.sum()),
            "all_attention": keep.attention.size,
            "channels": int(keep.mlp.sum()),
            "all_channels": keep.mlp.size,
        }
        yield name, heatmaps.keep_map(name, keep, _structure(trajectory)), counts


def _structure(trajectory: Trajectory) -> str:
    return "query heads" if trajectory.geometry.separate_heads else "kv groups"


def _scores(trajectory: Trajectory) -> Iterator[tuple[str, str, Mapping[int, ScoreSummary]]]:
    """Kind of structure, chart and the numbers behind it."""
    attention = {step.number: step.attention for step in trajectory.steps if step.attention}
    mlp = {step.number: step.mlp for step in trajectory.steps if step.mlp}
    if not attention and not mlp:
        return
    limits = charts.score_limits([*attention.values(), *mlp.values()])
    for name, scores in ((_structure(trajectory), attention), ("channels", mlp)):
        if scores:
            chart = charts.scores_chart(name, scores, num_steps=len(trajectory.steps), limits=limits)
            yield name, chart, scores


def _costs(trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    """Title and chart of what the steps took, as far as it was recorded."""
    if seconds := {step.number: step.seconds for step in trajectory.steps if step.seconds is not None}:
        yield "seconds of scoring", charts.bars_chart("seconds of scoring", seconds, "seconds", duration)
    if peaks := {step.number: step.peak_bytes / 1e9 for step in trajectory.steps if step.peak_bytes is not None}:
        chart = charts.bars_chart("peak memory", peaks, "GB", lambda value: f"{value:.3g} GB")
        yield "peak memory", chart
