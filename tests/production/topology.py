"""The whole topology, and one recipe that runs through it into a fresh place each time."""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from airflow_api import Api
from airflow_stack import OPERATOR, AirflowStack, DagRun
from backends import ADMIN, PIPELINE, Mlflow, Postgres, redis
from daemons import MARK, Daemon, processes_of
from fault_proxy import FaultProxy

from gisp_tasks.demo.services import free_ports, start_s3
from gisp_tasks.stores.manifest import check_seal
from gisp_tasks.stores.registry import RUN_TAG

BUCKET = "gisp"
NAME = "production"
DAG_ID = f"gisp_{NAME}"
MODEL_NAME = "production-gisp"
STEPS = 4
LEVELS = {"sp20": 0.2, "sp40": 0.4}
TASK_OF_STEPS_1_2, TASK_OF_STEPS_3_4 = "step_001_to_002.score_and_prune", "step_003_to_004.score_and_prune"
_TIMEOUT_S = 1500.0
# Less what may differ between two runs of the same bytes: timings, and the pages that show them.
_COMPARED = re.compile(
    r"removal_order\.safetensors|steps/\d+/(scores|removal_order)\.safetensors|calibration/.*"
    r"|levels/[^/]+/(model/.*|MLmodel|level\.json|evaluation\.json|reload\.json)|plan\.json|recipe\.yaml|manifest\.json"
)


@dataclass(frozen=True)
class Outcome:
    """A finished run, checked.

    Args:
        seconds: from trigger to the end.
        run_id: of the pipeline.
        digests: key below the run's prefix -> sha256 of the object's bytes.
        attempts: task -> number of attempts, where more than one was needed.
    """

    seconds: float
    run_id: str
    digests: Mapping[str, str]
    attempts: Mapping[str, int]


