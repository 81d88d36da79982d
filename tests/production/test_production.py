"""The pipeline in production shape, while parts of the topology fail.

PostgreSQL, Redis, CeleryExecutor with an API server, a scheduler, a DAG processor, a triggerer and a worker for each
of two queues, MLflow with logins on PostgreSQL, and an S3 server; started through the REST API by a user who is no
administrator. Every disturbed run must end by itself in the same bytes as the undisturbed one, with every object
written once, one MLflow run, and one version a level. ``--fault-repeats 3`` tries each fault at three moments.
"""

import time
import urllib.error
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from airflow_api import Api
from airflow_stack import OPERATOR
from daemons import Daemon, processes_of
from topology import TASK_OF_STEPS_1_2, TASK_OF_STEPS_3_4, Attempt, Outcome, Topology

pytestmark = pytest.mark.timeout(1800)

Note = Callable[[str], None]


def test_undisturbed(undisturbed: Outcome, note: Note) -> None:
    assert undisturbed.attempts == {}
    assert {"removal_order.safetensors", "manifest.json", "levels/sp40/level.json"} <= undisturbed.digests.keys()
    note(f"undisturbed: run {undisturbed.run_id}, {undisturbed.seconds:.0f} s, {len(undisturbed.digests)} objects")


def test_who_starts_runs_may_do_no_more(topology: Topology, undisturbed: Outcome) -> None:
    api = Api(topology.airflow.url, OPERATOR)
    with pytest.raises(urllib.error.HTTPError) as refused:
        api.send("POST", "/pools", {"name": "more", "slots": 100})
    assert refused.value.code == 403
    with pytest.raises(urllib.error.HTTPError) as unknown:
        Api(topology.airflow.url, (OPERATOR[0], "a guess"))
    assert unknown.value.code == 401


class TestFault:
    """Each test: start the recipe, disturb, wait, and hold the outcome against the undisturbed run."""

    def test_a_gpu_worker_dies_in_the_middle_of_a_step(self, topology, undisturbed, repeat, note) -> None:
        """Kill -9 for the worker, its task and the work; another worker starts 5 s later."""
        task, published = [
            (TASK_OF_STEPS_1_2, "calibration/tokens.safetensors"),
            (TASK_OF_STEPS_3_4, "steps/0003/removal_order.safetensors"),
            (TASK_OF_STEPS_1_2, "steps/0001/removal_order.safetensors"),
        ][repeat % 3]
        with topology.run() as attempt:
            attempt.wait_for_object(published)
            attempt.dag_run.wait_for(task, ("running",))
            _wait_until_it_computes(topology)
            topology.airflow.workers["gpu"].kill()
            killed = datetime.now(UTC)
            time.sleep(5)
            topology.airflow.start_worker("gpu", concurrency=1)
            outcome = _compare(attempt, undisturbed)
            assert outcome.attempts.keys() == {task}
            again = datetime.fromisoformat(attempt.dag_run.tasks()[task]["start_date"])
            next_s = (again - killed).total_seconds()
            note(f"{_line('gpu worker killed', repeat, outcome, undisturbed)}; next attempt after {next_s:.0f} s")

    def test_redis_restarts(self, topology, undisturbed, repeat, note) -> None:
        """Kill -9, back on its own data 20 s later: in a task, between two tasks, and as the run begins."""
        with topology.run() as attempt:
            if repeat % 3 == 0:
                attempt.dag_run.wait_for(TASK_OF_STEPS_1_2, ("running",))
            elif repeat % 3 == 1:
                attempt.wait_for_object("steps/0002/removal_order.safetensors")
            _away(topology.redis, 20)
            outcome = _compare(attempt, undisturbed)
            assert outcome.attempts == {}, "sending a task waits for the broker, at no attempt's cost"
            note(_line("redis restarted", repeat, outcome, undisturbed))

    def test_s3_fails_for_half_a_minute(self, topology, undisturbed, repeat, note) -> None:
        """Answers 500 and silence in turn: in a step, as levels are written, and as the run begins."""
        with topology.run() as attempt:
            if repeat % 3 == 0:
                attempt.dag_run.wait_for(TASK_OF_STEPS_3_4, ("running",))
            elif repeat % 3 == 1:
                attempt.dag_run.wait_for("sp20.materialize", ("running",))
            failed_before = topology.s3_proxy.failed
            topology.s3_proxy.begin_outage()
            time.sleep(30)
            topology.s3_proxy.end_outage()
            outcome = _compare(attempt, undisturbed)
            failed = topology.s3_proxy.failed - failed_before
            assert failed > 0, "nobody asked S3 during its outage"
            note(f"{_line('S3 out of order', repeat, outcome, undisturbed)}; {failed} requests failed")

    def test_mlflow_goes_down_while_a_level_is_registered(self, topology, undisturbed, repeat, note) -> None:
        """Kill -9 for 45 s; or the server makes a version, or a run, and its answer is lost."""
        lost_before = topology.mlflow_proxy.lost_answers
        created = (None, "model-versions", "runs")[repeat % 3]
        with topology.run() as attempt:
            if created is None:
                attempt.dag_run.wait_for("sp20.register_model", ("queued", "running"))
                _away(topology.mlflow, 45)
            else:
                topology.mlflow_proxy.lose_answer_to(f"POST /api/2.0/mlflow/{created}/create".encode())
            outcome = _compare(attempt, undisturbed)
        assert topology.mlflow_proxy.lost_answers - lost_before == (created is not None)
        fault = "MLflow down" if created is None else f"answer to {created}/create lost"
        note(_line(fault, repeat, outcome, undisturbed))

    def test_the_scheduler_restarts(self, topology, undisturbed, repeat, note) -> None:
        """Kill -9 and a new one 5 s later: in a step, as levels are written, and as the run begins."""
        with topology.run() as attempt:
            if repeat % 3 == 0:
                attempt.dag_run.wait_for(TASK_OF_STEPS_1_2, ("running",))
            elif repeat % 3 == 1:
                attempt.dag_run.wait_for("sp20.materialize", ("queued", "running"))
            _away(topology.airflow.scheduler, 5)
            outcome = _compare(attempt, undisturbed)
            note(_line("scheduler killed", repeat, outcome, undisturbed))


def _away(daemon: Daemon, seconds: float) -> None:
    """Kill -9 a server; it is back after ``seconds``."""
    daemon.kill()
    time.sleep(seconds)
    daemon.start()


def _wait_until_it_computes(topology: Topology) -> None:
    """Return when the work of a step has run for some seconds: its libraries are loaded, and it is at it."""
    deadline = time.monotonic() + 120
    while not any(
        sum(process.cpu_times()[:2]) > 8 for process in processes_of(topology.mark, running="score_and_prune")
    ):
        assert time.monotonic() < deadline, "no process of a step was seen at work"
        time.sleep(0.2)


def _compare(attempt: Attempt, undisturbed: Outcome) -> Outcome:
    outcome = attempt.outcome()
    assert outcome.run_id == undisturbed.run_id
    assert outcome.digests == undisturbed.digests
    return outcome


def _line(fault: str, repeat: int, outcome: Outcome, undisturbed: Outcome) -> str:
    repeated = ", ".join(f"{task} {number}" for task, number in outcome.attempts.items()) or "none"
    longer = outcome.seconds - undisturbed.seconds
    return f"{fault} ({repeat + 1}): {outcome.seconds:.0f} s ({longer:+.0f} s), attempts beyond the first: {repeated}"
