"""What a comparison of methods says: mean and spread over seeds, agreement of scores and subnetworks, table, plot."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.recipe import PruningSection, level_name

Cell = Mapping[str, Any]


def summarise(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Mean, standard deviation (of a sample; None for one) and number over seeds, by method, level and metric."""
    values: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for cell in cells:
        for metric, value in cell["metrics"].items():
            if not metric.endswith("_stderr"):
                values[cell["method"], cell["compensation"], cell["level"], metric].append(value)
    return [
        {
            "method": method,
            "compensation": compensation,
            "level": level,
            "metric": metric,
            "mean": statistics.fmean(found),
            "std": statistics.stdev(found) if len(found) > 1 else None,
            "n": len(found),
        }
        for (method, compensation, level, metric), found in values.items()
    ]


def agreement(
    orders: Mapping[tuple[str, int], RemovalOrder],
    scores: Mapping[tuple[str, int], StructureScores],
    geometry: Geometry,
    pruning: PruningSection,
) -> list[dict[str, Any]]:
    """How alike two draws of one method are, and two methods on one draw.

    Args:
        orders: by method and seed.
        scores: of the dense model, by method and seed.
        geometry: of the dense model.
        pruning: levels and rounding.

    Returns:
        One entry a pair: Spearman's rank correlation of the scores by kind, and by level the overlap of the
        keep-sets: structures that both keep over structures that either keeps, by kind.
    """
    pairs = [(a, b) for a, b in itertools.combinations(orders, 2) if (a[0] == b[0]) != (a[1] == b[1])]
    keeps = {
        (key, level): order.level(level, geometry=geometry, width_multiple=pruning.width_multiple)
        for key, order in orders.items()
        for level in pruning.levels
    }
    return [
        {
            "methods": [a[0], b[0]],
            "seeds": [a[1], b[1]],
            "rank_correlation": {
                "attention": _spearman(scores[a].attention, scores[b].attention),
                "mlp": _spearman(scores[a].mlp, scores[b].mlp),
            },
            "overlap": {level_name(level): _overlap(keeps[a, level], keeps[b, level]) for level in pruning.levels},
        }
        for a, b in pairs
    ]


def _overlap(a: KeepSets, b: KeepSets) -> dict[str, float]:
    def jaccard(x: NDArray[np.bool_], y: NDArray[np.bool_]) -> float:
        return float((x & y).sum() / (x | y).sum())

    return {"attention": jaccard(a.attention, b.attention), "mlp": jaccard(a.mlp, b.mlp)}


def _spearman(a: NDArray[np.float32], b: NDArray[np.float32]) -> float | None:
    """Over structures that are scored in both; None where one of them has a single value."""
    from scipy.stats import spearmanr

    scored = np.isfinite(a) & np.isfinite(b)
    if len(np.unique(a[scored])) < 2 or len(np.unique(b[scored])) < 2:
        return None
    return float(spearmanr(a[scored], b[scored]).statistic)


def heading(result: Mapping[str, Any], metric: str) -> str:
    """What the table of a metric shows."""
    dense = next(row for row in result["summary"] if row["method"] == "dense" and row["metric"] == metric)
    seeds = ", ".join(map(str, result["seeds"]))
    return f"{metric}: dense {dense['mean']:.4g}; mean ± standard deviation over seeds {seeds}"


def comparison_table(result: Mapping[str, Any], metric: str) -> Table:
    """One row a method, one column a level: mean of a metric, and its standard deviation over seeds."""
    levels = sorted({row["level"] for row in result["summary"] if row["level"] is not None})
    table = Table("method", *(level_name(level) for level in levels))
    for method, compensation in _rows(result):
        found = _by_level(result, metric, method, compensation)
        table.add_row(_label(method, compensation), *(_shown(found.get(level)) for level in levels))
    return table


def write_plot(result: Mapping[str, Any], metric: str, path: Path) -> None:
    """The metric over sparsity, one line a method, dashed with least squares; the same result gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "gisp", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        colours = {method: f"C{number}" for number, method in enumerate(result["methods"])}
        for method, compensation in _rows(result):
            found = _by_level(result, metric, method, compensation)
            axes.errorbar(
                [100 * level for level in found],
                [row["mean"] for row in found.values()],
                yerr=[row["std"] or 0.0 for row in found.values()],
                label=_label(method, compensation),
                color=colours[method],
                linestyle="--" if compensation else "-",
                marker="o",
                markersize=4,
                capsize=3,
            )
        if "ppl" in metric:
            axes.set_yscale("log")
        axes.set_xlabel("parameter sparsity of the decoder layers, %")
        axes.set_ylabel(metric)
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize=8, ncols=2)
        figure.savefig(path, format="svg", metadata={"Date": None})


def metrics_of(result: Mapping[str, Any]) -> list[str]:
    """Names of the metrics that were measured."""
    return list(dict.fromkeys(row["metric"] for row in result["summary"]))


def _rows(result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    pairs = dict.fromkeys((row["method"], row["compensation"]) for row in result["summary"] if row["method"] != "dense")
    order = {method: number for number, method in enumerate(result["methods"])}
    return sorted(pairs, key=lambda pair: (order[pair[0]], pair[1]))


def _by_level(result: Mapping[str, Any], metric: str, method: str, compensation: bool) -> dict[float, Any]:
    wanted = (metric, method, compensation)
    rows = [row for row in result["summary"] if (row["metric"], row["method"], row["compensation"]) == wanted]
    return {row["level"]: row for row in sorted(rows, key=lambda row: row["level"])}


def _label(method: str, compensation: bool) -> str:
    return f"{method} + least squares" if compensation else method


def _shown(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['mean']:.4g}" + (f" ± {row['std']:.2g}" if row["std"] is not None else "")
