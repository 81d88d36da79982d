"""The page's charts: quality over size, scores over steps, time and memory of steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gisp_tasks.report import drawing
from gisp_tasks.report.drawing import BAD, CARD, INK, MUTED, SERIES
from gisp_tasks.report.trajectory import ScoreSummary

_SIZE = (4.3, 2.8)
_MARKERS = "osD^vP"
_LOG_FROM = 3.0
"""Values that differ by more than this factor are drawn on a logarithmic axis."""
_MOST_TICKS = 6
_HALO = {"facecolor": CARD, "edgecolor": "none", "pad": 0.8}

Levels = Sequence[Mapping[str, Any]]


def perplexity_chart(levels: Levels, metric: str, limit: float | None) -> str:
    """A perplexity over sparsity beside the dense model's; levels that the gate stopped are crosses.

    Args:
        levels: of the summary, the dense model first; those that have the metric are drawn.
        metric: its name.
        limit: highest value that passes the gate, if the gate reads this metric.
    """
    found = [level for level in levels if metric in level["metrics"]]
    sparsity = [100 * level["param_sparsity"] for level in found]
    values = [level["metrics"][metric] for level in found]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axhline(values[0], color=MUTED, linewidth=1, linestyle="--")
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1, linestyle=":", zorder=1)
            axes.annotate("gate", (0, limit), xytext=(0, -4), textcoords="offset points", va="top", color=BAD)
        axes.plot(sparsity, values, color=SERIES[0], linewidth=1.8)
        for level, x, y in zip(found, sparsity, values, strict=True):
            failed = level["gate"] == "failed"
            axes.plot([x], [y], marker="X" if failed else "o", markersize=7, color=BAD if failed else SERIES[0])
            axes.annotate(
                level["name"], (x, y), textcoords="offset points", xytext=(-4, 8), ha="center", bbox=_HALO, zorder=1.5
            )
        _scale(axes, [*values, *([limit] if limit is not None else [])])
        axes.margins(x=0.1, y=0.16)
        axes.set_xlabel("parameter sparsity of the decoder layers, %")
        axes.grid(visible=True)

    return drawing.draw(f"curve-{metric}", label=f"{metric}: {_listed(found, values)}", size=_SIZE, paint=paint)


def lines_chart(levels: Levels, metrics: Sequence[str], what: str) -> str:
    """Several metrics of one kind over sparsity.

    Args:
        levels: of the summary.
        metrics: their names.
        what: they are, e.g. accuracy; names the picture.
    """
    series = {}
    for metric in metrics:
        found = [level for level in levels if metric in level["metrics"]]
        series[metric] = (found, [level["metrics"][metric] for level in found])

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for number, (metric, (found, values)) in enumerate(series.items()):
            axes.plot(
                [100 * level["param_sparsity"] for level in found],
                values,
                color=SERIES[number % len(SERIES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.8,
                label=metric,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("parameter sparsity of the decoder layers, %")
        axes.grid(visible=True)
        figure.legend(loc="outside upper left", ncols=1)

    said = "; ".join(f"{metric}: {_listed(found, values)}" for metric, (found, values) in series.items())
    height = _SIZE[1] + 0.16 * len(metrics)
    return drawing.draw(f"lines-{what}", label=f"{what}. {said}", size=(_SIZE[0], height), paint=paint)


def scores_chart(name: str, scores: Mapping[int, ScoreSummary], *, num_steps: int, limits: tuple[float, float]) -> str:
    """Quantiles of the scores of one kind before each step, and the highest one that the step removed.

    Args:
        name: of the structures, in the plural.
        scores: by step.
        num_steps: of the run.
        limits: of the axis of scores, which is the same for both kinds.
    """

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        wide = max(1.2, min(9.0, 150 / num_steps))
        numbers = list(scores)
        low, lower, middle, upper, high = zip(*(score.quantiles for score in scores.values()), strict=True)
        axes.vlines(numbers, low, high, color=SERIES[0], linewidth=max(0.8, wide / 5), label="5 to 95 %")
        axes.vlines(numbers, lower, upper, color=SERIES[0], linewidth=wide, alpha=0.55, label="25 to 75 %")
        axes.plot(numbers, middle, linestyle="none", marker="_", markersize=wide, color=INK, label="median")
        removed = [(step, score.highest_removed) for step, score in scores.items() if score.highest_removed is not None]
        if removed:
            axes.plot(*zip(*removed, strict=True), color=BAD, marker=".", linewidth=1.2, label="highest removed")
        axes.set_xlim(0.3, num_steps + 0.7)
        _whole_numbers(axes.xaxis)
        _scale(axes, limits, shown=lambda value: f"{value:.0e}")
        axes.set_ylim(limits)
        axes.set_xlabel("step")
        axes.grid(visible=True, axis="y")
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1.0, handlelength=1.2)

    medians = ", ".join(f"{step}: {score.quantiles[2]:.3g}" for step, score in scores.items())
    return drawing.draw(
        f"scores-{name}", label=f"Scores of {name}; medians by step: {medians}", size=_SIZE, paint=paint
    )


def bars_chart(name: str, values: Mapping[int, float], unit: str, shown: Callable[[float], str]) -> str:
    """One bar a step.

    Args:
        name: what it shows.
        values: by step.
        unit: of the axis.
        shown: a value with its unit, for the text alternative.
    """

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.bar(list(values), list(values.values()), color=SERIES[0], width=0.7)
        _whole_numbers(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(visible=True, axis="y")

    said = ", ".join(f"{step}: {shown(value)}" for step, value in values.items())
    return drawing.draw(f"bars-{name}", label=f"{name} by step: {said}", size=(_SIZE[0], 2.3), paint=paint)


def score_limits(scores: Sequence[ScoreSummary]) -> tuple[float, float]:
    """What an axis must reach to show all of them, zeros apart where it is logarithmic."""
    values = [value for score in scores for value in (*score.quantiles, score.highest_removed) if value is not None]
    above = [value for value in values if value > 0]
    if min(values) < 0 or not above:
        return min(values) - 0.05 * max(map(abs, values)), max(values) + 0.05 * max(map(abs, values)) + 1e-30
    return min(above) / 1.3, max(above) * 1.3


def _scale(axes: Any, values: Sequence[float], shown: Callable[[float], str] = lambda value: f"{value:,.6g}") -> None:
    """Logarithmic where the values ask for it, with ticks that read as numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(values), max(values)
    if low <= 0 or high / low < _LOG_FROM:
        return
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_locator(FixedLocator(_round_numbers(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: shown(value))


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values; powers alone where that would be too many."""
    powers = [10.0**power for power in range(-30, 31)]
    ticks = [power * digit for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low / 1.6 <= tick <= high * 1.6]
    return inside if len(inside) <= _MOST_TICKS else [tick for tick in inside if tick in powers]


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _listed(levels: Levels, values: Sequence[float]) -> str:
    return ", ".join(f"{level['name']} {value:.4g}" for level, value in zip(levels, values, strict=True))
