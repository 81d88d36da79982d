"""What a person sees on the terminal: progress while a run goes on, and its closing table."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gisp_tasks.report import metric_names


@contextmanager
def output_to(log: Path) -> Iterator[Console]:
    """Send everything that this process and its children print to a file; yields a console on the real stderr."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file, os.fdopen(os.dup(2), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=terminal)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


class TaskProgress:
    """A bar over the tasks of a run, and a line for each one that ended."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console,
        )  # fmt: skip
        self._bar = self._progress.add_task("starting", total=total)
        self._began: dict[str, float] = {}

    def __enter__(self) -> "TaskProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def event(self, task_id: str, state: str) -> None:
        """Show that a task runs, or how it ended."""
        if state == "running":
            self._began[task_id] = time.monotonic()
            self._progress.update(self._bar, description=task_id)
            return
        took = time.monotonic() - self._began.get(task_id, time.monotonic())
        mark = {"success": "[green]done[/]", "skipped": "[dim]skipped[/]"}.get(state, "[red]failed[/]")
        self._progress.console.print(f"  {mark}  {task_id}  [dim]{took:.1f} s[/]", highlight=False)
        self._progress.advance(self._bar)


def retention_table(runs: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """The runs of a store, one line each."""
    table = Table("run", "", "days", "bytes", "stays because", title=title, title_justify="left")
    for run in runs:
        state = "finished" if run["finished"] else "unfinished"
        reason = run["kept_because"] or "[bold]it does not[/]"
        table.add_row(run["run_id"], state, f"{run['age_days']:.1f}", f"{run['num_bytes']:,}", reason)
    return table


def ladder_table(summary: Mapping[str, Any]) -> Table:
    """The levels of a finished run, one column each; single tasks only by their mean, the page has them all."""
    levels = summary["levels"]
    table = Table(title=f"run {summary['run_id']}", title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    for level in levels:
        table.add_column(level["name"], justify="right", no_wrap=True)
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "sparsity": lambda level: f"{100 * level['param_sparsity']:.1f} %",
        "parameters": lambda level: f"{level['parameters'] / 1e6:.1f} M",
        "bytes": lambda level: f"{level['bytes'] / 1e6:.0f} MB",
        **{name: partial(_metric, name) for name in metric_names(levels)[0]},
        "gate": lambda level: level["gate"] or "-",
        "version": lambda level: str(level["model_version"] or "-"),
        "alias": lambda level: f"@{level['alias']}" if level["alias"] else "-",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, levels))
    return table


def _metric(name: str, level: Mapping[str, Any]) -> str:
    return f"{level['metrics'][name]:.4g}" if name in level["metrics"] else "-"
