"""The DAG file: which tasks a recipe becomes, what hangs on what, and what parsing it costs."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from gisp_tasks import errors, local_airflow
from gisp_tasks.recipe import Recipe

RECIPES = sorted((local_airflow.DAGS_FOLDER / "recipes").glob("*.yaml"))
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "mlflow", "boto3", "matplotlib")
MAX_PARSE_S = 0.5
MODEL_TASKS = ("resolve_model", "score", "score_and_prune", "evaluate_embedded_text", "evaluate_embedded_arithmetic")

BASE: dict[str, Any] = {
    "name": "small",
    "model": {"source": "a/model"},
    "calibration": {"dataset": "embedded"},
    "pruning": {"levels": [0.2, 0.375], "steps": 3},
    "evaluation": {"embedded_text": {}, "embedded_arithmetic": {}},
    "publish": {
        "store": "s3://models/gisp",
        "mlflow": {"tracking_uri": "http://mlflow:5000", "model_name": "small-gisp"},
    },
    "airflow": {"pool": "gpu", "queue": "gpu-queue", "retries": 5, "schedule": "@weekly"},
}

LoadDag = Callable[..., Any]


@pytest.fixture(autouse=True)
def airflow_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Airflow writes its configuration where it is first imported."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "False")


@pytest.fixture
def load_dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadDag:
    """The DAG of `BASE` with some sections changed."""

    def load(**sections: Any) -> Any:
        value = {key: BASE.get(key, {}) for key in {**BASE, **sections}}
        for key, change in sections.items():
            value[key] = {**value[key], **change} if isinstance(change, dict) else change
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(value))
        monkeypatch.setenv("GISP_RECIPES", str(path))
        return local_airflow.load_dag(Recipe.load(path))

    return load


def _edges(dag: Any) -> dict[str, set[str]]:
    return {task.task_id: set(task.upstream_task_ids) for task in dag.tasks}


def _before(dag: Any, task_id: str) -> set[str]:
    """Everything that has ended when a task begins."""
    return {task.task_id for task in dag.get_task(task_id).get_flat_relatives(upstream=True)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_becomes_a_dag(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GISP_RECIPES", str(path))
    recipe = Recipe.load(path)
    dag = local_airflow.load_dag(recipe)
    assert dag.dag_id == f"gisp_{recipe.name}"
    dag.check_cycle()
    registered = [task_id for task_id in dag.task_ids if task_id.endswith(".register_model")]
    assert len(registered) == len(recipe.pruning.levels)
    assert path.read_text() in (dag.doc_md or "")


def test_shipped_recipes_have_different_names() -> None:
    names = [Recipe.load(path).name for path in RECIPES]
    assert len(set(names)) == len(names) >= 2


def test_tasks_and_edges(load_dag: LoadDag) -> None:
    dense = {"dense.evaluate_embedded_text", "dense.evaluate_embedded_arithmetic"}
    wanted = {
        "resolve_model": set(),
        "prepare_calibration": {"resolve_model"},
        "dense.evaluate_embedded_text": {"resolve_model"},
        "dense.evaluate_embedded_arithmetic": {"resolve_model"},
        "step_001.score": {"resolve_model", "prepare_calibration"},
        "step_001.prune": {"resolve_model", "step_001.score"},
        "step_002.score": {"resolve_model", "step_001.prune"},
        "step_002.prune": {"resolve_model", "step_001.prune", "step_002.score"},
        "step_003.score": {"resolve_model", "step_002.prune"},
        "step_003.prune": {"resolve_model", "step_002.prune", "step_003.score"},
    }
    # 3 steps to 0.375 reach 0.125, 0.25, 0.375: sp20 is complete after the second, sp37.5 after the third.
    for group, last_step in (("sp20", "step_002.prune"), ("sp37_5", "step_003.prune")):
        own = {f"{group}.evaluate_embedded_text", f"{group}.evaluate_embedded_arithmetic"}
        wanted[f"{group}.materialize"] = {"resolve_model", last_step}
        wanted |= {task_id: {"resolve_model", f"{group}.materialize"} for task_id in own}
        wanted[f"{group}.upload_to_s3"] = {"resolve_model", f"{group}.materialize", last_step} | own | dense
        wanted[f"{group}.register_model"] = {"resolve_model", f"{group}.upload_to_s3"}
    ends = {"sp20.register_model", "sp37_5.register_model", "step_003.prune"}
    wanted["report"] = {"resolve_model"} | ends | dense
    assert _edges(load_dag()) == wanted


def test_a_level_does_not_wait_for_later_steps(load_dag: LoadDag) -> None:
    before = _before(load_dag(), "sp20.register_model")
    assert "step_002.prune" in before
    assert not {task_id for task_id in before if task_id.startswith(("step_003", "sp37_5"))}


def test_report_is_last(load_dag: LoadDag) -> None:
    dag = load_dag()
    assert _before(dag, "report") == set(dag.task_ids) - {"report"}
    assert not dag.get_task("report").downstream_task_ids


def _publish(**promotion: Any) -> dict[str, Any]:
    return {**BASE["publish"], "promotion": promotion}


def test_a_promotion_by_the_gate_follows_the_report(load_dag: LoadDag) -> None:
    plain, edges = _edges(load_dag()), _edges(load_dag(publish=_publish(by="gate")))
    added = {name: edges.pop(name) for name in list(edges) if name not in plain}
    assert edges == plain
    assert added == {
        f"promotion.promote_{level}": {"resolve_model", "report", f"{level}.register_model"}
        for level in ("sp20", "sp37_5")
    }


def test_an_approval_asks_before_it_promotes(load_dag: LoadDag) -> None:
    dag = load_dag(publish=_publish(by="approval", approvers=["ana", "ben"], timeout_hours=0.5))
    edges = _edges(dag)
    for level in ("sp20", "sp37_5"):
        known = {"resolve_model", f"{level}.register_model"}
        assert edges[f"promotion.approve_{level}"] == {"report"} | known
        assert edges[f"promotion.promote_{level}"] == {f"promotion.approve_{level}"} | known
    asked = dag.get_task("promotion.approve_sp20")
    assert (asked.defaults, asked.response_timeout) == (["Reject"], timedelta(minutes=30))
    assert asked.assigned_users == [{"id": name, "name": name} for name in ("ana", "ben")]
    assert dag.params.dump() == {"revision": None, "resume": False, "wait_for_approval": True}
    # What fails here does not make the finished run a failed one.
    assert not asked.on_failure_callback
    assert not dag.get_task("promotion.promote_sp20").on_failure_callback
    assert dag.get_task("report").on_failure_callback


def test_the_scheduler_can_store_an_approval(load_dag: LoadDag) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    dag = load_dag(publish=_publish(by="approval", approvers=["ana"]))
    restored = DagSerialization.from_json(DagSerialization.to_json(dag))
    assert _edges(restored) == _edges(dag)


def test_fused_steps(load_dag: LoadDag) -> None:
    edges = _edges(load_dag(airflow={"steps_per_task": 2}))
    first, second = "step_001_to_002.score_and_prune", "step_003_to_003.score_and_prune"
    assert edges[first] == {"resolve_model", "prepare_calibration"}
    assert edges[second] == {"resolve_model", first}
    assert first in edges["sp20.materialize"]
    assert second in edges["sp37_5.materialize"]
    assert not [task_id for task_id in edges if task_id.endswith((".score", ".prune"))]


def test_a_level_in_the_middle_of_fused_steps_waits_for_their_end(load_dag: LoadDag) -> None:
    edges = _edges(load_dag(airflow={"steps_per_task": 3}))
    only = "step_001_to_003.score_and_prune"
    assert edges["sp20.materialize"] == edges["sp37_5.materialize"] == {"resolve_model", only}


def test_levels_of_compat_hang_on_the_last_step(load_dag: LoadDag) -> None:
    edges = _edges(load_dag(importance={"compat": "reference"}))
    assert edges["sp20.materialize"] == edges["sp37_5.materialize"] == {"resolve_model", "step_003.prune"}


def test_without_mlflow_the_upload_is_the_end_of_a_level(load_dag: LoadDag) -> None:
    edges = _edges(load_dag(publish={"mlflow": None}))
    assert not [task_id for task_id in edges if task_id.endswith("register_model")]
    assert {"sp20.upload_to_s3", "sp37_5.upload_to_s3"} < edges["report"]


@pytest.mark.parametrize("steps_per_task", [1, 2])
def test_tasks_that_use_the_accelerator_are_sent_to_it(load_dag: LoadDag, steps_per_task: int) -> None:
    dag = load_dag(airflow={"steps_per_task": steps_per_task})
    sent = {task.task_id for task in dag.tasks if (task.pool, task.queue) == ("gpu", "gpu-queue")}
    assert sent == {task_id for task_id in dag.task_ids if task_id.rsplit(".", 1)[-1] in MODEL_TASKS}
    assert {(task.pool, task.queue) for task in dag.tasks} == {("gpu", "gpu-queue"), ("default_pool", "default")}


def test_schedule_and_concurrency(load_dag: LoadDag) -> None:
    dag = load_dag()
    assert dag.max_active_runs == 1
    assert dag.catchup is False
    assert dag.schedule == "@weekly"
    assert load_dag(airflow={"schedule": None}).schedule is None


def test_params(load_dag: LoadDag) -> None:
    params = load_dag().params
    assert params.dump() == {"revision": None, "resume": False}
    params["revision"] = "0123abcd"
    params["resume"] = True
    assert params.validate() == {"revision": "0123abcd", "resume": True}
    for name, value in (("revision", 7), ("resume", "yes")):
        with pytest.raises(ValueError, match=r"is not (of type|valid)"):
            params[name] = value


def test_only_errors_that_may_pass_are_tried_again(load_dag: LoadDag) -> None:
    from airflow.sdk import RetryAction

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GispError)]
    for task in load_dag().tasks:
        assert task.retries == 5
        for kind in kinds:
            action = task.retry_policy.evaluate(kind("why"), try_number=1, max_tries=5).action
            wanted = RetryAction.FAIL if issubclass(kind, errors.PermanentError) else RetryAction.DEFAULT
            assert action is wanted, kind
        unforeseen = task.retry_policy.evaluate(OSError("why"), try_number=1, max_tries=5).action
        assert unforeseen is RetryAction.DEFAULT


def test_the_scheduler_can_store_it(load_dag: LoadDag) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    dag = load_dag()
    restored = DagSerialization.from_json(DagSerialization.to_json(dag))
    assert _edges(restored) == _edges(dag)
    task = restored.get_task("step_001.score")
    assert (task.pool, task.queue, task.retries, restored.max_active_runs) == ("gpu", "gpu-queue", 5, 1)


def test_a_bad_recipe_warns_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_dag: LoadDag
) -> None:
    load_dag()
    good, bad = tmp_path / "small.yaml", tmp_path / "bad.yaml"
    bad.write_text("name: bad\nmodle: {source: a/model}\n")
    monkeypatch.setenv("GISP_RECIPES", os.pathsep.join([str(bad), str(good)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dag = local_airflow.load_dag(Recipe.load(good))
    assert dag.dag_id == "gisp_small"
    messages = [str(warning.message) for warning in caught if "no DAG was made" in str(warning.message)]
    assert len(messages) == 1
    assert "bad.yaml" in messages[0]
    assert "modle: unknown key. Did you mean 'model'?" in messages[0]
    assert "gisp_bad" not in vars(sys.modules["gisp_recompression"])


_PARSE = """
import importlib.util, json, sys, time
import airflow.sdk
spec = importlib.util.spec_from_file_location("gisp_recompression", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["gisp_recompression"] = module
began = time.process_time()
spec.loader.exec_module(module)
dags = [name for name in vars(module) if name.startswith("gisp_")]
print(json.dumps({"seconds": time.process_time() - began, "modules": list(sys.modules), "dags": dags}))
"""


def _parse(path: Path, home: Path, **environment: str) -> dict[str, Any]:
    """What parsing a DAG file in a new process takes and leaves."""
    known = {name: value for name, value in os.environ.items() if name != "GISP_RECIPES"}
    done = subprocess.run(
        [sys.executable, "-W", "error:no DAG was made", "-c", _PARSE, str(path)],
        env={**known, "AIRFLOW_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not set(HEAVY) & set(outcome["modules"])
    return outcome


def test_parsing_is_light(tmp_path: Path) -> None:
    path = local_airflow.DAGS_FOLDER / "gisp_recompression.py"
    outcomes = [_parse(path, tmp_path) for _ in range(3)]
    assert all(len(set(outcome["dags"]) - {"gisp_tasks"}) == len(RECIPES) for outcome in outcomes)
    assert min(outcome["seconds"] for outcome in outcomes) < MAX_PARSE_S


# Assets, the release watch, the example.


def test_every_level_is_an_asset_of_its_own(load_dag: LoadDag) -> None:
    dag = load_dag()
    found = {task.task_id: [asset.uri for asset in task.outlets] for task in dag.tasks if task.outlets}
    assert found == {
        "sp20.register_model": ["x-gisp://small/sp20"],
        "sp37_5.register_model": ["x-gisp://small/sp37.5"],
    }
    moved = load_dag(publish={"store": "s3://elsewhere/gisp"})
    assert moved.get_task("sp20.register_model").outlets == dag.get_task("sp20.register_model").outlets


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_recipes_that_ask_for_it_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, watch in (("watched", "0 3 * * *"), ("left-alone", None)):
        value = {**BASE, "name": name, "airflow": {"watch": watch, "retries": 2}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(value))
    monkeypatch.setenv("GISP_RECIPES", str(tmp_path))
    path = local_airflow.DAGS_FOLDER / "gisp_release_watch.py"
    module = _load(path)
    assert [name for name in vars(module) if name.startswith("watch_gisp_")] == ["watch_gisp_watched"]
    dag = vars(module)["watch_gisp_watched"]
    assert (dag.dag_id, dag.schedule, dag.catchup, dag.max_active_runs) == ("watch_gisp_watched", "0 3 * * *", False, 1)
    assert _edges(dag) == {"look_up": set(), "start": {"look_up"}}
    start = dag.get_task("start")
    assert (start.trigger_dag_id, start.skip_when_already_exists, start.reset_dag_run) == ("gisp_watched", True, False)
    assert {task.retries for task in dag.tasks} == {2}
    _parse(path, tmp_path, GISP_RECIPES=str(tmp_path))


def test_the_example_waits_for_a_level_of_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local_airflow.DAGS_FOLDER.parent / "examples" / "gisp_new_level.py"
    level = _load(path).LEVEL
    recipe = Recipe.load(local_airflow.DAGS_FOLDER / "recipes" / "smollm2-135m.yaml")
    monkeypatch.setenv("GISP_RECIPES", str(local_airflow.DAGS_FOLDER / "recipes" / "smollm2-135m.yaml"))
    outlets = [asset for task in local_airflow.load_dag(recipe).tasks for asset in task.outlets]
    assert level in outlets
    _parse(path, tmp_path)
