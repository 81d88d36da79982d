"""The command line: the same tasks without a scheduler.

Exit status: 0, 2 for bad input (one message, no traceback), 1 for a failure.
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gisp_tasks import promotion_commands
from gisp_tasks.errors import GispError, InputError
from gisp_tasks.recipe import ITEM_DATASETS, CalibrationSection, EvaluationSection, Recipe, level_name

app = typer.Typer(
    name="gisp",
    help="One recipe, a ladder of smaller, dense, registered models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML file of a recipe.", show_default=False)]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Overrides one value of the recipe; repeatable.")
]
StoreUri = Annotated[str | None, typer.Option("--store", metavar="URI", help="Replaces publish.store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else there.")]


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn this package's errors into one message and the exit status."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            sys.stderr.write(f"gisp: {error}\n")
            raise typer.Exit(2) from None
        except GispError as error:
            sys.stderr.write(f"gisp: {type(error).__name__}: {error}\n")
            raise typer.Exit(1) from None

    return wrapper


@app.command()
@_reports_errors
def run(
    recipe: RecipeFile,
    settings: Settings = [],  # noqa: B006 - typer copies it
    store: StoreUri = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run; never begin one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the recipe's DAG in this process.

    A run that was interrupted goes on where it stopped: what is published is never made again.
    """
    parsed = Recipe.load(recipe, tuple(settings), store)
    from gisp_tasks import local_airflow
    from gisp_tasks.console import TaskProgress, ladder_table, output_to

    log = local_airflow.CACHE / "logs" / f"{parsed.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with output_to(log) as console, local_airflow.prepare(parsed):
        console.print(f"[bold]{parsed.name}[/]: {parsed.model.source}, log in {log}", highlight=False, soft_wrap=True)
        dag = local_airflow.load_dag(parsed)
        from gisp_tasks.approval import WAIT

        with TaskProgress(console, total=len(dag.tasks)) as progress:
            # Nobody answers a run in this process: `gisp approve` does, later.
            conf = {"resume": resume} | ({WAIT: False} if WAIT in dag.params else {})
            manifest = local_airflow.run_dag(dag, conf=conf, on_event=progress.event)
        from gisp_tasks.tasks.report import summarise

        summary = summarise(parsed.model_dump(mode="json"), manifest)
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=1) + "\n")
        return
    console = Console()
    console.print(ladder_table(summary))
    for level in summary["levels"][1:]:
        console.print(f"{level['name']:9} {level['uri']}", highlight=False, soft_wrap=True)
        if level["promotion"] == "awaiting approval":
            command = f"gisp approve {shlex.quote(level['model_name'])} {level['model_version']} --reason TEXT"
            console.print(f"{'':9} awaits approval: {command}", highlight=False, soft_wrap=True)
    console.print(
        f"store     {summary['store']}\nmanifest  {summary['manifest_sha256']}", highlight=False, soft_wrap=True
    )


@app.command()
@_reports_errors
def plan(
    recipe: RecipeFile,
    settings: Settings = [],  # noqa: B006 - typer copies it
    as_json: AsJson = False,
) -> None:
    """Show steps, levels, sizes, memory and time; only the model's config.json is read."""
    parsed = Recipe.load(recipe, tuple(settings))
    from gisp_tasks.pruning.families import geometry_of
    from gisp_tasks.pruning.plan import make_plan
    from gisp_tasks.stores.model_source import read_config

    made = make_plan(parsed, geometry_of(read_config(parsed.model), granularity=parsed.importance.granularity))
    if as_json:
        sys.stdout.write(json.dumps(made.to_dict(), indent=1) + "\n")
        return
    from gisp_tasks.tasks.throughput import matmul_flops

    rate = matmul_flops(parsed.model.dtype)
    solving = f"least squares: about {made.compensation_bytes / 2**30:.1f} GiB\n" if made.compensation_bytes else ""
    console = Console()
    table = Table("level", "sparsity", "parameters, at most", "bytes, at most", "after step", title=parsed.name)
    table.add_row("dense", "0.0 %", f"{made.dense_parameters:,}", f"{made.dense_bytes:,}", "-")
    for level in made.levels:
        table.add_row(
            level.name,
            f"{100 * level.sparsity:.1f} %",
            f"{level.max_parameters:,}",
            f"{level.max_bytes:,}",
            f"{level.after_step} of {len(made.steps)}",
        )
    console.print(table)
    console.print(
        f"scoring: {_calibration_size(parsed.calibration)}, {made.micro_batch_tokens:,} tokens at once, about "
        f"{made.scoring_bytes / 2**30:.1f} GiB\n"
        f"{solving}time of all steps: about {made.scoring_flops / rate / 60:.1f} min at the {rate / 1e9:,.0f} GFLOP/s "
        f"that a matrix product reaches here",
        highlight=False,
    )


def _calibration_size(asked: CalibrationSection) -> str:
    if asked.dataset in ITEM_DATASETS:
        return f"items within a budget of {asked.sequences * asked.sequence_length:,} tokens"
    return f"{asked.sequences} sequences of {asked.sequence_length} tokens"