class Topology:
    """Everything that runs.

    Args:
        directory: for all of it.
        model: directory of the base model.
        stack: stops what is started.
    """

    def __init__(self, directory: Path, model: Path, stack: ExitStack) -> None:
        self.mark = uuid.uuid4().hex
        self._model = model
        self._num_runs = 0
        self._recipes = directory / "recipes"
        self._recipes.mkdir()
        postgres_port, redis_port, mlflow_port, *airflow_ports = free_ports(11)
        own = {MARK: self.mark, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

        self._s3 = stack.enter_context(start_s3(directory / "s3", access_key="pipeline", secret_key="pipeline-secret"))
        self.s3_proxy = stack.enter_context(FaultProxy(self._s3.port))
        postgres = Postgres(postgres_port)
        stack.callback(postgres.stop)
        postgres.start()
        self.redis = redis(redis_port, directory, own)
        stack.callback(self.redis.stop)
        self.redis.start()
        self._mlflow = Mlflow(postgres, mlflow_port, directory, own)
        stack.callback(self._mlflow.daemon.stop)
        self._mlflow.prepare()
        self.mlflow_proxy = stack.enter_context(FaultProxy(mlflow_port))
        postgres.create("airflow")
        through_proxies = dict.fromkeys(("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"), self.s3_proxy.url)
        self.airflow = AirflowStack(
            directory,
            ports=airflow_ports,
            database=postgres.url("airflow"),
            broker=f"redis://127.0.0.1:{redis_port}/0",
            environment={
                **own,
                **self._s3.environment,
                **through_proxies,
                "MLFLOW_TRACKING_USERNAME": PIPELINE[0],
                "MLFLOW_TRACKING_PASSWORD": PIPELINE[1],
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "HF_HUB_OFFLINE": "1",
                "GISP_RECIPES": str(self._recipes),
            },
        )
        stack.callback(self.airflow.stop)
        self._write_recipe("s3://gisp/first")
        self.airflow.start()
        self._make_bucket()

    @property
    def mlflow(self) -> Daemon:
        """MLflow's server."""
        return self._mlflow.daemon

    @contextmanager
    def run(self) -> Iterator["Attempt"]:
        """The recipe, started into an empty prefix of the store and an empty registry."""
        self._num_runs += 1
        store = f"s3://{BUCKET}/run-{self._num_runs}"
        self._mlflow.renew()
        self._write_recipe(store)
        self._wait_for_dag(store)
        api = Api(self.airflow.url, OPERATOR)
        run_id = api.send("POST", f"/dags/{DAG_ID}/dagRuns", {"logical_date": None})["dag_run_id"]
        yield Attempt(self, DagRun(api, DAG_ID, run_id), store.removeprefix(f"s3://{BUCKET}/"))

    def s3_client(self) -> Any:
        """A client that goes past the proxy."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self._s3.url,
            aws_access_key_id="pipeline",
            aws_secret_access_key="pipeline-secret",
            region_name="us-east-1",
        )

    def mlflow_client(self) -> Any:
        """A client that goes past the proxy; the login is in the environment (see `conftest`)."""
        from mlflow import MlflowClient

        return MlflowClient(self._mlflow.url, self._mlflow.url)

    def _make_bucket(self) -> None:
        """A bucket that keeps every version of an object, to show that nothing is written twice."""
        client = self.s3_client()
        client.create_bucket(Bucket=BUCKET)
        client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})

    def _write_recipe(self, store: str) -> None:
        recipe = {
            "name": NAME,
            "model": {"source": str(self._model), "dtype": "float32"},
            # A step takes some seconds of one core: long enough to be in the middle of it.
            "calibration": {"dataset": "embedded", "sequences": 384, "sequence_length": 128},
            "pruning": {"levels": list(LEVELS.values()), "steps": STEPS},
            "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 1025}},
            "publish": {
                "store": store,
                "mlflow": {"tracking_uri": self.mlflow_proxy.url, "model_name": MODEL_NAME},
                "gate": {"max_perplexity_ratio": 50},
            },
            "airflow": {"pool": "gpu", "queue": "gpu", "steps_per_task": 2},
        }
        partial = self._recipes / "production.partial"
        partial.write_text(yaml.safe_dump(recipe))
        partial.replace(self._recipes / "production.yaml")

    def _wait_for_dag(self, store: str) -> None:
        """Return when Airflow knows the recipe as it is now, unpaused."""
        api = Api(self.airflow.url, ADMIN)
        deadline = time.monotonic() + 180
        while f"store: {store}\n" not in self._documentation(api):
            assert time.monotonic() < deadline, "the DAG processor did not see the recipe"
            time.sleep(1)
        api.send("PATCH", f"/dags/{DAG_ID}", {"is_paused": False})

    @staticmethod
    def _documentation(api: Api) -> str:
        if DAG_ID not in {dag["dag_id"] for dag in api.get("/dags?limit=100")["dags"]}:
            return ""
        return str(api.get(f"/dags/{DAG_ID}/details")["doc_md"])


class Attempt:
    """One run of the recipe through the topology.

    Args:
        topology: where it runs.
        dag_run: as Airflow sees it.
        prefix: of its store in the bucket.
    """

    def __init__(self, topology: Topology, dag_run: DagRun, prefix: str) -> None:
        self._topology = topology
        self.dag_run = dag_run
        self._prefix = f"{prefix}/runs/"

    def wait_for_object(self, ending: str, *, timeout_s: float = 900) -> None:
        """Return when an object whose key ends so is published."""
        client = self._topology.s3_client()
        deadline = time.monotonic() + timeout_s
        while not any(key.endswith(ending) for key in self._versions(client)):
            assert time.monotonic() < deadline, f"{ending} was not published in {timeout_s:.0f} s"
            time.sleep(0.2)

    def outcome(self) -> Outcome:
        """Wait for the end, and check that nothing is lost, nothing is there twice, and nothing runs on."""
        seconds = self.dag_run.wait(timeout_s=_TIMEOUT_S)
        digests, run_id = self._published()
        self._check_registry(run_id)
        self._check_processes()
        attempts = {name: int(task["try_number"]) for name, task in self.dag_run.tasks().items()}
        repeated = {name: number for name, number in attempts.items() if number > 1}
        return Outcome(seconds, run_id, digests, repeated)

    def _published(self) -> tuple[dict[str, str], str]:
        """Digests of what was published, each object once; and the one finished run's id."""
        client = self._topology.s3_client()
        versions = self._versions(client)
        assert {key: count for key, count in versions.items() if count != 1} == {}, "objects were written again"
        bytes_of = {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in versions}
        manifests = [key for key in bytes_of if key.endswith("/manifest.json")]
        assert len(manifests) == 1, manifests
        manifest = json.loads(bytes_of[manifests[0]])
        check_seal(manifest)
        assert [level["name"] for level in manifest["levels"]] == ["dense", *LEVELS]
        assert len(manifest["steps"]) == STEPS
        below = f"{self._prefix}{manifest['run_id']}/"
        names = {key.removeprefix(below): hashlib.sha256(data).hexdigest() for key, data in bytes_of.items()}
        names["manifest.json"] = manifest["sha256"]  # of all but who triggered the run, which differs
        return {name: digest for name, digest in names.items() if _COMPARED.fullmatch(name)}, manifest["run_id"]

    def _versions(self, client: Any) -> dict[str, int]:
        """Key -> how often it was written."""
        counts: dict[str, int] = {}
        for page in client.get_paginator("list_object_versions").paginate(Bucket=BUCKET, Prefix=self._prefix):
            for version in page.get("Versions", []):
                counts[version["Key"]] = counts.get(version["Key"], 0) + 1
        return counts

    def _check_registry(self, run_id: str) -> None:
        """One MLflow run, finished; one version a level, each under its alias."""
        client = self._topology.mlflow_client()
        experiment = client.get_experiment_by_name(NAME)
        runs = client.search_runs([experiment.experiment_id])
        assert [(run.data.tags[RUN_TAG], run.info.status) for run in runs] == [(run_id, "FINISHED")]
        logged = {metric.step for metric in client.get_metric_history(runs[0].info.run_id, "step.objective")}
        assert logged == set(range(1, STEPS + 1)), "a step's metrics are lost"
        versions = client.search_model_versions(f"name = '{MODEL_NAME}'")
        assert sorted(version.tags["gisp.level"] for version in versions) == list(LEVELS)
        aliases = client.get_registered_model(MODEL_NAME).aliases
        expected = {version.tags["gisp.level"]: str(version.version) for version in versions}
        assert {alias: str(number) for alias, number in aliases.items()} == expected

    def _check_processes(self) -> None:
        """The work of a run ends with it."""
        deadline = time.monotonic() + 60
        while running := processes_of(self._topology.mark, running="gisp_tasks.tasks.child"):
            assert time.monotonic() < deadline, f"still running: {running}"
            time.sleep(1)
