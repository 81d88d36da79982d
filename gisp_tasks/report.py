"""The run's page: one self-contained HTML file."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from gisp_tasks.recipe import COMMONSENSE_TASKS


def render(summary: Mapping[str, Any], *, manifest: Mapping[str, Any], curve_metric: str | None) -> str:
    """The page of a finished run.

    Args:
        summary: as `gisp run --json` prints it; the dense model is the first level.
        manifest: of the run.
        curve_metric: the perplexity to draw over sparsity; None: no curve.
    """
    environment = Environment(
        loader=PackageLoader("gisp_tasks", "templates"),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["gate_value"] = gate_value
    headline, by_task = metric_names(summary["levels"])
    curve = _curve_svg(summary["levels"], curve_metric) if curve_metric else None
    return environment.get_template("report.html.jinja").render(
        summary=summary,
        manifest=manifest,
        metrics=headline,
        task_metrics=by_task,
        curve=curve,
        curve_metric=curve_metric,
    )


def gate_value(value: bool | int | float) -> str:
    """A value or a limit of a check of the gate, as tables show it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def metric_names(levels: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The metrics that tell a ladder's quality at a glance, and those of single tasks whose mean is among them.

    Standard errors are in neither.
    """
    names = dict.fromkeys(name for level in levels for name in level["metrics"] if not name.endswith("_stderr"))
    by_task = [name for name in names if name.startswith(COMMONSENSE_TASKS)]
    return [name for name in names if name not in by_task], by_task


def _curve_svg(levels: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Perplexity over parameter sparsity as an SVG element; the same levels give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "gisp", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        sparsity = [100 * level["param_sparsity"] for level in levels]
        values = [level["metrics"][metric] for level in levels]
        axes.plot(sparsity, values, marker="o", color="#2b5fa4")
        axes.axhline(values[0], color="#888888", linewidth=1, linestyle="--")
        for level, x, y in zip(levels, sparsity, values, strict=True):
            axes.annotate(level["name"], (x, y), textcoords="offset points", xytext=(5, 6), fontsize=9)
        axes.set_yscale("log")
        axes.set_xlabel("parameter sparsity of the decoder layers, %")
        axes.set_ylabel(metric)
        axes.grid(visible=True, which="both", alpha=0.25)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