@app.command()
@_reports_errors
def prune(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the order and the scores go.")],
    settings: Settings = [],  # noqa: B006 - typer copies it
    as_json: AsJson = False,
) -> None:
    """Calibration and steps only: writes removal_order.safetensors and the scores of each step."""
    overrides = (*settings, "publish.mlflow=null", "publish.promotion={}", "airflow.steps_per_task=1")
    parsed = Recipe.load(recipe, overrides, f"file://{out.absolute()}")
    from gisp_tasks.tasks.prune_only import prune_only

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    result = prune_only(parsed, out)
    sys.stdout.write(json.dumps(result, indent=1) + "\n" if as_json else f"{result['removal_order']}\n")


@app.command()
@_reports_errors
def materialize(
    model: Annotated[str, typer.Option("--model", metavar="M", help="The base model: hub id, directory, s3://.")],
    order: Annotated[str, typer.Option("--order", metavar="F", help="removal_order.safetensors of a run, or s3://.")],
    sparsity: Annotated[float, typer.Option("--sparsity", help="Parameter sparsity, up to the order's end.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="A directory that is empty or not there yet, or s3://.")
    ],
    width_multiple: Annotated[int, typer.Option(help="MLP widths are rounded up to a multiple of this.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; by default the model's own.")] = None,
    compensate: Annotated[
        Path | None, typer.Option(metavar="TOKENS", help="Token ids (.npy, .safetensors) to fit least squares on.")
    ] = None,
) -> None:
    """Cut any level from a base model and a removal order; no accelerator needed."""
    from gisp_tasks.tasks.materialize import materialize_from_order

    parameters = materialize_from_order(
        model,
        order,
        out=out,
        sparsity=sparsity,
        width_multiple=width_multiple,
        dtype=dtype,
        compensate=compensate,
    )
    sys.stdout.write(f"{out}: {level_name(sparsity)}, {parameters:,} parameters\n")


@app.command()
@_reports_errors
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face checkpoint directory.")],
    task: Annotated[list[str], typer.Option("--task", help="A key of a recipe's `evaluation`; repeatable.")],
    settings: Annotated[
        list[str], typer.Option("--set", metavar="TASK.KEY=VALUE", help="As in a recipe's `evaluation`.")
    ] = [],  # noqa: B006 - typer copies it
    dtype: Annotated[str, typer.Option(help="Type to hold the weights in.")] = "float32",
    dense: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The model that `--task speed` is compared with, in turn.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure any checkpoint as the pipeline does. Code that it carries is run, as for a level of a run."""
    from gisp_tasks.recipe.reading import apply_settings
    from gisp_tasks.tasks.measure import measure, measure_speed

    if dense is not None and "speed" not in task:
        raise InputError(f"--dense {dense} was given, and only `--task speed` reads it; add that task, or leave it out")
    chosen: dict[str, Any] = {name: {} for name in task}
    apply_settings(chosen, tuple(settings), EvaluationSection)
    section = EvaluationSection.parse(chosen, origin="--task")
    for directory in (checkpoint, *([dense] if dense else [])):
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory}: no config.json was found; give the directory of a Hugging Face checkpoint")
    results = {
        name: measure(checkpoint, name, getattr(section, name), dtype=dtype, trust_remote_code=True)
        for name in task
        if name != "speed"
    }
    if section.speed is not None:
        results["speed"] = measure_speed(checkpoint, section.speed, dense=dense, dtype=dtype, trust_remote_code=True)
    if as_json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    for result in results.values():
        for name, value in result["metrics"].items():
            sys.stdout.write(f"{name:44} {value:.6g}\n")


@app.command()
@_reports_errors
def compare(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results go; the same again: it goes on.")],
    settings: Settings = [],  # noqa: B006 - typer copies it
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the calibration draw, separated by commas.")] = "0,1,2",
    compensation: Annotated[bool, typer.Option(help="Measure each subnetwork with least squares too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Hold the method against others on your model, data and levels.

    Methods: gisp, one-shot, gate-fisher, gate-fisher-one-shot, wanda-sp, flap, magnitude, random; all by default.
    """
    parsed = Recipe.load(recipe, tuple(settings))
    from gisp_tasks import comparison
    from gisp_tasks.report import metric_names
    from gisp_tasks.tasks.compare import METHODS
    from gisp_tasks.tasks.compare import compare as run_comparison

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    chosen = [name.strip() for name in methods.split(",")] if methods else METHODS
    result = run_comparison(parsed, methods=chosen, seeds=_whole_numbers(seeds), compensation=compensation, out=out)
    for metric in comparison.metrics_of(result):
        comparison.write_plot(result, metric, out / f"{metric}.svg")
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    console = Console()
    for metric in metric_names(result["cells"])[0]:
        console.print(comparison.heading(result, metric), highlight=False, soft_wrap=True)
        console.print(comparison.comparison_table(result, metric))
    sys.stdout.write(f"{out / 'comparison.json'}\n")


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--seeds {text}: no list of whole numbers was found; write them with commas between, e.g. 0,1,2"
        ) from None


for _command in (promotion_commands.history, promotion_commands.approve, promotion_commands.rollback):
    app.command()(_reports_errors(_command))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
