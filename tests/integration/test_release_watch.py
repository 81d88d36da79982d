"""The release watch in a real Airflow: a revision starts its recipe once, whatever happens around it."""

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow_api import Api
from airflow_process import WITH_EXAMPLES, Airflow, airflow_process
from fake_hub import FakeHub, fake_hub
from s3_models import upload_release

from gisp_tasks.demo.services import Service, start_airflow
from gisp_tasks.errors import InputError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.tasks.resolve_model import resolve_model
from gisp_tasks.tasks.runtime import Run

FIRST, SECOND = "1" * 40, "2" * 40
Json = dict[str, Any]
WriteRecipe = Callable[..., None]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture(scope="module")
def airflow(hub: FakeHub, s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    home = tmp_path_factory.mktemp("watch")
    with airflow_process(home, {**s3_server.environment, "HF_ENDPOINT": hub.url}) as process:
        yield process


@pytest.fixture
def write_recipe(airflow: Airflow, tmp_path: Path) -> Iterator[WriteRecipe]:
    """Write a watched recipe; all of them are gone after the test, so that no other one parses them."""

    def write(name: str, source: str, **sections: Json) -> None:
        recipe = {
            "name": name,
            "model": {"source": source},
            "calibration": {"dataset": "embedded"},
            "pruning": {"levels": [0.2], "steps": 1},
            "evaluation": {"embedded_text": {}},
            "publish": {"store": f"file://{tmp_path}/store"},
            "airflow": {"watch": "@daily", "retries": 1},
        }
        (airflow.recipes / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, **sections}))

    yield write
    for path in airflow.recipes.glob("*.yaml"):
        path.unlink()


def _started(tick: Json) -> str:
    """State of the task that starts the recipe."""
    assert tick["state"] == "success", tick
    assert tick["tasks"]["look_up"] == ["success", 1]
    return str(tick["tasks"]["start"][0])


def test_a_new_revision_starts_the_recipe_once(airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe) -> None:
    write_recipe("once", "org/once")
    hub.commits["org/once"] = FIRST
    assert _started(airflow.tick("watch_gisp_once")) == "success"
    (run,) = airflow.runs("gisp_once")
    assert re.fullmatch(rf"watch__[0-9a-f]{{12}}__{FIRST}", run["run_id"])
    assert (run["conf"], run["state"]) == ({"revision": FIRST}, "queued")
    assert _started(airflow.tick("watch_gisp_once")) == "skipped"
    assert airflow.runs("gisp_once") == [run]


def test_a_second_revision_waits_behind_the_first(airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe) -> None:
    write_recipe("two", "org/two")
    for commit in (FIRST, SECOND):
        hub.commits["org/two"] = commit
        assert _started(airflow.tick("watch_gisp_two")) == "success"
    found = airflow.runs("gisp_two")
    assert [(run["conf"]["revision"], run["state"]) for run in found] == [(FIRST, "queued"), (SECOND, "queued")]


def test_two_recipes_of_one_model_run_once_each(airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe) -> None:
    hub.commits["org/shared"] = FIRST
    for name in ("left", "right"):
        write_recipe(name, "org/shared")
    for _ in range(2):
        for name in ("left", "right"):
            airflow.tick(f"watch_gisp_{name}")
    assert [len(airflow.runs(f"gisp_{name}")) for name in ("left", "right")] == [1, 1]


def test_what_changes_the_bytes_of_a_run_makes_it_another(
    airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe
) -> None:
    hub.commits["org/changed"] = FIRST
    write_recipe("changed", "org/changed")
    airflow.tick("watch_gisp_changed")
    write_recipe("changed", "org/changed", airflow={"watch": "@hourly", "retries": 0})
    assert _started(airflow.tick("watch_gisp_changed")) == "skipped"
    write_recipe("changed", "org/changed", pruning={"levels": [0.3], "steps": 1})
    assert _started(airflow.tick("watch_gisp_changed")) == "success"
    assert [run["conf"] for run in airflow.runs("gisp_changed")] == [{"revision": FIRST}] * 2


