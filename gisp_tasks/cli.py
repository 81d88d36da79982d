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
from enum import StrEnum
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gisp_tasks import promotion_commands
from gisp_tasks.errors import GispError, InputError, RetryableError
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


class LevelFormat(StrEnum):
    """What `gisp materialize` writes."""

    hf = "hf"
    gguf = "gguf"


GgufType = StrEnum("GgufType", ["float32", "float16", "bfloat16", "q8_0"])
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
        _ask_services(parsed)
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


def _ask_services(recipe: Recipe) -> None:
    """Tell who waits here at once that a server does not answer; a scheduler would try again later."""
    from gisp_tasks.tasks.services import check_services

    try:
        check_services(recipe)
    except RetryableError as error:
        raise InputError(str(error)) from error


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
    from gisp_tasks.pruning.plan import Keys, make_plan
    from gisp_tasks.stores.model_source import read_config

    config = read_config(parsed.model)
    if parsed.export.gguf != "none":
        from gisp_tasks.export.gguf import require_graph

        require_graph(config)
    made = make_plan(parsed, geometry_of(config, granularity=parsed.importance.granularity))
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
    if parsed.export.gguf != "none":
        files = ", ".join(Keys.level(level.name, f"{level.name}.gguf") for level in made.levels)
        console.print(f"for llama.cpp, {parsed.export.gguf}: {files}", highlight=False, soft_wrap=True)
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
    overrides = (*settings, "publish.mlflow=null", "publish.encryption=null", "airflow.steps_per_task=1")
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
    file_format: Annotated[
        LevelFormat, typer.Option("--format", help="A Hugging Face directory, or a file for llama.cpp.")
    ] = LevelFormat.hf,
    gguf_type: Annotated[
        GgufType | None, typer.Option("--gguf-type", help="Of the matrices in the file; by default float16.")
    ] = None,
) -> None:
    """Cut any level from a base model and a removal order; no accelerator needed."""
    from gisp_tasks.tasks.materialize import materialize_from_order

    if gguf_type is not None and file_format is not LevelFormat.gguf:
        raise InputError(f"--gguf-type {gguf_type.value} was given without --format gguf; add it, or leave it out")
    matrices = gguf_type or GgufType.float16

    parameters = materialize_from_order(
        model,
        order,
        out=out,
        sparsity=sparsity,
        width_multiple=width_multiple,
        dtype=dtype,
        compensate=compensate,
        gguf=matrices.value if file_format is LevelFormat.gguf else None,
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
    gguf_type: Annotated[
        GgufType | None,
        typer.Option("--gguf-type", help="Of the matrices that `--task speed` gives llama.cpp; by default --dtype."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that DIR carries; a level needs none.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure any checkpoint as the pipeline does. Levels are loaded by this package, not by code that they carry."""
    from gisp_tasks.recipe.reading import apply_settings
    from gisp_tasks.tasks.measure import measure
    from gisp_tasks.tasks.measure_speed import measure_speed

    _check_speed_options(task, dense, gguf_type)
    chosen: dict[str, Any] = {name: {} for name in task}
    apply_settings(chosen, tuple(settings), EvaluationSection)
    section = EvaluationSection.parse(chosen, origin="--task")
    for directory in (checkpoint, *([dense] if dense else [])):
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory}: no config.json was found; give the directory of a Hugging Face checkpoint")
    results = {
        name: measure(checkpoint, name, getattr(section, name), dtype=dtype, trust_remote_code=trust_remote_code)
        for name in task
        if name != "speed"
    }
    if section.speed is not None:
        matrices = gguf_type.value if gguf_type else None
        results["speed"] = measure_speed(
            checkpoint, section.speed, dense=dense, dtype=dtype, gguf=matrices, trust_remote_code=trust_remote_code
        )
    if as_json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    for result in results.values():
        for name, value in result["metrics"].items():
            sys.stdout.write(f"{name:44} {value:.6g}\n")


def _check_speed_options(tasks: list[str], dense: Path | None, gguf_type: GgufType | None) -> None:
    for option, value in (("--dense", dense), ("--gguf-type", gguf_type and gguf_type.value)):
        if value is not None and "speed" not in tasks:
            raise InputError(
                f"{option} {value} was given, and only `--task speed` reads it; add that task, or leave it out"
            )
    if gguf_type is not None and find_spec("llama_cpp") is None:
        raise InputError(
            f"--gguf-type {gguf_type.value} was given, and llama.cpp is not installed here; install the package "
            f"llama-cpp-python, or leave it out"
        )


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


@app.command()
@_reports_errors
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Prefix of a run (s3://, file://), or its manifest.json.")],
    replay: Annotated[bool, typer.Option("--replay", help="Repeat the steps and compare the removal order.")] = False,
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM public key; checks every signature with it.")
    ] = None,
    registry: Annotated[bool, typer.Option(help="Compare versions, tags and aliases with the manifest.")] = True,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", envvar="MLFLOW_TRACKING_URI", help="Where the registry is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a finished run again and hold it against its manifest; exit status 1 where something does not hold.

    One finding a line: what was checked, where, and what is so against what the record says.
    """
    from gisp_tasks.audit.verify import Wanted
    from gisp_tasks.audit.verify import verify as audit

    level = logging.INFO if replay else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    report = audit(run, Wanted(public_key, registry, tracking_uri, replay))
    found = report.audit
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=1) + "\n")
    else:
        for finding in found.findings:
            sys.stdout.write(f"{finding}\n")
        for note in found.notes:
            sys.stdout.write(f"note       {note}\n")
        result = "clean" if report.clean else f"{len(found.findings)} findings"
        sys.stdout.write(f"{report.prefix}: {found.objects} objects, {found.size:,} bytes read: {result}\n")
    if not report.clean:
        raise typer.Exit(1)


@app.command("prune-store")
@_reports_errors
def prune_store(
    store: Annotated[str, typer.Argument(metavar="STORE", help="publish.store of the recipes.", show_default=False)],
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=1, help="Runs that wrote anything in this many days stay.")
    ] = 90,
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="The registry to ask.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it nothing is removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show, and with --yes remove, old runs that no registered version and no other run needs."""
    if tracking_uri is None:
        raise InputError(
            "prune-store was asked for, and no registry was named; a run may go only when its registry says that no "
            "level of it is a version. Give --tracking-uri, or set MLFLOW_TRACKING_URI"
        )
    from gisp_tasks.console import retention_table
    from gisp_tasks.tasks import prune_store as retention

    found = retention.review(store, tracking_uri=tracking_uri, keep_days=keep_days)
    removed = retention.remove(store, found, tracking_uri=tracking_uri) if yes else None
    if as_json:
        gone = [run.run_id for run in removed.going] if removed else []
        sys.stdout.write(json.dumps({**found.to_dict(), "removed": gone}, indent=1) + "\n")
        return
    Console().print(retention_table(found.to_dict()["runs"], title=store))
    shown = removed or found
    verb = "removed" if yes else "would be removed (--yes removes them)"
    sys.stdout.write(f"{len(shown.going)} of {len(found.runs)} runs, {shown.num_bytes:,} bytes: {verb}\n")


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
