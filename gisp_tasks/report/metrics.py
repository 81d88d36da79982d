"""Names and values of metrics, as tables and charts show them."""

from collections.abc import Mapping, Sequence
from typing import Any

from gisp_tasks.recipe import COMMONSENSE_TASKS


def metric_names(levels: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The metrics that tell a ladder's quality at a glance, and those of single tasks whose mean is among them.

    Standard errors are in neither.
    """
    names = dict.fromkeys(name for level in levels for name in level["metrics"] if not name.endswith("_stderr"))
    by_task = [name for name in names if name.startswith(COMMONSENSE_TASKS)]
    return [name for name in names if name not in by_task], by_task


def is_perplexity(metric: str) -> bool:
    """Whether it is a perplexity: what matters is how many times the dense model's it is."""
    return "_ppl_" in metric


def is_accuracy(metric: str) -> bool:
    """Whether it is a share of right answers."""
    return "_acc" in metric or "_exact_match" in metric


def gate_value(value: bool | int | float) -> str:
    """A value or a limit of a check of the gate, as tables show it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def byte_size(size: float) -> str:
    """Decimal units, three digits: 230 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def duration(seconds: float) -> str:
    """As a person says it: 56.5 s, 3 min 9 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