def test_a_hub_that_is_down_is_asked_again_and_starts_nothing(
    airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe
) -> None:
    write_recipe("down", "org/down")
    hub.commits["org/down"] = FIRST
    hub.failures = 1000
    tick = airflow.tick("watch_gisp_down")
    assert (tick["state"], tick["tasks"]["look_up"]) == ("failed", ["failed", 2])
    assert tick["tasks"]["start"][0] == "upstream_failed"
    assert airflow.runs("gisp_down") == []
    hub.failures = 1
    tick = airflow.tick("watch_gisp_down")
    assert (tick["state"], tick["tasks"]["look_up"]) == ("success", ["success", 2])
    assert len(airflow.runs("gisp_down")) == 1


def test_a_model_that_is_not_there_fails_at_once(airflow: Airflow, write_recipe: WriteRecipe) -> None:
    write_recipe("missing", "org/missing")
    tick = airflow.tick("watch_gisp_missing")
    assert (tick["state"], tick["tasks"]["look_up"]) == ("failed", ["failed", 1])
    assert airflow.runs("gisp_missing") == []


@pytest.mark.parametrize("state", ["failed", "success", "running"])
def test_a_run_that_is_there_is_not_started_again(
    airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe, state: str
) -> None:
    write_recipe(state, f"org/{state}")
    hub.commits[f"org/{state}"] = FIRST
    airflow.tick(f"watch_gisp_{state}")
    (run,) = airflow.runs(f"gisp_{state}")
    airflow.end(f"gisp_{state}", run["run_id"], state)
    assert _started(airflow.tick(f"watch_gisp_{state}")) == "skipped"
    assert [run["state"] for run in airflow.runs(f"gisp_{state}")] == [state]


def test_missed_intervals_start_nothing_twice(airflow: Airflow, hub: FakeHub, write_recipe: WriteRecipe) -> None:
    write_recipe("late", "org/late")
    hub.commits["org/late"] = FIRST
    days = [f"2024-01-0{day}T00:00:00+00:00" for day in (1, 2, 3)]
    ticks = [_started(airflow.tick("watch_gisp_late", logical_date=day)) for day in days]
    assert ticks == ["success", "skipped", "skipped"]
    assert len(airflow.runs("gisp_late")) == 1


@pytest.fixture
def releases(s3: Any, request: pytest.FixtureRequest, testdata: Path) -> Callable[..., str]:
    """Upload a release of stories260K below a prefix; returns the prefix."""
    address = f"s3://{s3.bucket}/releases/{re.sub(r'[^a-z_]', '-', request.node.name)}"
    return partial(upload_release, testdata / "models/stories260K", address)


def test_a_release_counts_when_its_manifest_is_there(
    airflow: Airflow, write_recipe: WriteRecipe, releases: Callable[..., str]
) -> None:
    source = releases("v1", complete=False)
    write_recipe("released", source)
    tick = airflow.tick("watch_gisp_released")
    assert (tick["state"], tick["tasks"]["look_up"]) == ("failed", ["failed", 1])
    releases("v1")
    assert _started(airflow.tick("watch_gisp_released")) == "success"
    releases("v2", complete=False)
    assert _started(airflow.tick("watch_gisp_released")) == "skipped"
    assert [run["conf"] for run in airflow.runs("gisp_released")] == [{"revision": "v1"}]


def test_a_run_shows_the_revision_it_was_started_with_and_its_levels_are_events(
    airflow: Airflow, write_recipe: WriteRecipe, releases: Callable[..., str], tmp_path: Path
) -> None:
    source = releases("v1")
    releases("v2")
    write_recipe(
        "smollm2-135m",  # the one that the example waits for
        source,
        model={"source": source, "dtype": "float32"},
        calibration={"dataset": "embedded", "sequences": 4, "sequence_length": 32},
        pruning={"levels": [0.4], "steps": 1},
        evaluation={"embedded_text": {"windows": [64], "limit_tokens": 65}},
        publish={
            "store": f"file://{tmp_path}/store",
            "mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "model_name": "stories"},
            "gate": {"max_perplexity_ratio": 1000.0},
        },
    )
    assert airflow.tick("gisp_smollm2-135m", conf={"revision": "v1"})["state"] == "success"

    (run,) = (tmp_path / "store/runs").iterdir()
    manifest = json.loads((run / Keys.MANIFEST).read_text())
    assert manifest["recipe"]["model"]["revision"] == manifest["model"]["revision"] == "v1"
    assert manifest["model"]["revision_kind"] == "release"
    assert yaml.safe_load((run / Keys.RECIPE).read_text()) == manifest["recipe"]

    (told,) = airflow.events("x-gisp://smollm2-135m/sp40")
    level = manifest["levels"][1]
    assert told == {
        "recipe": "smollm2-135m",
        "level": "sp40",
        "run_id": manifest["run_id"],
        "base_source": source,
        "base_revision": "v1",
        "uri": f"file://{run}/levels/sp40",
        "model_name": "stories",
        "model_version": 1,
        "alias": "sp40",
        "digest": level["model"]["sha256"],
        "metrics": level["evaluation"]["metrics"],
        "gate": "passed",
    }
    assert open_store(told["uri"]).verify_directory("model").sha256 == told["digest"]
    assert airflow.tick("gisp_new_level")["tasks"]["take_over"] == ["success", 1]


