"""The registry against a real MLflow server (and an SQLite file): once, recoverable, readable back, loadable."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fault_proxy import FaultProxy
from mlflow import MlflowClient
from mlflow.entities import ViewType

from gisp_tasks.demo.services import Service
from gisp_tasks.errors import GispError, InputError, PermanentError, RegistryUnavailableError
from gisp_tasks.export.mlmodel import write_mlmodel
from gisp_tasks.stores.registry import LevelVersion, MlflowRegistry, alias_name

RUN_ID = "0123456789ab"
DATASETS = [
    {
        "name": "c4",
        "source": "https://huggingface.co/datasets/allenai/c4",
        "digest": "c4" * 32,
        "context": "calibration",
    },
    {"name": "wikitext2", "source": "s3://data/wikitext2", "digest": "f2" * 32, "context": "evaluation"},
]
SERVE = """
import json, sys
sys.modules["gisp_tasks"] = None
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps(model.predict(["Once upon a time"], {"max_new_tokens": 8})))
"""


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes an empty directory where a client of an SQLite file runs; and it reports home by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def registry(mlflow_server: Service) -> MlflowRegistry:
    return MlflowRegistry(mlflow_server.url)


@pytest.fixture
def client(mlflow_server: Service) -> MlflowClient:
    return MlflowClient(mlflow_server.url, mlflow_server.url)


def _open(registry: MlflowRegistry, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "experiment": f"experiment-{uuid.uuid4().hex}",
        "run_id": RUN_ID,
        "parameters": {"model": {"source": "org/model", "revision": None}, "pruning": {"levels": [0.2, 0.4]}},
        "datasets": DATASETS,
    }
    return registry.open_run(**{**arguments, **changes})


@pytest.fixture
def level(registry: MlflowRegistry) -> LevelVersion:
    return LevelVersion(
        model_name=f"model-{uuid.uuid4().hex}",
        level="sp40",
        source=f"s3://bucket/runs/{RUN_ID}/levels/sp40",
        digest="ab" * 32,
        run_id=RUN_ID,
        mlflow_run=_open(registry),
        gate_passed=True,
        tags={"parameters": "1000", "base_revision": "main"},
    )


def test_a_run_is_opened_once_and_reads_back(registry: MlflowRegistry, client: MlflowClient) -> None:
    experiment = f"experiment-{uuid.uuid4().hex}"
    first = _open(registry, experiment=experiment)
    registry.close_run(first, "FAILED")
    # The retry has other values of what may change between attempts, and a new parameter.
    again = _open(
        registry, experiment=experiment, parameters={"model": {"source": "elsewhere"}, "airflow": {"pool": "x"}}
    )
    assert again == first
    assert _open(registry, experiment=experiment, run_id="other") != first
    run = client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.data.params == {
        "model.source": "org/model",
        "model.revision": "null",
        "pruning.levels": "[0.2, 0.4]",
        "airflow.pool": "x",
    }


def test_an_answer_that_is_lost_makes_no_second_run(mlflow_server: Service, client: MlflowClient) -> None:
    """MLflow's client sends every request again whose answer does not come, those that create something too."""
    experiment = f"experiment-{uuid.uuid4().hex}"
    with FaultProxy(mlflow_server.port) as proxy:
        proxy.lose_answer_to(b"POST /api/2.0/mlflow/runs/create")
        run = _open(MlflowRegistry(proxy.url), experiment=experiment)
        assert proxy.lost_answers == 1
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    assert [found.info.run_id for found in client.search_runs([experiment_id])] == [run]
    deleted = client.search_runs([experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert len(deleted) == 1, "the server carried out both requests"


def test_many_and_long_parameters(registry: MlflowRegistry, client: MlflowClient) -> None:
    run = _open(registry, parameters={f"p{i:03}": "x" * 9000 if i == 7 else str(i) for i in range(150)})
    parameters = client.get_run(run).data.params
    assert len(parameters) == 150
    assert parameters["p149"] == "149"
    assert parameters["p007"] == "x" * 6000


def test_lineage_reads_back_once(registry: MlflowRegistry, client: MlflowClient) -> None:
    experiment = f"experiment-{uuid.uuid4().hex}"
    _open(registry, experiment=experiment)
    run = _open(registry, experiment=experiment)
    inputs = {entry.dataset.name: entry for entry in client.get_run(run).inputs.dataset_inputs}
    assert len(client.get_run(run).inputs.dataset_inputs) == 2
    tags = {tag.key: tag.value for tag in inputs["c4"].tags}
    assert tags == {"mlflow.data.context": "calibration", "gisp.sha256": "c4" * 32}
    assert inputs["c4"].dataset.digest == "c4" * 18
    assert {tag.value for tag in inputs["wikitext2"].tags} == {"evaluation", "f2" * 32}


@pytest.mark.parametrize("index", [0, 1])
def test_mlflow_knows_the_sources(registry: MlflowRegistry, client: MlflowClient, index: int) -> None:
    import mlflow.data

    run = _open(registry, datasets=[DATASETS[index]])
    (entry,) = client.get_run(run).inputs.dataset_inputs
    source = mlflow.data.get_source(entry.dataset)
    assert DATASETS[index]["source"] in source.to_dict().values()


def test_a_run_knows_its_experiment(registry: MlflowRegistry, client: MlflowClient) -> None:
    experiment = f"experiment-{uuid.uuid4().hex}"
    run = _open(registry, experiment=experiment)
    assert registry.experiment_of(run) == client.get_experiment_by_name(experiment).experiment_id


def test_metrics_and_files(registry: MlflowRegistry, client: MlflowClient, tmp_path: Path) -> None:
    run = _open(registry)
    registry.log_metrics(run, {"sp40/wikitext2/ppl_token_w128": 12.5}, step=40)
    registry.log_text(run, "name: demo\n", artifact_file="recipe.yaml")
    (tmp_path / "report.html").write_text("<p>report</p>")
    registry.log_artifact(run, tmp_path / "report.html", artifact_path="reports")
    registry.close_run(run, "FINISHED")
    (metric,) = client.get_metric_history(run, "sp40/wikitext2/ppl_token_w128")
    assert (metric.value, metric.step) == (12.5, 40)
    assert Path(client.download_artifacts(run, "recipe.yaml", str(tmp_path))).read_text() == "name: demo\n"
    assert [file.path for file in client.list_artifacts(run, "reports")] == ["reports/report.html"]
    assert client.get_run(run).info.status == "FINISHED"


def test_registering_twice_makes_one_version(
    registry: MlflowRegistry, client: MlflowClient, level: LevelVersion
) -> None:
    first, second = registry.register_level(level), registry.register_level(level)
    assert first == second
    assert (first.version, first.alias) == (1, "sp40")
    version = client.get_model_version_by_alias(level.model_name, "sp40")
    assert (str(version.version), version.source, version.run_id) == ("1", level.source, level.mlflow_run)
    assert version.tags == {
        "parameters": "1000",
        "base_revision": "main",
        "gisp.run_id": RUN_ID,
        "gisp.level": "sp40",
        "gisp.digest": "ab" * 32,
        "gate": "passed",
    }
    assert registry.versions(level.model_name) == [first]


def test_a_crash_before_the_alias_is_made_good(
    registry: MlflowRegistry, level: LevelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", die)
        with pytest.raises(KeyboardInterrupt):
            registry.register_level(level)
    (orphan,) = registry.versions(level.model_name)
    assert orphan.alias is None
    registry.register_level(level)
    (repaired,) = registry.versions(level.model_name)
    assert (repaired.version, repaired.alias) == (orphan.version, "sp40")


def test_later_tags_are_added_to_the_version(registry: MlflowRegistry, level: LevelVersion) -> None:
    registry.register_level(level)
    registry.register_level(dataclasses.replace(level, tags={"parameters": "999", "gsm8k": "0.1"}))
    (version,) = registry.versions(level.model_name)
    assert (version.tags["parameters"], version.tags["gsm8k"]) == ("999", "0.1")


def test_a_failed_gate_leaves_the_alias(registry: MlflowRegistry, level: LevelVersion) -> None:
    good = registry.register_level(level)
    bad = registry.register_level(dataclasses.replace(level, digest="cd" * 32, run_id="another", gate_passed=False))
    assert (bad.version, bad.alias, bad.tags["gate"]) == (2, None, "failed")
    assert registry.versions(level.model_name) == [good, bad]


def test_a_new_run_takes_the_alias(registry: MlflowRegistry, level: LevelVersion) -> None:
    registry.register_level(level)
    registry.register_level(dataclasses.replace(level, run_id="another"))
    assert [version.alias for version in registry.versions(level.model_name)] == [None, "sp40"]


@pytest.mark.parametrize("change", ["digest", "level", "run_id", "source"])
def test_another_level_is_another_version(registry: MlflowRegistry, level: LevelVersion, change: str) -> None:
    registry.register_level(level)
    other = registry.register_level(dataclasses.replace(level, **{change: getattr(level, change) + "0"}))
    assert other.version == 2


def test_a_level_with_a_dot_has_an_alias(registry: MlflowRegistry, client: MlflowClient, level: LevelVersion) -> None:
    registered = registry.register_level(dataclasses.replace(level, level="sp37.5"))
    assert registered.alias == alias_name("sp37.5") == "sp37_5"
    assert client.get_model_version_by_alias(level.model_name, "sp37_5").tags["gisp.level"] == "sp37.5"


def test_a_model_that_is_not_there_has_no_versions(registry: MlflowRegistry) -> None:
    assert registry.versions("no such model") == []


def test_a_server_takes_no_local_source(registry: MlflowRegistry, level: LevelVersion, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="s3://"):
        registry.register_level(dataclasses.replace(level, source=tmp_path.as_uri()))
    assert registry.versions(level.model_name) == []


def test_what_the_server_refuses_is_permanent(registry: MlflowRegistry) -> None:
    with pytest.raises(PermanentError, match="ppl@128"):
        registry.log_metrics(_open(registry), {"ppl@128": 1.0})


def test_an_answer_that_is_lost_makes_no_second_version(
    mlflow_server: Service, client: MlflowClient, level: LevelVersion
) -> None:
    with FaultProxy(mlflow_server.port) as proxy:
        proxy.lose_answer_to(b"POST /api/2.0/mlflow/model-versions/create")
        registered = MlflowRegistry(proxy.url).register_level(level)
        assert proxy.lost_answers == 1
    versions = client.search_model_versions(f"name = '{level.model_name}'")
    assert [int(version.version) for version in versions] == [registered.version] == [1]
    assert client.get_model_version_by_alias(level.model_name, "sp40").version == "1"
    other = MlflowRegistry(mlflow_server.url).register_level(dataclasses.replace(level, level="sp50"))
    assert other.version == 3, "the server carried out both requests, and numbers are not given twice"


def test_a_server_that_went_away_is_retryable(
    registry: MlflowRegistry, level: LevelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryUnavailableError, match="register sp40"):
        MlflowRegistry(f"http://127.0.0.1:{_closed_port()}").register_level(level)


def test_check_of_a_running_server(registry: MlflowRegistry) -> None:
    registry.check()


def test_check_of_nothing_and_of_silence(tmp_path: Path) -> None:
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (_closed_port(), silent.getsockname()[1]):
            start = time.monotonic()
            with pytest.raises(RegistryUnavailableError, match=r"no answer.*(refused|timed out)"):
                MlflowRegistry(f"http://127.0.0.1:{port}").check()
            assert time.monotonic() - start < 15


@pytest.fixture
def answering() -> Iterator[Callable[[int], str]]:
    """Starts an HTTP server that answers everything with one status."""
    with ExitStack() as stack:

        def start(status: int) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    self.send_response(status)
                    self.send_header("Content-Type", "text/plain")
                    self.end_headers()
                    self.wfile.write(b"no JSON")

                def log_message(self, *_: object) -> None:
                    pass

                do_POST = do_GET  # noqa: N815 - the name is http.server's

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, PermanentError),
        (401, InputError),
        (403, InputError),
        (429, RegistryUnavailableError),
        (500, RegistryUnavailableError),
        (503, RegistryUnavailableError),
    ],
)
def test_statuses_decide_about_another_try(
    answering: Callable[[int], str], monkeypatch: pytest.MonkeyPatch, status: int, error: type[GispError]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = MlflowRegistry(answering(status))
    with pytest.raises(error) as caught:
        _open(registry)
    assert type(caught.value) is error
    with pytest.raises(RegistryUnavailableError if status >= 429 else InputError, match=f"HTTP {status}"):
        registry.check()


def test_an_answer_without_mlflow_is_refused(answering: Callable[[int], str]) -> None:
    with pytest.raises(InputError, match="no MLflow tracking server"):
        MlflowRegistry(answering(200)).check()


def test_the_password_is_in_no_message(answering: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "very-secret")
    with pytest.raises(InputError, match="refuses the credentials") as caught:
        MlflowRegistry(answering(401)).check()
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["ftp://host", "mlruns", "http://user:secret@host", "https://token@host"])
def test_addresses_that_are_refused(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        MlflowRegistry(uri)
    assert "secret" not in str(caught.value)
    assert "token@" not in str(caught.value)


def test_check_of_database_files(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, and it is longer than the header of one " * 20)
    for name in ("text.db", "text.db/below.db", "."):
        with pytest.raises(InputError, match="cannot be used"):
            MlflowRegistry(f"sqlite:///{tmp_path}/{name}").check()


def test_a_database_file_serves_without_a_server(tmp_path: Path, model: Path) -> None:
    registry = MlflowRegistry(f"sqlite:///{tmp_path}/new/mlflow.db")
    registry.check()
    run = _open(registry)
    registry.log_text(run, "text", artifact_file="recipe.yaml")
    assert len(list((tmp_path / "new" / "mlartifacts").rglob("recipe.yaml"))) == 1
    level = LevelVersion(
        model_name="tiny",
        level="sp40",
        source=model.as_uri(),
        digest="ab" * 32,
        run_id=RUN_ID,
        mlflow_run=run,
        gate_passed=True,
    )
    assert registry.register_level(level) == registry.register_level(level)
    assert _serve(f"sqlite:///{tmp_path}/new/mlflow.db", "models:/tiny@sp40").startswith("Once upon a time")


def test_a_level_in_s3_is_served_by_its_alias(
    mlflow_server: Service, registry: MlflowRegistry, level: LevelVersion, s3: Any, model: Path
) -> None:
    import boto3

    bucket = boto3.resource("s3").Bucket(s3.bucket)
    for path in (path for path in model.rglob("*") if path.is_file()):
        bucket.upload_file(str(path), f"registry-test/sp40/{path.relative_to(model)}")
    registry.register_level(dataclasses.replace(level, source=f"s3://{s3.bucket}/registry-test/sp40"))
    assert _serve(mlflow_server.url, f"models:/{level.model_name}@sp40").startswith("Once upon a time")


@pytest.fixture
def model(testdata: Path, tmp_path: Path) -> Path:
    """A tiny real Llama as an MLflow model."""
    directory = tmp_path / "level"
    shutil.copytree(testdata / "models" / "stories260K", directory / "model")
    write_mlmodel(directory, digest="ab" * 32)
    return directory


def _serve(tracking_uri: str, model_uri: str) -> str:
    """The answer of a process that has MLflow and not this package."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE, tracking_uri, model_uri],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (answer,) = json.loads(done.stdout.splitlines()[-1])
    return str(answer)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
