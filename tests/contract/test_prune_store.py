"""Retention on a directory and on a real S3 server: nothing that a registry or another run needs is ever removed."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from gisp_tasks import cli
from gisp_tasks.errors import InputError, RegistryUnavailableError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.artifacts import Store, open_store
from gisp_tasks.stores.registry import RUN_TAG, MlflowRegistry
from gisp_tasks.tasks import prune_store

FINISHED = {Keys.MANIFEST: b"{}", Keys.level("sp20", "level.json"): b"{}", Keys.level("sp20", "model/a.bin"): b"w" * 99}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    return open_store(f"s3://{request.getfixturevalue('s3').bucket}/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry: MLflow migrates a new file for seconds, so it is made once."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    MlflowRegistry(f"sqlite:///{path}").check()
    return path


@pytest.fixture
def tracking_uri(migrated: Path, tmp_path: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri, uri).create_registered_model("m")
    return uri


def _put_run(store: Store, *, source: str = "a/model", model_name: str | None = "m", **artefacts: Any) -> str:
    """A run with what decides about it; ``artefacts=FINISHED`` by default."""
    run_id = uuid.uuid4().hex[:12]
    mlflow = model_name and {"model_name": model_name}
    first = {
        Keys.RECIPE: yaml.safe_dump({"publish": {"mlflow": mlflow}}).encode(),
        Keys.MODEL: json.dumps({"source": source}).encode(),
    }
    for name, data in {**first, **artefacts.get("artefacts", FINISHED)}.items():
        store.put_bytes(f"runs/{run_id}/{name}", data)
    return run_id


def _register(uri: str, source: str, *, tags: dict[str, str] | None = None) -> str:
    version = MlflowClient(uri, uri).create_model_version("m", source, tags=tags)
    return f"m/{version.version}"


def _in_days(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    later = time.time() + days * 86_400
    monkeypatch.setattr(prune_store.time, "time", lambda: later)


def _reasons(store: Store, tracking_uri: str, keep_days: float = 30) -> dict[str, str | None]:
    found = prune_store.review(store.uri, tracking_uri=tracking_uri, keep_days=keep_days)
    return {run.run_id: run.kept_because for run in found.runs}


def test_why_each_run_stays_or_goes(store: Store, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = _put_run(store)
    abandoned = _put_run(store, artefacts={Keys.PLAN: b"{}"})
    killed_at_once = _put_run(store)
    for name in (Keys.MODEL, *FINISHED):
        store.delete(f"runs/{killed_at_once}/{name}")
    registered = _put_run(store)
    copied = _put_run(store)
    version = _register(tracking_uri, f"{store.uri}/runs/{registered}/levels/sp20")
    copy = _register(tracking_uri, "s3://another/place", tags={RUN_TAG: copied})
    base = _put_run(store)
    child = _put_run(store, source=f"{store.uri}/runs/{base}/levels/sp20/model")
    elsewhere = _put_run(store, model_name="other")
    unpublished = _put_run(store, model_name=None)
    store.put_bytes("runs/notes.txt", b"a user's")
    store.put_bytes("elsewhere/runs/0123456789ab/plan.json", b"{}")

    assert set(_reasons(store, tracking_uri).values()) >= {"younger than 30 days"}
    _in_days(monkeypatch, 31)
    assert _reasons(store, tracking_uri) == {
        unused: None,
        abandoned: None,
        killed_at_once: None,
        registered: f"registered as {version}",
        copied: f"registered as {copy}",
        base: f"base model of run {child}",
        child: None,
        elsewhere: "published to other, a model that this registry does not have",
        unpublished: None,
    }
    assert None not in _reasons(store, tracking_uri, keep_days=40).values()


def test_one_late_artefact_keeps_a_run(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    store = open_store((tmp_path / "store").as_uri())
    run_id = _put_run(store, artefacts={Keys.PLAN: b"{}"})
    old = time.time() - 100 * 86_400
    for path in (tmp_path / "store").rglob("*.json"):
        os.utime(path, (old, old))
    assert _reasons(store, tracking_uri) == {run_id: "younger than 30 days"}


def test_removal_leaves_everything_else(store: Store, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    going, staying = _put_run(store), _put_run(store)
    _register(tracking_uri, f"{store.uri}/runs/{staying}/levels/sp20")
    store.put_bytes("notes.txt", b"a user's")
    _in_days(monkeypatch, 31)
    found = prune_store.review(store.uri, tracking_uri=tracking_uri, keep_days=30)
    before = set(store.keys())
    removed = prune_store.remove(store.uri, found, tracking_uri=tracking_uri)
    assert [run.run_id for run in removed.runs] == [going]
    assert removed.num_bytes == found.num_bytes > 99
    assert set(store.keys()) == {key for key in before if going not in key}
    assert list(store.keys(f"runs/{staying}"))


def test_a_level_registered_meanwhile_stays(store: Store, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = _put_run(store)
    _in_days(monkeypatch, 31)
    found = prune_store.review(store.uri, tracking_uri=tracking_uri, keep_days=30)
    _register(tracking_uri, f"{store.uri}/runs/{run_id}/levels/sp20")
    before = set(store.keys())
    assert prune_store.remove(store.uri, found, tracking_uri=tracking_uri).runs == ()
    assert set(store.keys()) == before


@pytest.mark.parametrize("survivors", [1, 3])
def test_a_removal_cut_short_leaves_no_record_of_what_is_gone(
    store: Store, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    run_id = _put_run(store)
    _in_days(monkeypatch, 31)
    found = prune_store.review(store.uri, tracking_uri=tracking_uri, keep_days=30)
    delete, left = type(store).delete, [5 - survivors]

    def dying(self: Store, key: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "delete", dying)
        with pytest.raises(KeyboardInterrupt):
            prune_store.remove(store.uri, found, tracking_uri=tracking_uri)
    keys = {key.removeprefix(f"runs/{run_id}/") for key in store.keys(f"runs/{run_id}")}
    assert len(keys) == survivors
    assert Keys.MANIFEST not in keys
    if Keys.level("sp20", "model/a.bin") not in keys:
        assert not {key for key in keys if key.endswith(".json")}
    again = prune_store.review(store.uri, tracking_uri=tracking_uri, keep_days=30)
    prune_store.remove(store.uri, again, tracking_uri=tracking_uri)
    assert not list(store.keys("runs"))


def test_more_versions_than_a_page(store: Store, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = _put_run(store)
    _register(tracking_uri, f"{store.uri}/runs/{run_id}/levels/sp20")
    for _ in range(4):
        _register(tracking_uri, "s3://another/place")
    _in_days(monkeypatch, 31)
    monkeypatch.setattr("gisp_tasks.stores.registry._ENTRIES_PER_PAGE", 2)
    assert _reasons(store, tracking_uri) == {run_id: "registered as m/1"}


def test_no_registry_no_removal(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store((tmp_path / "store").as_uri())
    _put_run(store)
    _in_days(monkeypatch, 31)
    with pytest.raises(RegistryUnavailableError, match="no answer"):
        prune_store.review(store.uri, tracking_uri="http://127.0.0.1:9", keep_days=30)
    with pytest.raises(InputError, match="there is no such file"):
        prune_store.review(store.uri, tracking_uri=f"sqlite:///{tmp_path}/typo.db", keep_days=30)
    assert not (tmp_path / "typo.db").exists()

    found = prune_store.review(store.uri, tracking_uri=tracking_uri, keep_days=30)
    before = set(store.keys())

    def away(self: MlflowRegistry) -> Any:
        raise RegistryUnavailableError("gone")

    monkeypatch.setattr(MlflowRegistry, "inventory", away)
    with pytest.raises(RegistryUnavailableError):
        prune_store.remove(store.uri, found, tracking_uri=tracking_uri)
    assert set(store.keys()) == before


def test_the_command_shows_first_and_removes_with_yes(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    run_id = _put_run(store)
    _in_days(monkeypatch, 31)

    def call(*options: str, status: int = 0, environment: dict[str, str] | None = None) -> Any:
        done = CliRunner().invoke(cli.app, ["prune-store", store.uri, *options], env=environment)
        assert done.exit_code == status, done.output
        return done

    named = {"MLFLOW_TRACKING_URI": tracking_uri}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "set MLFLOW_TRACKING_URI" in call(status=2).stderr
    assert run_id in call("--keep-days", "30", environment=named).stdout
    assert "0 of 1 runs" in call("--keep-days", "32", "--yes", "--tracking-uri", tracking_uri).stdout
    assert list(store.keys(f"runs/{run_id}"))
    told = json.loads(call("--keep-days", "30", "--json", environment=named).stdout)
    assert told["removed"] == []
    size = sum(item.size for item in store.objects(f"runs/{run_id}"))
    assert told["bytes_to_free"] == told["runs"][0]["num_bytes"] == size
    told = json.loads(call("--keep-days", "30", "--json", "--yes", environment=named).stdout)
    assert told["removed"] == [run_id]
    assert not list(store.keys())
    call("--keep-days", "0", "--yes", status=2, environment=named)