def test_the_same_weights_give_the_same_run_however_they_were_named(
    releases: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GISP_CACHE", str(tmp_path / "cache"))
    recipe: Json = {
        "name": "named",
        "model": {"source": releases("v1"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 4, "sequence_length": 32},
        "pruning": {"levels": [0.4], "steps": 1},
        "evaluation": {"embedded_text": {"windows": [64], "limit_tokens": 65}},
        "publish": {"store": f"file://{tmp_path}/store"},
        "airflow": {"watch": "@daily"},
    }
    newest = resolve_model(recipe)
    assert resolve_model(recipe, revision="v1") == newest
    assert Run.open(recipe, newest).recipe.model.revision == "v1"
    with pytest.raises(InputError, match=r"revision=v2: no .*/v2/manifest\.json was found"):
        resolve_model(recipe, revision="v2")


# With Airflow's own scheduler.


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_scheduler_watches_backfills_and_hands_levels_on(
    s3_server: Any, mlflow_server: Service, testdata: Path, tmp_path: Path
) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    recipe = {
        "name": "smollm2-135m",
        "model": {"source": "org/model", "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 4, "sequence_length": 32},
        "pruning": {"levels": [0.4], "steps": 1},
        "evaluation": {"embedded_text": {"windows": [64], "limit_tokens": 65}},
        "publish": {
            "store": f"s3://{s3_server.bucket}/watched",
            "mlflow": {"tracking_uri": mlflow_server.url, "model_name": "watched"},
            "gate": {"max_perplexity_ratio": 1000.0},
        },
        "airflow": {"watch": "* * * * *"},
    }
    (recipes / "smollm2-135m.yaml").write_text(yaml.safe_dump(recipe))
    with fake_hub(testdata / "models/stories260K") as hub:
        hub.commits["org/model"] = FIRST
        environment = {
            **s3_server.environment,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            **WITH_EXAMPLES,
        }
        with start_airflow(tmp_path / "airflow", recipes=recipes, environment=environment) as airflow:
            api = Api(airflow.url)
            dags = ("gisp_new_level", "gisp_smollm2-135m", "watch_gisp_smollm2-135m")
            _wait(lambda: {dag["dag_id"] for dag in api.get("/dags?limit=100")["dags"]}.issuperset(dags), 180)
            for dag_id in dags:
                api.send("PATCH", f"/dags/{dag_id}", {"is_paused": False})
            _wait(lambda: _states(api, "gisp_smollm2-135m") == ["success"], 400)
            _wait(lambda: _states(api, "gisp_new_level") == ["success"], 120)

            window = {"from_date": "2024-01-01T00:00:00Z", "to_date": "2024-01-01T00:02:00Z"}
            api.send("POST", "/backfills", {"dag_id": dags[2], **window})
            _wait(lambda: _states(api, dags[2], "backfill") == ["success"] * 3, 240)
            assert _states(api, "gisp_smollm2-135m") == ["success"]

            hub.commits["org/model"] = SECOND
            _wait(lambda: _states(api, "gisp_smollm2-135m") == ["success"] * 2, 500)
            runs = api.get("/dags/gisp_smollm2-135m/dagRuns")["dag_runs"]
            assert {run["conf"]["revision"] for run in runs} == {FIRST, SECOND}
            assert {run["run_type"] for run in runs} == {"operator_triggered"}


def _states(api: Api, dag_id: str, run_type: str | None = None) -> list[str]:
    runs = api.get(f"/dags/{dag_id}/dagRuns?limit=100")["dag_runs"]
    return sorted(run["state"] for run in runs if run_type in (None, run["run_type"]))


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(1)
