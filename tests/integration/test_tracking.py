"""What the tracking server must know of a run, whenever it was away."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gisp_tasks.errors import RegistryUnavailableError
from gisp_tasks.tasks import prune
from gisp_tasks.tasks.prepare_calibration import prepare_calibration
from gisp_tasks.tasks.resolve_model import resolve_model
from gisp_tasks.tasks.score_and_prune import score_and_prune


def test_a_step_whose_metrics_could_not_be_logged_logs_them_when_it_is_tried_again(
    testdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = {
        "name": "tracked",
        "model": {"source": str(testdata / "models/stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 4, "sequence_length": 32},
        "pruning": {"levels": [0.4], "steps": 2},
        "evaluation": {"embedded_text": {"windows": [64], "limit_tokens": 65}},
        "publish": {"store": f"file://{tmp_path}/store", "mlflow": {"tracking_uri": uri, "model_name": "tracked"}},
    }
    plan = resolve_model(recipe)
    prepare_calibration(recipe, plan)
    log = prune.log_metrics

    def away_at_step_2(*arguments: Any, step: int) -> None:
        if step == 2:
            raise RegistryUnavailableError("away")
        log(*arguments, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "log_metrics", away_at_step_2)
        with pytest.raises(RegistryUnavailableError):
            score_and_prune(recipe, plan, [1, 2], None)
    score_and_prune(recipe, plan, [1, 2], None)

    client = MlflowClient(uri, uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tracked").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "step.objective")] == [1, 2]
