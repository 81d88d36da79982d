"""Secrets stay where they were given: marked ones go into a whole run, and every place that it writes is searched."""

import gzip
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from gisp_tasks.demo.services import start_mlflow, start_s3

MARKS = {
    "AWS_SECRET_ACCESS_KEY": "mark-of-the-s3-secret-7f3a",
    "MLFLOW_TRACKING_PASSWORD": "mark-of-the-mlflow-password-91bc",
    "HF_TOKEN": "hf_markofthehubtoken5d2e",
    "AIRFLOW_CONN_WAREHOUSE": "postgres://etl:mark-of-the-connection-c04d@db/warehouse",
}
PARTS = [value.split("etl:")[-1].split("@")[0] for value in MARKS.values()]
ACCESS_KEY = "access-key-of-the-test"


def _texts_of_database(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every row of every table (XComs, rendered templates, params, logs, tags …), and the file itself."""
    yield path.name, path.read_bytes()
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in connection.execute(f'SELECT * FROM "{table}"'):
                yield f"{path.name}:{table}", repr(row).encode()


def _texts_below(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        if path.suffix == ".db":
            yield from _texts_of_database(path)
        else:
            data = path.read_bytes()
            yield str(path), gzip.decompress(data) if path.suffix == ".gz" else data


def _objects(s3: Any, bucket: str) -> Iterator[tuple[str, bytes]]:
    for item in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        found = s3.get_object(Bucket=bucket, Key=item["Key"])
        yield item["Key"], item["Key"].encode() + json.dumps(found["Metadata"]).encode() + found["Body"].read()


def _found(texts: list[tuple[str, bytes]], word: str) -> list[str]:
    return [place for place, text in texts if word.encode() in text]


def test_no_secret_leaves_the_environment(gisp: Any, testdata: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "secretive",
        "model": {"source": str(testdata / "models" / "stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 4, "sequence_length": 32},
        "pruning": {"levels": [0.2], "steps": 1},
        "evaluation": {"embedded_text": {"windows": [64], "limit_tokens": 65}},
        "publish": {"store": "s3://marked/gisp", "encryption": {}},
    }
    cache, home, mlflow_home = tmp_path / "cache", tmp_path / "airflow", tmp_path / "mlflow"
    with (
        start_s3(tmp_path / "s3", access_key=ACCESS_KEY, secret_key=MARKS["AWS_SECRET_ACCESS_KEY"]) as store,
        start_mlflow(mlflow_home) as mlflow,
    ):
        recipe["publish"]["mlflow"] = {"tracking_uri": mlflow.url, "model_name": "secretive"}  # type: ignore[index]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        s3 = boto3.session.Session(ACCESS_KEY, MARKS["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1").client(
            "s3", endpoint_url=store.url
        )
        s3.create_bucket(Bucket="marked")
        done = gisp.start_inline(
            *("run", str(path), "--json"),
            environment={
                **store.environment,
                **MARKS,
                "MLFLOW_TRACKING_USERNAME": "pipeline",
                "GISP_AIRFLOW_HOME": str(home),
                "GISP_CACHE": str(cache),
            },
        )
        run_id = json.loads(done.stdout)["run_id"]
        places = {
            "output": [("stdout", done.stdout.encode()), ("stderr", done.stderr.encode())],
            "store": list(_objects(s3, "marked")),
            "Airflow": list(_texts_below(home)),
            "log": list(_texts_below(cache / "logs")),
            "MLflow": list(_texts_below(mlflow_home)),
        }
    for place, texts in places.items():
        assert _found(texts, run_id), f"{place} holds nothing of the run, so a search there shows nothing"
        for mark in PARTS:
            assert not _found(texts, mark), f"{mark} stands in {place}"


@pytest.mark.parametrize("suffix", ["txt", "gz", "db"])
def test_the_search_finds_what_is_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "db":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (a JSON)")
            connection.execute("INSERT INTO t VALUES (?)", [json.dumps({"key": PARTS[0]})])
    else:
        path.write_bytes(gzip.compress(PARTS[0].encode()) if suffix == "gz" else PARTS[0].encode())
    assert _found(list(_texts_below(tmp_path)), PARTS[0])
